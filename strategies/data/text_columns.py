"""Finds the columns of one or two texts and of their labels, by the user's choice or by their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.data.label_scan import check_texts
from ftlaunch.strategies.data.local_files import list_names
from ftlaunch.strategies.data.several_labels import check_label_columns
from ftlaunch.strategies.options import DataOptions

if TYPE_CHECKING:
    from datasets import Dataset

# The first entry whose columns all exist wins.
_TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("question", "context"),
    ("text_a", "text_b"),
    ("query", "passage"),
    ("title", "content"),
    ("title", "text"),
    ("title", "body"),
    ("text",),
    ("sentence",),
    ("review",),
    ("content",),
    ("document",),
    ("tweet",),
    ("comment",),
)
_LABEL_COLUMNS = (
    "label",
    "labels",
    "target",
    "class",
    "category",
    "stars",
    "score",
    "sentiment",
)


def find_columns(rows: Dataset, options: DataOptions) -> tuple[tuple[str, ...], str, list[str]]:
    """(text columns, label column, a note if either was guessed). UserError where none is found.

    The label column is "" where data.label_columns names several.
    """
    label_column = _find_label_column(rows, options)
    text_columns = _find_text_columns(rows, options, label_column)
    if options.text_columns is not None and (options.label_column or options.label_columns):
        return text_columns, label_column, []
    texts = " + ".join(f"'{column}'" for column in text_columns)
    shown = f"label = '{label_column}'" if label_column else "labels as told"
    return (
        text_columns,
        label_column,
        [
            f"columns: text = {texts}, {shown} "
            "(guessed; set data.text_columns and data.label_column to choose)"
        ],
    )


def check_columns(
    rows: Dataset, text_columns: tuple[str, ...], label_column: str, part: str
) -> None:
    """UserError unless a part of the data has the columns, and every row its texts."""
    _require(rows, (*text_columns, label_column) if label_column else text_columns, part)
    for column in text_columns:
        check_texts(rows, column, part)


def _find_label_column(rows: Dataset, options: DataOptions) -> str:
    if options.label_columns is not None:
        check_label_columns(rows, options, "training")
        return ""
    if options.label_column is not None:
        _require(rows, (options.label_column,), "training", "data.label_column")
        return options.label_column
    for name in _LABEL_COLUMNS:
        if name in rows.column_names and name not in (options.text_columns or ()):
            return name
    raise UserError(
        f"No label column was recognised among the columns {list_names(rows.column_names)}: "
        f"it must be named {', '.join(_LABEL_COLUMNS)}, or be chosen. Set data.label_column."
    )


def _find_text_columns(rows: Dataset, options: DataOptions, label_column: str) -> tuple[str, ...]:
    if options.text_columns is not None:
        wanted = options.text_columns
        if not 1 <= len(wanted) <= 2 or label_column in wanted:
            raise UserError(
                f"The text columns {list_names(wanted)} do not fit the label column "
                f"{label_column!r}: one or two columns other than the label are needed. "
                "Set data.text_columns."
            )
        _require(rows, wanted, "training", "data.text_columns")
        return wanted
    existing = set(rows.column_names) - {label_column, *(options.label_columns or ())}
    for candidate in _TEXT_COLUMNS:
        if existing.issuperset(candidate):
            return candidate
    strings = [name for name in rows.column_names if name in existing and _is_string(rows, name)]
    if len(strings) == 1:
        return (strings[0],)
    raise UserError(
        f"No text column was recognised among the columns {list_names(rows.column_names)}: it "
        "must have a customary name such as 'text' or be the only one of strings (found "
        f"{len(strings)}). Set data.text_columns, for example data.text_columns=[title,body]."
    )


def _is_string(rows: Dataset, column: str) -> bool:
    return getattr(rows.features[column], "dtype", None) in {"string", "large_string"}


def _require(
    rows: Dataset, columns: Sequence[str], part: str, key: str = "data.text_columns"
) -> None:
    for column in columns:
        if column not in rows.column_names:
            raise UserError(
                f"There is no column {column!r} in the {part} data: it has the columns "
                f"{list_names(rows.column_names)}. Set {key} to columns that exist in the training "
                "and the evaluation data."
            )
