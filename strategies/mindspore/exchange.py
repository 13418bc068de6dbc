"""The exchange test of MindSpore's ranks. On Ascend, over HCCL, it was not run on hardware yet."""

from __future__ import annotations

import time

import mindspore as ms
import numpy as np
from numpy.typing import NDArray

from ftlaunch.cluster.world import World
from ftlaunch.strategies.exchange import ExchangeRequest
from ftlaunch.strategies.mindspore.goodbye import Goodbye
from ftlaunch.strategies.mindspore.group import (
    all_reduce,
    choose_device,
    join_group,
    leave_group,
)


def open_exchange(request: ExchangeRequest) -> MindSporeExchange:
    """Collective: meet the other ranks at the scheduler."""
    choose_device(request.accelerator, request.device)
    return MindSporeExchange(request.world, join_group(request.world))


class MindSporeExchange:
    def __init__(self, world: World, goodbye: Goodbye) -> None:
        self._world = world
        self._goodbye = goodbye

    def add(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        # A copy: what `asnumpy` shows is MindSpore's memory, which ends with the group.
        summed: NDArray[np.float32] = all_reduce(ms.Tensor(values)).asnumpy().copy()
        return summed

    def time(self, num_bytes: int, repeats: int) -> list[float]:
        tensor = ms.Tensor(np.zeros(num_bytes // 4, dtype=np.float32))
        # The first one opens connections, and on an NPU compiles.
        self._time_one(tensor)
        return [self._time_one(tensor) for _ in range(repeats)]

    def _time_one(self, tensor: ms.Tensor) -> float:
        started = time.perf_counter()
        all_reduce(tensor)
        # Not by its numbers: fetching them would be measured, too.
        ms.runtime.synchronize()
        return time.perf_counter() - started

    def leave(self) -> None:
        leave_group(self._world, self._goodbye)
