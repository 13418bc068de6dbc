"""How the ranks of a MindSpore job leave each other: rank 0, which waits for the others' answers, first."""

from __future__ import annotations

import os
import signal
import time

from ftlaunch.cluster.world import World
from ftlaunch.strategies.mindspore.goodbye import open_goodbye
from tests.mindspore.ranks import run_ranks


def _leave(world, folder, delay):
    """Has rank 0 seen the last exchange end when this rank is through with leaving?"""
    from ftlaunch.strategies.mindspore import group

    group.choose_device("cpu", 0)
    goodbye = group.join_group(world)
    exchange = group.all_reduce

    def slow_to_see(values):
        summed = exchange(values)
        if world.rank == 0:
            time.sleep(delay)
            (folder / "through").touch()
        return summed

    group.all_reduce = slow_to_see
    group.leave_group(world, goodbye)
    return (folder / "through").exists()


def test_the_others_stay_until_rank_0_is_through(tmp_path):
    assert run_ranks(3, _leave, tmp_path, 1.5) == [True] * 3


def _world(rank):
    return World(
        rank=rank,
        size=2,
        local_rank=rank,
        local_size=2,
        node_rank=0,
        num_nodes=1,
        master_address="127.0.0.1",
        master_port=1,
    )


def test_nobody_stays_for_a_rank_0_that_is_gone():
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        open_goodbye(_world(0), lambda port: os.write(writing, port.to_bytes(4, "big")))
        time.sleep(60)
        os._exit(1)
    try:
        goodbye = open_goodbye(_world(1), lambda _: int.from_bytes(os.read(reading, 4), "big"))
        os.kill(child, signal.SIGKILL)
        started = time.monotonic()
        goodbye.say()
        # It would stay for a minute.
        assert time.monotonic() - started < 10
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)


def test_a_rank_that_reaches_nobody_leaves_nevertheless():
    # Nobody listens on port 1; 0 says that rank 0 could not listen.
    open_goodbye(_world(1), lambda _: 0).say()
    open_goodbye(_world(1), lambda _: 1).say()
