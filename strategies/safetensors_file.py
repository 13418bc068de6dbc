"""Reads and writes safetensors files with numpy. Knows the bytes, not what the tensors mean.

Layout: 8 bytes little-endian header length, a JSON header, then the tensors without gaps.
https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ftlaunch.cluster.errors import FtlaunchError
from ftlaunch.strategies.files import replace_file

_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ITEM_BYTES = {name: dtype.itemsize for name, dtype in _DTYPES.items()}
# Those of the format that have no array here, or none yet.
_OTHER_ITEM_BYTES: Mapping[str, int] = {
    "BF16": 2,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
# The limit of the safetensors library itself.
_MAX_HEADER_BYTES = 100_000_000
_MAX_AXES = 32
_METADATA = "__metadata__"


class FileDamaged(FtlaunchError):
    """A file that is not, or no longer, a whole safetensors file."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is damaged: {reason}")
        self.path = path
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlace:
    """Where a tensor lies: `nbytes` from byte `offset` of the file; its dtype as the format names it."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFile:
    """An open file; its tensors are read-only views of one memory map made on first use."""

    __slots__ = ("_data_start", "_entries", "_map", "_size", "metadata", "path")

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, str],
        entries: Mapping[str, _Entry],
        data_start: int,
        size: int,
    ) -> None:
        self.path = path
        self.metadata = metadata
        self._entries = entries
        self._data_start = data_start
        self._size = size
        self._map: NDArray[np.uint8] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._entries[name].dtype

    def place(self, name: str) -> TensorPlace:
        entry = self._entries[name]
        return TensorPlace(
            dtype=_DTYPE_NAMES[entry.dtype],
            shape=entry.shape,
            offset=self._data_start + entry.begin,
            nbytes=entry.end - entry.begin,
        )

    def tensor(self, name: str) -> NDArray[Any]:
        """Read-only view of the file. KeyError for a name that is not in `names`."""
        entry = self._entries[name]
        begin, end = self._data_start + entry.begin, self._data_start + entry.end
        return self._mapped()[begin:end].view(entry.dtype).reshape(entry.shape)

    def _mapped(self) -> NDArray[np.uint8]:
        if self._map is None:
            mapped = np.memmap(self.path, dtype=np.uint8, mode="r")
            if mapped.size != self._size:
                raise FileDamaged(self.path, f"it changed from {self._size} to {mapped.size} bytes")
            # A plain ndarray slices several times faster than np.memmap and keeps the map alive.
            self._map = mapped.view(np.ndarray)
        return self._map


def write_file(
    path: Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]
) -> None:
    """Write `path` by temporary file, fsync and rename: there is a whole file or none.

    Raises OSError as it comes; the temporary file is gone then.
    """
    kinds = {name: (array.dtype, array.shape) for name, array in tensors.items()}
    write_tensors(path, kinds, tensors.items(), metadata)


def write_tensors(
    path: Path,
    kinds: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],
    tensors: Iterable[tuple[str, NDArray[Any]]],
    metadata: Mapping[str, str],
) -> None:
    """As `write_file`, holding one tensor at a time: dtype and shape of each are known beforehand.

    ValueError when other tensors come than were said.
    """
    # Largest elements first, so that every tensor starts at a multiple of its element size.
    ordered = dict(sorted(kinds.items(), key=lambda item: (-item[1][0].itemsize, item[0])))
    header, offsets = _encode_header(ordered, metadata)
    with replace_file(path) as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for name, array in tensors:
            if name not in offsets or (array.dtype, array.shape) != kinds[name]:
                raise ValueError(
                    f"{name!r} comes as {array.dtype} {array.shape}, which was not said"
                )
            file.seek(8 + len(header) + offsets.pop(name))
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        if offsets:
            raise ValueError(f"{next(iter(offsets))!r} has not come")


def open_file(path: Path) -> SafetensorsFile:
    """Check the header against the file. FileDamaged for anything wrong; OSError passes."""
    header, metadata, data_start, size = _open_header(path)
    entries: dict[str, _Entry] = {}
    for name, value in header.items():
        dtype_name, shape, begin, end = _check_entry(path, name, value, _ITEM_BYTES)
        entries[name] = _Entry(dtype=_DTYPES[dtype_name], shape=shape, begin=begin, end=end)
    _check_coverage(path, {n: (e.begin, e.end) for n, e in entries.items()}, size - data_start)
    return SafetensorsFile(path, metadata, entries, data_start, size)


def read_places(path: Path) -> dict[str, TensorPlace]:
    """Where every tensor lies, of any dtype of the format; reads the header alone.

    FileDamaged for anything wrong; OSError passes.
    """
    header, _, data_start, size = _open_header(path)
    places: dict[str, TensorPlace] = {}
    known = {**_ITEM_BYTES, **_OTHER_ITEM_BYTES}
    for name, value in header.items():
        dtype, shape, begin, end = _check_entry(path, name, value, known)
        places[name] = TensorPlace(
            dtype=dtype, shape=shape, offset=data_start + begin, nbytes=end - begin
        )
    spans = {
        n: (p.offset - data_start, p.offset - data_start + p.nbytes) for n, p in places.items()
    }
    _check_coverage(path, spans, size - data_start)
    return places


def read_metadata(path: Path) -> Mapping[str, str]:
    """What `__metadata__` says. FileDamaged for a header that is none; OSError passes."""
    return _open_header(path)[1]


def _open_header(path: Path) -> tuple[dict[str, Any], Mapping[str, str], int, int]:
    """(tensor entries as they stand there, metadata, where the data begins, bytes of the file)."""
    if path.exists() and not path.is_file():
        # Opening a pipe would wait for ever.
        raise FileDamaged(path, "it is no file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        raw = _read_header(path, file, size)
    header = _decode_json(path, raw)
    metadata = _check_metadata(path, header.pop(_METADATA, {}))
    return header, metadata, 8 + len(raw), size


def _encode_header(
    kinds: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The header, and where each tensor begins, counted from where the data begins."""
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    offsets: dict[str, int] = {}
    position = 0
    for name, (dtype, shape) in kinds.items():
        dtype_name = _DTYPE_NAMES.get(dtype)
        if dtype_name is None or name == _METADATA:
            raise ValueError(f"cannot write tensor {name!r} of dtype {dtype}")
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": dtype_name,
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        offsets[name] = position
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) + 8 > _MAX_HEADER_BYTES:
        raise ValueError(f"header of {len(text)} bytes exceeds {_MAX_HEADER_BYTES}")
    return text + b" " * (-len(text) % 8), offsets


def _read_header(path: Path, file: BinaryIO, size: int) -> bytes:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise FileDamaged(path, f"{size} bytes are too few for a header")
    length = int.from_bytes(prefix, "little")
    if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
        raise FileDamaged(path, f"header length {length} does not fit a file of {size} bytes")
    raw = file.read(length)
    if len(raw) < length:
        raise FileDamaged(path, "it ends within its header")
    return raw


def _decode_json(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            raise ValueError("a name occurs twice")
        return result

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    # RecursionError: thousands of nested brackets.
    except (ValueError, RecursionError) as error:
        raise FileDamaged(path, f"its header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise FileDamaged(path, "its header is not a JSON object")
    return header


def _check_metadata(path: Path, value: object) -> Mapping[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise FileDamaged(path, f"{_METADATA} is not a table of strings")
    return value


def _check_entry(
    path: Path, name: str, value: object, item_bytes: Mapping[str, int]
) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, first byte, byte after the last), counted from where the data begins."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise FileDamaged(path, f"tensor {name!r} lacks dtype, shape or data_offsets")
    dtype_name, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in item_bytes:
        known = ", ".join(item_bytes)
        raise FileDamaged(path, f"tensor {name!r} has dtype {dtype_name!r}, not one of {known}")
    if not _are_sizes(shape) or len(shape) > _MAX_AXES:
        raise FileDamaged(path, f"tensor {name!r} has shape {shape!r}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise FileDamaged(path, f"tensor {name!r} has data_offsets {offsets!r}")
    begin, end = offsets
    if end - begin != math.prod(shape) * item_bytes[dtype_name]:
        raise FileDamaged(path, f"tensor {name!r} has {end - begin} bytes, not those of its shape")
    return dtype_name, tuple(shape), begin, end


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**48 for v in value)


def _check_coverage(path: Path, spans: Mapping[str, tuple[int, int]], data_bytes: int) -> None:
    """Tensors lie one after the other: no overlap, no gap, nothing before or behind them."""
    position = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != position:
            problem = "overlaps another" if begin < position else "follows a gap"
            raise FileDamaged(path, f"tensor {name!r} {problem}")
        position = end
    if position != data_bytes:
        raise FileDamaged(path, f"it holds {data_bytes} bytes of tensors, its header {position}")
