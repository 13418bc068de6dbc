"""What a `.ckpt` file of MindSpore holds, as places in the file. Reads no tensor data but for the checksum.

The file is one protobuf message, `checkpoint.proto` of MindSpore, written piece by piece:

    value (1): tag (1), the name; tensor (2): dims (1), one varint an axis; tensor_type (2), such as
               "Float32"; tensor_content (3), row-major and little-endian

A tensor above 512 MiB is several such values, one after the other, with the same name and the whole
shape in each. At the end may stand "crc_num" and the CRC-32 of all before it in 10 bytes, big-endian.
MindSpore is not imported, and no length in the file is believed before it is compared with the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.checkpoint.protobuf_file import ProtobufFile, file_damaged
from ftlaunch.strategies.checkpoint.torch_zip import ITEM_BYTES
from ftlaunch.strategies.checkpoint.weights import Run, Weight

# As MindSpore names dtypes → as safetensors does.
_DTYPES = {
    "Float64": "F64",
    "Float32": "F32",
    "Float16": "F16",
    "BFloat16": "BF16",
    "Int64": "I64",
    "Int32": "I32",
    "Int16": "I16",
    "Int8": "I8",
    "UInt64": "U64",
    "UInt32": "U32",
    "UInt16": "U16",
    "UInt8": "U8",
    "Bool": "BOOL",
}
_TEXT = "str"
# The keys of the fields: number << 3 | wire type, 0 for a varint, 2 for bytes with their length.
_VALUE, _TAG, _TENSOR, _MAP = 0x0A, 0x0A, 0x12, 0x1A
_DIM, _PACKED_DIMS, _TYPE, _CONTENT = 0x08, 0x0A, 0x12, 0x1A
_CHECKSUM = b"crc_num"
_TRAILER_BYTES = len(_CHECKSUM) + 10
# Of AES-GCM, AES-CBC and SM4-CBC, as the first four bytes of a file.
_ENCRYPTED = {(0x7F3A5ED8 + i).to_bytes(4, "little") for i in range(3)}
# Of a zip archive, which torch.save and PyTorch Lightning write under the same ending.
_ZIP = b"PK\x03\x04"

_MAX_VALUES = 1 << 20
_MAX_NAME_BYTES = 4096
_MAX_TYPE_BYTES = 32
_MAX_AXES = 32
_MAX_DIM = 1 << 48
# MindSpore cuts every 512 MiB.
_MAX_PARTS = 1 << 12


@dataclass(frozen=True, slots=True, kw_only=True)
class MindsporeFile:
    """What one file holds.

    entries       every tensor, those of an optimizer included
    texts         names of entries that are text, such as save_checkpoint's append_dict may have
    has_checksum  whether the file has one; then it has been compared
    """

    path: Path
    entries: tuple[Weight, ...]
    texts: tuple[str, ...]
    has_checksum: bool


def read_ckpt(path: Path) -> MindsporeFile:
    """UserError for a file that is cut off, damaged, encrypted or of another format."""
    check_is_file(path)
    with open(path, "rb", buffering=0) as file:
        data = ProtobufFile(path, file.fileno())
        _check_kind(path, data.take(0, min(4, data.size)))
        entries, texts, end = _walk(data)
        if end < data.size:
            _check_crc(data, end)
    return MindsporeFile(
        path=path, entries=entries, texts=texts, has_checksum=end + _TRAILER_BYTES == data.size
    )


def check_is_file(path: Path) -> None:
    """UserError for a folder, a pipe, which would be waited for, or a link to nothing."""
    if not path.is_file():
        kind = "is a link that leads to no file" if path.is_symlink() else "is no file"
        raise UserError(f"{path} {kind}. Pass a checkpoint's file, or the folder that it is in.")


def _check_kind(path: Path, first: bytes) -> None:
    if not first:
        raise file_damaged(path, "it is empty")
    if first in _ENCRYPTED:
        raise UserError(
            f"{path} is encrypted. Load it in MindSpore with its dec_key and save it again without "
            "an enc_key; then merge that."
        )
    if first == _ZIP:
        raise UserError(
            f"{path} is a file of torch.save, not of MindSpore, and cannot be merged. Pass a "
            "checkpoint of MindSpore, of DeepSpeed or of ftlaunch."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Value:
    """One value of the file: a tensor, or a part of one."""

    name: str
    kind: str
    dims: tuple[int, ...]
    run: Run


def _walk(data: ProtobufFile) -> tuple[tuple[Weight, ...], tuple[str, ...], int]:
    """(tensors, names of texts, where the trailer begins or the file ends)."""
    entries: dict[str, Weight] = {}
    # Names alone, as the keys of a table: there may be a million.
    texts: dict[str, None] = {}
    parts: list[_Value] = []
    end = 0
    for number, (value, after) in enumerate(_values(data)):
        end = after
        if number >= _MAX_VALUES:
            raise data.damaged(f"it has more than {_MAX_VALUES:,} entries")
        if parts and parts[0].name != value.name:
            _finish(data, parts, entries, texts)
            parts = []
        if value.name in entries or value.name in texts:
            raise data.damaged(f"the entry {value.name!r} stands at two places")
        parts.append(value)
    if parts:
        _finish(data, parts, entries, texts)
    return tuple(entries.values()), tuple(texts), end


def _values(data: ProtobufFile) -> Iterator[tuple[_Value, int]]:
    """Every value, and where the next one begins."""
    offset = 0
    while offset < data.size:
        num_left = data.size - offset
        first = data.take(offset, min(len(_CHECKSUM), num_left))
        if _CHECKSUM.startswith(first) and num_left <= _TRAILER_BYTES:
            if num_left < _TRAILER_BYTES:
                raise data.cut_off("the checksum", offset + _TRAILER_BYTES)
            return
        if first[0] != _VALUE:
            raise data.damaged(f"no entry begins at byte {offset:,}, where one should")
        length, begin = data.varint(offset + 1, data.size)
        offset = begin + length
        if offset > data.size:
            raise data.cut_off(f"the entry at byte {begin:,}", offset)
        yield _value(data, begin, offset), offset


def _value(data: ProtobufFile, begin: int, end: int) -> _Value:
    what = f"the entry at byte {begin:,}"
    fields: dict[int, tuple[int, int]] = {}
    for key, first, last in data.fields(begin, end, what):
        if key in fields or key not in (_TAG, _TENSOR, _MAP):
            raise data.damaged(f"{what} has a field of key {key} that it should not have")
        fields[key] = (first, last)
    if _TAG not in fields:
        raise data.damaged(f"{what} has no name")
    name = data.text(*fields[_TAG], _MAX_NAME_BYTES, "a name")
    if _MAP in fields:
        raise UserError(
            f"{data.path}: {name!r} is a MapParameter, a table that grows, which a model's file "
            "cannot hold. Save the checkpoint without it."
        )
    if _TENSOR not in fields:
        raise data.damaged(f"{name!r} has no tensor")
    return _tensor(data, name, *fields[_TENSOR])


def _tensor(data: ProtobufFile, name: str, begin: int, end: int) -> _Value:
    dims: list[int] = []
    fields: dict[int, tuple[int, int]] = {}
    for key, first, last in data.fields(begin, end, repr(name)):
        if key in (_DIM, _PACKED_DIMS):
            while first < last and len(dims) <= _MAX_AXES:
                dim, first = data.varint(first, last)
                dims.append(dim)
        elif key in fields or key not in (_TYPE, _CONTENT):
            raise data.damaged(f"{name!r} has a field of key {key} that it should not have")
        else:
            fields[key] = (first, last)
    if len(dims) > _MAX_AXES or any(dim >= _MAX_DIM for dim in dims):
        raise data.damaged(f"{name!r} has a shape that makes no sense")
    if len(fields) < 2:
        raise data.damaged(f"{name!r} has no type or no content")
    first, last = fields[_CONTENT]
    kind = data.text(*fields[_TYPE], _MAX_TYPE_BYTES, f"the type of {name!r}")
    if kind not in _DTYPES and kind != _TEXT:
        raise UserError(
            f"{data.path}: {name!r} is of type {kind!r}, which cannot be merged; known are "
            f"{', '.join(_DTYPES)}. Save the checkpoint without it, or in one of these."
        )
    return _Value(name=name, kind=kind, dims=tuple(dims), run=Run(data.path, first, last - first))


def _finish(
    data: ProtobufFile, parts: list[_Value], entries: dict[str, Weight], texts: dict[str, None]
) -> None:
    """Makes one entry of all parts of a tensor, whose bytes have to be those of its shape."""
    name, kind, dims = parts[0].name, parts[0].kind, parts[0].dims
    if any((part.kind, part.dims) != (kind, dims) for part in parts):
        raise data.damaged(f"the parts of {name!r} differ in shape or type")
    if kind == _TEXT:
        if len(parts) > 1:
            raise data.damaged(f"the entry {name!r} stands at two places")
        texts[name] = None
        return
    dtype = _DTYPES[kind]
    nbytes = sum(part.run.nbytes for part in parts)
    # How MindSpore before 2.0 wrote a number without axes.
    shape = () if dims == (0,) and nbytes == ITEM_BYTES[dtype] else dims
    if nbytes != (expected := math.prod(shape) * ITEM_BYTES[dtype]):
        raise data.damaged(
            f"{name!r} has {nbytes:,} bytes, its shape {shape} of {kind} needs {expected:,}",
        )
    if len(parts) > _MAX_PARTS or any(part.run.nbytes % ITEM_BYTES[dtype] for part in parts):
        raise data.damaged(f"{name!r} is cut into pieces that make no sense")
    runs = tuple(part.run for part in parts if part.run.nbytes)
    entries[name] = Weight(name=name, dtype=dtype, shape=shape, runs=runs)


def _check_crc(data: ProtobufFile, end: int) -> None:
    expected = int.from_bytes(data.take(end, _TRAILER_BYTES)[len(_CHECKSUM) :], "big")
    if data.checksum(end) != expected:
        raise data.damaged("its bytes have another checksum than it says")
