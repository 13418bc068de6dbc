"""The training loop: the same for every framework, every topology and every task."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ftlaunch.strategies.base import Batch, Say, StepOutcome, Strategy, say_nothing
from ftlaunch.strategies.data.batches import Batches, micro_batch_seed
from ftlaunch.strategies.data.dealing import divide
from ftlaunch.strategies.data.sample_order import SampleOrder
from ftlaunch.strategies.schedule import Schedule

# Padded tokens that are made in one go. What comes after a computation, or after others were waited for,
# finds cold caches: the few samples of a small micro-batch are made in a sixth of the time behind others.
_TOKENS_AT_ONCE = 16_384
_MOST_AT_ONCE = 64

_Made = tuple["Window", Batch, bool]


@dataclass(slots=True, kw_only=True)
class Cursor:
    """Where training stands, and all that resuming it takes.

    step      optimizer steps done, skipped ones included: it chooses the samples
    applied   optimizer steps that changed the weights: it chooses the learning rate
    """

    step: int = 0
    applied: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The samples of one optimizer step.

    indices        (samples,) their numbers
    dealt          dealt[rank][i] are the samples of that rank's i-th micro-batch
    num_tokens     of all ranks, without padding; padded_tokens with it
    total_items    what the loss is divided by, the same on every rank
    """

    step: int
    indices: NDArray[np.int64]
    dealt: Sequence[Sequence[NDArray[np.int64]]]
    num_tokens: int
    padded_tokens: int
    total_items: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One step as the loop saw it: its samples, its outcome and its duration."""

    window: Window
    learning_rate: float
    outcome: StepOutcome
    seconds: float

    @property
    def indices(self) -> NDArray[np.int64]:
        return self.window.indices


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """The micro-batches of each optimizer step, divided for one rank.

    micro_batch, max_tokens   what one holds at most: `dealing.divide`
    """

    order: SampleOrder
    collator: Batches
    rank: int
    world_size: int
    micro_batch: int
    max_tokens: int | None = None

    def window(self, step: int) -> Window:
        """The samples of optimizer step `step`, counted from 0, and who computes them."""
        return self._divide(self.order.global_batch(step), step)

    def _divide(self, indices: NDArray[np.int64], step: int) -> Window:
        lengths = self.collator.table.lengths(indices)
        division = divide(
            indices,
            lengths,
            world_size=self.world_size,
            micro_batch=self.micro_batch,
            max_tokens=self.max_tokens,
        )
        return Window(
            step=step,
            indices=indices,
            dealt=division.runs,
            num_tokens=int(lengths.sum()),
            padded_tokens=division.padded_tokens,
            total_items=self.total_items(indices, step),
        )

    def batches(self, window: Window) -> Iterator[tuple[Batch, bool]]:
        """This rank's share of a window, each micro-batch with whether it is the last."""
        dealt = window.dealt[self.rank]
        seeds = [
            micro_batch_seed(self.order.seed, window.step, self.rank, number)
            for number in range(len(dealt))
        ]
        made = self.collator.batches(dealt, seeds=seeds, epoch=self.order.epoch(window.step))
        for number, batch in enumerate(made):
            yield batch, number == len(dealt) - 1

    def stream(self, first: int, end: int) -> Iterator[_Made]:
        """The micro-batches of steps `first` to `end` - 1, one after the other."""
        for step in range(first, end):
            window = self.window(step)
            for batch, last in self.batches(window):
                yield window, batch, last

    def micro_batches(self, indices: NDArray[np.int64], step: int) -> Iterator[tuple[Batch, bool]]:
        """This rank's share of any samples, as if they were those of `step`."""
        return self.batches(self._divide(indices, step))

    def total_items(self, indices: NDArray[np.int64], step: int) -> float:
        """What the loss of a global batch is divided by, the same on every rank."""
        return self.collator.total_items(indices, epoch=self.order.epoch(step))


def several_at_once(stream: Iterator[_Made], num_tokens: int) -> Iterator[_Made]:
    """The same, but made until there are so many padded tokens whenever there are none left.

    Counted as if all ranks had equal shares: so all make theirs before the same micro-batch, and none
    waits for another that does.
    """
    made: deque[_Made] = deque()
    while True:
        tokens = 0.0
        while tokens < num_tokens and len(made) < _MOST_AT_ONCE:
            each = next(stream, None)
            if each is None:
                break
            dealt = each[0].dealt
            tokens += each[0].padded_tokens / (len(dealt) * len(dealt[0]))
            made.append(each)
        if not made:
            return
        while made:
            yield made.popleft()


def train(
    strategy: Strategy,
    windows: Windows,
    schedule: Schedule,
    cursor: Cursor,
    *,
    total_steps: int,
    say: Say = say_nothing,
    ready_to_begin: Callable[[], None] = lambda: None,
    after_step: Callable[[StepReport], bool],
) -> None:
    """Collective: train from `cursor` to `total_steps`, or until `after_step` says to end.

    say              what this rank has to tell the others, asked in every step
    ready_to_begin   called once, when the first micro-batch is there
    """
    stream = several_at_once(windows.stream(cursor.step, total_steps), _TOKENS_AT_ONCE)
    ready = next(stream, None)
    ready_to_begin()
    while ready is not None:
        started = time.perf_counter()
        last = False
        while not last:
            assert ready is not None
            window, batch, last = ready
            strategy.accumulate(batch, window.total_items, last=last, say=say)
            # Made while a device still computes; the next step's first one, too.
            ready = next(stream, None)
        learning_rate = schedule.learning_rate(cursor.applied)
        outcome = strategy.apply(learning_rate)
        # A skipped step has used up its samples, but neither the schedule nor the weights moved.
        cursor.step += 1
        cursor.applied += outcome.applied
        report = StepReport(
            window=window,
            learning_rate=learning_rate,
            outcome=outcome,
            seconds=time.perf_counter() - started,
        )
        if after_step(report):
            return
