"""The task of giving one or two texts a class, or a number. Knows columns, labels and formulas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.data.label_scan import Labels, scan_labels
from ftlaunch.strategies.data.local_files import list_names
from ftlaunch.strategies.data.several_labels import (
    binary_losses,
    check_enough,
    encode_several,
    for_model,
    has_several,
    scan_several,
    several_predictions,
)
from ftlaunch.strategies.data.tasks import Encoded, ModelLabels, TaskSpec
from ftlaunch.strategies.data.text_columns import check_columns, find_columns
from ftlaunch.strategies.options import DataOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ftlaunch.strategies.data.sources import Splits


class TextClassification:
    """`RowTask` for classes, several labels and regression over one text or a pair."""

    def inspect(self, splits: Splits, options: DataOptions) -> TaskSpec:
        """See `Task.inspect`."""
        text_columns, label_column, notes = find_columns(splits.train, options)
        parts = {"training": splits.train}
        if splits.eval is not None:
            parts["evaluation"] = splits.eval
        for part, rows in parts.items():
            check_columns(rows, text_columns, label_column, part)
        if has_several(splits.train, label_column, options):
            several = scan_several(parts, label_column, options, splits.whole_train)
            check_enough(several, label_column)
            return several.spec(text_columns, label_column, notes)
        labels = {
            part: scan_labels(
                rows, label_column, part, splits.whole_train if part == "training" else None
            )
            for part, rows in parts.items()
        }
        return _make_spec(text_columns, label_column, labels, notes)

    def inspect_for_model(
        self, splits: Splits, options: DataOptions, labels: ModelLabels
    ) -> TaskSpec:
        """See `Task.inspect_for_model`."""
        text_columns, label_column, notes = find_columns(splits.train, options)
        check_columns(splits.train, text_columns, label_column, "evaluation")
        if has_several(splits.train, label_column, options):
            several = scan_several({"evaluation": splits.train}, label_column, options, None)
            return for_model(several, label_column, labels).spec(text_columns, label_column, notes)
        found = scan_labels(splits.train, label_column, "evaluation", None)
        return TaskSpec(
            task="text-classification",
            text_columns=text_columns,
            label_column=label_column,
            problem=labels.problem,
            label_names=labels.label_names,
            num_outputs=len(labels.label_names) or 1,
            loss="cross_entropy" if labels.problem == "classification" else "mse",
            labels_are_ids=_holds_ids(label_column, found, labels),
            notes=tuple(notes),
        )

    def cache_key(self, options: DataOptions) -> Mapping[str, Any]:
        """See `Task.cache_key`."""
        return {"label_columns": options.label_columns} if options.label_columns else {}

    def fit_tokenizer(
        self, spec: TaskSpec, tokenizer: PreTrainedTokenizerBase, options: DataOptions
    ) -> TaskSpec:
        """See `Task.fit_tokenizer`."""
        return spec

    def encode(
        self,
        rows: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        spec: TaskSpec,
        max_length: int,
    ) -> Encoded:
        """See `Task.encode`."""
        texts = [list(rows[column]) for column in spec.text_columns]
        wants_types = "token_type_ids" in tokenizer.model_input_names
        keys = ("input_ids", "token_type_ids") if wants_types else ("input_ids",)
        encoded = _tokenize(tokenizer, texts, wants_types)
        # Cutting only the rows that need it also counts them, with any kind of tokenizer.
        long = [i for i, ids in enumerate(encoded["input_ids"]) if len(ids) > max_length]
        if long:
            chosen = [[column[i] for i in long] for column in texts]
            cut = _tokenize(tokenizer, chosen, wants_types, max_length)
            for key in keys:
                for position, i in enumerate(long):
                    encoded[key][i] = cut[key][position]
        _fill_empty_rows(encoded, tokenizer)
        return Encoded(
            input_ids=encoded["input_ids"],
            token_type_ids=encoded["token_type_ids"] if wants_types else None,
            labels=_encode_labels(rows, spec),
            num_truncated=len(long),
        )

    def default_metrics(self, spec: TaskSpec) -> tuple[str, ...]:
        """See `Task.default_metrics`."""
        if spec.problem == "classification":
            return ("accuracy", "f1")
        if spec.problem == "several-labels":
            return ("f1_micro", "f1_macro", "subset_accuracy")
        return ("pearson", "spearman", "mse")

    def evaluation_loss(
        self, logits: NDArray[Any], labels: NDArray[Any], weights: NDArray[Any], spec: TaskSpec
    ) -> tuple[float, float]:
        """See `RowTask.evaluation_loss`: -log softmax(logits)[label], (logit - label)^2, or for each
        output -log of the probability of its label.
        """
        scores, weights = logits.astype(np.float64), weights.astype(np.float64)
        if spec.loss == "mse":
            losses = (scores[:, 0] - labels.astype(np.float64)) ** 2
        elif spec.loss == "binary_cross_entropy":
            losses = binary_losses(scores, labels.astype(np.float64))
        else:
            rows = np.arange(len(scores))
            losses = _log_sum_exp(scores) - scores[rows, labels.astype(np.int64)]
        # A filler row may hold anything; nan * 0 would be nan.
        kept = weights != 0
        return float(losses[kept] @ weights[kept]), float(weights.sum())

    def predictions(self, logits: NDArray[Any], spec: TaskSpec) -> list[dict[str, Any]]:
        """See `RowTask.predictions`: label, label_id and scores by label; labels and scores; or value."""
        scores = logits.astype(np.float64)
        if spec.problem == "regression":
            return [{"value": float(row[0])} for row in scores]
        if spec.problem == "several-labels":
            return several_predictions(scores, spec)
        probabilities = np.exp(scores - _log_sum_exp(scores)[:, None])
        return [
            {
                "label": spec.label_names[winner],
                "label_id": winner,
                "scores": dict(zip(spec.label_names, map(float, row), strict=True)),
            }
            for winner, row in zip(scores.argmax(axis=1).tolist(), probabilities, strict=True)
        ]


def _holds_ids(label_column: str, found: Labels, labels: ModelLabels) -> bool:
    """Whether the column holds the model's label ids rather than names. UserError if neither."""
    names = labels.label_names
    if labels.problem == "several-labels":
        raise UserError(
            f"The model gives any number of labels a text, but the label column {label_column!r} holds "
            f"{found.describe()}. Set data.label_column to a column of lists, or data.label_columns to "
            "columns of 0 and 1."
        )
    if labels.problem == "regression":
        if found.class_names is None and found.kind in ("float", "int"):
            return False
        raise UserError(
            f"The model gives numbers, but the label column {label_column!r} holds "
            f"{found.describe()}. Set data.label_column to a column of numbers."
        )
    if found.class_names is not None and tuple(found.class_names) == names:
        return True
    by_value = found.class_names is None and found.kind != "float"
    if by_value and {str(value) for value in found.values} <= set(names):
        return False
    generic = names == tuple(f"LABEL_{i}" for i in range(len(names)))
    if (
        by_value
        and generic
        and all(isinstance(v, int) and 0 <= v < len(names) for v in found.values)
    ):
        return True
    seen = found.class_names or sorted(map(str, found.values))
    raise UserError(
        f"The labels in {label_column!r} are not the model's: the data has {list_names(seen)}, the "
        f"model {list_names(names)}, in that order. Evaluate with data that is labelled alike, or "
        "set data.label_column."
    )


def _make_spec(
    text_columns: tuple[str, ...],
    label_column: str,
    labels: Mapping[str, Labels],
    notes: list[str],
) -> TaskSpec:
    first = labels["training"]
    for part, other in labels.items():
        if other.kind != first.kind or other.class_names != first.class_names:
            raise UserError(
                f"The label column {label_column!r} holds {first.describe()} in the training data "
                f"but {other.describe()} in the {part} data: both must be of one kind. "
                "Convert one of them."
            )
    if first.kind == "float":
        notes += _note_whole_numbers(label_column, first)
        names: tuple[str, ...] = ()
    else:
        _check_unseen(label_column, labels)
        present = set().union(*(part.values for part in labels.values()))
        if len(present) < 2:
            raise UserError(
                f"All labels in {label_column!r} are {list_names(present)}: a classification "
                "needs at least two classes. Add rows of another class, or choose another "
                "data.label_column."
            )
        names = first.class_names or tuple(str(value) for value in sorted(present))
    return TaskSpec(
        task="text-classification",
        text_columns=text_columns,
        label_column=label_column,
        problem="classification" if names else "regression",
        label_names=names,
        num_outputs=len(names) or 1,
        loss="cross_entropy" if names else "mse",
        labels_are_ids=first.class_names is not None,
        notes=tuple(notes),
    )


def _check_unseen(label_column: str, labels: Mapping[str, Labels]) -> None:
    train = labels["training"]
    # A ClassLabel states its classes, whether rows have them or not.
    if train.class_names is not None:
        return
    for part, other in labels.items():
        unseen = sorted(other.values - train.values)
        if unseen:
            raise UserError(
                f"The {part} data holds labels that the training data lacks: {list_names(unseen)} "
                f"in {label_column!r}, while the training data has "
                f"{list_names(sorted(train.values))}. Every label must occur in training. Correct "
                "the labels or add training rows."
            )


def _note_whole_numbers(label_column: str, labels: Labels) -> list[str]:
    if not labels.few_whole_numbers:
        return []
    values = ", ".join(f"{value:g}" for value in labels.few_whole_numbers)
    return [
        f"labels: '{label_column}' holds only {values}, but as floating-point numbers, so this is "
        "a regression; store whole numbers or strings for a classification"
    ]


def _tokenize(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[list[str]],
    wants_types: bool,
    max_length: int | None = None,
) -> dict[str, list[list[int]]]:
    encoded = tokenizer(
        *texts,
        truncation="longest_first" if max_length else False,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=wants_types,
        verbose=False,
    )
    return {key: list(encoded[key]) for key in encoded}


def _fill_empty_rows(
    encoded: dict[str, list[list[int]]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Without special tokens "" becomes no token at all, which no model takes."""
    for i, ids in enumerate(encoded["input_ids"]):
        if not ids:
            eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
            encoded["input_ids"][i] = [pad if eos is None else eos]
            if "token_type_ids" in encoded:
                encoded["token_type_ids"][i] = [0]


def _encode_labels(rows: Mapping[str, Any], spec: TaskSpec) -> NDArray[Any]:
    if spec.problem == "several-labels":
        return encode_several(rows, spec)
    values = rows[spec.label_column]
    if spec.problem == "regression":
        return np.array(values, dtype=np.float32)
    if spec.labels_are_ids:
        return np.array(values, dtype=np.int64)
    ids = {name: i for i, name in enumerate(spec.label_names)}
    return np.array([ids[str(value)] for value in values], dtype=np.int64)


def _log_sum_exp(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    highest = scores.max(axis=1)
    total = np.log(np.exp(scores - highest[:, None]).sum(axis=1))
    result: NDArray[np.float64] = highest + total
    return result
