"""The ranks of a torch job: their device, their process group, what they share."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import resource
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch._C._distributed_c10d import TCPStore

from ftlaunch.cluster.world import World
from ftlaunch.strategies.base import StrategyRequest
from ftlaunch.strategies.torch.attention import use_byte_dropout

# Process groups that are no longer used, and what refers to them; they end with the process.
_LEFT: list[Any] = []


def use_device(request: StrategyRequest) -> torch.device:
    """This rank's device, made the current one."""
    torch.set_num_threads(request.num_threads)
    if request.accelerator != "cuda":
        # Attention with dropout goes by the products that are written out, on a CPU as well, and those
        # are widened to fp32 unless this is set. Scores are scaled before, and bf16 does not overflow.
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(request.precision == "bf16")
        use_byte_dropout()
        _take_turns()
        return torch.device("cpu")
    device = torch.device("cuda", request.world.local_rank)
    torch.cuda.set_device(device)
    return device


def _take_turns() -> None:
    """A thread of this rank that is woken waits for its turn, as those that it makes from now on.

    An exchange over gloo wakes several, and each would interrupt the one that woke it: a step of two ranks
    on two cores takes twice as long. Whoever has chosen another policy keeps it.
    """
    with contextlib.suppress(OSError):  # a sandbox may forbid it
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def join_process_group(request: StrategyRequest, device: torch.device) -> None:
    """Collective: meet at the store that rank 0 hosts on the socket its agent has held for it."""
    meet(
        request.world,
        device,
        listen_fd=request.listen_fd,
        timeout_seconds=request.timeout_seconds,
    )


def meet(
    world: World, device: torch.device, *, listen_fd: int | None, timeout_seconds: float
) -> None:
    """Collective: as `join_process_group`, by what of a request it takes."""
    timeout = datetime.timedelta(seconds=timeout_seconds)
    hosts = world.is_main
    store = TCPStore(
        world.master_address,
        world.master_port,
        world.size,
        is_master=hosts,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listen_fd if hosts else None,
    )
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout
    )
    # The store is rank 0's and ends with it, while others may still read there how to reach each other.
    # A rank that fails at once would make them fail of a lost connection.
    dist.all_reduce(torch.zeros(1))


def sum_across_ranks(world: World, values: NDArray[Any]) -> NDArray[Any]:
    """Collective: elementwise sum, in the dtype given."""
    if world.size == 1:
        return values
    tensor = torch.from_numpy(np.array(values))
    dist.all_reduce(tensor)
    return tensor.numpy()


def peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def leave_process_group(*kept: Any) -> None:
    """Collective. The group is left, not destroyed: ~ProcessGroupGloo joins its threads while it
    holds the GIL, and a thread that wants the GIL to drop its last tensor then waits for ever
    (torch 2.13). What refers to it is kept, too.
    """
    if not dist.is_initialized():
        return
    _LEFT.append((kept, dist.group.WORLD))
    try:
        dist.barrier()
    except RuntimeError as error:
        # All work is done: a peer that left first does not make the job a failed one.
        logging.getLogger(__name__).info("leaving the process group: %s", error)
