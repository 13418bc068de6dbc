"""Ctrl-C, Ctrl-Z, SIGTERM and a scheduler's signals as something a selector can wait for."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

# Schedulers announce the end of an allocation by one of the two that programs may choose.
ANNOUNCEMENTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_STOPS = (signal.SIGINT, *ANNOUNCEMENTS)


class StopSignals:
    """Counts the requests to stop; `descriptor` becomes readable at each.

    first     the signal by which a stop was asked for first
    hurry     Ctrl-C was pressed when a stop had been asked for already
    suspend   Ctrl-Z was pressed; set back by whoever obeys
    """

    def __init__(self) -> None:
        self.count = 0
        self.first: int | None = None
        self.hurry = False
        self.suspend = False
        self.descriptor, self._writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        for number in _STOPS:
            self._before[number] = signal.signal(number, self._count)
        # A shell without job control has it ignored, and so it stays.
        if signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL:
            self._before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._ask_suspend)

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
        self.first = self.first or number
        self.hurry = self.hurry or (self.count > 1 and number == signal.SIGINT)
        self._wake()

    def _ask_suspend(self, number: int, frame: FrameType | None) -> None:
        self.suspend = True
        self._wake()

    def _wake(self) -> None:
        try:
            os.write(self._writing, b"!")
        except BlockingIOError:
            pass
