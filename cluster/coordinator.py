"""The job seen from above: starts an agent for each node, hears them all, decides what happened.

It knows ranks, exits and failures; what ranks say about their work is handed on unread.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from ftlaunch.cluster.errors import EXIT_STOPPED, JobError, UserError
from ftlaunch.cluster.events import (
    Bind,
    Bound,
    Event,
    Exited,
    Failure,
    FromRank,
    Hello,
    Kill,
    Killed,
    RankStart,
    Refused,
    Start,
    Stop,
    decode_event,
)
from ftlaunch.cluster.machine import Machine
from ftlaunch.cluster.signals import StopSignals
from ftlaunch.cluster.transport import Node, start_local
from ftlaunch.cluster.verdict import first_failure, lost_peer, signal_in_words

_READ_BYTES = 1 << 16
_HELLO_SECONDS = 60.0
_KILL_SECONDS = 10.0
_LEAVE_SECONDS = 5.0
# Failures that arrive together are judged together: the rank that was killed and the one that
# only lost its connection are a few milliseconds apart, in either order.
_VERDICT_SECONDS = 0.5

Ending = Literal["done", "stopped", "failed", "interrupted"]
OnMessage = Callable[[int, Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one attempt ended. `failure` is the first one, if it failed."""

    ending: Ending
    failure: Failure | None = None


class Coordinator:
    """A context manager: on leaving, every agent and every rank is gone."""

    def __init__(self, node_names: Sequence[str], *, env: Mapping[str, str], log_dir: Path) -> None:
        self._selector = selectors.DefaultSelector()
        self._nodes: list[Node] = []
        self._lost: set[int] = set()
        self._signals = StopSignals()
        self._node_names = node_names
        self._env = env
        self._log_dir = log_dir
        self._given_up: str | None = None

    def __enter__(self) -> Coordinator:
        self._signals.install()
        self._selector.register(self._signals.descriptor, selectors.EVENT_READ, None)
        for number, name in enumerate(self._node_names):
            node = start_local(name, self._env, self._log_dir / f"agent-{number}.log")
            self._nodes.append(node)
            self._selector.register(node.events, selectors.EVENT_READ, number)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for node in self._nodes:
            node.hang_up()
        deadline = time.monotonic() + _LEAVE_SECONDS
        for node in self._nodes:
            try:
                node.process.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                # Its ranks die with it (PDEATHSIG).
                node.process.kill()
                node.process.wait(timeout=_LEAVE_SECONDS)
            node.events.close()
        self._selector.close()
        self._signals.restore()

    @property
    def stop_requested(self) -> bool:
        return self._signals.count > 0

    @property
    def hurried(self) -> bool:
        """Ctrl-C was pressed again after a first request to stop."""
        return self._signals.hurry

    # -- before the ranks -------------------------------------------------------------------

    def machines(self) -> list[Machine]:
        """Wait until every agent has said what its machine is."""
        found: dict[int, Machine] = {}
        for number, event in self._events_until(_HELLO_SECONDS, lambda: len(found) < self._size):
            if event is None:
                raise self._agent_lost(number)
            if isinstance(event, Hello):
                found[number] = Machine.from_dict(event.machine)
        if len(found) < self._size and not self.stop_requested:
            silent = [self._nodes[n].name for n in range(self._size) if n not in found]
            raise JobError(
                f"no answer from the agent on {', '.join(silent)} within {_HELLO_SECONDS:.0f} s; "
                f"see {self._nodes[0].log_path.parent}"
            )
        return [found[n] for n in sorted(found)]

    def bind(self, address: str, port: int) -> int:
        """Have node 0 hold the rendezvous port. UserError when it is taken."""
        self._nodes[0].send(Bind(address=address, port=port))
        for number, event in self._events_until(_HELLO_SECONDS, lambda: True):
            if event is None:
                raise self._agent_lost(number)
            if isinstance(event, Bound):
                return event.port
            if isinstance(event, Refused):
                raise (UserError if event.user else JobError)(event.reason)
        raise JobError("the agent of node 0 did not answer when asked for a port")

    def _agent_lost(self, number: int) -> JobError:
        node = self._nodes[number]
        return JobError(
            f"the agent on {node.name} has ended; its last words are in {node.log_path}"
        )

    @property
    def _size(self) -> int:
        return len(self._node_names)

    # -- the ranks --------------------------------------------------------------------------

    def run(
        self,
        starts: Sequence[Sequence[RankStart]],
        *,
        on_message: OnMessage,
        on_stop: Callable[[], None],
        stop_seconds: float,
    ) -> Outcome:
        """Start the ranks of every node and stay until the last is gone.

        starts        the ranks of each node, in the order of the nodes
        on_message    called with what a rank says
        on_stop       called once when the user asks to stop
        stop_seconds  time for the ranks to reach a step boundary and save, then they are killed
        """
        attempt = _Attempt(starts, [node.name for node in self._nodes])
        for node, ranks in zip(self._nodes, starts, strict=True):
            node.send(Start(ranks=list(ranks)))
        for number in self._lost:
            attempt.take(number, None, on_message)
        stop_deadline: float | None = None
        while not attempt.over:
            for number, event in self._poll(0.2):
                attempt.take(number, event, on_message)
            if self._signals.count and stop_deadline is None:
                stop_deadline = time.monotonic() + stop_seconds
                attempt.stopping = True
                on_stop()
                for node in self._nodes:
                    node.send(Stop())
            if self._signals.hurry:
                self.kill()
                return Outcome(ending="interrupted")
            if stop_deadline is not None and time.monotonic() > stop_deadline:
                title = f"did not stop within {stop_seconds:.0f} s (cluster.stop_timeout_seconds)"
                attempt.end(title)
            if self._given_up is not None:
                attempt.end(self._given_up)
        if attempt.failures or attempt.unfinished:
            self.kill()
        return attempt.outcome()

    def give_up(self, reason: str) -> None:
        """End the attempt as failed: the caller cannot do its own part."""
        self._given_up = reason

    def kill(self) -> None:
        """End every rank and wait until the agents say that they are gone."""
        waiting = {n for n, node in enumerate(self._nodes) if node.send(Kill())} - self._lost
        for number, event in self._events_until(_KILL_SECONDS, lambda: bool(waiting)):
            if event is None or isinstance(event, Killed):
                waiting.discard(number)

    # -- events -----------------------------------------------------------------------------

    def _events_until(
        self, seconds: float, unfinished: Callable[[], bool]
    ) -> Any:  # iterator of (node number, event or None at its end of file)
        deadline = time.monotonic() + seconds
        while unfinished() and time.monotonic() < deadline:
            yield from self._poll(0.1)
            if self._signals.hurry:
                return

    def _poll(self, seconds: float) -> list[tuple[int, Event | None]]:
        """Everything that has arrived: (node, event), or (node, None) when its agent is gone."""
        arrived: list[tuple[int, Event | None]] = []
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                self._signals.drain()
                continue
            number: int = key.data
            node = self._nodes[number]
            data = os.read(node.events.fileno(), _READ_BYTES)
            if not data:
                self._selector.unregister(node.events)
                self._lost.add(number)
                arrived.append((number, None))
            for line in node.lines.feed(data):
                event = decode_event(line)
                if event is not None:
                    arrived.append((number, event))
        return arrived


class _Attempt:
    """What is known of the ranks that were started together."""

    def __init__(self, starts: Sequence[Sequence[RankStart]], node_names: Sequence[str]) -> None:
        self._running = {start.rank for ranks in starts for start in ranks}
        self._logs = {start.rank: start.log_path for ranks in starts for start in ranks}
        self._ranks_of = [[start.rank for start in ranks] for ranks in starts]
        self._node_names = node_names
        self._codes: set[int] = set()
        self.stopping = False
        self._leave_by: float | None = None
        self.failures: list[Failure] = []
        self._judged_at: float | None = None

    @property
    def over(self) -> bool:
        if self._judged_at is not None:
            return time.monotonic() >= self._judged_at
        if self._leave_by is not None and time.monotonic() >= self._leave_by:
            return True
        return not self._running

    @property
    def unfinished(self) -> bool:
        return bool(self._running)

    def take(self, number: int, event: Event | None, on_message: OnMessage) -> None:
        if event is None:
            for rank in self._running.intersection(self._ranks_of[number]):
                self._fail(number, rank, "exit", "its agent is gone", "")
        elif isinstance(event, FromRank):
            if event.payload.get("kind") == "failed":
                cause, title, traceback = (
                    str(event.payload.get(k, "")) for k in ("cause", "title", "traceback")
                )
                self._fail(number, event.rank, cause, title, traceback)
            else:
                on_message(event.rank, event.payload)
        elif isinstance(event, Exited):
            self._exited(number, event)
        elif isinstance(event, Refused):
            rank = self._ranks_of[number][0]
            self._fail(number, rank, "user" if event.user else "exit", event.reason, "")

    def _exited(self, number: int, event: Exited) -> None:
        self._running.discard(event.rank)
        # SIGTERM itself ends a rank that has not come to the point of handling it.
        if event.code == EXIT_STOPPED or (self.stopping and event.signal == signal.SIGTERM):
            # A rank leaves with that code when nothing is left to save. Others may wait for it in
            # a call that no signal interrupts: they get a moment, then they are ended.
            self._codes.add(EXIT_STOPPED)
            self._leave_by = self._leave_by or time.monotonic() + _LEAVE_SECONDS
        elif event.signal is not None:
            self._fail(number, event.rank, "signal", signal_in_words(event.signal), "")
        elif event.code == 0:
            self._codes.add(event.code)
        elif not any(failure.rank == event.rank for failure in self.failures):
            self._fail(number, event.rank, "exit", f"exit code {event.code}", "")

    def _fail(self, number: int, rank: int, cause: str, title: str, traceback: str) -> None:
        if self._judged_at is None:
            self._judged_at = time.monotonic() + _VERDICT_SECONDS
        self.failures.append(
            Failure(
                rank=rank,
                node=self._node_names[number],
                cause=cause,
                title=title,
                traceback=traceback,
                log_path=self._logs.get(rank, ""),
            )
        )

    def end(self, title: str) -> None:
        """Fail now, in the name of the first rank that still runs."""
        rank = min(self._running, default=0)
        number = next((n for n, ranks in enumerate(self._ranks_of) if rank in ranks), 0)
        self._fail(number, rank, "exit", title, "")
        self._judged_at = time.monotonic()

    def outcome(self) -> Outcome:
        # A rank that had nothing to save yet leaves at once when a stop is asked for; what the
        # others then say of a lost connection is no failure.
        stopped = EXIT_STOPPED in self._codes
        if self.failures and not (stopped and all(map(lost_peer, self.failures))):
            return Outcome(ending="failed", failure=first_failure(self.failures))
        return Outcome(ending="stopped" if stopped else "done")
