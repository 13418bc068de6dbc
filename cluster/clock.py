"""What another machine's CLOCK_MONOTONIC is ahead of ours, from questions and answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(slots=True)
class Clock:
    """`offset` seconds are to be taken off the other's times. Exact where both are one machine."""

    offset: float = 0.0
    _best_round_trip: float = math.inf

    def meet(self, boot_id: str) -> None:
        """The same boot id means the same machine, and the same clock."""
        if boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip():
            self.offset = 0.0
            self._best_round_trip = 0.0

    def compare(self, *, sent: float, theirs: float, received: float) -> None:
        """The answer was given some time between; the shortest round trip says it best."""
        round_trip = received - sent
        if 0 <= round_trip < self._best_round_trip:
            self._best_round_trip = round_trip
            self.offset = theirs - (sent + received) / 2
