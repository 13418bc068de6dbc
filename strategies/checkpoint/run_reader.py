"""Reads the bytes of weights from wherever they lie, through one small buffer."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.checkpoint.manifest import CheckpointDamaged
from ftlaunch.strategies.checkpoint.weights import Weight

# A multiple of every element size. Bytes that are converted go in smaller pieces, which stay in the cache.
_BUFFER_BYTES = 8 << 20
_CONVERTED_BYTES = 1 << 20
# Of a thousand ranks not all files fit into the usual limit of 1,024 descriptors.
_MAX_OPEN_FILES = 512


class RunReader:
    """Reads runs through one buffer; keeps the files open that it has read from.

    pread, not a memory map: mapped pages count as memory of the process.
    """

    def __init__(self) -> None:
        self._buffer = np.empty(_BUFFER_BYTES, dtype=np.uint8)
        self._other = np.empty(0, dtype=np.uint8)
        self._files: dict[Path, int] = {}

    def __enter__(self) -> RunReader:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def pieces(self, weight: Weight, *, converts: bool) -> Iterator[NDArray[np.uint8]]:
        """The bytes of a weight, whole elements at a time; each is gone with the next."""
        limit = _CONVERTED_BYTES if converts else _BUFFER_BYTES
        for run in weight.runs:
            checksum, position = 0, 0
            while position < run.nbytes:
                size = min(limit, run.nbytes - position)
                data = self._buffer[:size]
                self._fill(run.path, run.offset + position, data)
                if run.crc32 is not None:
                    checksum = zlib.crc32(data.data, checksum)
                yield data
                position += size
            if run.crc32 is not None and checksum != run.crc32:
                raise CheckpointDamaged(
                    run.path.parent, f"{run.path.name}: the bytes of {weight.name} have changed"
                )

    def read_beside(self, path: Path, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """In a buffer of its own, so that it can be compared with a piece."""
        if self._other.size < nbytes:
            self._other = np.empty(nbytes, dtype=np.uint8)
        self._fill(path, offset, self._other[:nbytes])
        return self._other[:nbytes]

    def _fill(self, path: Path, offset: int, data: NDArray[np.uint8]) -> None:
        descriptor = self._open(path)
        rest = memoryview(data.data)
        while rest:
            try:
                count = os.preadv(descriptor, [rest], offset)
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror}.") from None
            if count == 0:
                raise CheckpointDamaged(path.parent, f"{path.name} ends at byte {offset:,}")
            rest, offset = rest[count:], offset + count

    def _open(self, path: Path) -> int:
        if path not in self._files:
            if len(self._files) >= _MAX_OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[path]
