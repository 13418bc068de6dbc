"""Writes files as MindSpore does, by the specification of protobuf: knows nothing of what reads them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

KINDS = {
    "float64": "Float64",
    "float32": "Float32",
    "float16": "Float16",
    "int64": "Int64",
    "int32": "Int32",
    "int16": "Int16",
    "int8": "Int8",
    "uint64": "UInt64",
    "uint32": "UInt32",
    "uint16": "UInt16",
    "uint8": "UInt8",
    "bool": "Bool",
}


def varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the top bit says that more follow. 300 is AC 02."""
    groups = []
    while number >= 128:
        groups.append(number % 128 + 128)
        number //= 128
    return bytes([*groups, number])


def chunk(number: int, content: bytes) -> bytes:
    """A field of bytes: its number and type 2, the length, the bytes."""
    return varint(number * 8 + 2) + varint(len(content)) + content


def value(name: str | bytes, dims: Sequence[int], kind: str, content: bytes) -> bytes:
    """One value of a checkpoint: value { tag, tensor { dims, tensor_type, tensor_content } }."""
    shape = b"".join(varint(1 * 8 + 0) + varint(dim) for dim in dims)
    tensor = shape + chunk(2, kind.encode()) + chunk(3, content)
    tag = name.encode() if isinstance(name, str) else name
    return chunk(1, chunk(1, tag) + chunk(2, tensor))


def of(name: str, data: np.ndarray | str) -> bytes:
    """A value of an array, or of a text, which MindSpore keeps in UTF-32."""
    if isinstance(data, str):
        return value(name, [0], "str", data.encode("utf-32-le"))
    return value(name, data.shape, KINDS[data.dtype.name], data.tobytes())


def with_crc(content: bytes) -> bytes:
    return content + b"crc_num" + zlib.crc32(content).to_bytes(10, "big")


def write_ckpt(path: Path, tensors: Mapping[str, Any], *, crc: bool = True) -> Path:
    content = b"".join(of(name, data) for name, data in tensors.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(with_crc(content) if crc else content)
    return path


def write_split_info(
    folder: Path, split: Mapping[str, bool], num_ranks: int, *, without: Sequence[int] = ()
) -> Path:
    """As mindone's ZeroHelper.dump_params_split_info."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank in set(range(num_ranks)) - set(without):
        table = {
            name: {"split": is_split, "group_size": num_ranks, "rank_id": rank}
            for name, is_split in split.items()
        }
        (folder / f"params_split_info_{rank}.json").write_text(json.dumps(table, indent=2))
    return folder


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
