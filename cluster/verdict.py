"""Which of several failures was the first, and what an exit means in words."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence

from ftlaunch.cluster.events import Failure

# How a rank sounds that lost another one: gloo, NCCL and the store, in their own words.
_LOST_PEER = re.compile(
    r"connection (closed|reset|refused)|closed by peer|broken pipe|socket timeout|gloo|nccl"
    r"|timed out|remote process|DistNetworkError|DistStoreError|DistBackendError",
    re.IGNORECASE,
)
_MEANINGS = {
    signal.SIGKILL: "killed by SIGKILL (by hand, or by the kernel for want of memory)",
    signal.SIGSEGV: "segmentation fault (SIGSEGV)",
    signal.SIGABRT: "aborted (SIGABRT)",
    signal.SIGBUS: "bus error (SIGBUS): a mapped file was cut short, or shared memory is full",
    signal.SIGTERM: "terminated (SIGTERM)",
}


def lost_peer(failure: Failure) -> bool:
    """Whether the rank says no more than that it lost another one."""
    return failure.cause == "exception" and bool(_LOST_PEER.search(failure.title))


def first_failure(failures: Sequence[Failure]) -> Failure:
    """The failure that the others follow from: the earliest that is not merely a lost peer."""
    for failure in failures:
        if not lost_peer(failure):
            return failure
    return failures[0]


def signal_in_words(number: int) -> str:
    try:
        meaning = signal.Signals(number)
    except ValueError:
        return f"ended by signal {number}"
    return _MEANINGS.get(meaning, f"ended by {meaning.name}")
