"""What a rank tells its agent, over a pipe of its own: JSON lines.

Only "failed" and "ending" are known here.
"""

from __future__ import annotations

import errno
import json
import os
import re
import time
from collections.abc import Mapping
from typing import Any

MAX_TRACEBACK_CHARS = 4000
EVENT_FD_VARIABLE = "FTLAUNCH_EVENT_FD"
LISTEN_FD_VARIABLE = "FTLAUNCH_LISTEN_FD"
# Seconds that the fork server has imported, for a rank that was forked with what it has imported.
PRELOAD_VARIABLE = "FTLAUNCH_PRELOAD_SECONDS"

_NO_MEMORY = re.compile(
    r"out of memory|can('t|not) allocate memory|not enough memory|bad_alloc"
    # CUDA's libraries and NCCL, which do not say it as torch does.
    r"|_ALLOC_FAILED|failed to cuda [cm]alloc"
    # MindSpore's words, on CPUs and on NPUs, and those of ACL and HCCL that it passes on.
    r"|allocate (device )?memory failed|memory (isn't|is not|not) enough|memory malloc failed"
    r"|memory_allocation_failure|failed to allocate (\w+ )*memory|rtmalloc fail|\bEL0004\b|\b207001\b",
    re.IGNORECASE,
)


def cause_of(error: BaseException) -> str:
    """ "memory" where an allocation failed, by what Python and the frameworks call it; else "exception"."""
    # The class is torch's on an accelerator; on the CPU it is a RuntimeError that says so.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "memory"
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return "memory"
    if isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)):
        return "memory"
    return "exception"


def failure_payload(cause: str, title: str, traceback: str) -> dict[str, Any]:
    """The payload by which a rank says why it fails. The whole traceback is in the rank's log."""
    return {
        "kind": "failed",
        "time": time.monotonic(),
        "cause": cause,
        "title": title[:MAX_TRACEBACK_CHARS],
        "traceback": traceback[-MAX_TRACEBACK_CHARS:],
    }


def ending_payload(code: int) -> dict[str, Any]:
    """The payload by which a script's rank says with which exit code it is about to leave."""
    return {"kind": "ending", "code": code}


class RankPipe:
    """A rank's end of the pipe to its agent. Writes nowhere when there is no agent."""

    def __init__(self, descriptor: int | None, *, preload_seconds: float = 0.0) -> None:
        """preload_seconds   that the fork server had imported before this rank was forked from it"""
        self._descriptor = descriptor
        self.preload_seconds = preload_seconds

    @classmethod
    def from_environment(cls) -> RankPipe:
        value = os.environ.pop(EVENT_FD_VARIABLE, None)
        preload_seconds = float(os.environ.pop(PRELOAD_VARIABLE, "0"))
        return cls(int(value) if value is not None else None, preload_seconds=preload_seconds)

    def send(self, payload: Mapping[str, Any]) -> None:
        """Blocks while the pipe is full. An agent that is gone kills us; nothing to handle here."""
        if self._descriptor is None:
            return
        line = json.dumps(payload).encode() + b"\n"
        view = memoryview(line)
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except BrokenPipeError:
            self._descriptor = None
