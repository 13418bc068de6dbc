"""What a job and its ranks have printed: the logs of an output folder, read as untrusted bytes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.log_tail import LogTail
from ftlaunch.launcher.wording import plain_text

_POLL_SECONDS = 0.5
_LOOK_SECONDS = 5.0
# Longer lines are shown in pieces.
_LINE_BYTES = 1 << 16
# What a follower sees of the past of each log.
_PAST_BYTES = 4_096


def find_logs(folder: Path, rank: int | None, job_id: str | None) -> dict[str, Path]:
    """Label → log: the job's own, those of its ranks. UserError for a rank that has none."""
    logs = folder / "logs"
    ranks = {}
    for path in sorted(logs.glob("rank-*.log")):
        number = path.stem.removeprefix("rank-")
        if number.isdecimal():
            ranks[int(number)] = path
    if rank is not None:
        if rank in ranks:
            return {f"rank {rank}": ranks[rank]}
        has = f"There are those of ranks {min(ranks)} to {max(ranks)}" if ranks else "There is none"
        raise UserError(f"rank {rank} has no log in {logs}. {has}.")
    found = {}
    if job_id is not None and (logs / f"slurm-{job_id}.log").is_file():
        found["job"] = logs / f"slurm-{job_id}.log"
    return found | {f"rank {number}": path for number, path in ranks.items()}


def lines_of(path: Path) -> Iterator[str]:
    """A log from its beginning, line by line, without control characters."""
    with open(path, "rb") as file:
        while line := file.readline(_LINE_BYTES):
            yield plain_text(line.decode(errors="replace").rstrip("\n"))


def follow(
    find: Callable[[], dict[str, Path]],
    is_over: Callable[[], bool],
    show: Callable[[str, str], None],
) -> None:
    """Show (label, line) of each log as it grows, and of those that come, until the job is over."""
    tails: dict[str, LogTail] = {}
    looked_at = time.monotonic()
    over = is_over()
    try:
        while True:
            for label, path in find().items():
                if label not in tails:
                    tails[label] = LogTail(str(path), start=_recent(path))
            grew = False
            for label, tail in tails.items():
                for line in tail.read(to_the_end=over).splitlines():
                    grew = True
                    show(label, plain_text(line))
            if over and not grew:
                return
            if not grew:
                time.sleep(_POLL_SECONDS)
            if not over and time.monotonic() - looked_at > _LOOK_SECONDS:
                looked_at = time.monotonic()
                over = is_over()
    finally:
        for tail in tails.values():
            tail.close()


def _recent(path: Path) -> int:
    """Where the last lines begin."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= _PAST_BYTES:
            return 0
        file.seek(size - _PAST_BYTES)
        cut = file.read(_PAST_BYTES).find(b"\n")
        return size - _PAST_BYTES + cut + 1
