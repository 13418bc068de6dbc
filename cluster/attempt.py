"""What is known of the ranks that were started together, from the events of their agents. No I/O."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ftlaunch.cluster.errors import EXIT_STOPPED
from ftlaunch.cluster.events import (
    Event,
    Exited,
    FromRank,
    RankStart,
    Refused,
    ServerGone,
    Stack,
)
from ftlaunch.cluster.stacks import odd_ranks
from ftlaunch.cluster.verdict import (
    Cause,
    Failure,
    Verdict,
    judge,
    lost_peer,
    ranks_in_words,
    signal_in_words,
)

# Failures that arrive together are judged together: the rank that was killed and the one that
# only lost its connection are a few milliseconds apart, in either order.
_VERDICT_SECONDS = 0.3
# As long as nobody has said more than that a connection is lost, the one that is to blame has not
# been heard: its exit is only told once the process is gone, which a driver may delay.
_BLAME_SECONDS = 3.0
_LEAVE_SECONDS = 5.0
_CRASHES = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
_CAUSES: dict[str, Cause] = {
    "user": "user",
    "exception": "exception",
    "job": "exception",
    "memory": "memory",
}

Ending = Literal["done", "stopped", "failed", "interrupted"]
OnMessage = Callable[[int, Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one attempt ended.

    left_behind   processes that outlived the rank that had started them
    stop_signal   by which the user asked the ranks to stop, before any had failed
    remarks       what changed nothing, and should be known
    """

    ending: Ending
    verdict: Verdict | None = None
    left_behind: int = 0
    stop_signal: int | None = None
    remarks: tuple[str, ...] = ()


class Attempt:
    """The ranks of one start, until the last is gone or the first has failed.

    passes_code   a rank's exit code means what the user's script means by it
    """

    def __init__(
        self,
        starts: Sequence[Sequence[RankStart]],
        node_names: Sequence[str],
        *,
        passes_code: bool = False,
    ) -> None:
        everyone = [start for ranks in starts for start in ranks]
        self._logs = {start.rank: start.log_path for start in everyone}
        self._titles = {start.rank: start.title for start in everyone}
        self._running = {start.rank for start in everyone if start.rank >= 0}
        self._node_of = {s.rank: number for number, ranks in enumerate(starts) for s in ranks}
        self._node_names = node_names
        self._passes_code = passes_code
        self._codes: set[int] = set()
        # With which code a rank has said that it leaves.
        self._leaves_with: dict[int, int] = {}
        self._remarks: list[str] = []
        self._stacks: dict[int, Stack] = {}
        self._leave_by: float | None = None
        self._judged_at: float | None = None
        self.failures: list[Failure] = []
        self.left_behind = 0
        # The signal by which the user asked the ranks to stop.
        self._stop_signal: int | None = None
        self._failed_before_stop = False

    @property
    def over(self) -> bool:
        if self._judged_at is not None:
            return time.monotonic() >= self._judged_at
        if self._leave_by is not None and time.monotonic() >= self._leave_by:
            return True
        return not self._running

    @property
    def due_in(self) -> float:
        """Seconds until this attempt may be over without another event."""
        times = [t for t in (self._judged_at, self._leave_by) if t is not None]
        return max(0.0, min(times) - time.monotonic()) if times else math.inf

    @property
    def running(self) -> frozenset[int]:
        return frozenset(self._running)

    @property
    def silent(self) -> frozenset[int]:
        """Ranks that have not said yet where they are."""
        return frozenset(self._running - self._stacks.keys())

    def node_of(self, rank: int) -> str:
        return self._node_names[self._node_of[rank]]

    # -- events -----------------------------------------------------------------------------

    def take(self, node: int, event: Event, offset: float, on_message: OnMessage) -> None:
        """`offset` is what the clock of the node's agent is ahead of ours."""
        if isinstance(event, FromRank | Exited | Stack) and self._node_of.get(event.rank) != node:
            # Of a rank that this node was not given: another machine's word is not enough.
            return
        if isinstance(event, FromRank):
            payload = event.payload
            if payload.get("kind") == "ending" and isinstance(payload.get("code"), int):
                self._leaves_with[event.rank] = payload["code"]
                return
            if payload.get("kind") != "failed":
                on_message(event.rank, payload)
                return
            said_at = payload.get("time", event.time)
            self._fail_rank(
                event.rank,
                _CAUSES.get(str(payload.get("cause")), "exception"),
                str(payload.get("title", "")),
                traceback=str(payload.get("traceback", "")),
                at=(said_at if isinstance(said_at, float) else event.time) - offset,
            )
        elif isinstance(event, Exited):
            self._exited(event, event.time - offset)
        elif isinstance(event, Refused):
            cause: Cause = "user" if event.user else "lost"
            self._fail_node(node, f"the agent on {self._node_names[node]}", cause, event.reason)
        elif isinstance(event, ServerGone):
            self._server_gone(node, event, offset)
        elif isinstance(event, Stack):
            self._stacks[event.rank] = event

    def stop(self, number: int) -> None:
        """The ranks are asked to stop, by a signal of this number."""
        self._stop_signal = number
        self._failed_before_stop = bool(self.failures)

    def lose_node(self, node: int, reason: str) -> None:
        """Its agent is gone, or nothing was heard of it."""
        self._fail_node(node, f"the agent on {self._node_names[node]}", "lost", reason)

    def _server_gone(self, node: int, event: ServerGone, offset: float) -> None:
        """Nodes that are played on one machine share a server, and only one of them knows its end."""
        subject = f"the fork server on {self._node_names[node]} (process {event.pid})"
        ranks = [r for r in sorted(self._running) if self._node_of[r] == node]
        for number, failure in enumerate(self.failures):
            if _is_of_server(failure, event):
                if event.how != "gone":
                    rank = ranks[0] if ranks else failure.rank
                    self.failures[number] = replace(
                        failure,
                        rank=rank,
                        node=self.node_of(rank),
                        subject=subject,
                        title=event.how,
                        log_path=self._logs.get(rank, ""),
                    )
                self._running.difference_update(ranks)
                return
        if ranks:
            self._fail(ranks[0], subject, "lost", event.how, at=event.time - offset)
            self._running.difference_update(ranks)

    def _exited(self, event: Exited, at: float) -> None:
        if event.signal in _CRASHES and event.rank in self._leaves_with:
            event = self._without_its_end(event)
        self._running.discard(event.rank)
        self.left_behind = max(self.left_behind, event.left_behind)
        if event.rank < 0:
            # With code 0 it has seen the last of them leave, whose own end is still to be heard.
            if self._running and event.code != 0:
                title = f"{_how(event)} before the ranks that it serves had ended"
                self._fail_rank(event.rank, "lost", title, at=at)
        elif self._is_stop(event):
            # A rank of ours leaves with that code when nothing is left to save. Others may wait for
            # it in a call that no signal interrupts: they get a moment, then they are ended.
            self._codes.add(EXIT_STOPPED)
            if not self._passes_code:
                self._leave_by = self._leave_by or time.monotonic() + _LEAVE_SECONDS
        elif event.signal is not None:
            if event.out_of_memory:
                title = f"killed by the kernel for want of memory: {event.out_of_memory}"
                self._fail_rank(event.rank, "memory", title, at=at, code=128 + event.signal)
            else:
                title = signal_in_words(event.signal)
                self._fail_rank(event.rank, "signal", title, at=at, code=128 + event.signal)
        elif event.code == 0:
            self._codes.add(0)
        elif not self._has_said_why(event.rank, event.code):
            self._fail_rank(event.rank, "exit", f"exit code {event.code}", at=at, code=event.code)

    def _without_its_end(self, event: Exited) -> Exited:
        """A crash of what takes a finished rank down is not its failure."""
        assert event.signal is not None
        code = self._leaves_with[event.rank]
        self._remarks.append(
            f"rank {event.rank} on {self.node_of(event.rank)}: {signal_in_words(event.signal)} while "
            f"its interpreter was taken down; its script had ended by then, with exit code {code}"
        )
        return replace(event, signal=None, code=code)

    def _is_stop(self, event: Exited) -> bool:
        if not self._passes_code and event.code == EXIT_STOPPED:
            return True
        # The signal itself ends a rank that has not come to the point of handling it.
        return self._stop_signal is not None and event.signal in (
            signal.SIGTERM,
            self._stop_signal,
        )

    def _has_said_why(self, rank: int, code: int | None) -> bool:
        """The exit that follows from what the rank has said already; its code is the rank's own."""
        for number, failure in enumerate(self.failures):
            if failure.rank == rank:
                self.failures[number] = replace(failure, code=code)
                return True
        return False

    def _fail_node(
        self, node: int, subject: str, cause: Cause, title: str, at: float | None = None
    ) -> None:
        ranks = [r for r in sorted(self._running) if self._node_of[r] == node]
        if not ranks and cause == "lost":
            return
        rank = ranks[0] if ranks else min(r for r, n in self._node_of.items() if n == node)
        if ranks and cause == "lost":
            title = f"{title}; {ranks_in_words(ranks)} ended with it"
        self._fail(rank, subject, cause, title, at=at)
        self._running.difference_update(ranks)

    def _fail_rank(
        self,
        rank: int,
        cause: Cause,
        title: str,
        *,
        traceback: str = "",
        at: float | None = None,
        code: int | None = None,
    ) -> None:
        node = self.node_of(rank)
        name = f"rank {rank}" if rank >= 0 else self._titles[rank]
        self._fail(rank, f"{name} on {node}", cause, title, traceback, at, code)

    def _fail(
        self,
        rank: int,
        subject: str,
        cause: Cause,
        title: str,
        traceback: str = "",
        at: float | None = None,
        code: int | None = None,
    ) -> None:
        self.failures.append(
            Failure(
                rank=rank,
                node=self.node_of(rank),
                subject=subject,
                cause=cause,
                title=title,
                traceback=traceback,
                log_path=self._logs.get(rank, ""),
                time=time.monotonic() if at is None else at,
                code=code,
            )
        )
        heard = {failure.rank for failure in self.failures}
        waits = all(map(lost_peer, self.failures)) and not self._running <= heard
        judged_at = time.monotonic() + (_BLAME_SECONDS if waits else _VERDICT_SECONDS)
        self._judged_at = min(self._judged_at or judged_at, judged_at)

    # -- the end ----------------------------------------------------------------------------

    def end(self, title: str) -> None:
        """Fail now, in the name of the first rank that still runs."""
        self._fail_rank(min(self._running, default=0), "exit", title)
        self._judged_at = time.monotonic()

    def odd_ranks(self) -> tuple[list[int], str]:
        """Of those that have said where they are: who holds up the others, and what is seen."""
        return odd_ranks({r: s for r, s in self._stacks.items() if r in self._running})

    def stall(self, seconds: float) -> None:
        """Fail for want of progress; names the rank that holds up the others, if one does."""
        odd, seen = self.odd_ranks()
        rank = odd[0] if odd else min(self._running, default=0)
        stack = self._stacks.get(rank)
        self._fail_rank(
            rank,
            "stall",
            f"no progress for {seconds:.0f} s (cluster.stall_timeout_seconds): {seen}",
            traceback=stack.text if stack is not None else "",
        )
        self._judged_at = time.monotonic()

    def outcome(self) -> Outcome:
        # A rank that had nothing to save yet leaves at once when a stop is asked for; what the
        # others then say of a lost connection is no failure.
        stopped = EXIT_STOPPED in self._codes
        if self.failures and not (stopped and all(map(lost_peer, self.failures))):
            verdict = judge(self.failures)
            if lost_peer(verdict.first) and not self._passes_code:
                # Nobody's code: the network, or a rank that is stuck in its end.
                first = replace(verdict.first, cause="lost")
                verdict = replace(verdict, first=first)
            return Outcome(
                ending="failed",
                verdict=verdict,
                left_behind=self.left_behind,
                stop_signal=None if self._failed_before_stop else self._stop_signal,
                remarks=tuple(self._remarks),
            )
        return Outcome(
            ending="stopped" if stopped else "done",
            left_behind=self.left_behind,
            stop_signal=self._stop_signal,
            remarks=tuple(self._remarks),
        )


def _is_of_server(failure: Failure, event: ServerGone) -> bool:
    """An agent that only says "gone" shares the server; it may not have learned its process yet."""
    if failure.cause != "lost" or not failure.subject.startswith("the fork server on "):
        return False
    same = failure.subject.endswith(f"(process {event.pid})")
    return same or "gone" in (failure.title, event.how)


def _how(event: Exited) -> str:
    if event.signal is not None:
        return signal_in_words(event.signal)
    return f"exit code {event.code}"
