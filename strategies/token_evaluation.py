"""Evaluation of samples with a label for each token: sums are gathered, logits are not.

Each sample exactly once, numbers that do not depend on ranks or batch size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.base import Batch, Strategy
from ftlaunch.strategies.data.batches import evaluation_batches
from ftlaunch.strategies.data.tasks import UNSUPERVISED, TaskSpec, TokenTask
from ftlaunch.strategies.data.token_batches import TokenCollator
from ftlaunch.strategies.data.token_outputs import TokenMetric, TokenOutputs, mean_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvaluator:
    """Evaluates the strategy's present weights on one table of samples."""

    collator: TokenCollator
    task: TokenTask
    spec: TaskSpec
    metrics: Mapping[str, TokenMetric]
    micro_batch: int
    max_tokens: int | None = None

    @property
    def num_samples(self) -> int:
        return len(self.collator.table)

    @property
    def metric_names(self) -> tuple[str, ...]:
        return tuple(self.metrics)

    def run(self, strategy: Strategy) -> TokenOutputs:
        """Collective. Each rank fills in its own samples and leaves zeros elsewhere: the sum over
        ranks is exact.
        """
        everything = np.arange(self.num_samples)
        sums = np.zeros((self.num_samples, 4), dtype=np.float64)
        keeps = self.spec.keeps_winners
        starts = np.concatenate([[0], np.cumsum(self.collator.table.lengths(everything))])
        # Winner and label of every token.
        tokens = np.zeros((2, int(starts[-1]) if keeps else 0), dtype=np.float64)
        for batch in evaluation_batches(
            self.collator,
            rank=strategy.world.rank,
            world_size=strategy.world.size,
            micro_batch=self.micro_batch,
            max_tokens=self.max_tokens,
        ):
            scores = strategy.score(batch)
            for row in np.flatnonzero(batch.indices >= 0).tolist():
                number = int(batch.indices[row])
                losses, winners = scores.losses[row], scores.winners[row]
                sums[number] = _sums(batch, row, losses, winners)
                if keeps:
                    length = int(starts[number + 1] - starts[number])
                    place = slice(int(starts[number]), int(starts[number + 1]))
                    tokens[0, place] = winners[:length]
                    tokens[1, place] = batch.labels[row, :length]
        sums = strategy.sum_across_ranks(sums)
        outputs = TokenOutputs(
            loss_sums=sums[:, 0],
            weight_sums=sums[:, 1],
            num_items=sums[:, 2].astype(np.int64),
            num_correct=sums[:, 3].astype(np.int64),
            origins=self.collator.table.origins(everything),
        )
        if not keeps:
            return outputs
        whole = strategy.sum_across_ranks(tokens).astype(np.int64)
        pieces = [np.split(each, starts[1:-1]) for each in whole]
        return TokenOutputs(
            loss_sums=outputs.loss_sums,
            weight_sums=outputs.weight_sums,
            num_items=outputs.num_items,
            num_correct=outputs.num_correct,
            origins=outputs.origins,
            winners=pieces[0],
            labels=pieces[1],
        )

    def evaluate(self, outputs: TokenOutputs) -> dict[str, float]:
        """The loss, summed in fp64 in the order of the samples, and the metrics."""
        result = {"loss": mean_loss(outputs)}
        for metric in self.metrics.values():
            result |= metric(outputs, self.spec)
        return result

    def records(self, outputs: TokenOutputs) -> list[dict[str, Any]]:
        """What is written of each sample."""
        return self.task.predictions(outputs, self.spec)


def choose_metrics(
    task: TokenTask, spec: TaskSpec, wanted: Sequence[str] | None
) -> dict[str, TokenMetric]:
    """UserError for a metric that the task does not have."""
    known = task.metrics(spec)
    names = tuple(dict.fromkeys(task.default_metrics(spec) if wanted is None else wanted))
    if unknown := [name for name in names if name not in known]:
        raise UserError(
            f"The metric {unknown[0]!r} does not fit the task {spec.task}: it has "
            f"{', '.join(known)}. Set train.metrics to some of these."
        )
    return {name: known[name] for name in names}


def _sums(
    batch: Batch, row: int, losses: NDArray[np.float32], winners: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(weighted loss, weight, items, items predicted right) of one sample."""
    real = batch.labels[row] != UNSUPERVISED
    weights = batch.weights[row, real].astype(np.float64)
    return np.array(
        [
            losses[real].astype(np.float64) @ weights,
            weights.sum(),
            real.sum(),
            (winners[real] == batch.labels[row, real]).sum(),
        ]
    )
