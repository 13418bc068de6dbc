"""Finds the columns of tagged texts: words with a tag each, or a text with spans of characters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.data.label_lists import (
    check_same_length,
    check_unseen,
    check_words,
    element_of,
    scan_lists,
)
from ftlaunch.strategies.data.label_scan import Labels, check_texts
from ftlaunch.strategies.data.local_files import list_names
from ftlaunch.strategies.options import DataOptions

if TYPE_CHECKING:
    from datasets import Dataset

# The first that exists and holds what is looked for wins.
_WORDS = ("tokens", "words")
_TAGS = ("ner_tags", "tags", "labels", "pos_tags", "chunk_tags", "label")
_TEXTS = ("text", "sentence", "content", "document")
_SPANS = ("spans", "entities", "labels", "label")
_SPAN_KEYS = ("start", "end", "label")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tagged:
    """Which columns hold what, and the tags in the order of their ids.

    tags          of words: as they stand; of spans: "O", then B- and I- of every label
    label_names   of a ClassLabel in the order of its ids, () for labels that stand for themselves
    """

    kind: Literal["words", "spans"]
    text_column: str
    label_column: str
    tags: tuple[str, ...]
    label_names: tuple[str, ...]
    notes: tuple[str, ...]


def find_tagged(
    parts: Mapping[str, Dataset], options: DataOptions, whole_train: Dataset | None
) -> Tagged:
    """Look through all parts of the data ("training" comes first). UserError for what does not fit."""
    first_part, rows = next(iter(parts.items()))
    label_column = _label_column(rows, options, first_part)
    kind: Literal["words", "spans"] = (
        "spans" if isinstance(element_of(rows, label_column), dict) else "words"
    )
    text_column = _text_column(rows, options, kind, first_part)
    found: dict[str, Labels] = {}
    for part, each in parts.items():
        whole = whole_train if part == "training" else None
        found[part] = _check(each, kind, text_column, label_column, part, whole)
        check_unseen(label_column, found[first_part], found[part], part)
    labels = found[first_part]
    names = labels.class_names or tuple(str(value) for value in sorted(labels.values))
    if kind == "spans":
        tags = ("O", *(f"{mark}-{name}" for name in names for mark in "BI"))
    else:
        tags = names
    guessed = options.text_columns is None or options.label_column is None
    note = (
        f"columns: {'words' if kind == 'words' else 'text'} = '{text_column}', "
        f"{'tags' if kind == 'words' else 'spans'} = '{label_column}' "
        "(guessed; set data.text_columns and data.label_column to choose)"
    )
    return Tagged(
        kind=kind,
        text_column=text_column,
        label_column=label_column,
        tags=tags,
        label_names=labels.class_names or (),
        notes=(note,) if guessed else (),
    )


def _label_column(rows: Dataset, options: DataOptions, part: str) -> str:
    wanted = options.label_column
    if wanted is not None:
        _require(rows, wanted, part, "data.label_column")
        if element_of(rows, wanted) is None:
            raise UserError(
                f"The label column {wanted!r} of the {part} data does not hold lists: each row needs a "
                "list with one tag for each word, or a list of spans. Convert it, or choose another "
                "with data.label_column."
            )
        return wanted
    taken = options.text_columns or ()
    for names, is_span in ((_TAGS, False), (_SPANS, True)):
        for name in names:
            if name in rows.column_names and name not in taken:
                element = element_of(rows, name)
                if element is not None and isinstance(element, dict) is is_span:
                    return name
    raise UserError(
        f"No column of tags was recognised among the columns {list_names(rows.column_names)}: there "
        f"must be lists of tags named {', '.join(_TAGS)}, or lists of spans (records with start, end "
        f"and label) named {', '.join(_SPANS)}. Set data.label_column."
    )


def _text_column(rows: Dataset, options: DataOptions, kind: str, part: str) -> str:
    if options.text_columns is not None:
        if len(options.text_columns) != 1:
            raise UserError(
                f"data.text_columns is {list_names(options.text_columns)}: token-classification takes "
                "one column, of words or of texts."
            )
        _require(rows, options.text_columns[0], part, "data.text_columns")
        return options.text_columns[0]
    for name in _WORDS if kind == "words" else _TEXTS:
        if name in rows.column_names:
            return name
    what = "lists of words" if kind == "words" else "texts"
    raise UserError(
        f"No column of {what} was recognised among the columns {list_names(rows.column_names)}: it must "
        f"be named {', '.join(_WORDS if kind == 'words' else _TEXTS)}. Set data.text_columns."
    )


def _require(rows: Dataset, column: str, part: str, key: str) -> None:
    if column not in rows.column_names:
        raise UserError(
            f"There is no column {column!r} in the {part} data: it has the columns "
            f"{list_names(rows.column_names)}. Set {key} to a column that exists in the training and "
            "the evaluation data."
        )


def _check(
    rows: Dataset, kind: str, text: str, label: str, part: str, whole: Dataset | None
) -> Labels:
    _require(rows, text, part, "data.text_columns")
    _require(rows, label, part, "data.label_column")
    if kind == "words":
        check_words(rows, text, part)
        labels = scan_lists(rows, label, part, whole)
        check_same_length(rows, text, label, part)
        return labels
    check_texts(rows, text, part)
    _check_span_keys(element_of(rows, label), label, part)
    return scan_lists(rows, label, part, whole, field="label")


def _check_span_keys(element: Any, column: str, part: str) -> None:
    keys = sorted(element) if isinstance(element, dict) else []
    whole = [
        key
        for key in ("start", "end")
        if str(getattr(element.get(key) if keys else None, "dtype", "")).startswith(("int", "uint"))
    ]
    if not set(_SPAN_KEYS) <= set(keys) or len(whole) < 2:
        raise UserError(
            f"The spans in {column!r} of the {part} data have the keys {list_names(keys)}: each needs "
            "start and end, whole numbers of characters, and label. Convert them."
        )
