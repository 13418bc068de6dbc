"""What a rank adds to its log, in bounded portions: however much it writes, little is held."""

from __future__ import annotations

import codecs
import os

_PORTION_BYTES = 1 << 16
# Behind by more than this, the middle is left out.
_MAX_BEHIND_BYTES = 1 << 20


class LogTail:
    """Reads a log from its present end on, or from `start`."""

    def __init__(self, path: str, *, start: int | None = None) -> None:
        self._path = path
        self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        end = os.fstat(self._file.fileno()).st_size
        self._position = end if start is None else min(start, end)
        self._pending = ""
        # A character may be cut at the end of a portion.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def read(self, *, to_the_end: bool = False) -> str:
        """The whole lines that have come since the last call, at most a portion; else empty.

        to_the_end   with what stands behind the last line break: nothing more will come
        """
        size = os.fstat(self._file.fileno()).st_size
        skipped = ""
        if size < self._position:
            self._position = 0  # it was cut short by somebody
        if size - self._position > _MAX_BEHIND_BYTES:
            behind = size - self._position - _PORTION_BYTES
            self._position += behind
            self._decoder.reset()
            self._pending = ""
            skipped = f"\n[{behind / 2**20:.1f} MiB are not shown; they are in {self._path}]\n"
        self._file.seek(self._position)
        data = self._file.read(_PORTION_BYTES)
        self._position += len(data)
        text = self._pending + self._decoder.decode(data)
        # A progress bar ends its lines with a return.
        whole = max(text.rfind("\n"), text.rfind("\r")) + 1
        if to_the_end or len(text) > _PORTION_BYTES:
            whole = len(text)
        self._pending = text[whole:]
        return skipped + text[:whole]

    @property
    def path(self) -> str:
        """Where this process can read the file, though its name may be gone."""
        return f"/proc/self/fd/{self._file.fileno()}"

    def close(self) -> None:
        self._file.close()
