"""What a task must say about data: columns, labels, loss, metrics. Each task is another file.

A new task is one file with a class that fits `Task`, and one line in `TASKS`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol

from numpy.typing import NDArray

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.options import DataOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ftlaunch.strategies.data.sources import Splits

TASKS: dict[str, str] = {
    "text-classification": "ftlaunch.strategies.data.text_classification:TextClassification",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """What the data turned out to be; equal on every rank.

    label_names     in the order of their ids; () for a regression
    labels_are_ids  the label column holds the ids themselves (a ClassLabel), not the names
    num_outputs     width of the logits: the number of classes, 1 for a regression
    notes           lines for the user (guessed columns, ...)
    """

    task: str
    text_columns: tuple[str, ...]
    label_column: str
    problem: Literal["classification", "regression"]
    label_names: tuple[str, ...]
    num_outputs: int
    loss: Literal["cross_entropy", "mse"]
    labels_are_ids: bool = False
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` gives an equal spec back."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TaskSpec:
        """ValueError or TypeError for what `to_dict` cannot have given."""
        arguments: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        spec = cls(**arguments)
        strings = (*spec.text_columns, *spec.label_names, *spec.notes, spec.label_column)
        if not all(isinstance(s, str) for s in strings) or type(spec.num_outputs) is not int:
            raise ValueError("a field of the task has the wrong type")
        if spec.problem == "classification" and len(spec.label_names) != spec.num_outputs:
            raise ValueError("as many names as outputs are needed")
        return spec


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLabels:
    """What a trained model's outputs mean; label_names in the order of their ids, () for numbers."""

    problem: Literal["classification", "regression"]
    label_names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Some tokenized rows, without padding.

    labels         (rows,) int64 class ids or float32 targets
    num_truncated  rows that were cut to max_length
    """

    input_ids: Sequence[Sequence[int]]
    token_type_ids: Sequence[Sequence[int]] | None
    labels: NDArray[Any]
    num_truncated: int


class Task(Protocol):
    """All that the data part and the loop ask of a task. Stateless."""

    def inspect(self, splits: Splits, options: DataOptions) -> TaskSpec:
        """Find columns and labels in loaded rows. UserError for rows that do not fit the task."""

    def inspect_for_model(
        self, splits: Splits, options: DataOptions, labels: ModelLabels
    ) -> TaskSpec:
        """The same for rows that a trained model is evaluated on: its labels are given."""

    def encode(
        self,
        rows: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        spec: TaskSpec,
        max_length: int,
    ) -> Encoded:
        """Tokenize rows given by column, all of which `inspect` has accepted."""

    def default_metrics(self, spec: TaskSpec) -> tuple[str, ...]:
        """Names for `metrics.load_metrics` when the user names none."""

    def evaluation_loss(
        self, logits: NDArray[Any], labels: NDArray[Any], weights: NDArray[Any], spec: TaskSpec
    ) -> tuple[float, float]:
        """(sum of weight times loss, sum of weights) over rows, in float64.

        logits (rows, num_outputs), labels (rows,), weights (rows,) with class weights included.
        """

    def predictions(self, logits: NDArray[Any], spec: TaskSpec) -> list[dict[str, Any]]:
        """One JSON-able record per row of logits (rows, num_outputs)."""


def load_task(name: str) -> Task:
    """UserError for a name that is not in `TASKS`."""
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.4)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"There is no task {name!r}: known are {', '.join(TASKS)}. "
            f"Set task to one of them.{hint}"
        )
    module, _, attribute = TASKS[name].partition(":")
    task: Task = getattr(importlib.import_module(module), attribute)()
    return task
