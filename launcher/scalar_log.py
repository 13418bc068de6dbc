"""TensorBoard's event files, written without torch and TensorFlow."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ftlaunch.launcher.line_log import WholeWriter


class ScalarLog:
    """One event file of a folder, opened with the first scalar."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: WholeWriter | None = None
        self._put: Callable[[Any], None]
        self._kept_step: int | None = None

    def append(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self._writer is None:
            self._open(step - 1 if self._kept_step is None else self._kept_step)
        summary = Summary(
            value=[
                Summary.Value(tag=tag, simple_value=value)
                for tag, value in values.items()
                if isinstance(value, (int, float))
            ]
        )
        self._put(Event(wall_time=time.time(), step=step, summary=summary))

    def rewind(self, step: int) -> None:
        self._kept_step = step
        if self._writer is not None:
            self._purge_after(step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _open(self, kept_step: int) -> None:
        # Not EventFileWriter: it looks for TensorFlow to open its file and writes from a thread,
        # where a full disk would be seen by nobody.
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        # Readers take the files of a folder in the order of their names.
        number = sum(1 for _ in self._folder.iterdir())
        name = f"events.out.tfevents.{int(time.time()):010d}.{number:05d}.{socket.gethostname()}"
        self._writer = WholeWriter(self._folder / name)
        records = RecordWriter(self._writer)
        self._put = lambda event: records.write(event.SerializeToString())
        self._put(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._purge_after(kept_step)

    def _purge_after(self, step: int) -> None:
        """Readers drop what has a step >= that of a START, except for the first START they meet."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        start = SessionLog(status=SessionLog.START)
        self._put(Event(wall_time=time.time(), step=step + 1, session_log=start))
