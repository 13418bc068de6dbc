"""Files of JSON lines: appended to, cut back and read. Nothing about what the lines mean."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ftlaunch.strategies.files import replace_file

_BLOCK = 65_536


class WholeWriter:
    """Appends byte strings to a file, each one wholly or not at all."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def write(self, data: bytes) -> None:
        start = os.fstat(self._descriptor).st_size
        try:
            left = memoryview(data)
            # A disk that fills up takes a part first and refuses the rest on the next call.
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError:
            os.ftruncate(self._descriptor, start)
            raise

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class LineLog:
    """A file of JSON objects, one a line; strict JSON: non-finite numbers become null."""

    def __init__(self, path: Path) -> None:
        self._path = path
        _cut_torn_line(path)
        self._writer = WholeWriter(path)

    def append(self, line: Mapping[str, Any]) -> None:
        self._writer.write(_encode(line))

    def read(self) -> Iterator[dict[str, Any]]:
        return read_lines(self._path)

    def last(self) -> dict[str, Any] | None:
        with self._path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _BLOCK))
            decoded = map(_decode, reversed(file.readlines()))
            return next((line for line in decoded if line is not None), None)

    def rewind(self, step: int) -> None:
        """Drop the lines whose "step" is greater; without one to drop the file is not touched."""
        with self._path.open("rb") as file:
            lines = file.readlines()
        kept = [line for line in lines if _is_within(_decode(line), step)]
        if len(kept) == len(lines):
            return
        with replace_file(self._path) as file:
            file.writelines(kept)
        self.close()
        self._writer = WholeWriter(self._path)

    def close(self) -> None:
        self._writer.close()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of lines, damaged ones left out; nothing for a missing file."""
    try:
        with path.open("rb") as file:
            for line in file:
                parsed = _decode(line)
                if parsed is not None:
                    yield parsed
    except FileNotFoundError:
        return


def _cut_torn_line(path: Path) -> None:
    """A run that was killed, or whose machine was, may leave a line without its end."""
    try:
        with path.open("r+b") as file:
            end = file.seek(0, os.SEEK_END)
            tail = b""
            while end and b"\n" not in tail:
                start = max(0, end - _BLOCK)
                file.seek(start)
                tail = file.read(end - start)
                end = start
            whole = end + tail.rfind(b"\n") + 1
            file.truncate(whole)
    except FileNotFoundError:
        return


def _encode(line: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(line, allow_nan=False)
    except (TypeError, ValueError):
        text = json.dumps(strict(line), allow_nan=False)
    return text.encode("ascii") + b"\n"


def _decode(line: bytes) -> dict[str, Any] | None:
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def strict(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return value


def _is_within(line: Mapping[str, Any] | None, step: int) -> bool:
    """False for a damaged line too."""
    if line is None:
        return False
    own = line.get("step")
    return not isinstance(own, (int, float)) or own <= step
