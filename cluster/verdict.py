"""Which of several failures was the first, which followed from it, and what an exit means in words."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# "user"       a mistake in what was asked for
# "exception"  the rank's own code raised, or left with an exit code of its own ("exit")
# "memory"     no memory left: an allocation failed, or the kernel killed for want of it
# "signal"     killed from outside, or crashed
# "lost"       its node: the agent or the fork server is gone, or nothing was heard of it
# "stall"      nothing went on for too long
Cause = Literal["user", "exception", "exit", "memory", "signal", "lost", "stall"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What ended an attempt, or followed from that.

    subject   who failed: "rank 3 on node1", "the agent on node1"
    time      on the coordinator's CLOCK_MONOTONIC
    code      exit code, where there was one; of a signal 128 + its number
    """

    rank: int
    node: str
    subject: str
    cause: Cause
    title: str
    traceback: str
    log_path: str
    time: float
    code: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The failure that the others follow from, and these."""

    first: Failure
    consequences: tuple[Failure, ...]


# How a rank sounds that lost another one: gloo, NCCL and the store, in their own words.
_LOST_PEER = re.compile(
    r"connection (was )?(closed|reset|refused)|closed by peer|broken pipe|socket timeout|gloo|nccl"
    r"|timed out|remote process|DistNetworkError|DistStoreError|DistBackendError|ProcessGroup",
    re.IGNORECASE,
)
_MEANINGS = {
    signal.SIGKILL: "killed by SIGKILL",
    signal.SIGSEGV: "segmentation fault (SIGSEGV)",
    signal.SIGABRT: "aborted (SIGABRT)",
    signal.SIGBUS: "bus error (SIGBUS): a mapped file was cut short, or shared memory is full",
    signal.SIGTERM: "terminated (SIGTERM)",
}


def lost_peer(failure: Failure) -> bool:
    """Whether the rank says no more than that it lost another one."""
    return failure.cause == "exception" and bool(_LOST_PEER.search(failure.title))


def judge(failures: Sequence[Failure]) -> Verdict:
    """The first is the earliest that is not merely a lost peer.

    A rank has one failure: an exception and the exit code that follows from it are the same.
    """
    by_time = sorted(failures, key=lambda failure: failure.time)
    first = next((f for f in by_time if not lost_peer(f)), by_time[0])
    seen = {first.rank}
    rest = []
    for failure in by_time:
        if failure.rank not in seen:
            seen.add(failure.rank)
            rest.append(failure)
    return Verdict(first=first, consequences=tuple(rest))


def signal_in_words(number: int) -> str:
    try:
        meaning = signal.Signals(number)
    except ValueError:
        return f"ended by signal {number}"
    return _MEANINGS.get(meaning, f"ended by {meaning.name}")


def exit_in_words(returncode: int) -> str:
    """Of a return code as `subprocess` gives it: below zero a signal."""
    return signal_in_words(-returncode) if returncode < 0 else f"exit code {returncode}"


def ranks_in_words(ranks: Sequence[int]) -> str:
    """ "rank 3", "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"rank{'' if len(ranks) == 1 else 's'} {text}"
