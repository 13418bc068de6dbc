"""A rank of `benchmarks.overhead`: our loop and two plain ones in turn, in blocks of the same steps."""

from __future__ import annotations

import contextlib
import copy
import cProfile
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ftlaunch.launcher import worker
from ftlaunch.strategies import training
from ftlaunch.strategies.loop import Cursor, Windows, train

_PROFILE_VARIABLE = "OVERHEAD_PROFILE"
# (input tensors, labels, weights) of a micro-batch.
_Made = tuple[dict[str, torch.Tensor], torch.Tensor]


def main() -> int:
    """As a rank of ours, but for the loop."""
    result, blocks, steps = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    in_turn = InTurn(result, blocks, steps)
    mock.patch.object(training, "train", in_turn.run).start()
    return worker.main()


class InTurn:
    """Stands in the place of `loop.train`, in a job of two blocks more than are measured: the first to warm
    up, the last to end the job.
    """

    def __init__(self, result: str, blocks: int, steps: int) -> None:
        self._result = result
        self._blocks = blocks
        self._steps = steps

    def run(
        self, strategy: Any, windows: Windows, schedule: Any, cursor: Cursor, **others: Any
    ) -> None:
        last = others.pop("total_steps")
        profile = cProfile.Profile() if os.environ.get(_PROFILE_VARIABLE) else None

        def ours(total_steps: int) -> None:
            if profile is not None:
                profile.enable()
            train(strategy, windows, schedule, cursor, total_steps=total_steps, **others)
            if profile is not None:
                profile.disable()

        ours(self._steps)
        model, optimizer = plain_copy(strategy)
        warm_up = [make(windows, step) for step in range(cursor.step)]
        plain(model, optimizer, warm_up, agrees=True)
        wall: list[list[float]] = []
        processor: list[list[float]] = []
        for _ in range(self._blocks):
            first = cursor.step
            made = [make(windows, step) for step in range(first, first + self._steps)]
            sides: list[Callable[[], None]] = [
                partial(ours, first + self._steps),
                partial(plain, model, optimizer, made, agrees=False),
                partial(plain, model, optimizer, made, agrees=True),
            ]
            taken = [(0.0, 0.0)] * len(sides)
            for number in range(len(sides)):
                side = (number + len(wall)) % len(sides)
                strategy.sum_across_ranks(np.zeros(1))
                taken[side] = timed(sides[side])
            wall.append([each[0] / self._steps for each in taken])
            processor.append([each[1] / self._steps for each in taken])
        # The end of the job, with its checkpoint, is in no block that is measured.
        train(strategy, windows, schedule, cursor, total_steps=last, **others)
        if strategy.world.is_main:
            if profile is not None:
                profile.dump_stats(os.environ[_PROFILE_VARIABLE])
            with open(self._result, "w") as file:
                json.dump({"wall": wall, "processor": processor}, file)


def timed(run: Callable[[], None]) -> tuple[float, float]:
    """Seconds by the clock, and of this process's processor time."""
    started, worked = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - started, time.process_time() - worked


def make(windows: Windows, step: int) -> tuple[list[_Made], float]:
    """The micro-batches of a step as tensors, and what its loss is divided by."""
    indices = windows.order.global_batch(step)
    made: list[_Made] = []
    for batch, _ in windows.micro_batches(indices, step):
        inputs = {name: torch.from_numpy(values) for name, values in batch.inputs.items()}
        made.append((inputs, torch.from_numpy(batch.labels)))
    return made, windows.total_items(indices, step)


def plain_copy(strategy: Any) -> tuple[Any, Any]:
    """The same model as anyone would train it: DDP where there are several ranks, fused AdamW."""
    model = copy.deepcopy(strategy.model)
    if strategy.world.size > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    options = strategy._optimizer.param_groups[0]
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=options["lr"],
        betas=options["betas"],
        eps=options["eps"],
        weight_decay=options["weight_decay"],
        fused=True,
    )
    return model, optimizer


def plain(
    model: Any, optimizer: Any, made: list[tuple[list[_Made], float]], *, agrees: bool
) -> None:
    """What anyone would write for these micro-batches.

    agrees   gradients are clipped, and the ranks sum up their losses
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    for micro_batches, total_items in made:
        losses = torch.zeros((), dtype=torch.float64)
        for number, (inputs, labels) in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            with contextlib.nullcontext() if last or ranks == 1 else model.no_sync():
                logits = model(**inputs).logits
                loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
                torch.autograd.backward(loss * (ranks / total_items))
            if agrees:
                losses += loss.detach()
        if agrees:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if ranks > 1:
                dist.all_reduce(losses)
            losses.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=ranks == 1)


if __name__ == "__main__":
    main()
