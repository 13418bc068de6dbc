"""The agents of a job, one for each node: started, heard, kept in touch with, replaced, ended."""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ftlaunch.cluster.events import (
    Command,
    Event,
    Ping,
    Signalled,
    Suspend,
    decode_event,
    encode_command,
)
from ftlaunch.cluster.fork_link import JOB_VARIABLE
from ftlaunch.cluster.linux import kill_exactly, processes_with
from ftlaunch.cluster.signals import ANNOUNCEMENTS, StopSignals
from ftlaunch.cluster.transport import Node, Orders, Way, start_agent

_READ_BYTES = 1 << 16
_LEAVE_SECONDS = 8.0
# Pings within the time after which silence means loss.
_PINGS = 3
# How often silent ones are looked for, at most.
_LOOK_SECONDS = 0.1
# How soon what a pipe did not take is tried again.
_FLUSH_SECONDS = 0.01
# For agents that have closed their pipes, together, to say how they ended.
_LAST_WORDS_SECONDS = 1.0


class Nodes:
    """Every agent, and the signals that the user sends to the job."""

    def __init__(self, ways: Sequence[Way], orders: Orders, *, log_dir: Path) -> None:
        self.names = tuple(way.name for way in ways)
        self.signals = StopSignals()
        # Silence of an agent after which its node is taken for lost.
        self.heartbeat_seconds = orders.heartbeat_seconds
        self._ways = tuple(ways)
        self._orders = orders
        self._selector = selectors.DefaultSelector()
        self._nodes: list[Node] = []
        self._log_dir = log_dir
        self._polled_at = time.monotonic()
        self._look_at = 0.0
        self._pinger = threading.Thread(target=self._ping, daemon=True, name="pings")
        self._closing = threading.Event()
        self._job = secrets.token_hex(8)

    def __getitem__(self, number: int) -> Node:
        return self._nodes[number]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes)

    def open(self) -> None:
        self.signals.install()
        self._selector.register(self.signals.descriptor, selectors.EVENT_READ, None)
        for number in range(len(self)):
            self._nodes.append(self._start(number))
        self._pinger.start()

    def close(self, *, grace_seconds: float) -> None:
        """Every agent has left, or is made to; nothing of the job is left on this machine.

        grace_seconds   that ranks which are still there are given by their fork server
        """
        self._closing.set()
        self._pinger.join()
        for node in self._nodes:
            node.hang_up()
        deadline = time.monotonic() + grace_seconds + _LEAVE_SECONDS
        for node in self._nodes:
            self._end(node, deadline)
        self._selector.close()
        self.signals.restore()
        # Agents and fork servers have ended all that they knew of. Should one have been killed in
        # the act: whatever carries the job's mark on this machine is the job's.
        for mark in {self._mark(number) for number in range(len(self))}:
            for process in processes_with(JOB_VARIABLE, mark):
                kill_exactly(process)

    def replace_lost(self) -> list[int]:
        """Start an agent anew where one is gone; of which nodes."""
        lost = [number for number, node in enumerate(self._nodes) if node.lost is not None]
        for number in lost:
            self._nodes[number].process.kill()
            self._nodes[number].hang_up()
            self._end(self._nodes[number], time.monotonic())
            self._nodes[number] = self._start(number)
        return lost

    def _start(self, number: int) -> Node:
        node = start_agent(
            self._ways[number],
            self._orders,
            {JOB_VARIABLE: self._mark(number)},
            self._log_dir / f"agent-{number}.log",
        )
        self._selector.register(node.events, selectors.EVENT_READ, number)
        return node

    def _mark(self, number: int) -> str:
        """What everything of the job carries on a node; nodes that are played here share it."""
        return self._job if self._ways[number].kind == "local" else f"{self._job}-{number}"

    def _end(self, node: Node, deadline: float) -> None:
        """Wait for it to leave; what it still has to say is read by nobody any more."""
        while node.process.poll() is None and time.monotonic() < deadline:
            node.discard_events()
            time.sleep(0.005)
        if node.process.poll() is None:
            # The fork server ends its ranks when its agent is gone.
            node.process.kill()
            # One that the kernel holds up must not keep the others from being ended.
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.process.wait(timeout=_LEAVE_SECONDS)
        node.events.close()

    # -- talking ----------------------------------------------------------------------------

    def tell(self, command: Command) -> None:
        data = encode_command(command)
        for node in self._nodes:
            node.write(data)

    def poll(self, seconds: float) -> list[tuple[int, Event | None]]:
        """(node, event) of what has come within `seconds`; (node, None) once its agent is lost."""
        self._obey_suspend()
        arrived: list[tuple[int, Event | None]] = []
        unsent = [node.flush() for node in self._nodes if node.unsent and node.lost is None]
        if any(unsent):
            seconds = min(seconds, _FLUSH_SECONDS)
        closed: list[int] = []
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                self.signals.drain()
                continue
            number: int = key.data
            node = self._nodes[number]
            data = os.read(node.events.fileno(), _READ_BYTES)
            arrived += [(number, event) for event in self._events_in(node, data)]
            if not data:
                closed.append(number)
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        for number in closed:
            left = max(0.0, deadline - time.monotonic())
            self._lose(number, self._nodes[number].how_it_ended(left))
            arrived.append((number, None))
        arrived += [(number, None) for number in self._fallen_silent()]
        return arrived

    def _events_in(self, node: Node, data: bytes) -> Iterator[Event]:
        for line in node.lines.feed(data):
            try:
                event = decode_event(line)
            except ValueError:
                event = None
            if event is None:
                # What a login shell prints may be the reason why no agent follows.
                node.keep(line)
                continue
            node.hear(event)
            if isinstance(event, Signalled):
                if event.signal in ANNOUNCEMENTS:
                    self.signals.relay(event.signal)
            else:
                yield event

    def poll_until(
        self, seconds: float, unfinished: Callable[[], bool]
    ) -> Iterator[tuple[int, Event | None]]:
        """As `poll`, while `unfinished`, within a limit, and until the user is in a hurry."""
        deadline = time.monotonic() + seconds
        while unfinished() and time.monotonic() < deadline:
            yield from self.poll(min(0.1, max(0.0, deadline - time.monotonic())))
            if self.signals.hurry:
                return

    def _ping(self) -> None:
        """The pinger's thread: a terminal or a file system that blocks the others is no silence."""
        while not self._closing.wait(self.heartbeat_seconds / _PINGS):
            self.tell(Ping(time=time.monotonic()))

    def _obey_suspend(self) -> None:
        """Ctrl-Z stops this process and not the job."""
        if self.signals.suspend:
            self.signals.suspend = False
            self.tell(Suspend())
            os.kill(os.getpid(), signal.SIGSTOP)
            self.tell(Ping(time=time.monotonic()))

    def _fallen_silent(self) -> list[int]:
        now = time.monotonic()
        if now - self._polled_at > self.heartbeat_seconds / _PINGS:
            # It was this process that was held up; what was said meanwhile has not been read yet.
            for node in self._nodes:
                node.heard_at = now
        self._polled_at = now
        if now < self._look_at:
            return []
        # A look at every node for every event of one would make a thousand nodes cost a million looks.
        self._look_at = now + min(_LOOK_SECONDS, self.heartbeat_seconds / (4 * _PINGS))
        limit = now - self.heartbeat_seconds
        silent = [
            number
            for number, node in enumerate(self._nodes)
            if node.greeted and node.lost is None and node.heard_at < limit
        ]
        for number in silent:
            self.give_up(number, f"silent for {self.heartbeat_seconds:.0f} s")
        return silent

    def give_up(self, number: int, how: str) -> None:
        """Take an agent that does not answer for lost; its fork server ends its ranks."""
        self._lose(number, how)
        self._nodes[number].process.kill()

    def _lose(self, number: int, how: str) -> None:
        self._nodes[number].lost = how
        self._selector.unregister(self._nodes[number].events)
