"""Agents that only speak the protocol, many in a process, for a coordinator that is the real one.

An agent says hello, answers pings, "starts" its rank and says that it has ended. Rank 0 also tells of
as many optimizer steps as it is asked for.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast
from unittest import mock

from ftlaunch.cluster.events import (
    Bind,
    Bound,
    Command,
    Event,
    Exited,
    FromRank,
    Hello,
    Kill,
    Killed,
    LineBuffer,
    Ping,
    Pong,
    Start,
    Started,
    decode_command,
    encode_event,
)
from ftlaunch.cluster.machine import detect_machine
from ftlaunch.cluster.transport import Node, Orders, Way

_AGENTS_OF_A_HELPER = 128
_STEP = {
    "kind": "step_done",
    "epoch": 0.5,
    "loss": 0.693,
    "learning_rate": 1e-4,
    "grad_norm": 1.25,
    "loss_scale": 1.0,
    "applied": True,
    "samples_per_second": 1000.0,
    "tokens_per_second": 20000.0,
    "samples_digest": "0123456789abcdef",
    "num_samples": 32,
    "num_tokens": 640,
    "num_padded_tokens": 700,
    "culprit": None,
}


class _Process:
    """What a coordinator sees of the process that leads to an agent."""

    def __init__(self, stdin: int, stdout: int) -> None:
        self.pid = os.getpid()
        self.stdin = os.fdopen(stdin, "wb", buffering=0)
        self.stdout = os.fdopen(stdout, "rb", buffering=0)

    def poll(self) -> int | None:
        return 0 if self.stdin.closed else None

    def wait(self, timeout: float | None = None) -> int:
        return 0

    def kill(self) -> None:
        pass


@contextlib.contextmanager
def fake_agents(number: int, *, steps: int = 0) -> Iterator[None]:
    """While it lasts, the agents that are started are `number` fakes, in the order of their nodes."""
    ours: list[tuple[int, int]] = []
    theirs: list[tuple[int, int]] = []
    for _ in range(number):
        reading, stdin = os.pipe()
        stdout, writing = os.pipe()
        os.set_blocking(stdin, False)
        os.set_blocking(stdout, False)
        ours.append((stdin, stdout))
        theirs.append((reading, writing))
    helpers = []
    machine = detect_machine(os.environ).to_dict()
    for first in range(0, number, _AGENTS_OF_A_HELPER):
        pairs = theirs[first : first + _AGENTS_OF_A_HELPER]
        helpers.append(
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    __name__,
                    json.dumps([pairs, 0 if first else steps, machine]),
                ],
                pass_fds=[descriptor for pair in pairs for descriptor in pair],
                cwd=Path(__file__).parent.parent,
            )
        )
        for descriptor in (each for pair in pairs for each in pair):
            os.close(descriptor)
    left = iter(ours)

    def start(way: Way, orders: Orders, marks: Mapping[str, str], log_path: Path) -> Node:
        process = cast(Any, _Process(*next(left)))
        return Node(name=way.name, kind=way.kind, process=process, log_path=log_path)

    try:
        with mock.patch("ftlaunch.cluster.nodes.start_agent", start):
            yield
    finally:
        for descriptor in (each for pair in left for each in pair):
            os.close(descriptor)
        for helper in helpers:
            try:
                helper.wait(timeout=30)
            except subprocess.TimeoutExpired:
                helper.kill()
                helper.wait()


class _Agent:
    def __init__(self, reading: int, writing: int, steps: int) -> None:
        self.reading = reading
        self._writing = writing
        self._steps = steps
        self._lines = LineBuffer()

    def say(self, event: Event) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self._writing, encode_event(event))

    def hear(self) -> bool:
        """False when the coordinator has hung up."""
        data = os.read(self.reading, 1 << 16)
        for line in self._lines.feed(data):
            self._obey(decode_command(line))
        if not data:
            os.close(self.reading)
            os.close(self._writing)
        return bool(data)

    def _obey(self, command: Command) -> None:
        if isinstance(command, Ping):
            self.say(Pong(echo=command.time, time=time.monotonic()))
        elif isinstance(command, Bind):
            self.say(Bound(port=1))
        elif isinstance(command, Kill):
            self.say(Killed(survivors=[]))
        elif isinstance(command, Start):
            for start in command.ranks:
                self.say(Started(rank=start.rank, pid=os.getpid()))
                for step in range(1, self._steps + 1):
                    payload = {**_STEP, "step": step}
                    self.say(FromRank(rank=start.rank, payload=payload, time=time.monotonic()))
                self.say(Exited(rank=start.rank, code=0, signal=None, time=time.monotonic()))


def main() -> None:
    pairs, steps, machine = json.loads(sys.argv[1])
    selector = selectors.DefaultSelector()
    for number, (reading, writing) in enumerate(pairs):
        agent = _Agent(reading, writing, 0 if number else steps)
        agent.say(
            Hello(machine=machine, pid=os.getpid(), boot_id="one", network="one", addresses={})
        )
        selector.register(reading, selectors.EVENT_READ, agent)
    while selector.get_map():
        for key, _ in selector.select():
            if not key.data.hear():
                selector.unregister(key.fd)


if __name__ == "__main__":
    main()
