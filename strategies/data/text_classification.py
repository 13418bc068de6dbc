"""The task of giving one or two texts a class, or a number. Knows columns, labels and formulas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.data.label_scan import Labels, check_texts, scan_labels
from ftlaunch.strategies.data.local_files import list_names
from ftlaunch.strategies.data.tasks import Encoded, ModelLabels, TaskSpec
from ftlaunch.strategies.options import DataOptions

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from ftlaunch.strategies.data.sources import Splits

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


class TextClassification:
    """`Task` for single-label classification and regression over one text or a pair."""

    def inspect(self, splits: Splits, options: DataOptions) -> TaskSpec:
        """See `Task.inspect`."""
        text_columns, label_column, notes = _find_columns(splits.train, options)
        parts = {"training": splits.train}
        if splits.eval is not None:
            parts["evaluation"] = splits.eval
        for part, rows in parts.items():
            _require_columns(rows, (*text_columns, label_column), part)
            for column in text_columns:
                check_texts(rows, column, part)
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
        text_columns, label_column, notes = _find_columns(splits.train, options)
        _require_columns(splits.train, (*text_columns, label_column), "evaluation")
        for column in text_columns:
            check_texts(splits.train, column, "evaluation")
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
        return {}

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
            labels=_encode_labels(rows[spec.label_column], spec),
            num_truncated=len(long),
        )

    def default_metrics(self, spec: TaskSpec) -> tuple[str, ...]:
        """See `Task.default_metrics`."""
        if spec.problem == "classification":
            return ("accuracy", "f1")
        return ("pearson", "spearman", "mse")

    def evaluation_loss(
        self, logits: NDArray[Any], labels: NDArray[Any], weights: NDArray[Any], spec: TaskSpec
    ) -> tuple[float, float]:
        """See `RowTask.evaluation_loss`: -log softmax(logits)[label], or (logit - label)^2."""
        scores, weights = logits.astype(np.float64), weights.astype(np.float64)
        if spec.loss == "mse":
            losses = (scores[:, 0] - labels.astype(np.float64)) ** 2
        else:
            rows = np.arange(len(scores))
            losses = _log_sum_exp(scores) - scores[rows, labels.astype(np.int64)]
        # A filler row may hold anything; nan * 0 would be nan.
        kept = weights != 0
        return float(losses[kept] @ weights[kept]), float(weights.sum())

    def predictions(self, logits: NDArray[Any], spec: TaskSpec) -> list[dict[str, Any]]:
        """See `RowTask.predictions`: label, label_id and scores by label; or value."""
        scores = logits.astype(np.float64)
        if spec.problem == "regression":
            return [{"value": float(row[0])} for row in scores]
        probabilities = np.exp(scores - _log_sum_exp(scores)[:, None])
        return [
            {
                "label": spec.label_names[winner],
                "label_id": winner,
                "scores": dict(zip(spec.label_names, map(float, row), strict=True)),
            }
            for winner, row in zip(scores.argmax(axis=1).tolist(), probabilities, strict=True)
        ]


def _find_columns(rows: Dataset, options: DataOptions) -> tuple[tuple[str, ...], str, list[str]]:
    """(text columns, label column, a note if either was guessed)."""
    label_column = _find_label_column(rows, options)
    text_columns = _find_text_columns(rows, options, label_column)
    if options.text_columns is not None and options.label_column is not None:
        return text_columns, label_column, []
    texts = " + ".join(f"'{column}'" for column in text_columns)
    return (
        text_columns,
        label_column,
        [
            f"columns: text = {texts}, label = '{label_column}' "
            "(guessed; set data.text_columns and data.label_column to choose)"
        ],
    )


def _holds_ids(label_column: str, found: Labels, labels: ModelLabels) -> bool:
    """Whether the column holds the model's label ids rather than names. UserError if neither."""
    names = labels.label_names
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


def _find_label_column(rows: Dataset, options: DataOptions) -> str:
    if options.label_column is not None:
        _require_columns(rows, (options.label_column,), "training", "data.label_column")
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
        _require_columns(rows, wanted, "training", "data.text_columns")
        return wanted
    existing = set(rows.column_names) - {label_column}
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


def _require_columns(
    rows: Dataset, columns: Sequence[str], part: str, key: str = "data.text_columns"
) -> None:
    for column in columns:
        if column not in rows.column_names:
            raise UserError(
                f"There is no column {column!r} in the {part} data: it has the columns "
                f"{list_names(rows.column_names)}. Set {key} to columns that exist in the training "
                "and the evaluation data."
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


def _encode_labels(values: Iterable[Any], spec: TaskSpec) -> NDArray[Any]:
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
