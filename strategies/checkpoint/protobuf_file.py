"""Walks through a protobuf message in a file, without its schema and without reading what is large.

The wire format: every field is a key, a varint of number << 3 | type, and then a varint (type 0) or a
length and so many bytes (type 2). https://protobuf.dev/programming-guides/encoding
Other types are refused. No length is believed before it is compared with what it lies in.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from ftlaunch.cluster.errors import UserError

# Between large tensors a window serves one of them only.
_WINDOW_BYTES = 1 << 13
_CHECKED_BYTES = 1 << 20
_REMEDY = "Copy it anew from where it was written, or merge another checkpoint."


def file_damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged: {reason}. {_REMEDY}")


class ProtobufFile:
    """An open file. Small pieces are read through one window: most lie close to one another."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.size = os.fstat(descriptor).st_size
        self._descriptor = descriptor
        self._window = b""
        self._start = 0

    def damaged(self, reason: str) -> UserError:
        return file_damaged(self.path, reason)

    def cut_off(self, what: str, end: int) -> UserError:
        return UserError(
            f"{self.path} is cut off, or no checkpoint of MindSpore: {what} would end at byte "
            f"{end:,}, the file has {self.size:,}. {_REMEDY}"
        )

    def take(self, offset: int, nbytes: int) -> bytes:
        """Bytes [offset, offset + nbytes), at most a window of them and all inside the file."""
        position = offset - self._start
        if not 0 <= position <= len(self._window) - nbytes:
            self._window = os.pread(self._descriptor, _WINDOW_BYTES, offset)
            self._start, position = offset, 0
        found = self._window[position : position + nbytes]
        if len(found) < nbytes:
            raise self.damaged(f"it has shrunk to {offset + len(found):,} bytes")
        return found

    def varint(self, offset: int, end: int) -> tuple[int, int]:
        """(value, where the next byte is) of a number that has to end before `end`."""
        value = 0
        for i, byte in enumerate(self.take(offset, min(10, end - offset))):
            value |= (byte & 0x7F) << (7 * i)
            if byte < 0x80:
                if value >= 1 << 63:
                    raise self.damaged(f"the number at byte {offset:,} is out of range")
                return value, offset + i + 1
        if end - offset < 10 and end == self.size:
            raise self.cut_off("a number", end + 1)
        raise self.damaged(f"the number at byte {offset:,} does not end")

    def fields(self, offset: int, end: int, what: str) -> Iterator[tuple[int, int, int]]:
        """(key, first byte, byte after the last) of every field of a message."""
        while offset < end:
            key, begin = self.varint(offset, end)
            if key & 7 == 0:
                _, offset = self.varint(begin, end)
            elif key & 7 == 2:
                length, begin = self.varint(begin, end)
                offset = begin + length
            else:
                raise self.damaged(f"{what} has a field of key {key} at byte {offset:,}")
            if offset > self.size:
                raise self.cut_off(what, offset)
            if offset > end:
                raise self.damaged(f"a part of {what} ends at byte {offset:,}, after {end:,}")
            yield key, begin, offset

    def text(self, begin: int, end: int, limit: int, what: str) -> str:
        if not 0 < end - begin <= limit:
            raise self.damaged(f"{what} has {end - begin:,} bytes, not 1 to {limit:,}")
        try:
            return self.take(begin, end - begin).decode()
        except UnicodeDecodeError:
            raise self.damaged(f"{what} at byte {begin:,} is no UTF-8") from None

    def checksum(self, end: int) -> int:
        """CRC-32 of all bytes before `end`."""
        buffer, checksum, offset = bytearray(_CHECKED_BYTES), 0, 0
        while offset < end:
            part = memoryview(buffer)[: min(_CHECKED_BYTES, end - offset)]
            count = os.preadv(self._descriptor, [part], offset)
            if count == 0:
                raise self.damaged(f"it has shrunk to {offset:,} bytes")
            checksum = zlib.crc32(part[:count], checksum)
            offset += count
        return checksum
