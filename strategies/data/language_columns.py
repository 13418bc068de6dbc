"""Finds the columns of a language model's data: a text, a prompt with its completion, or messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.data.label_scan import check_texts, refuse_bad_utf8
from ftlaunch.strategies.data.local_files import list_names
from ftlaunch.strategies.options import DataOptions

if TYPE_CHECKING:
    from datasets import Dataset

Kind = Literal["text", "completion", "messages"]

# The first that exists wins, conversations before pairs before texts.
_MESSAGES = ("messages", "conversation", "conversations")
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "response"),
    ("instruction", "output"),
    ("question", "answer"),
)
_TEXTS = ("text", "content", "document", "code")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Which columns hold what; label_column is that of the completions, "" without any."""

    kind: Kind
    text_columns: tuple[str, ...]
    label_column: str
    notes: tuple[str, ...]

    def describe(self) -> str:
        names = {"completion": "prompts with completions", "messages": "conversations"}
        return names.get(self.kind, "texts")


def find_columns(
    parts: Mapping[str, Dataset], options: DataOptions, *, kinds: Sequence[Kind] = ()
) -> Found:
    """The columns of all parts of the data ("training", …). UserError where they do not fit.

    kinds   that the task takes; () for all
    """
    rows = next(iter(parts.values()))
    kind, columns = _choose(rows, options)
    if kinds and kind not in kinds:
        if options.text_columns is not None:
            raise UserError(
                f"The columns {list_names(columns)} do not hold plain texts. Set data.text_columns to "
                "one column of texts, and leave data.label_column out."
            )
        kind, columns = _choose_text(rows)
    for part, each in parts.items():
        for column in columns:
            if column not in each.column_names:
                raise UserError(
                    f"There is no column {column!r} in the {part} data: it has the columns "
                    f"{list_names(each.column_names)}. Set data.text_columns and data.label_column to "
                    "columns that exist in the training and the evaluation data."
                )
            if kind == "messages":
                _check_messages(each, column, part)
            else:
                check_texts(each, column, part)
    guessed = options.text_columns is None
    return Found(
        kind=kind,
        text_columns=columns[:1],
        label_column=columns[1] if kind == "completion" else "",
        notes=(_note(kind, columns),) if guessed else (),
    )


def _choose(rows: Dataset, options: DataOptions) -> tuple[Kind, tuple[str, ...]]:
    if options.text_columns is None and options.label_column is None:
        return _guess(rows)
    if options.text_columns is None or len(options.text_columns) != 1:
        raise UserError(
            f"data.text_columns is {list_names(options.text_columns or ())}: a language model takes one "
            "column of texts, prompts or messages; completions are named by data.label_column."
        )
    column = options.text_columns[0]
    if options.label_column is not None:
        if options.label_column == column:
            raise UserError(
                f"data.text_columns and data.label_column are both {column!r}: prompt and completion "
                "must be two columns. Leave data.label_column out for plain texts."
            )
        return "completion", (column, options.label_column)
    holds_messages = column in rows.column_names and _is_list(rows, column)
    return ("messages" if holds_messages else "text"), (column,)


def _guess(rows: Dataset) -> tuple[Kind, tuple[str, ...]]:
    names = rows.column_names
    for name in _MESSAGES:
        if name in names and _is_list(rows, name):
            return "messages", (name,)
    for pair in _PAIRS:
        if all(name in names and _is_string(rows, name) for name in pair):
            return "completion", pair
    return _choose_text(rows)


def _choose_text(rows: Dataset) -> tuple[Kind, tuple[str, ...]]:
    strings = [name for name in rows.column_names if _is_string(rows, name)]
    for name in (*_TEXTS, *(strings if len(strings) == 1 else ())):
        if name in strings:
            return "text", (name,)
    raise UserError(
        f"No column of texts was recognised among {list_names(rows.column_names)}: there must be "
        "messages, prompt and completion, text, or a single column of strings. Set data.text_columns "
        "to the column of texts, prompts or messages (and data.label_column to that of completions)."
    )


def _note(kind: Kind, columns: tuple[str, ...]) -> str:
    what = {
        "messages": "messages = '{}'",
        "completion": "prompt = '{}', completion = '{}'",
        "text": "text = '{}'",
    }[kind].format(*columns)
    return f"columns: {what} (guessed; set data.text_columns and data.label_column to choose)"


def _is_string(rows: Dataset, column: str) -> bool:
    return getattr(rows.features[column], "dtype", None) in {"string", "large_string"}


def _is_list(rows: Dataset, column: str) -> bool:
    return not hasattr(rows.features[column], "names") and not _is_value(rows.features[column])


def _is_value(feature: Any) -> bool:
    return type(feature).__name__ == "Value"


def _check_messages(rows: Dataset, column: str, part: str) -> None:
    """UserError unless messages have a role and a content. What these are is seen row by row."""
    refuse_bad_utf8(rows, column, part)
    feature = rows.features[column]
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    # Messages whose keys differ from row to row are of a type of their own, seen row by row too.
    if "Json" in (type(feature).__name__, type(inner).__name__):
        return
    keys = sorted(inner) if isinstance(inner, dict) else []
    if not {"role", "content"} <= set(keys):
        what = f"have the keys {list_names(keys)}" if keys else "are not lists of messages"
        raise UserError(
            f"The messages in {column!r} of the {part} data {what}: each message needs role and "
            "content. Rename the keys, or choose another column with data.text_columns."
        )
