"""Single settings of a config.json, checked: sizes, flags and probabilities. Knows no family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ftlaunch.cluster.errors import UserError

# Far above any model. Numbers beyond make lists and products that nobody could wait for.
MAX_SIZE = 1 << 31
MAX_LAYERS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The content of a config.json. A key that is missing or null has the family's default."""

    values: Mapping[str, Any]

    def size(self, *names: str, default: int | None = None, most: int = MAX_SIZE) -> int:
        """The first of `names` that is there: a whole number above 0. UserError otherwise."""
        return self._whole(names, default, 1, most)

    def count(self, *names: str, default: int | None = None, most: int = MAX_SIZE) -> int:
        """The same, 0 included."""
        return self._whole(names, default, 0, most)

    def layers(self, *names: str, default: int | None = None) -> int:
        return self._whole(names, default, 1, MAX_LAYERS)

    def has(self, *names: str) -> bool:
        return any(self.values.get(name) is not None for name in names)

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise _wrong(name, value, "must be true or false")
        return value

    def is_above_zero(self, *names: str, default: float = 0.0) -> bool:
        """Whether any of these probabilities is above 0; UserError when one is no probability."""
        found = False
        for name in names:
            value = self.values.get(name)
            if value is None:
                value = default
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise _wrong(name, value, "must be a number from 0 to 1")
            if not 0 <= value <= 1:  # neither is what is not a number
                raise _wrong(name, value, "must be a number from 0 to 1")
            found = found or value > 0
        return found

    def text(self, name: str, default: str) -> str:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise _wrong(name, value, "must be a text")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts, or one text with bars between them."""
        value = self.values.get(name)
        if value is None:
            return ()
        if isinstance(value, str):
            return tuple(value.split("|"))
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise _wrong(name, value, "must be a list of texts")
        return tuple(value)

    def _whole(self, names: tuple[str, ...], default: int | None, least: int, most: int) -> int:
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise _wrong(name, value, "must be a whole number")
            if not least <= value <= most:
                raise _wrong(name, value, f"must be from {least:,} to {most:,}")
            return value
        if default is None:
            raise UserError(
                f"config.json has none of {', '.join(names)}, so the model's size cannot be told. Pass the "
                "config.json of the model's own folder."
            )
        return default


def _wrong(name: str, value: object, rule: str) -> UserError:
    try:
        shown = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, a list in a list in …
        shown = f"a {type(value).__name__} that is too long to show"
    shown = shown if len(shown) <= 60 else f"{shown[:57]}…"
    return UserError(f"config.json: {name} is {shown}: it {rule}. Correct it.")


def head_size(hidden_size: int, num_heads: int) -> int:
    """UserError where the width cannot be divided among the heads."""
    if hidden_size % num_heads:
        raise UserError(
            f"config.json: a hidden size of {hidden_size} cannot be divided among {num_heads} attention "
            "heads. Correct one of them."
        )
    return hidden_size // num_heads
