"""Texts with any number of labels each: a list of them, or a column of 0 and 1 for each label.

Knows label columns and the formulas that follow; what the texts are is `text_classification`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.data.label_lists import check_unseen, element_of, scan_lists
from ftlaunch.strategies.data.label_scan import scan_labels
from ftlaunch.strategies.data.local_files import list_names
from ftlaunch.strategies.data.tasks import BadRow, ModelLabels, TaskSpec
from ftlaunch.strategies.options import DataOptions

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, slots=True, kw_only=True)
class SeveralLabels:
    """names           in the order of their ids
    labels_are_ids  the lists hold the ids themselves
    columns         of 0 and 1, one for each name; () where there are lists
    """

    names: tuple[str, ...]
    labels_are_ids: bool
    columns: tuple[str, ...]

    def spec(self, text_columns: tuple[str, ...], label_column: str, notes: list[str]) -> TaskSpec:
        return TaskSpec(
            task="text-classification",
            text_columns=text_columns,
            label_column=label_column,
            problem="several-labels",
            label_names=self.names,
            num_outputs=len(self.names),
            loss="binary_cross_entropy",
            labels_are_ids=self.labels_are_ids,
            details={"label_columns": list(self.columns)} if self.columns else {},
            notes=tuple(notes),
        )


def has_several(rows: Dataset, label_column: str, options: DataOptions) -> bool:
    """Whether a row may have several labels: by the user's columns, or by the column's type."""
    return options.label_columns is not None or element_of(rows, label_column) is not None


def check_label_columns(rows: Dataset, options: DataOptions, part: str) -> None:
    """UserError unless data.label_columns names two or more columns of 0 and 1."""
    columns = options.label_columns or ()
    if options.label_column is not None:
        raise UserError(
            f"data.label_column is {options.label_column!r} and data.label_columns is "
            f"{list_names(columns)}: labels are in one column of lists or in several of 0 and 1. Leave "
            "one of them out."
        )
    twice = len(set(columns)) < len(columns) or set(columns) & set(options.text_columns or ())
    if len(columns) < 2 or twice:
        raise UserError(
            f"data.label_columns is {list_names(columns)}: it needs two or more different columns, none "
            "of them a text. A single column of labels is data.label_column."
        )
    for column in columns:
        if column not in rows.column_names:
            raise UserError(
                f"There is no column {column!r} in the {part} data: it has the columns "
                f"{list_names(rows.column_names)}. Set data.label_columns to columns that exist in the "
                "training and the evaluation data."
            )


def scan_several(
    parts: Mapping[str, Dataset],
    label_column: str,
    options: DataOptions,
    whole_train: Dataset | None,
) -> SeveralLabels:
    """Look through the labels of all parts of the data ("training", …). UserError."""
    if options.label_columns is not None:
        for part, rows in parts.items():
            check_label_columns(rows, options, part)
            for column in options.label_columns:
                _check_zeros_and_ones(rows, column, part)
        columns = tuple(options.label_columns)
        return SeveralLabels(names=columns, labels_are_ids=False, columns=columns)
    found = {
        part: scan_lists(rows, label_column, part, whole_train if part == "training" else None)
        for part, rows in parts.items()
    }
    first = next(iter(found.values()))
    for part, other in found.items():
        check_unseen(label_column, first, other, part)
    names = first.class_names or tuple(str(value) for value in sorted(first.values))
    return SeveralLabels(names=names, labels_are_ids=first.class_names is not None, columns=())


def check_enough(found: SeveralLabels, label_column: str) -> None:
    """UserError for fewer than two labels in training."""
    if len(found.names) < 2:
        raise UserError(
            f"All labels in {label_column!r} are {list_names(found.names)}: there must be at least two "
            "different ones. Add rows with others, or choose another data.label_column."
        )


def for_model(found: SeveralLabels, label_column: str, labels: ModelLabels) -> SeveralLabels:
    """The same with the model's labels. UserError where the data's are not among them."""
    names = labels.label_names
    same = found.names == names if found.labels_are_ids else set(found.names) <= set(names)
    if (
        labels.problem != "several-labels"
        or not same
        or (found.columns and len(found.names) < len(names))
    ):
        where = repr(label_column) if label_column else "data.label_columns"
        kind = (
            "any number of labels" if labels.problem == "several-labels" else "one label or number"
        )
        raise UserError(
            f"The labels in {where} are not the model's: the data has any number of "
            f"{list_names(found.names)} a text, the model gives {kind} of {list_names(names)}. Evaluate "
            "with data that is labelled alike, or set data.label_column."
        )
    return SeveralLabels(
        names=names,
        labels_are_ids=found.labels_are_ids,
        columns=names if found.columns else (),
    )


def encode_several(rows: Mapping[str, Any], spec: TaskSpec) -> NDArray[np.float32]:
    """(rows, outputs), 1 where a row has the label. BadRow for one that has it twice."""
    if columns := spec.details.get("label_columns"):
        return np.stack([np.asarray(rows[column], dtype=np.float32) for column in columns], axis=1)
    ids = {name: i for i, name in enumerate(spec.label_names)}
    lists = rows[spec.label_column]
    result = np.zeros((len(lists), spec.num_outputs), dtype=np.float32)
    for index, labels in enumerate(lists):
        chosen = list(labels) if spec.labels_are_ids else [ids[str(label)] for label in labels]
        if len(set(chosen)) < len(chosen):
            raise BadRow(
                index,
                f"has a label twice in {spec.label_column!r}, {str(labels)[:100]}: each may be there "
                "once. If these are 0 and 1 for each label, give each a column of its own and name "
                "them with data.label_columns.",
            )
        result[index, chosen] = 1
    return result


def binary_losses(logits: NDArray[np.float64], labels: NDArray[Any]) -> NDArray[np.float64]:
    """−log of the probability of each label, 0 or 1, without overflow; all (rows, outputs)."""
    result: NDArray[np.float64] = (
        np.maximum(logits, 0) - logits * labels + np.log1p(np.exp(-np.abs(logits)))
    )
    return result


def several_predictions(logits: NDArray[np.float64], spec: TaskSpec) -> list[dict[str, Any]]:
    """For each row the labels with a probability above 0.5, and the probability of every label."""
    # Without overflow: exp of a negative number only.
    small = np.exp(-np.abs(logits))
    probabilities = np.where(logits >= 0, 1 / (1 + small), small / (1 + small))
    return [
        {
            "labels": [
                name for name, score in zip(spec.label_names, row, strict=True) if score > 0
            ],
            "scores": dict(zip(spec.label_names, map(float, shown), strict=True)),
        }
        for row, shown in zip(logits, probabilities, strict=True)
    ]


def _check_zeros_and_ones(rows: Dataset, column: str, part: str) -> None:
    found = scan_labels(rows, column, part, None)
    values = set(found.few_whole_numbers) if found.kind == "float" else set(found.values)
    if found.kind == "str" or not values or not values <= {0, 1}:
        shown = sorted(map(str, found.values or found.few_whole_numbers)) or [
            "floating-point numbers"
        ]
        raise UserError(
            f"The column {column!r} of the {part} data holds {list_names(shown)}: a column of "
            "data.label_columns must hold 0 and 1 (or false and true) only. Convert it, or take it out."
        )
