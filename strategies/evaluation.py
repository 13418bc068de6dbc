"""Evaluation: each sample exactly once, numbers that do not depend on ranks or batch size."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ftlaunch.strategies.base import Strategy
from ftlaunch.strategies.data.batches import Collator, evaluation_batches
from ftlaunch.strategies.data.tasks import RowTask, TaskSpec
from ftlaunch.strategies.files import replace_file
from ftlaunch.strategies.metrics import Metrics


class Evaluator(Protocol):
    """Evaluates a strategy's present weights on one table of samples: `RowEvaluator` for labels of
    rows, `token_evaluation.TokenEvaluator` for labels of tokens.
    """

    @property
    def num_samples(self) -> int: ...

    @property
    def metric_names(self) -> tuple[str, ...]: ...

    def run(self, strategy: Strategy) -> Any:
        """Collective: what the model makes of every sample, the same on every rank."""

    def evaluate(self, outputs: Any) -> dict[str, float]:
        """The loss and the metrics of what `run` gave."""

    def records(self, outputs: Any) -> list[dict[str, Any]]:
        """What is written of each sample, in the order of the data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowEvaluator:
    """Evaluates the strategy's present weights on one table of samples."""

    collator: Collator
    task: RowTask
    spec: TaskSpec
    metrics: Metrics
    micro_batch: int
    max_tokens: int | None = None

    @property
    def num_samples(self) -> int:
        return len(self.collator.table)

    @property
    def metric_names(self) -> tuple[str, ...]:
        return self.metrics.names

    def run(self, strategy: Strategy) -> NDArray[np.float32]:
        """Collective: the logits of every sample, (samples, outputs), in the order of the table.

        Each rank fills in its own rows and leaves zeros elsewhere: the sum over ranks is exact.
        """
        logits = np.zeros((self.num_samples, self.spec.num_outputs), dtype=np.float32)
        for batch in evaluation_batches(
            self.collator,
            rank=strategy.world.rank,
            world_size=strategy.world.size,
            micro_batch=self.micro_batch,
            max_tokens=self.max_tokens,
        ):
            rows = strategy.predict(batch)
            real = batch.indices >= 0
            logits[batch.indices[real]] = rows[real]
        return strategy.sum_across_ranks(logits)

    def evaluate(self, outputs: NDArray[np.float32]) -> dict[str, float]:
        """The loss, summed in fp64 in the order of the samples, and the metrics."""
        labels = self.labels()
        weights = self.collator.weights(labels)
        loss_sum, weight_sum = self.task.evaluation_loss(outputs, labels, weights, self.spec)
        return {"loss": loss_sum / weight_sum, **self.metrics.compute(outputs, labels)}

    def records(self, outputs: NDArray[np.float32]) -> list[dict[str, Any]]:
        """The prediction and the label of each sample."""
        records = self.task.predictions(outputs, self.spec)
        return [
            {"index": index, **record, "expected": self._expected(label)}
            for index, (record, label) in enumerate(zip(records, self.labels(), strict=True))
        ]

    def _expected(self, label: Any) -> Any:
        names = self.spec.label_names
        if self.spec.problem == "several-labels":
            return [name for name, here in zip(names, label, strict=True) if here]
        return names[int(label)] if names else float(label)

    def labels(self) -> NDArray[Any]:
        return self.collator.table.labels(np.arange(self.num_samples))


def write_predictions(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """One JSON line a sample."""
    with replace_file(path) as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
