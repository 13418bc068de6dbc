"""Real ranks for tests: processes that meet at MindSpore's scheduler, as a job's ranks do.

They are forked from a server that has imported everything once and runs nothing: a fork of a process
that has run MindSpore's operations has none of its threads.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import traceback
from collections.abc import Callable
from typing import Any

from ftlaunch.cluster.ports import hold_port
from ftlaunch.cluster.world import World
from ftlaunch.strategies.mindspore_environment import rank_variables, scheduler_variables

_SECONDS = 180.0
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["ftlaunch.strategies.mindspore.data_parallel", "tests.tiny"])


def run_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """[function(world, *args) of every rank]. AssertionError with the traceback of one that fails."""
    os.environ.setdefault("GLOG_v", "3")
    holder = hold_port("127.0.0.1", 0, listens=False)
    port = holder.getsockname()[1]
    processes, receivers = [], []
    for rank in range(-1 if size > 1 else 0, size):
        world = World(
            rank=max(rank, 0),
            size=size,
            local_rank=max(rank, 0),
            local_size=size,
            node_rank=0,
            num_nodes=1,
            master_address="127.0.0.1",
            master_port=port,
        )
        if rank < 0:
            variables = scheduler_variables(world, timeout_seconds=60)
            process = _CONTEXT.Process(target=_scheduler, args=(variables,))
        else:
            variables = rank_variables(world, timeout_seconds=60)
            receiver, sender = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(
                target=_rank, args=(sender, variables, function, world, args)
            )
            receivers.append(receiver)
        process.start()
        processes.append(process)
    try:
        return [
            _result(process, receiver)
            for process, receiver in zip(processes[-size:], receivers, strict=True)
        ]
    finally:
        for process in processes:
            process.kill()
            process.join(10)
        holder.close()


def _result(process: Any, receiver: Any) -> Any:
    assert receiver.poll(_SECONDS), f"a rank did not answer within {_SECONDS} s"
    try:
        ok, value = receiver.recv()
    except EOFError:
        process.join(10)
        raise AssertionError(f"a rank ended with {process.exitcode}") from None
    assert ok, value
    return value


def _scheduler(variables: dict[str, str]) -> None:
    os.environ.update(variables)
    from ftlaunch.strategies.mindspore import scheduler

    scheduler.main()


def _rank(
    sender: Any, variables: dict[str, str], function: Callable[..., Any], world: World, args: Any
) -> None:
    os.environ.update(variables)
    faulthandler.enable()
    try:
        sender.send((True, function(world, *args)))
    except BaseException as error:  # noqa: BLE001 - shown by the parent
        sender.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    sender.close()
    os._exit(0)
