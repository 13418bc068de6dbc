"""What Linux offers for processes: death signals, adoption, names, the process table. No policy."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import resource
import signal
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
# The same on every architecture.
_NR_PIDFD_SEND_SIGNAL = 424
_NR_PIDFD_OPEN = 434
_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "in an uninterruptible wait of the kernel",
    "T": "stopped by a signal",
    "t": "held by a debugger",
    "Z": "dead, not reaped",
    "I": "idle",
}


# -- this process -------------------------------------------------------------------------------


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread of `parent` that started it ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        # It ended before we could ask.
        os.kill(os.getpid(), signal.SIGKILL)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def name_process(name: str) -> None:
    """The name that `ps` and `top` show, 15 bytes at most."""
    buffer = ctypes.create_string_buffer(name.encode()[:15])
    _prctl(_PR_SET_NAME, ctypes.addressof(buffer))


def _prctl(option: int, argument: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    if libc.prctl(option, ctypes.c_ulong(argument), zero, zero, zero):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


# -- other processes ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One line of the process table. `started` with `pid` tells it from a later process of that number."""

    pid: int
    name: str
    state: str
    parent: int
    session: int
    started: int

    @property
    def is_alive(self) -> bool:
        return self.state not in "ZX"


def read_process(pid: int) -> Process | None:
    """None when there is no such process."""
    try:
        line = Path(f"/proc/{pid}/stat").read_bytes().decode(errors="replace")
    except OSError:
        return None
    # The name stands in parentheses and may hold any character, these included.
    head, _, tail = line.rpartition(")")
    fields = tail.split()
    return Process(
        pid=pid,
        name=head.partition("(")[2],
        state=fields[0],
        parent=int(fields[1]),
        session=int(fields[3]),
        started=int(fields[19]),
    )


def command_line(pid: int) -> list[str]:
    """The words of its command; empty when it is gone."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []
    return [word.decode(errors="replace") for word in words]


def process_table() -> dict[int, Process]:
    found = (read_process(pid) for pid in _all_pids())
    return {process.pid: process for process in found if process is not None}


def descendants(roots: Collection[int], table: dict[int, Process]) -> list[Process]:
    """Every process below `roots`, these not included."""
    children: dict[int, list[Process]] = {}
    for process in table.values():
        children.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    waiting = list(roots)
    while waiting:
        for child in children.pop(waiting.pop(), []):
            found.append(child)
            waiting.append(child.pid)
    return found


def processes_with(variable: str, value: str) -> Iterator[Process]:
    """The live processes that were started with `variable` set to `value`, or forked from one that was."""
    wanted = f"{variable}={value}".encode()
    for pid in _all_pids():
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        if wanted in environ.split(b"\0"):
            process = read_process(pid)
            if process is not None and process.is_alive:
                yield process


def kill_exactly(process: Process, number: int = signal.SIGKILL) -> None:
    """Send a signal to this very process, never to a later one that was given its number.

    One that is gone, or that belongs to another user (sudo), is left alone.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        try:
            descriptor = _open_pidfd(process.pid)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EPERM, errno.EINVAL):
                return
            # A kernel before 5.3, or a filter of system calls: as exact as it gets.
            if _is_still(process):
                os.kill(process.pid, number)
            return
        try:
            if _is_still(process):
                _signal_pidfd(descriptor, number)
        finally:
            os.close(descriptor)


def limit_memory(process: Process, spare_bytes: int = 4 << 20) -> bool:
    """Give this very process no more address space than it has now, but for a little, which saying that
    there is none takes. False when it is gone, or another user's.
    """
    try:
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + spare_bytes
        if not _is_still(process):
            return False
        _, hard = resource.prlimit(process.pid, resource.RLIMIT_AS)
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, hard))
    except (OSError, IndexError):
        return False
    return True


def _is_still(process: Process) -> bool:
    now = read_process(process.pid)
    return now is not None and now.started == process.started


def _open_pidfd(pid: int) -> int:
    """`os.pidfd_open`, which Pythons that were built on an old system lack."""
    if hasattr(os, "pidfd_open"):
        return os.pidfd_open(pid)
    return _system_call(_NR_PIDFD_OPEN, pid, 0)


def _signal_pidfd(descriptor: int, number: int) -> None:
    if hasattr(signal, "pidfd_send_signal"):
        signal.pidfd_send_signal(descriptor, number)
    else:
        _system_call(_NR_PIDFD_SEND_SIGNAL, descriptor, number, 0, 0)


def _system_call(*arguments: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result = int(libc.syscall(*(ctypes.c_long(argument) for argument in arguments)))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def state_in_words(pid: int) -> str:
    process = read_process(pid)
    if process is None:
        return "gone"
    return _STATES.get(process.state, f"in state {process.state}")


def handles_signal(pid: int, number: int) -> bool:
    """Whether the process has a handler of its own for a signal that would otherwise end it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return False
    mask = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return mask is not None and bool(int(mask[1], 16) >> (number - 1) & 1)


def _all_pids() -> list[int]:
    with os.scandir("/proc") as entries:
        return [int(entry.name) for entry in entries if entry.name.isdigit()]
