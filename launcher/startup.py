"""Where the time went from the command to the first optimizer step, and who measured which part.

The parts follow one another and add up to the whole. What a rank says of itself are durations, so
that its clock need not be ours; what lies between is ours to measure.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

from ftlaunch.cluster.linux import read_process
from ftlaunch.strategies.progress import Startup

_COORDINATOR = "coordinator"
_RANK = "rank 0"


@dataclass(slots=True, kw_only=True)
class StartupClock:
    """What the coordinator notes; all in seconds of `time.monotonic`.

    opened     the command line is read, the job begins
    asked      the first ranks were asked for; None before
    asked_last those that did the first step were
    stepped    the first step was heard of; None before
    of_rank    what rank 0 said with it
    """

    opened: float
    asked: float | None = None
    asked_last: float | None = None
    stepped: float | None = None
    of_rank: Startup | None = None

    def ask(self) -> None:
        """Ranks are asked for. Once a step was done, a job that is started anew changes nothing."""
        if self.stepped is None:
            self.asked_last = time.monotonic()
            self.asked = self.asked or self.asked_last

    def hear(self, message: Startup) -> None:
        if self.of_rank is None:
            self.of_rank, self.stepped = message, time.monotonic()

    def to_json(self) -> dict[str, Any] | None:
        """`startup` of summary.json; None where no step was done.

        {"total_seconds", "preload_seconds", "parts": [{"name", "seconds", "measured_by"}, …]}
        """
        if (
            self.asked is None
            or self.asked_last is None
            or self.stepped is None
            or self.of_rank is None
        ):
            return None
        since = _process_started(self.opened)
        own = self.of_rank.seconds
        # From being asked for to the rank's first line, and the way of its message back.
        between = self.stepped - self.asked_last - sum(own.values())
        earlier = self.asked_last - self.asked
        parts = [
            ("command line", self.opened - since, _COORDINATOR),
            ("agents and plan", self.asked - self.opened, _COORDINATOR),
            *([("earlier attempts", earlier, _COORDINATOR)] if earlier else []),
            ("ranks begin", max(0.0, between), _COORDINATOR),
            *((name, seconds, _RANK) for name, seconds in own.items()),
        ]
        return {
            "total_seconds": round(self.stepped - since, 4),
            # By the fork server, beside the first three parts.
            "preload_seconds": round(self.of_rank.preload_seconds, 4),
            "parts": [
                {"name": name, "seconds": round(seconds, 4), "measured_by": who}
                for name, seconds, who in parts
            ],
        }


def _process_started(opened: float) -> float:
    """When this process began, to a hundredth of a second; `opened` where the kernel does not say."""
    process = read_process(os.getpid())
    if process is None:
        return opened
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - process.started / os.sysconf("SC_CLK_TCK")
    return min(opened, time.monotonic() - age)
