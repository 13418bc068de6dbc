"""How the ranks of a MindSpore job leave each other: rank 0, which waits for the others' answers, first."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

import pytest

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


@pytest.fixture
def meeting():
    """(rank 0 in a process of its own, rank 1's goodbye, where rank 0 listens)"""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        kept = open_goodbye(_world(0), lambda number: os.write(writing, number.to_bytes(8, "big")))
        time.sleep(60)
        os._exit(kept is None)
    number = int.from_bytes(os.read(reading, 8), "big")
    yield child, number, number >> 32
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    os.close(writing)


def _stays_for(child, goodbye):
    """Whether a rank stays for rank 0, and no longer than that lives."""
    leaving = threading.Thread(target=goodbye.say)
    leaving.start()
    # A rank that is turned away leaves after less than that.
    leaving.join(2)
    stayed = leaving.is_alive()
    os.kill(child, signal.SIGKILL)
    # It would stay for a minute.
    leaving.join(10)
    return stayed and not leaving.is_alive()


def test_nobody_stays_for_a_rank_0_that_is_gone(meeting):
    child, number, _ = meeting
    assert _stays_for(child, open_goodbye(_world(1), lambda _: number))


def test_who_is_none_of_the_ranks_takes_no_ranks_place(meeting):
    child, number, port = meeting
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"GET ")
        assert _stays_for(child, open_goodbye(_world(1), lambda _: number))


def test_a_rank_that_reaches_nobody_leaves_nevertheless():
    # Nobody listens on port 1; 0 says that rank 0 could not listen.
    open_goodbye(_world(1), lambda _: 0).say()
    open_goodbye(_world(1), lambda _: 1 << 32).say()
