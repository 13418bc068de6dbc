"""What a file of torch.save holds, with its tensors as places in the file. Reads no tensor data.

The file is a zip archive of stored members: NAME/data.pkl, a pickle that refers to storages, and
NAME/data/KEY, the bytes of each storage. Neither torch nor anything that the pickle names is
imported, and no size in the file is believed before it is compared with the file.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.checkpoint.restricted_pickle import Builder, PickleRefused, load_pickle

ITEM_BYTES: Mapping[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "UntypedStorage": "U8",
}
_DTYPES = {"uint16": "U16", "uint32": "U32", "uint64": "U64"}
_LOCAL_HEADER = struct.Struct("<4s22xHH")
# Far above that of any model: half a million parameters have a pickle of some 100 MB.
_MAX_PICKLE_BYTES = 1 << 28
# Some 100 bytes for each storage, of which zipfile makes several times as much.
_MAX_TABLE_BYTES = 1 << 25
_MAX_AXES = 32
_REMEDY = "Copy it anew from where it was written, or merge another checkpoint."


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor in a file: its first element at byte `offset`, `strides` in elements.

    dtype    as the safetensors format names it; "?" for one that it does not have
    storage  key of its storage in the file, by which shared tensors are known
    """

    path: Path
    storage: str
    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.num_elements * ITEM_BYTES[self.dtype]

    @property
    def is_contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return self.num_elements == 0
            expected *= size
        return True


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: str
    offset: int
    nbytes: int


def read_torch_file(path: Path) -> Any:
    """The object that was saved, with a `StoredTensor` in the place of every tensor.

    UserError for a file that is cut off, damaged, of another format, or wants to import something.
    """
    if path.exists() and not path.is_file():
        # Opening a pipe would wait for ever.
        raise _damaged(path, "it is no file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        members = _members(path, file, size)
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise _damaged(path, f"it has {len(pickles)} members data.pkl and should have one")
        archive = pickles[0].removesuffix("data.pkl")
        _check_byte_order(path, file, members.get(f"{archive}byteorder"))
        offset, nbytes = members[pickles[0]]
        if nbytes > _MAX_PICKLE_BYTES:
            raise _damaged(path, f"its pickle has {nbytes:,} bytes, more than any model needs")
        data = os.pread(file.fileno(), nbytes, offset)
    tensors = _Tensors(path, archive, members)
    try:
        return load_pickle(data, tensors.builders(), tensors.storage)
    except PickleRefused as error:
        text = str(error)
        if text.endswith("; refused"):
            raise UserError(
                f"{path}: {text}. A checkpoint needs nothing of that: do not load this file with "
                "torch.load either, unless you know who wrote it."
            ) from None
        raise _damaged(path, f"of its pickle, {text}") from None


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged: {reason}. {_REMEDY}")


def _members(path: Path, file: BinaryIO, size: int) -> dict[str, tuple[int, int]]:
    """Member name → (first byte, number of bytes), every one inside the file."""
    try:
        # ZipFile itself would read all of it, however large.
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
        table_bytes = end[zipfile._ECD_SIZE] if end else 0  # type: ignore[attr-defined]
        if table_bytes > _MAX_TABLE_BYTES:
            raise _damaged(
                path,
                f"its table of contents has {table_bytes:,} bytes, more than any model needs",
            )
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OSError):
        raise UserError(
            f"{path} is cut off, or no file of torch.save: it has {size:,} bytes, and the table of "
            f"contents that has to stand at its end is not there{_beside(path)}. {_REMEDY}"
        ) from None
    members: dict[str, tuple[int, int]] = {}
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise _damaged(path, f"its member {info.filename[:100]!r} is compressed or encrypted")
        inside = 0 <= info.header_offset <= size - _LOCAL_HEADER.size
        head = os.pread(file.fileno(), _LOCAL_HEADER.size, info.header_offset) if inside else b""
        if len(head) < _LOCAL_HEADER.size or head[:4] != b"PK\x03\x04":
            raise _damaged(path, f"its member {info.filename[:100]!r} is not where it should be")
        _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(head)
        offset = info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        if info.file_size != info.compress_size or offset + info.file_size > size:
            raise _damaged(
                path,
                f"its member {info.filename[:100]!r} would end at byte "
                f"{offset + info.file_size:,}, the file has {size:,}",
            )
        if info.filename in members:
            raise _damaged(path, f"it has two members {info.filename[:100]!r}")
        members[info.filename] = (offset, info.file_size)
    return members


def _beside(path: Path) -> str:
    """The sizes of the other ranks' files: the ranks of a job write about the same."""
    kind = path.name[path.name.find("_mp_rank") :] if "_mp_rank" in path.name else None
    if kind is None:
        return ""
    sizes = {p.name: p.stat().st_size for p in path.parent.glob(f"*{kind}") if p != path}
    if not sizes:
        return ""
    name = max(sizes, key=lambda each: sizes[each])
    return f" (beside it, {name} has {sizes[name]:,} bytes)"


def _check_byte_order(path: Path, file: BinaryIO, member: tuple[int, int] | None) -> None:
    if member is not None and os.pread(file.fileno(), min(member[1], 16), member[0]) != b"little":
        raise _damaged(path, "it was written on a machine with another byte order")


def _size(args: tuple[Any, ...]) -> tuple[int, ...]:
    [sizes] = args
    if not isinstance(sizes, list | tuple) or len(sizes) > _MAX_AXES:
        raise PickleRefused("a shape has too many axes, or is none")
    if not all(type(size) is int for size in sizes):
        raise PickleRefused("a shape holds what is no number")
    return tuple(sizes)


class _Tensors:
    """Makes `StoredTensor`s of what a pickle says of storages, checked against the file."""

    def __init__(self, path: Path, archive: str, members: Mapping[str, tuple[int, int]]) -> None:
        self._path = path
        self._archive = archive
        self._members = members

    def storage(self, pid: Any) -> _Storage:
        """Of a persistent id ("storage", class, key, device, number of elements)."""
        kind, storage_class, key, _, numel = pid
        if type(key) is not str:
            raise PickleRefused(f"a storage has a {type(key).__name__} for a name")
        name = getattr(storage_class, "name", "")
        dtype = _STORAGES.get(name, "?")
        place = self._members.get(f"{self._archive}data/{key}")
        if kind != "storage" or type(numel) is not int or place is None:
            raise PickleRefused(f"the storage {key[:100]!r} is not in the file")
        if dtype != "?" and place[1] != numel * ITEM_BYTES[dtype]:
            raise PickleRefused(
                f"the storage {key!r} has {place[1]:,} bytes and should have "
                f"{numel * ITEM_BYTES[dtype]:,} ({numel} numbers)"
            )
        return _Storage(key, dtype, *place)

    def builders(self) -> dict[tuple[str, str], Builder]:
        return {
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v3"): self._tensor_v3,
            ("torch._utils", "_rebuild_parameter"): lambda args: args[0],
            ("torch._utils", "_rebuild_parameter_with_state"): lambda args: args[0],
            ("torch._tensor", "_rebuild_from_type_v2"): self._from_type,
            ("torch", "Size"): _size,
        }

    def _tensor(self, args: tuple[Any, ...]) -> StoredTensor:
        storage, first, shape, strides, *_ = args
        return self._place(storage, storage.dtype, first, shape, strides)

    def _tensor_v3(self, args: tuple[Any, ...]) -> StoredTensor:
        """As above, over an untyped storage, with the dtype named."""
        storage, first, shape, strides, _, _, dtype, *_ = args
        return self._place(storage, _DTYPES.get(dtype.name, "?"), first, shape, strides)

    def _from_type(self, args: tuple[Any, ...]) -> Any:
        function, _, inner, _ = args
        build = self.builders().get((function.module, function.name))
        if build is None:
            raise PickleRefused(f"it makes a tensor by {function!r}, which is not known")
        return build(inner)

    def _place(
        self, storage: Any, dtype: str, first: Any, shape: Any, strides: Any
    ) -> StoredTensor:
        if not isinstance(storage, _Storage):
            raise PickleRefused("a tensor has no storage")
        numbers = (first, *shape, *strides)
        if len(shape) != len(strides) or len(shape) > _MAX_AXES:
            raise PickleRefused(f"a tensor has {len(shape)} axes and {len(strides)} strides")
        if not all(type(number) is int and 0 <= number < 1 << 48 for number in numbers):
            raise PickleRefused("a tensor has a shape or strides that make no sense")
        item_bytes = ITEM_BYTES.get(dtype, 1)
        last = first + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if 0 not in shape and (last + 1) * item_bytes > storage.nbytes:
            raise PickleRefused(
                f"a tensor of shape {tuple(shape)} at element {first} needs "
                f"{(last + 1) * item_bytes:,} bytes of a storage of {storage.nbytes:,}"
            )
        return StoredTensor(
            path=self._path,
            storage=storage.key,
            offset=storage.offset + first * item_bytes,
            dtype=dtype,
            shape=tuple(shape),
            strides=tuple(strides),
        )
