"""Many nodes and many samples: counted, not timed. Figures are in `benchmarks.scale`."""

from __future__ import annotations

import sys
import time
import tracemalloc

import numpy as np
import pytest

from benchmarks import scale
from benchmarks.fake_agents import fake_agents
from ftlaunch.cluster import nodes
from ftlaunch.cluster.events import decode_event
from ftlaunch.cluster.nodes import Nodes
from ftlaunch.cluster.transport import Node, Orders, Way
from ftlaunch.strategies.data import sample_order
from ftlaunch.strategies.data.sample_order import SampleOrder, permute

STEPS = 20


@pytest.mark.parametrize("number", [4, 192])
def test_a_node_costs_as_many_messages_whatever_their_number(number, tmp_path, monkeypatch):
    """In: hello, started, exited, killed. Out: prepare, start, kill. Pings come after 10 s."""
    heard, written = 0, 0
    write = Node.write

    def counting_decode(line):
        nonlocal heard
        heard += 1
        return decode_event(line)

    def counting_write(node, data):
        nonlocal written
        written += 1
        return write(node, data)

    monkeypatch.setattr(nodes, "decode_event", counting_decode)
    monkeypatch.setattr(Node, "write", counting_write)
    started = time.monotonic()
    assert scale.run_coordinator(number, tmp_path, steps=STEPS) == STEPS
    pings = int((time.monotonic() - started) / 10) * number
    assert 4 * number + STEPS <= heard <= 4 * number + STEPS + pings
    assert 3 * number <= written <= 3 * number + pings


def _calls_of_a_look(number, tmp_path):
    """(Python functions called, descriptors waited for) while nothing arrives."""
    ways = [Way(name=f"node{n}") for n in range(number)]
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    with fake_agents(number):
        every = Nodes(ways, Orders(heartbeat_seconds=3600.0), log_dir=tmp_path)
        every.open()
        try:
            greeted: set[int] = set()
            for node, _ in every.poll_until(60.0, lambda: len(greeted) < number):
                greeted.add(node)
            every.poll(0.0)
            every._look_at = time.monotonic() + 3600.0
            sys.setprofile(count)
            every.poll(0.0)
            sys.setprofile(None)
            return calls, len(every._selector.get_map())
        finally:
            every.close(grace_seconds=0.0)


def test_an_event_costs_nothing_for_the_nodes_that_it_is_not_of(tmp_path):
    """One selector waits for all of them, and for signals."""
    few, many = (_calls_of_a_look(number, tmp_path) for number in (4, 64))
    assert few == (few[0], 5)
    assert many == (few[0], 65)


def _bytes_held(number, folder):
    held = {}

    def mark(phase):
        held[phase] = tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        scale.run_coordinator(number, folder, steps=0, mark=mark)
    finally:
        tracemalloc.stop()
    return held["meet"]


def test_memory_is_so_much_a_node(tmp_path):
    """Of 32, 64 and 128 nodes: the second 32 take as much as each of the next two."""
    _bytes_held(4, tmp_path / "warm")
    held = [_bytes_held(number, tmp_path / str(number)) for number in (32, 64, 128)]
    first, second = (held[1] - held[0]) / 32, (held[2] - held[1]) / 64
    assert 0 < second < 16 * 1024
    assert second < 1.5 * first


@pytest.mark.parametrize("num_samples", [10**6, 10**9])
def test_a_step_costs_the_same_whatever_the_number_of_samples(num_samples, monkeypatch):
    """32 samples a step: 32 steps are permuted together, so 320 steps take 10 times 1,024 positions."""
    order = SampleOrder(num_samples=num_samples, global_batch_size=32, seed=3)
    permuted = []

    def counting(positions, *arguments, **keywords):
        permuted.append(len(positions))
        return permute(positions, *arguments, **keywords)

    monkeypatch.setattr(sample_order, "permute", counting)
    sample_order._permuted.cache_clear()
    tracemalloc.start()
    for step in range(320):
        order.global_batch(step)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    sample_order._permuted.cache_clear()
    assert permuted == [1024] * 10
    # 1,024 numbers of 8 bytes, and what numpy makes of them on the way.
    assert peak < 200 * 1024


def test_steps_together_are_those_alone():
    """Over the borders of blocks and epochs: 2,500 samples are 79 steps of 32, the last one of 4."""
    order = SampleOrder(num_samples=2500, global_batch_size=32, seed=3)
    for step in (0, 31, 32, 77, 78, 79, 120, 157, 158):
        epoch, place = divmod(step, 79)
        positions = np.arange(place * 32, min(place * 32 + 32, 2500))
        alone = permute(positions, 2500, seed=3, epoch=epoch)
        assert order.global_batch(step).tolist() == alone.tolist()
