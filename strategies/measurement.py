"""One rank's part of `ftlaunch bench`: warm-up, measured steps, then steps that tell where the time goes.

The loop, the strategy and the data are those of training. Nothing is saved and nothing evaluated.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.base import Batch, Say, StepOutcome, Strategy, say_nothing
from ftlaunch.strategies.data.sample_order import SampleOrder
from ftlaunch.strategies.data.synthetic import synthetic_tokens
from ftlaunch.strategies.data.token_cache import Tokens
from ftlaunch.strategies.flops import is_countable, read_shape, step_flops
from ftlaunch.strategies.instruments import (
    Instruments,
    Shares,
    make_instruments,
    make_shares,
    split_waits,
)
from ftlaunch.strategies.job_data import class_weights, make_collator, total_steps
from ftlaunch.strategies.loop import Cursor, StepReport, Window, Windows, train
from ftlaunch.strategies.model_config import read_model_config
from ftlaunch.strategies.progress import Measured, Phase, Progress
from ftlaunch.strategies.schedule import make_schedule
from ftlaunch.strategies.session import (
    SessionRequest,
    Stop,
    create_strategy,
    prepare,
    signs_of_life,
    strategy_request,
)

# As many steps as this at most tell where the time goes.
_SHARE_STEPS = 10


def measure(request: SessionRequest, *, emit: Callable[[Progress], None], stop: Stop) -> bool:
    """Collective: measure the job's steps; rank 0 emits `Measured`. There is nothing to save: a request to
    stop ends the rank where it is.
    """
    options = request.options
    say = emit if request.world.is_main else lambda message: None
    alive = signs_of_life(emit)
    say(Phase(name="data"))
    tokens = _tokens(request, alive)
    size = options.train.global_batch_size
    if len(tokens.train) < size:
        raise UserError(
            f"there are {len(tokens.train)} training samples, fewer than the {size} of one global batch: no "
            "step would be like another. Use more data (or bench.samples), or lower "
            "train.global_batch_size."
        )
    say(Phase(name="model"))
    instruments = make_instruments(request.strategy, strategy_request(request, tokens))
    strategy = create_strategy(request, tokens)
    say(Phase(name="train"))
    measured = _Measurement(request, tokens, strategy, instruments, alive).run()
    say(measured)
    strategy.close()
    return False


def _tokens(request: SessionRequest, alive: Callable[[], None]) -> Tokens:
    options = request.options
    if options.data.name_or_path is not None:
        return prepare(request, alive)
    return synthetic_tokens(options)


class _Measurement:
    def __init__(
        self,
        request: SessionRequest,
        tokens: Tokens,
        strategy: Strategy,
        instruments: Instruments,
        alive: Callable[[], None],
    ) -> None:
        options = request.options
        self._bench = options.bench
        self._tokens = tokens
        self._config = read_model_config(options.model)
        self._instruments = instruments
        self._watched = _Watched(strategy, instruments)
        self._strategy = strategy
        size = options.train.global_batch_size
        self._windows = Windows(
            # Without what an epoch has left at its end: every step has a whole global batch.
            order=SampleOrder(
                num_samples=len(tokens.train) // size * size,
                global_batch_size=size,
                seed=options.train.seed,
            ),
            collator=make_collator(
                options,
                tokens,
                tokens.train,
                class_weights=class_weights(options, tokens),
                alive=alive,
            ),
            rank=strategy.world.rank,
            world_size=strategy.world.size,
            micro_batch=request.micro_batch,
            max_tokens=request.max_tokens,
        )
        self._schedule = make_schedule(options.train, total_steps(options, tokens))
        self._cursor = Cursor()

    def run(self) -> Measured:
        bench = self._bench
        self._steps(bench.warmup_steps, lambda report: None)
        self._meet()
        # A product's matrices are no part of training.
        held = self._strategy.peak_memory_bytes()
        peak = self._instruments.peak_flops()
        self._meet()
        ends: list[float] = []
        reports: list[StepReport] = []

        def note(report: StepReport) -> None:
            ends.append(time.perf_counter())
            reports.append(report)

        started = time.perf_counter()
        self._steps(bench.steps, note)
        self._instruments.synchronize()
        ends[-1] = time.perf_counter()
        seconds = np.diff([started, *ends])
        shares, share_steps = self._shares(min(bench.steps, _SHARE_STEPS))
        mine = {**asdict(shares), "peak_flops_per_second": peak}
        mine["peak_memory_bytes"] = float(max(held, self._strategy.peak_memory_bytes()))
        by_rank = self._gather(np.array(list(mine.values()), dtype=np.float64))
        by_step = self._gather(seconds)
        windows = [report.window for report in reports]
        return Measured(
            step_seconds=tuple(by_step.max(axis=0).tolist()),
            seconds=float(by_step.sum(axis=1).max()),
            num_samples=sum(len(window.indices) for window in windows),
            num_tokens=sum(window.num_tokens for window in windows),
            num_padded_tokens=sum(window.padded_tokens for window in windows),
            skipped_steps=sum(not report.outcome.applied for report in reports),
            model_flops=self._flops(windows),
            ranks=tuple(dict(zip(mine, row, strict=True)) for row in by_rank.tolist()),
            share_steps=share_steps,
        )

    def _steps(self, count: int, after: Callable[[StepReport], None]) -> None:
        """Collective: `count` steps of the training loop."""

        def after_step(report: StepReport) -> bool:
            after(report)
            return False

        train(
            cast(Strategy, self._watched),
            self._windows,
            self._schedule,
            self._cursor,
            total_steps=self._cursor.step + count,
            after_step=after_step,
        )

    def _meet(self) -> None:
        self._strategy.sum_across_ranks(np.zeros(1, dtype=np.float64))

    def _gather(self, mine: NDArray[np.float64]) -> NDArray[np.float64]:
        """Collective: (ranks, …) of what each rank has."""
        world = self._strategy.world
        everyone = np.zeros((world.size, *mine.shape), dtype=np.float64)
        everyone[world.rank] = mine
        gathered: NDArray[np.float64] = self._strategy.sum_across_ranks(everyone)
        return gathered

    # -- where the time goes ----------------------------------------------------------------

    def _shares(self, count: int) -> tuple[Shares, int]:
        """Collective: of this rank, from `count` steps that are watched."""
        watched, instruments = self._watched, self._instruments
        stamped: list[list[tuple[Any, Any]]] = []
        with instruments.watching(self._strategy):
            self._meet()
            instruments.take_waits()
            watched.calls.clear()
            watched.watches = True
            began = instruments.stamp()

            def note(report: StepReport) -> None:
                stamped.append(instruments.take_waits())

            self._steps(count, note)
            watched.watches = False
        # Stamps are read when all steps are over: to wait for the device between them, or to ask for its
        # times, would be counted as what lies between two steps.
        instruments.synchronize()
        total = instruments.seconds(began, watched.calls[-1][1])
        calls = sum(instruments.seconds(*call) for call in watched.calls)
        waits = [[instruments.seconds(*wait) for wait in of_step] for of_step in stamped]
        communication, idle = self._told_apart(waits)
        return make_shares(total, calls, communication, idle), count

    def _told_apart(self, waits: list[list[float]]) -> tuple[float, float]:
        """Collective: (communication, idle) of this rank; waits[step][i] are this rank's."""
        counts = self._gather(np.array([len(each) for each in waits], dtype=np.float64))
        flat = np.array([wait for each in waits for wait in each], dtype=np.float64)
        if not (counts == counts[0]).all():
            # Not the same collectives everywhere: step by step is the most that can be compared.
            flat = np.array([sum(each) for each in waits], dtype=np.float64)
        if not flat.size:
            return 0.0, 0.0
        return split_waits(self._gather(flat).tolist())[self._strategy.world.rank]

    # -- what was done ----------------------------------------------------------------------

    def _flops(self, windows: list[Window]) -> float | None:
        shape = read_shape(self._config)
        weights = self._instruments.weights(self._strategy)
        if shape is None or not is_countable(weights, shape):
            return None
        return step_flops(
            weights,
            shape,
            self._tokens.train.lengths(
                np.concatenate([window.indices for window in windows])
            ).tolist(),
            int(sum(window.total_items for window in windows)),
        )


class _Watched:
    """The strategy as the loop sees it, its calls timed where asked to.

    calls   (begin, end) of each call of a step
    """

    def __init__(self, strategy: Strategy, instruments: Instruments) -> None:
        self._strategy = strategy
        self._instruments = instruments
        self.world = strategy.world
        self.watches = False
        self.calls: list[tuple[Any, Any]] = []

    def accumulate(
        self, batch: Batch, total_items: float, *, last: bool, say: Say = say_nothing
    ) -> None:
        if not self.watches:
            self._strategy.accumulate(batch, total_items, last=last, say=say)
            return
        begin = self._instruments.stamp()
        self._strategy.accumulate(batch, total_items, last=last, say=say)
        if last:
            self._instruments.exchange_ended()
        self.calls.append((begin, self._instruments.stamp()))

    def apply(self, learning_rate: float) -> StepOutcome:
        if not self.watches:
            return self._strategy.apply(learning_rate)
        begin = self._instruments.stamp()
        outcome = self._strategy.apply(learning_rate)
        self.calls.append((begin, self._instruments.stamp()))
        return outcome

    def __getattr__(self, name: str) -> Any:
        return getattr(self._strategy, name)
