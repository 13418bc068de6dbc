"""What an agent hears of a rank that says much: everything, in its order, and not at every word."""

from __future__ import annotations

import json
import os
import selectors
import time

import pytest

from ftlaunch.cluster.events import Exited, FromRank, RankStart
from ftlaunch.cluster.rank_watch import RankWatch


class _Agent:
    """A watch with one rank, whose end of the pipe is ours."""

    def __init__(self, folder):
        self.selector = selectors.DefaultSelector()
        self.heard: list[int] = []
        self.watch = RankWatch(self.selector, self._note, lambda: False)
        start = RankStart(
            rank=0,
            title="",
            module="",
            arguments=[],
            env={},
            working_dir=None,
            log_path=str(folder / "log"),
            inherits_listener=False,
            shows_output=False,
        )
        log, self.pipe = self.watch.add(start)
        os.close(log)

    def _note(self, event):
        assert isinstance(event, FromRank)
        self.heard.append(event.payload["number"])

    def say(self, number):
        os.write(self.pipe, json.dumps({"number": number}).encode() + b"\n")

    def turn(self, timeout):
        """As the agent's loop does; whether somebody was ready."""
        due = self.watch.due_at()
        wait = timeout if due is None else min(timeout, max(0.0, due - time.monotonic()))
        ready = self.selector.select(wait)
        for key, _ in ready:
            key.data()
        self.watch.look()
        return bool(ready)


@pytest.fixture
def agent(tmp_path):
    made = _Agent(tmp_path)
    yield made
    made.watch.forget_all()
    made.selector.close()


def test_the_first_word_is_heard_at_once_and_many_words_together(agent):
    agent.say(0)
    assert agent.turn(5.0) and agent.heard == [0]
    wakes, said = 0, 1
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        agent.say(said)
        said += 1
        wakes += agent.turn(0.0)
    while len(agent.heard) < said:
        agent.turn(1.0)
    assert agent.heard == list(range(said))
    # A hundred times a second at most, however much was said.
    assert wakes <= 55 < said
    os.close(agent.pipe)


def test_what_was_said_before_the_end_is_heard_while_the_rank_is_left_alone(agent):
    for number in range(3):
        agent.say(number)
        agent.turn(5.0)
    agent.say(3)
    os.close(agent.pipe)
    exited = Exited(rank=0, code=1, signal=None, time=0.0)
    agent.watch.exited(exited)
    assert agent.heard == [0, 1, 2, 3]
    assert not agent.selector.get_map()


def test_an_end_of_file_while_the_rank_is_left_alone(agent):
    for number in range(2):
        agent.say(number)
        agent.turn(5.0)
    os.close(agent.pipe)
    for _ in range(3):
        agent.turn(0.05)
    assert agent.heard == [0, 1]
    assert not agent.selector.get_map()
    assert agent.watch.due_at() is None
