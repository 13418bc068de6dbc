"""Pipes to agents: what is sent to one that reads slowly, or not at all, holds up nobody."""

from __future__ import annotations

import sys
import time

import pytest

from ftlaunch.cluster.coordinator import Coordinator
from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.events import Hello, Prepare, encode_event
from ftlaunch.cluster.nodes import Nodes
from ftlaunch.cluster.transport import Orders, Way

# More than a pipe holds.
LARGE = {f"LARGE_{number}": "x" * 60_000 for number in range(5)}
SLOW = (
    sys.executable,
    "-c",
    "import time, os, sys; time.sleep(3.0); os.execv(sys.argv[1], sys.argv[1:])",
)
DEAF = (sys.executable, "-c", "import time; time.sleep(60)")


def test_a_large_environment_waits_for_what_reads_it_and_nobody_for_that(tmp_path):
    nodes = Nodes(
        [Way(name=f"n{number}", words=SLOW) for number in range(2)],
        Orders(heartbeat_seconds=30.0, env=LARGE),
        log_dir=tmp_path,
    )
    started = time.monotonic()
    nodes.open()
    try:
        assert time.monotonic() - started < 3.0
        seen: set[int] = set()
        for number, event in nodes.poll_until(30.0, lambda: len(seen) < 2):
            assert event is not None, (tmp_path / f"agent-{number}.log").read_text()
            seen.add(number)
        assert seen == {0, 1}
    finally:
        nodes.close(grace_seconds=0.0)


def test_one_that_never_reads_holds_up_neither_the_job_nor_its_end(tmp_path):
    orders = Orders(heartbeat_seconds=0.3, env=LARGE)
    coordinator = Coordinator([Way(name="n0", words=DEAF)], orders, log_dir=tmp_path)
    started = time.monotonic()
    with coordinator:
        coordinator.prepare(Prepare(start_method="exec", env=LARGE, preload=[], grace_seconds=0.0))
        time.sleep(1.0)
        took = time.monotonic() - started
        coordinator._nodes.give_up(0, "deaf")
    assert took < 3.0
    assert time.monotonic() - started < 6.0


def test_many_that_close_their_pipes_and_stay_are_lost_in_one_second(tmp_path):
    stays = (sys.executable, "-c", "import os, time; os.close(1); time.sleep(60)")
    ways = [Way(name=f"n{number}", words=stays) for number in range(6)]
    nodes = Nodes(ways, Orders(heartbeat_seconds=30.0), log_dir=tmp_path)
    nodes.open()
    try:
        # So that all have closed theirs, and are found in one look.
        time.sleep(3.0)
        started = time.monotonic()
        lost = [number for number, event in nodes.poll(5.0) if event is None]
        assert sorted(lost) == list(range(6))
        assert time.monotonic() - started < 3.0
        assert {node.lost for node in nodes} == {"its pipe was closed"}
    finally:
        for number in range(6):
            nodes[number].process.kill()
        nodes.close(grace_seconds=0.0)


def test_a_machine_in_words_of_another_version_is_the_users_to_mend(tmp_path):
    hello = Hello(
        machine={"hostname": 7}, pid=1, boot_id="", network="", addresses={"nowhere": "x"}
    )
    script = f"import os, sys, time; os.write(1, {encode_event(hello)!r}); time.sleep(60)"
    way = Way(name="n7", words=(sys.executable, "-c", script))
    with (
        Coordinator([way], Orders(heartbeat_seconds=30.0), log_dir=tmp_path) as coordinator,
        pytest.raises(UserError, match=r"n7 describes its machine .* another version of ftlaunch"),
    ):
        try:
            coordinator.machines()
        finally:
            coordinator._nodes.give_up(0, "heard")
