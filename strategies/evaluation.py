"""Evaluation: each sample exactly once, numbers that do not depend on ranks or batch size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftlaunch.strategies.base import Strategy
from ftlaunch.strategies.data.batches import Collator, evaluation_batches
from ftlaunch.strategies.data.tasks import Task, TaskSpec
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
