"""Ctrl-C and SIGTERM as something a selector can wait for."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Counts the requests to stop; `descriptor` becomes readable at each.

    hurry   Ctrl-C was pressed when a stop had been asked for already
    """

    def __init__(self) -> None:
        self.count = 0
        self.hurry = False
        self.descriptor, self._writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._count)

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self.descriptor)
        os.close(self._writing)

    def drain(self) -> None:
        try:
            os.read(self.descriptor, 1024)
        except BlockingIOError:
            pass

    def _count(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.hurry = self.hurry or (self.count > 1 and number == signal.SIGINT)
        try:
            os.write(self._writing, b"!")
        except BlockingIOError:
            pass
