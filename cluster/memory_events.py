"""Whether the kernel killed for want of memory: its own counts, read before and after."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_KERNEL_LOG = Path("/dev/kmsg")
_MAX_RECORDS = 20_000
_CLOCK_SLACK = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryKills:
    """How often the kernel has killed for want of memory; None where it does not say.

    cgroup   in the control group of this process, versions 1 and 2
    machine  on the whole machine
    time     of the count, on CLOCK_MONOTONIC
    """

    cgroup: int | None
    machine: int | None
    time: float


def count_memory_kills() -> MemoryKills:
    folder = _memory_cgroup()
    in_cgroup = None
    if folder is not None:
        in_cgroup = _count(folder / "memory.events")
        if in_cgroup is None:
            in_cgroup = _count(folder / "memory.oom_control")
    machine = _count(Path("/proc/vmstat"))
    return MemoryKills(cgroup=in_cgroup, machine=machine, time=time.monotonic())


def killed_for_memory(pid: int, before: MemoryKills) -> str:
    """What the kernel says of a process that ended by SIGKILL; empty when it was not the kernel's doing."""
    record = _kernel_record(pid, before.time)
    if record:
        return record
    now = count_memory_kills()
    if _rose(before.cgroup, now.cgroup):
        return f"the memory limit{_limit_in_words()} of its control group was reached"
    # A control group counts its own victims whoever the killer was after; only where there is none:
    # another job's process may have been meant, so it is said as what it is, a coincidence in time.
    if now.cgroup is None and _rose(before.machine, now.machine):
        return "the kernel killed for want of memory on this machine at that time"
    return ""


def _rose(before: int | None, now: int | None) -> bool:
    return before is not None and now is not None and now > before


def _count(path: Path) -> int | None:
    try:
        found = re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def _memory_cgroup() -> Path | None:
    """The folder of this process's memory controller."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return _ROOT / "memory" / path.lstrip("/")
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            return _ROOT / path.lstrip("/")
    return None


def _limit_in_words() -> str:
    folder = _memory_cgroup()
    for name in ("memory.max", "memory.limit_in_bytes"):
        try:
            value = ((folder or _ROOT) / name).read_text().strip()
        except OSError:
            continue
        # Version 1 writes "no limit" as a number of about 8 EiB.
        if value.isdigit() and int(value) < 1 << 60:
            return f" ({int(value) / 2**30:.1f} GiB)"
    return ""


def _kernel_record(pid: int, since: float) -> str:
    """The kernel's own line about this process, where its log may be read."""
    try:
        descriptor = os.open(_KERNEL_LOG, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return ""
    wanted = re.compile(rf"Killed process {pid} \((.*?)\).*?anon-rss:(\d+)kB")
    found = ""
    try:
        for _ in range(_MAX_RECORDS):
            record = os.read(descriptor, 8192).decode(errors="replace")
            # "priority,number,microseconds,flags;text". An earlier process may have had the number.
            recorded = record.partition(";")[0].split(",")
            match = wanted.search(record)
            if match and float(recorded[2]) / 1e6 > since - _CLOCK_SLACK:
                found = f"it held {int(match[2]) / 2**20:.1f} GiB, says the kernel's log"
    except OSError:
        pass  # BlockingIOError at the end of the log; EPIPE when a record was overwritten
    finally:
        os.close(descriptor)
    return found
