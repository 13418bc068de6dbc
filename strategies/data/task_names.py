"""Which tasks there are, and which keys of the data section are theirs. Loads none of them, nor numpy."""

from __future__ import annotations

import difflib
from dataclasses import fields

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.options import DataOptions

TASKS: dict[str, str] = {
    "text-classification": "ftlaunch.strategies.data.text_classification:TextClassification",
    "causal-lm": "ftlaunch.strategies.data.causal_lm:CausalLm",
    "masked-lm": "ftlaunch.strategies.data.masked_lm:MaskedLm",
    "token-classification": "ftlaunch.strategies.data.token_classification:TokenClassification",
}
# Keys of the data section that mean something to some tasks only.
OWN_KEYS: dict[str, tuple[str, ...]] = {
    "label_columns": ("text-classification",),
    "packing": ("causal-lm",),
    "long_samples": ("causal-lm", "masked-lm", "token-classification"),
    "mlm_probability": ("masked-lm",),
    "whole_word_masking": ("masked-lm",),
}


def check_task(name: str) -> None:
    """UserError for a name that is not in `TASKS`."""
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.4)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"There is no task {name!r}: known are {', '.join(TASKS)}. "
            f"Set task to one of them.{hint}"
        )


def check_own_keys(name: str, options: DataOptions) -> None:
    """UserError for a key that is set and means nothing to the task."""
    for key, tasks in OWN_KEYS.items():
        default = next(each.default for each in fields(DataOptions) if each.name == key)
        if name not in tasks and getattr(options, key) != default:
            raise UserError(
                f"data.{key} is set, and means nothing to the task {name}: it is for "
                f"{', '.join(tasks)}. Leave it out."
            )
