"""What a task must say about data: columns, labels, loss, metrics. Each task is another file.

A new task is one file with a class that fits `RowTask` or `TokenTask`, and one line in `TASKS`
(`task_names`).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ftlaunch.strategies.data.task_names import TASKS, check_task
from ftlaunch.strategies.options import DataOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ftlaunch.strategies.data.sources import Splits
    from ftlaunch.strategies.data.token_outputs import TokenMetric, TokenOutputs
    from ftlaunch.strategies.data.token_samples import TokenSample, TokenSamples
    from ftlaunch.strategies.data.token_table import TokenTable

Problem = Literal["classification", "regression", "several-labels", "tokens"]
ModelProblem = Literal["classification", "regression", "several-labels"]
Head = Literal["sequence-classification", "token-classification", "causal-lm", "masked-lm"]
Loss = Literal["cross_entropy", "mse", "binary_cross_entropy", "token_cross_entropy"]

# The label of a token that is not to be learned.
UNSUPERVISED = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelLayout:
    """How the labels of a problem lie in the cache.

    per   "row": one a sample; "output": one for each output of a sample; "token": one a token,
          `UNSUPERVISED` where there is nothing to learn
    """

    dtype: np.dtype[Any]
    per: Literal["row", "output", "token"]


LAYOUTS: Mapping[Problem, LabelLayout] = {
    "classification": LabelLayout(dtype=np.dtype(np.int64), per="row"),
    "regression": LabelLayout(dtype=np.dtype(np.float32), per="row"),
    "several-labels": LabelLayout(dtype=np.dtype(np.float32), per="output"),
    "tokens": LabelLayout(dtype=np.dtype(np.int32), per="token"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """What the data turned out to be; equal on every rank.

    problem         what a label is: a class of the row, a number, 0 or 1 for each output ("several
                    labels"), or a class for each token
    label_column    "" where the labels are made of the text itself
    label_names     in the order of their ids; () for a regression and for tokens of the vocabulary
    num_outputs     width of the logits: the number of classes, 1 for a regression, 0 for the model's
                    vocabulary
    labels_are_ids  the label column holds the ids themselves (a ClassLabel), not the names
    head            what the model is loaded with
    drawn           inputs and labels are drawn anew every epoch, by `TokenTask.draw`
    keeps_winners   the metrics need the predicted class of every token, not only sums
    details         what else the task has to know; plain JSON (lists, no tuples)
    notes           lines for the user (guessed columns, ...)
    """

    task: str
    text_columns: tuple[str, ...]
    label_column: str
    problem: Problem
    label_names: tuple[str, ...]
    num_outputs: int
    loss: Loss
    labels_are_ids: bool = False
    head: Head = "sequence-classification"
    drawn: bool = False
    keeps_winners: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def layout(self) -> LabelLayout:
        return LAYOUTS[self.problem]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` gives an equal spec back."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        # A cache of a task that has none of them is what it was before they were.
        for name in ("head", "drawn", "keeps_winners", "details"):
            if values[name] in ("sequence-classification", False, {}):
                del values[name]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TaskSpec:
        """ValueError, TypeError or KeyError for what `to_dict` cannot have given."""
        arguments: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        spec = cls(**arguments)
        strings = (*spec.text_columns, *spec.label_names, *spec.notes, spec.label_column)
        if not all(isinstance(s, str) for s in strings) or type(spec.num_outputs) is not int:
            raise ValueError("a field of the task has the wrong type")
        if spec.problem not in LAYOUTS or not isinstance(spec.details, dict):
            raise ValueError("a field of the task has the wrong value")
        named = bool(spec.label_names) or spec.problem in ("classification", "several-labels")
        if named and len(spec.label_names) != spec.num_outputs:
            raise ValueError("as many names as outputs are needed")
        return spec


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLabels:
    """What a trained model's outputs mean; label_names in the order of their ids, () for numbers."""

    problem: ModelProblem
    label_names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Some tokenized rows, without padding.

    labels         by `LabelLayout.per`: (rows,), (rows, outputs), or for each row as many as it has
                   tokens. A label is what the output *at that place* is to be: a language model's
                   labels are the ids of the next tokens.
    num_truncated  rows that were cut to max_length
    num_too_long   rows that were left without a token because they were longer than max_length
    """

    input_ids: Sequence[Sequence[int]]
    token_type_ids: Sequence[Sequence[int]] | None
    labels: Any
    num_truncated: int
    num_too_long: int = 0


class BadRow(Exception):
    """A row that `Task.encode` cannot take: `index` in what it was given, what is wrong and what to do.

    The row's own number is put before the text by whoever knows it.
    """

    def __init__(self, index: int, text: str) -> None:
        super().__init__(text)
        self.index = index
        self.text = text


def too_long(index: int, num_tokens: int, max_length: int) -> BadRow:
    """What `encode` raises where data.long_samples is error."""
    return BadRow(
        index,
        f"has {num_tokens} tokens: data.max_length is {max_length}, and data.long_samples is error. "
        "Shorten it, raise data.max_length, or set data.long_samples to truncate or drop.",
    )


class Task(Protocol):
    """All that the data part asks of any task. Stateless. See also `RowTask` and `TokenTask`."""

    def inspect(self, splits: Splits, options: DataOptions) -> TaskSpec:
        """Find columns and labels in loaded rows. UserError for rows that do not fit the task."""

    def inspect_for_model(
        self, splits: Splits, options: DataOptions, labels: ModelLabels
    ) -> TaskSpec:
        """The same for rows that a trained model is evaluated on: its labels are given."""

    def cache_key(self, options: DataOptions) -> Mapping[str, Any]:
        """The task's own options that decide what is in the cache; JSON-able, {} for none."""

    def fit_tokenizer(
        self, spec: TaskSpec, tokenizer: PreTrainedTokenizerBase, options: DataOptions
    ) -> TaskSpec:
        """The spec with what the tokenizer adds to it. UserError for one that does not do."""

    def encode(
        self,
        rows: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        spec: TaskSpec,
        max_length: int,
    ) -> Encoded:
        """Tokenize rows given by column, all of which `inspect` has accepted. BadRow."""

    def default_metrics(self, spec: TaskSpec) -> tuple[str, ...]:
        """Names of metrics when the user names none."""


class RowTask(Task, Protocol):
    """A task with a label for each row, or for each output of a row."""

    def evaluation_loss(
        self, logits: NDArray[Any], labels: NDArray[Any], weights: NDArray[Any], spec: TaskSpec
    ) -> tuple[float, float]:
        """(sum of weight times loss, sum of weights) over rows, in float64.

        logits (rows, num_outputs), labels (rows,) or (rows, num_outputs), weights like labels, with
        class weights included.
        """

    def predictions(self, logits: NDArray[Any], spec: TaskSpec) -> list[dict[str, Any]]:
        """One JSON-able record per row of logits (rows, num_outputs)."""


class TokenTask(Task, Protocol):
    """A task with a label for each token. Its loss and its sums come from the ranks' devices."""

    def arrange(
        self, table: TokenTable, split: str, spec: TaskSpec, max_length: int
    ) -> tuple[TokenSamples, tuple[str, ...]]:
        """What the samples are, given the table of the rows; and notes for the user.

        Mostly `arrangements.supervised_only`.
        """

    def draw(
        self, sample: TokenSample, spec: TaskSpec, generator: np.random.Generator
    ) -> TokenSample:
        """The sample as it is seen in one epoch. Only called if `spec.drawn`.

        generator   of its own for each (seed, epoch, sample)
        """

    def metrics(self, spec: TaskSpec) -> Mapping[str, TokenMetric]:
        """Every metric of the task by its name."""

    def predictions(self, outputs: TokenOutputs, spec: TaskSpec) -> list[dict[str, Any]]:
        """One JSON-able record a sample."""


def load_task(name: str) -> Task:
    """UserError for a name that is not in `TASKS`."""
    check_task(name)
    module, _, attribute = TASKS[name].partition(":")
    task: Task = getattr(importlib.import_module(module), attribute)()
    return task
