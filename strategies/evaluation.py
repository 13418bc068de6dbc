"""Evaluation: each sample exactly once, numbers that do not depend on ranks or batch size."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftlaunch.strategies.base import Strategy
from ftlaunch.strategies.data.batches import Collator, evaluation_batches
from ftlaunch.strategies.data.tasks import Task, TaskSpec
from ftlaunch.strategies.files import replace_file
from ftlaunch.strategies.metrics import Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluator:
    """Evaluates the strategy's present weights on one table of samples."""

    collator: Collator
    task: Task
    spec: TaskSpec
    metrics: Metrics
    micro_batch: int

    @property
    def num_samples(self) -> int:
        return len(self.collator.table)

    def logits(self, strategy: Strategy) -> NDArray[np.float32]:
        """Collective: the logits of every sample, (samples, outputs), in the order of the table.

        Each rank fills in its own rows and leaves zeros elsewhere: the sum over ranks is exact.
        """
        logits = np.zeros((self.num_samples, self.spec.num_outputs), dtype=np.float32)
        for batch in evaluation_batches(
            self.collator,
            rank=strategy.world.rank,
            world_size=strategy.world.size,
            micro_batch=self.micro_batch,
        ):
            rows = strategy.predict(batch)
            real = batch.indices >= 0
            logits[batch.indices[real]] = rows[real]
        return strategy.sum_across_ranks(logits)

    def evaluate(self, logits: NDArray[np.float32]) -> dict[str, float]:
        """The loss, summed in fp64 in the order of the samples, and the metrics."""
        labels = self.labels()
        weights = self.collator.weights(labels)
        loss_sum, weight_sum = self.task.evaluation_loss(logits, labels, weights, self.spec)
        return {"loss": loss_sum / weight_sum, **self.metrics.compute(logits, labels)}

    def labels(self) -> NDArray[Any]:
        return self.collator.table.labels(np.arange(self.num_samples))


def write_predictions(path: Path, evaluator: Evaluator, logits: NDArray[np.float32]) -> None:
    """One JSON line a sample, in the order of the data: its prediction and its label."""
    names = evaluator.spec.label_names
    with replace_file(path) as file:
        records = evaluator.task.predictions(logits, evaluator.spec)
        for index, (record, label) in enumerate(zip(records, evaluator.labels(), strict=True)):
            expected = names[int(label)] if names else float(label)
            line = {"index": index, **record, "expected": expected}
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
