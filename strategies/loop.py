"""The training loop: the same for every framework, every topology and every task."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ftlaunch.strategies.base import Batch, StepOutcome, Strategy
from ftlaunch.strategies.data.batches import Batches, deal, micro_batch_seed
from ftlaunch.strategies.data.sample_order import SampleOrder
from ftlaunch.strategies.schedule import Schedule


@dataclass(slots=True, kw_only=True)
class Cursor:
    """Where training stands, and all that resuming it takes.

    step      optimizer steps done, skipped ones included: it chooses the samples
    applied   optimizer steps that changed the weights: it chooses the learning rate
    """

    step: int = 0
    applied: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One step as the loop saw it: its samples, its outcome and its duration."""

    indices: NDArray[np.int64]
    learning_rate: float
    outcome: StepOutcome
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """The micro-batches of each optimizer step, divided for one rank."""

    order: SampleOrder
    collator: Batches
    rank: int
    world_size: int
    micro_batch: int

    def micro_batches(self, indices: NDArray[np.int64], step: int) -> Iterator[tuple[Batch, bool]]:
        """This rank's share of a global batch, each with whether it is the last."""
        dealt = deal(
            indices,
            self.collator.table.lengths(indices),
            world_size=self.world_size,
            micro_batch=self.micro_batch,
        )[self.rank]
        for number, run in enumerate(dealt):
            seed = micro_batch_seed(self.order.seed, step, self.rank, number)
            batch = self.collator.batch(run, seed=seed, epoch=self.order.epoch(step))
            yield batch, number == len(dealt) - 1

    def total_items(self, indices: NDArray[np.int64], step: int) -> float:
        """What the loss of a global batch is divided by, the same on every rank."""
        return self.collator.total_items(indices, epoch=self.order.epoch(step))


def train(
    strategy: Strategy,
    windows: Windows,
    schedule: Schedule,
    cursor: Cursor,
    *,
    total_steps: int,
    stop_requested: Callable[[], bool],
    saving: Callable[[], float] = lambda: 0.0,
    after_step: Callable[[StepReport], bool],
) -> None:
    """Collective: train from `cursor` to `total_steps`, or until `after_step` says to end."""
    while cursor.step < total_steps:
        started = time.perf_counter()
        indices = windows.order.global_batch(cursor.step)
        total_items = windows.total_items(indices, cursor.step)
        for batch, last in windows.micro_batches(indices, cursor.step):
            strategy.accumulate(batch, total_items, last=last)
        learning_rate = schedule.learning_rate(cursor.applied)
        outcome = strategy.apply(learning_rate, stop=stop_requested(), saving=saving())
        # A skipped step has used up its samples, but neither the schedule nor the weights moved.
        cursor.step += 1
        cursor.applied += outcome.applied
        report = StepReport(
            indices=indices,
            learning_rate=learning_rate,
            outcome=outcome,
            seconds=time.perf_counter() - started,
        )
        if after_step(report):
            return
