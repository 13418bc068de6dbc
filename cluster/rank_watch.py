"""What an agent hears and sees of its ranks: their pipes, their logs, where they are. Ends nothing."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from ftlaunch.cluster.events import (
    Event,
    Exited,
    FromRank,
    LineBuffer,
    Output,
    RankStart,
    Stack,
    Started,
)
from ftlaunch.cluster.linux import (
    Process,
    handles_signal,
    kill_exactly,
    read_process,
    state_in_words,
)
from ftlaunch.cluster.log_tail import LogTail
from ftlaunch.cluster.memory_events import count_memory_kills, killed_for_memory
from ftlaunch.cluster.stacks import MAX_STACK_BYTES, STACK_SIGNAL

_READ_BYTES = 1 << 16
_TAIL_SECONDS = 0.1
_STACK_SECONDS = 1.0
# To wake the agent for every step of a few milliseconds takes the ranks' time; a pipe that nobody
# waits for costs its writer nothing. A rank that was heard so lately is left alone for a moment.
_LATELY_SECONDS = 0.05
_REST_SECONDS = 0.01
# What the kernel has killed before is not this job's; rarely enough to cost nothing.
_COUNT_SECONDS = 4.0


@dataclass(slots=True)
class _Rank:
    """A rank as its agent knows it.

    pipe       None once it was closed
    heard_at   when it was read last
    rests_until   until then nobody waits for the pipe; None while somebody does
    """

    start: RankStart
    pipe: int | None
    tail: LogTail | None
    process: Process | None = None
    lines: LineBuffer = field(default_factory=LineBuffer)
    heard_at: float = -float("inf")
    rests_until: float | None = None

    @property
    def log_path(self) -> str:
        return self.start.log_path if self.tail is None else self.tail.path


class RankWatch:
    """The ranks of one agent.

    send      hands an event to the coordinator
    is_full   the coordinator does not read: nothing more is taken from the ranks, who have to wait
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        send: Callable[[Event], None],
        is_full: Callable[[], bool],
    ) -> None:
        self._selector = selector
        self._send = send
        self._is_full = is_full
        self._ranks: dict[int, _Rank] = {}
        # Where each rank's log ended when stacks were asked for, and when to look for them.
        self._asked: dict[int, int] = {}
        self._look_at: float | None = None
        self._memory_kills = count_memory_kills()

    def add(self, start: RankStart) -> tuple[int, int]:
        """Make a rank's log and pipe: the descriptors to be handed to it and closed. OSError."""
        log = os.open(start.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        tail = LogTail(start.log_path) if start.shows_output else None
        rank = _Rank(start, reading, tail)
        self._ranks[start.rank] = rank
        self._wait_for(rank)
        return log, writing

    def started(self, event: Started) -> None:
        if event.rank in self._ranks:
            self._ranks[event.rank].process = read_process(event.pid)

    def exited(self, event: Exited) -> Exited:
        """What is to be told of an exit, after everything that the rank had still said."""
        rank = self._ranks.get(event.rank)
        if rank is None:
            return event
        self._forget(rank)
        if event.signal != signal.SIGKILL or rank.process is None:
            return event
        reason = killed_for_memory(rank.process.pid, self._memory_kills)
        return replace(event, out_of_memory=reason)

    def forget_all(self) -> None:
        """The ranks are gone: send on what they had still said."""
        for rank in list(self._ranks.values()):
            self._forget(rank)

    def due_at(self) -> float | None:
        """When `look` should be called next."""
        times = [rank.rests_until for rank in self._ranks.values() if rank.rests_until is not None]
        times += [self._look_at] if self._look_at is not None else []
        if any(rank.tail is not None for rank in self._ranks.values()):
            times.append(time.monotonic() + _TAIL_SECONDS)
        return min(times) if times else None

    def look(self) -> None:
        """Send on what was printed, and the stacks that were asked for."""
        for rank in self._ranks.values():
            if rank.rests_until is not None and time.monotonic() >= rank.rests_until:
                self._wait_for(rank)
            self._show_output(rank)
        if time.monotonic() - self._memory_kills.time > _COUNT_SECONDS:
            self._memory_kills = count_memory_kills()
        if self._look_at is not None and time.monotonic() >= self._look_at:
            self._look_at = None
            self._report_stacks()

    # -- what they say ----------------------------------------------------------------------

    def _hear(self, rank: _Rank) -> bool:
        if self._is_full():
            # The pipe stays readable: without a pause this would go round and round.
            time.sleep(0.01)
        else:
            lately = time.monotonic() - rank.heard_at < _LATELY_SECONDS
            self._read_pipe(rank)
            if lately:
                self._rest(rank)
        return True

    def _wait_for(self, rank: _Rank) -> None:
        if rank.pipe is not None:
            rank.rests_until = None
            self._selector.register(rank.pipe, selectors.EVENT_READ, lambda: self._hear(rank))

    def _rest(self, rank: _Rank) -> None:
        if rank.pipe is not None:
            rank.rests_until = time.monotonic() + _REST_SECONDS
            self._selector.unregister(rank.pipe)

    def _read_pipe(self, rank: _Rank) -> bool:
        """One portion of what a rank says; False when there is no more for now."""
        if rank.pipe is None:
            return False
        try:
            data = os.read(rank.pipe, _READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._close_pipe(rank)
            return False
        rank.heard_at = time.monotonic()
        for line in rank.lines.feed(data):
            try:
                payload = json.loads(line)
            except ValueError:
                continue
            if isinstance(payload, dict):
                now = time.monotonic()
                self._send(FromRank(rank=rank.start.rank, payload=payload, time=now))
        return True

    def _close_pipe(self, rank: _Rank) -> None:
        if rank.pipe is not None:
            if rank.rests_until is None:
                self._selector.unregister(rank.pipe)
            os.close(rank.pipe)
            rank.pipe = rank.rests_until = None

    def _show_output(self, rank: _Rank, *, to_the_end: bool = False) -> bool:
        """Send on what a rank has written since; False when there was nothing."""
        if rank.tail is None or (self._is_full() and not to_the_end):
            return False
        text = rank.tail.read(to_the_end=to_the_end)
        if text:
            self._send(Output(rank=rank.start.rank, text=text))
        return bool(text)

    def _forget(self, rank: _Rank) -> None:
        while self._read_pipe(rank):
            pass
        self._close_pipe(rank)
        while self._show_output(rank, to_the_end=True):
            pass
        if rank.tail is not None:
            rank.tail.close()
            rank.tail = None
        del self._ranks[rank.start.rank]

    # -- where they are ---------------------------------------------------------------------

    def ask_stacks(self) -> None:
        """Every rank that can is to write its Python stack into its log."""
        self._asked.clear()
        for number, rank in self._ranks.items():
            with contextlib.suppress(OSError):
                self._asked[number] = Path(rank.log_path).stat().st_size
                process = rank.process
                if process is not None and handles_signal(process.pid, STACK_SIGNAL):
                    kill_exactly(process, STACK_SIGNAL)
        self._look_at = time.monotonic() + _STACK_SECONDS

    def _report_stacks(self) -> None:
        for number, offset in self._asked.items():
            rank = self._ranks.get(number)
            if rank is None or rank.process is None:
                continue
            text = ""
            with contextlib.suppress(OSError), open(rank.log_path, "rb") as log:
                log.seek(offset)
                text = log.read(MAX_STACK_BYTES).decode(errors="replace")
            if "(most recent call first)" not in text:
                text = ""
            self._send(Stack(rank=number, text=text, state=state_in_words(rank.process.pid)))
