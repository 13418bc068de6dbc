"""Looks through columns of lists, in Arrow batches: tags of words, spans, or the labels of a text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.data.label_scan import (
    Labels,
    batches,
    kind_of,
    refuse_bad_utf8,
    refuse_nulls,
    row_name,
    type_name,
)
from ftlaunch.strategies.data.local_files import list_names

if TYPE_CHECKING:
    from datasets import Dataset


def element_of(rows: Dataset, column: str) -> Any | None:
    """The type of what a column's lists hold; None for a column of something else."""
    feature = rows.features[column]
    if isinstance(feature, list):
        return feature[0] if len(feature) == 1 else None
    inner = getattr(feature, "feature", None)
    # A Sequence of records holds a record of lists.
    return None if type(feature).__name__ == "Sequence" and isinstance(inner, dict) else inner


def check_words(rows: Dataset, column: str, part: str) -> None:
    """UserError unless every row has a list of strings, be it an empty one."""
    element = element_of(rows, column)
    if getattr(element, "dtype", None) not in {"string", "large_string", "null"}:
        found = type_name(rows.features[column]) if element is None else type_name(element)
        raise UserError(
            f"The column {column!r} of the {part} data does not hold lists of words: it has "
            f"{'lists of ' if element is not None else ''}{found}. Each row must have a list of "
            "strings. Convert it, or choose another column with data.text_columns."
        )
    refuse_nulls(rows, column, part, "text", "An empty list is allowed, a missing one is not")
    _refuse_inner_nulls(rows, column, part, None)
    refuse_bad_utf8(rows, column, part)


def scan_lists(
    rows: Dataset, column: str, part: str, whole: Dataset | None = None, *, field: str | None = None
) -> Labels:
    """Kind and distinct values of what the lists of a column hold. UserError for what is no label.

    whole   what `rows` were drawn from: its values count too
    field   of the records that the lists hold; None where they hold the labels themselves
    """
    element = element_of(rows, column)
    if field is not None:
        element = element.get(field) if isinstance(element, dict) else None
    kind = kind_of(element)
    if kind not in ("int", "str"):
        found = "nothing" if getattr(element, "dtype", None) == "null" else type_name(element)
        where = f"lists of {found}" if field is None else f"{field!r} of {found}"
        raise UserError(
            f"The label column {column!r} of the {part} data has {where}: each label must be a string "
            "or a whole number, all of one kind. Convert it, or choose another with data.label_column."
        )
    refuse_nulls(rows, column, part, "label", "A row without any label needs an empty list")
    _refuse_inner_nulls(rows, column, part, field)
    refuse_bad_utf8(rows, column, part)
    values = frozenset(_distinct(rows, column, field))
    names = getattr(element, "names", None)
    if names is not None and (wrong := sorted(v for v in values if not 0 <= v < len(names))):
        first = _first_row(rows, column, field, wrong)
        raise UserError(
            f"The label column {column!r} of the {part} data holds the class numbers {wrong[:10]}, "
            f"first in {first}: they must be 0 to {len(names) - 1}. Correct or remove these rows."
        )
    if whole is not None and whole is not rows:
        refuse_bad_utf8(whole, column, part)
        values |= _distinct(whole, column, field) - {None}
    return Labels(kind=kind, values=values, class_names=tuple(names) if names else None)


def check_same_length(rows: Dataset, words: str, tags: str, part: str) -> None:
    """UserError unless every row has as many tags as words."""
    import pyarrow.compute as compute

    pairs = zip(batches(rows, words), batches(rows, tags), strict=True)
    for (start, left), (_, right) in pairs:
        counts = [compute.list_value_length(each).to_pylist() for each in (left, right)]
        for index, (num_words, num_tags) in enumerate(zip(*counts, strict=True)):
            if num_words != num_tags:
                row = row_name(rows, start + index)
                raise UserError(
                    f"{row[0].upper()}{row[1:]} of the {part} data has {num_words} words in {words!r} "
                    f"and {num_tags} tags in {tags!r}: each word needs one tag. Correct that row."
                )


def check_unseen(column: str, train: Labels, other: Labels, part: str) -> None:
    """UserError for kinds and labels of another part of the data that the training data lacks."""
    if other.kind != train.kind or other.class_names != train.class_names:
        raise UserError(
            f"The label column {column!r} holds {train.describe()} in the training data but "
            f"{other.describe()} in the {part} data: both must be of one kind. Convert one of them."
        )
    unseen = sorted(other.values - train.values) if train.class_names is None else []
    if unseen:
        raise UserError(
            f"The {part} data holds labels that the training data lacks: {list_names(unseen)} in "
            f"{column!r}, while the training data has {list_names(sorted(train.values))}. Every "
            "label must occur in training. Correct the labels or add training rows."
        )


def _refuse_inner_nulls(rows: Dataset, column: str, part: str, field: str | None) -> None:
    for start, lists in batches(rows, column):
        for index, row in _with_nulls(lists, field):
            raise UserError(
                f"The column {column!r} of the {part} data has a list with a missing value in "
                f"{row_name(rows, start + index)}: {str(row)[:100]}. Every entry needs a value. "
                "Fill it or remove the row."
            )


def _with_nulls(lists: Any, field: str | None) -> Iterator[tuple[int, Any]]:
    if _values(lists, field).null_count == 0:
        return
    for index, row in enumerate(lists.to_pylist()):
        inner = row if field is None else [entry and entry.get(field) for entry in row]
        if None in inner:
            yield index, row


def _values(lists: Any, field: str | None) -> Any:
    """All that the lists hold, one after the other."""
    import pyarrow.compute as compute

    flat = compute.list_flatten(lists)
    return flat if field is None else compute.struct_field(flat, field)


def _distinct(rows: Dataset, column: str, field: str | None) -> set[Any]:
    found: set[Any] = set()
    for _, lists in batches(rows, column):
        found.update(_values(lists, field).unique().to_pylist())
    return found


def _first_row(rows: Dataset, column: str, field: str | None, wrong: list[int]) -> str:
    for start, lists in batches(rows, column):
        for index, row in enumerate(lists.to_pylist()):
            if any((each if field is None else each[field]) in wrong for each in row):
                return row_name(rows, start + index)
    raise AssertionError("the value was seen before")
