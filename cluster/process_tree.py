"""Ending processes with all that they have started. Returns when they are gone, within a limit."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

from ftlaunch.cluster.linux import Process, descendants, kill_exactly, process_table

_ROUND_SECONDS = 0.002


def end_families(leaders: Collection[int], *, seconds: float) -> list[int]:
    """SIGKILL for session leaders, all below them and all in their sessions; who survives it.

    In rounds, since a process may fork between the look at the table and the signal. The leaders
    must not be reaped meanwhile: their numbers are what their sessions are known by.
    """
    deadline = time.monotonic() + seconds
    while True:
        living = _family(leaders)
        if not living or time.monotonic() >= deadline:
            return [process.pid for process in living]
        for process in living:
            kill_exactly(process)
        time.sleep(_ROUND_SECONDS)


def end_processes(processes: Sequence[Process]) -> None:
    """SIGKILL for processes and all below them."""
    table = process_table()
    for process in (*processes, *descendants([p.pid for p in processes], table)):
        kill_exactly(process)


def _family(leaders: Collection[int]) -> list[Process]:
    table = process_table()
    members = {process.pid: process for process in descendants(leaders, table)}
    members |= {
        process.pid: process
        for process in table.values()
        if process.pid in leaders or process.session in leaders
    }
    return [process for process in members.values() if process.is_alive]
