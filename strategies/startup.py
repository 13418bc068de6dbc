"""Where a rank's time goes before its first optimizer step is done. Knows a clock and names, no work."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Literal

# In the order in which they follow one another. MindSpore's ranks on NPUs meet before the model.
Stage = Literal[
    "imports",
    "tokens",
    "model",
    "process group",
    "strategy",
    "resuming",
    "proof",
    "first batch",
    "first step",
]


class Stages:
    """A stopwatch that is always within one stage: together they are all of the time.

    Once stopped it stays so: what a later evaluation does is no part of the start.
    """

    def __init__(self, stage: Stage = "imports") -> None:
        self._stage: Stage = stage
        self._since = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._stopped = False

    @property
    def seconds(self) -> Mapping[str, float]:
        """Of the stages that have ended, in their order."""
        return self._seconds

    def begin(self, stage: Stage) -> None:
        """The stage before ends. One that is begun again goes on."""
        self._end()
        self._stage = stage

    def stop(self) -> None:
        self._end()
        self._stopped = True

    def _end(self) -> None:
        if self._stopped:
            return
        now = time.perf_counter()
        self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + now - self._since
        self._since = now
