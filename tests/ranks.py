"""Real ranks for tests: forked processes that meet over gloo, as a job's ranks do."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from typing import Any

# Imported here once, instead of by every rank anew: what the first model and the first DDP load.
import torch._dynamo
import torch.nn.parallel
import transformers.models.bert.modeling_bert
import transformers.models.modernbert.modeling_modernbert
import transformers.models.qwen2.modeling_qwen2

from ftlaunch.cluster.ports import hold_port
from ftlaunch.cluster.world import World

_SECONDS = 180.0
_PRELOADED = (torch, transformers)


def run_ranks(
    size: int, function: Callable[..., Any], *args: Any, seconds: float = _SECONDS
) -> list[Any]:
    """[function(world, listen_fd, *args) of every rank], run in `size` forked processes.

    Forked even when size is 1, so that this process never has a process group or autograd threads.
    AssertionError with the traceback of the first rank that fails.
    """
    context = multiprocessing.get_context("fork")
    listener = hold_port("127.0.0.1", 0)
    port = listener.getsockname()[1]
    ranks = []
    for rank in range(size):
        world = World(
            rank=rank,
            size=size,
            local_rank=rank,
            local_size=size,
            node_rank=0,
            num_nodes=1,
            master_address="127.0.0.1",
            master_port=port,
        )
        receiver, sender = context.Pipe(duplex=False)
        fd = listener.fileno() if rank == 0 else None
        process = context.Process(target=_rank, args=(sender, function, world, fd, args))
        process.start()
        sender.close()
        ranks.append((process, receiver))
    listener.close()
    try:
        return [_result(receiver, seconds) for _, receiver in ranks]
    finally:
        for process, _ in ranks:
            process.kill()
            process.join(10)


def _result(receiver: Any, seconds: float) -> Any:
    assert receiver.poll(seconds), f"a rank did not answer within {seconds} s"
    ok, value = receiver.recv()
    assert ok, value
    return value


def _rank(
    sender: Any, function: Callable[..., Any], world: World, fd: int | None, args: Any
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        sender.send((True, function(world, fd, *args)))
    except BaseException as error:  # noqa: BLE001 - shown by the parent
        text = traceback.format_exc()
        # So that a test can look at what was raised.
        sender.send((False, f"{type(error).__name__}: {error}\n{text}"))
    sender.close()
    os._exit(0)
