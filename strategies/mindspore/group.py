"""The ranks of a MindSpore job: their device, their communication group, what they share.

The group is met through the scheduler process that the agent of node 0 runs; where it listens and
who this rank is stands in MindSpore's own variables (`strategies.mindspore_environment`).
"""

from __future__ import annotations

import logging
import resource
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import communication, ops
from numpy.typing import NDArray

from ftlaunch.cluster.world import World
from ftlaunch.strategies.base import StrategyRequest
from ftlaunch.strategies.mindspore.goodbye import Goodbye, open_goodbye

_TARGETS = {"cpu": "CPU", "ascend": "Ascend"}


def use_device(request: StrategyRequest) -> None:
    """This rank's device, and what its random numbers begin with."""
    choose_device(request.accelerator, request.device)
    ms.set_seed(request.options.train.seed % 2**31)


def choose_device(accelerator: str, device: int) -> None:
    """The device, and the mode in which every operation runs when it is called."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    if accelerator == "ascend":
        # By the place that the launcher has chosen: without one every rank would begin on the first
        # NPU, since only the meeting of the ranks, later, tells MindSpore the others.
        ms.set_device("Ascend", device)
    else:
        ms.set_device("CPU")
        # Asynchronous operations pass through four threads that spin while they wait for each other:
        # with more ranks than a few cores a step takes 15 times as long (27 s for 8 steps, not 1.7).
        ms.set_context(pynative_synchronize=True)


def join_group(world: World) -> Goodbye:
    """Collective: meet the other ranks at the scheduler. What it returns belongs to `leave_group`."""
    if world.size == 1:
        return Goodbye(world, [])
    communication.init()
    if ms.get_context("device_target") != "CPU":
        # HCCL's ranks exchange with their neighbours, on the devices.
        return Goodbye(world, [])
    return open_goodbye(world, lambda number: int(gather(world, np.array([number]))[0, 0]))


def all_reduce(values: Any) -> Any:
    """Collective: the elementwise sum of a float32 tensor over the ranks."""
    return ops.AllReduce()(values)


def gather(world: World, values: NDArray[Any]) -> NDArray[Any]:
    """Collective: what each rank has, (ranks, …), bit for bit and in the order of the ranks.

    Travels as int32, which every device passes on unchanged: NPUs gather no float64, CPUs round both
    float64 and int64 on the way, and an NPU that saturates would make an infinite number finite.
    """
    whole = np.ascontiguousarray(values, dtype=np.float64)
    if world.size == 1:
        return whole[np.newaxis]
    bits = whole.reshape(-1).view(np.int32)
    gathered = ops.AllGather()(ms.Tensor(bits)).asnumpy()
    by_rank: NDArray[Any] = gathered.view(np.float64).reshape(world.size, *whole.shape)
    return by_rank


def sum_across_ranks(world: World, values: NDArray[Any]) -> NDArray[Any]:
    """Collective: elementwise sum, in the dtype given (float32 or float64)."""
    if world.size == 1 or values.size == 0:
        return values
    if values.dtype == np.float64:
        total: NDArray[Any] = gather(world, values).sum(axis=0)
        return total
    flat = ms.Tensor(np.ascontiguousarray(values).reshape(-1))
    # A copy: what `asnumpy` shows is MindSpore's memory, which ends with the group.
    summed: NDArray[Any] = all_reduce(flat).asnumpy().copy().reshape(values.shape)
    return summed


def peak_memory_bytes(accelerator: str) -> int:
    if accelerator == "ascend":
        return int(ms.runtime.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def leave_group(world: World, goodbye: Goodbye) -> None:
    """Collective: nobody leaves while another still needs it."""
    if world.size == 1:
        return
    try:
        all_reduce(ms.Tensor(np.zeros(1, dtype=np.float32))).asnumpy()
    except RuntimeError as error:
        # All have come this far; a rank that died is seen to have by the agent.
        logging.getLogger(__name__).info("leaving the group: %s", error)
    goodbye.say()
    communication.release()
