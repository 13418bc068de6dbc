"""Looks through text and label columns, in Arrow batches, for what a task must know or refuse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ftlaunch.cluster.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

Kind = Literal["int", "str", "bool", "float"]

_BATCH_ROWS = 10_000
_FEW_VALUES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """The labels of one part of the data.

    kind               "float" is a regression, the others are classes
    values             the distinct values of classes; empty for "float"
    class_names        the names of a ClassLabel in the order of its ids
    few_whole_numbers  the distinct values of "float" when all are whole and they are few, else ()
    """

    kind: Kind
    values: frozenset[Any]
    class_names: tuple[str, ...] | None = None
    few_whole_numbers: tuple[float, ...] = ()

    def describe(self) -> str:
        if self.class_names is not None:
            return f"the {len(self.class_names)} named classes {', '.join(self.class_names[:10])}"
        names = {"int": "whole", "float": "floating-point"}
        return f"{names[self.kind]} numbers" if self.kind in names else f"{self.kind} values"


def check_texts(rows: Dataset, column: str, part: str) -> None:
    """UserError unless every row has a string, be it an empty one."""
    feature = rows.features[column]
    dtype = getattr(feature, "dtype", None)
    # A column without any value has the type null.
    if dtype not in {"string", "large_string", "null"}:
        raise UserError(
            f"The text column {column!r} of the {part} data is not text: its type is "
            f"{type_name(feature)}, and it must be string. Convert it, or choose another column "
            "with data.text_columns."
        )
    refuse_nulls(rows, column, part, "text", "An empty text is allowed, a missing one is not")
    refuse_bad_utf8(rows, column, part)


def scan_labels(rows: Dataset, column: str, part: str, whole: Dataset | None = None) -> Labels:
    """Kind and distinct values of a label column. UserError for what cannot be a label.

    whole  what `rows` were drawn from: its values count too, whether complete or not
    """
    feature = rows.features[column]
    kind = kind_of(feature)
    dtype = getattr(feature, "dtype", None)
    if kind is None and dtype != "null":
        raise UserError(
            f"The label column {column!r} of the {part} data has the type {type_name(feature)}: a "
            "label must be one string, whole number, truth value or floating-point number of a "
            "single kind. Convert it, or choose another with data.label_column."
        )
    refuse_nulls(rows, column, part, "label", "Every row needs a label")
    assert kind is not None
    if kind == "float":
        return _scan_floats(rows, column, part)
    if kind == "str":
        refuse_bad_utf8(rows, column, part)
    names = getattr(feature, "names", None)
    values = frozenset(_distinct(rows, column))
    if names is not None:
        _check_ids(rows, column, part, values, len(names))
    if whole is not None:
        refuse_bad_utf8(whole, column, part)
        values |= _distinct(whole, column) - {None}
    return Labels(kind=kind, values=values, class_names=tuple(names) if names else None)


def kind_of(feature: object) -> Kind | None:
    """What values of a column's type are; None for what is no single value of these kinds."""
    # Sequences have no dtype of their own or one that starts with "list".
    dtype = str(getattr(feature, "dtype", ""))
    if dtype in {"string", "large_string"}:
        return "str"
    if dtype == "bool":
        return "bool"
    if dtype.startswith(("int", "uint")):
        return "int"
    return "float" if dtype in {"float16", "float32", "float64"} else None


def type_name(feature: object) -> str:
    """How a column's type is called in a message."""
    name = type(feature).__name__
    if name == "Json":
        return "mixed (values of several types)"
    return str(getattr(feature, "dtype", name)) if name == "Value" else name.lower()


def batches(rows: Dataset, column: str) -> Iterator[tuple[int, Any]]:
    """(number of the first row, pyarrow.ChunkedArray)."""
    arrow = rows.select_columns([column]).with_format("arrow")
    for start, table in enumerate(arrow.iter(batch_size=_BATCH_ROWS)):
        yield start * _BATCH_ROWS, table.column(0)


def refuse_nulls(rows: Dataset, column: str, part: str, what: str, rule: str) -> None:
    """UserError unless every row has a value."""
    count, first = 0, -1
    for start, values in batches(rows, column):
        if values.null_count:
            if count == 0:
                first = start + values.is_null().to_pylist().index(True)
            count += values.null_count
    if count:
        raise UserError(
            f"The {what} column {column!r} of the {part} data is missing in {count} of {len(rows)} "
            f"rows, the first is {row_name(rows, first)}. {rule}. Fill or remove these rows, "
            f"or choose another column with data.{what}_column{'s' if what == 'text' else ''}."
        )


def refuse_bad_utf8(rows: Dataset, column: str, part: str) -> None:
    """UserError unless all strings are UTF-8, those in lists too.

    Arrow's readers take strings as they come, and fail when one is first looked at.
    """
    import pyarrow

    for start, values in batches(rows, column):
        try:
            values.validate(full=True)
        except pyarrow.ArrowInvalid:
            bad = next((i for i, value in enumerate(values) if not _is_utf8(value)), 0)
            raise UserError(
                f"The column {column!r} of the {part} data is not UTF-8 in "
                f"{row_name(rows, start + bad)}: all text must be. Convert the file to UTF-8."
            ) from None


def _is_utf8(value: Any) -> bool:
    try:
        value.as_py()
    except UnicodeDecodeError:
        return False
    return True


def row_name(rows: Dataset, index: int) -> str:
    """The number of a row, counted from 1, in the data from which a subset may have been drawn."""
    drawn = getattr(rows, "_indices", None)
    number = index if drawn is None else drawn.column(0)[index].as_py()
    return f"row {number + 1}"


def _distinct(rows: Dataset, column: str) -> set[Any]:
    found: set[Any] = set()
    for _, values in batches(rows, column):
        found.update(values.unique().to_pylist())
    return found


def _check_ids(
    rows: Dataset, column: str, part: str, values: frozenset[int], num_names: int
) -> None:
    """-1 is how data sets without public labels mark a missing one."""
    wrong = sorted(value for value in values if not 0 <= value < num_names)
    if not wrong:
        return
    first = next(
        start + index
        for start, batch in batches(rows, column)
        for index, value in enumerate(batch.to_pylist())
        if value in wrong
    )
    raise UserError(
        f"The label column {column!r} of the {part} data holds the class numbers {wrong[:10]}, "
        f"first in {row_name(rows, first)}: they must be 0 to {num_names - 1}; -1 stands "
        "for a missing label. Remove these rows, or choose another split with data.eval_split."
    )


def _scan_floats(rows: Dataset, column: str, part: str) -> Labels:
    import numpy as np

    found: set[float] = set()
    whole = True
    for start, batch in batches(rows, column):
        values = batch.to_numpy().astype(np.float64)
        if not np.isfinite(values).all():
            bad = int(np.flatnonzero(~np.isfinite(values))[0])
            raise UserError(
                f"The label column {column!r} of the {part} data holds {values[bad]} in "
                f"{row_name(rows, start + bad)}: the target of a regression must be a finite "
                "number. Correct or remove these rows."
            )
        whole = whole and bool((values == np.floor(values)).all())
        if whole and len(found) <= _FEW_VALUES:
            found.update(np.unique(values).tolist())
    few = tuple(sorted(found)) if whole and len(found) <= _FEW_VALUES else ()
    return Labels(kind="float", values=frozenset(), few_whole_numbers=few)
