"""Writes weights as a Hugging Face model's safetensors files, and compares such files with them.

Bytes stream through one small buffer, whatever the size of the model; headers come first, since all
sizes are known. Weights that are equal give files that are equal, whoever held them before. Knows
nothing of where weights come from, of folders that are replaced, or of config.json.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.adapter import ADAPTER_WEIGHTS
from ftlaunch.strategies.checkpoint.agreement import FULL
from ftlaunch.strategies.checkpoint.conversion import (
    SaveDtype,
    convert,
    overflows,
    target_dtype,
)
from ftlaunch.strategies.checkpoint.low_rank import stream_changed
from ftlaunch.strategies.checkpoint.run_reader import RunReader
from ftlaunch.strategies.checkpoint.torch_zip import ITEM_BYTES
from ftlaunch.strategies.checkpoint.weights import Run, Weight
from ftlaunch.strategies.safetensors_file import TensorPlace, read_places

MAX_SHARD_BYTES = 5 * 10**9
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_METADATA = {"format": "pt"}
# The order in which the safetensors library itself lays tensors down: by this, then by name.
_ORDER = ("U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "I8", "U8", "BOOL")

# (bytes done, bytes in all), of the files that are written or compared
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What `write_weights` wrote.

    overflowed  the first tensor with numbers that became infinite in fp16, if there is one
    """

    num_tensors: int
    num_parameters: int
    num_bytes: int
    files: tuple[str, ...]
    overflowed: str | None


@dataclass(frozen=True, slots=True)
class _Shard:
    name: str
    weights: tuple[Weight, ...]


def write_weights(
    weights: Sequence[Weight],
    folder: Path,
    *,
    dtype: SaveDtype | None = "fp32",
    on_progress: Progress | None = None,
    max_shard_bytes: int | None = MAX_SHARD_BYTES,
    name: str = WEIGHTS_NAME,
) -> Written:
    """Write model.safetensors, or shards and their index, into an existing folder, synced to the disk.

    Floating-point tensors are written in `dtype` (None: each in its own), others as they are.

    max_shard_bytes  None: one file, `name`, whatever its size
    CheckpointDamaged when bytes have another checksum than they should or are not there; UserError when
    the disk is full.
    """
    for weight in weights:
        _check_name(weight.name)
        _check_bytes(weight)
    shards = _split(weights, dtype, max_shard_bytes, name)
    total = written_bytes(weights, dtype)
    done, overflowed = 0, None
    with RunReader() as reader:
        for shard in shards:
            path = folder / shard.name
            try:
                with open(path, "xb", buffering=0) as file:
                    _write_all(file, _header(shard.weights, dtype))
                    for weight, data, infinite in _converted(shard.weights, dtype, reader):
                        _write_all(file, data.data)
                        overflowed = overflowed or (weight.name if infinite else None)
                        done += data.nbytes
                        if on_progress is not None:
                            on_progress(done, total)
                    os.fsync(file.fileno())
            except OSError as error:
                if error.errno in FULL:
                    raise no_space(path, total) from None
                raise
    files = [shard.name for shard in shards]
    if len(shards) > 1:
        _write_index(folder / INDEX_NAME, shards, weights, dtype)
        files.append(INDEX_NAME)
    return Written(
        num_tensors=len(weights),
        num_parameters=sum(weight.num_elements for weight in weights),
        num_bytes=sum((folder / name).stat().st_size for name in files),
        files=tuple(files),
        overflowed=overflowed,
    )


def write_adapter(
    weights: Sequence[Weight],
    folder: Path,
    *,
    dtype: SaveDtype = "fp32",
    on_progress: Progress | None = None,
) -> Written:
    """As `write_weights`, the one file of an adapter, which have peft's names."""
    return write_weights(
        weights,
        folder,
        dtype=dtype,
        on_progress=on_progress,
        max_shard_bytes=None,
        name=ADAPTER_WEIGHTS,
    )


def _check_name(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(f"the checkpoint has a tensor {name!r}, which is no text.") from None
    if name == "__metadata__":
        raise UserError("the checkpoint has a tensor '__metadata__', which names something else.")


def _check_bytes(weight: Weight) -> None:
    """Headers are written before the bytes: fewer or more would be a file that nobody can read."""
    found = sum(run.nbytes for run in weight.runs)
    needed = weight.num_elements * ITEM_BYTES[weight.dtype]
    if found != needed:
        raise UserError(
            f"the checkpoint has {found:,} bytes of {weight.name}, of which {needed:,} are needed for "
            f"shape {weight.shape} in {weight.dtype}. Copy it anew, or merge another."
        )


def written_bytes(weights: Sequence[Weight], dtype: SaveDtype | None) -> int:
    """Of the tensors alone; the headers add about a hundred bytes each."""
    return sum(_written_bytes(weight, dtype) for weight in weights)


def no_space(path: Path, needed: int) -> UserError:
    return UserError(
        f"no space left on the disk while writing {path}: the weights need {needed:,} bytes. Free "
        "some space, or choose another place or a smaller dtype."
    )


def compare_weights(
    weights: Sequence[Weight], folder: Path, *, on_progress: Progress | None = None
) -> Iterator[str]:
    """What differs between the weights and a folder's safetensors files, a line for each tensor.

    A floating-point tensor is converted to the dtype that the folder has it in. Changes nothing.
    FileDamaged for files that are not whole.
    """
    places: dict[str, tuple[Path, TensorPlace]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, place in read_places(path).items():
            if name in places:
                yield f"{name}: in {places[name][0].name} and in {path.name}"
            places[name] = (path, place)
    total, done = sum(place.nbytes for _, place in places.values()), 0
    extra = places.keys() - {weight.name for weight in weights}
    yield from (f"{name}: not in the source" for name in sorted(extra))
    with RunReader() as reader:
        for weight in sorted(weights, key=lambda each: each.name):
            _check_bytes(weight)
            if weight.name not in places:
                yield f"{weight.name}: missing"
                continue
            path, place = places[weight.name]
            if place.shape != weight.shape:
                yield f"{weight.name}: shape {place.shape}, in the source {weight.shape}"
            elif place.dtype not in {
                target_dtype(weight.dtype, d) for d in ("fp32", "bf16", "fp16")
            }:
                yield f"{weight.name}: dtype {place.dtype}, in the source {weight.dtype}"
            else:
                target = Run(path, place.offset, place.nbytes)
                different = _first_difference(weight, place.dtype, target, reader)
                if different is not None:
                    yield f"{weight.name}: other bytes from element {different} on"
            done += place.nbytes
            if on_progress is not None:
                on_progress(done, total)


def _split(
    weights: Sequence[Weight], dtype: SaveDtype | None, max_bytes: int | None, name: str
) -> list[_Shard]:
    """In the order of their names; a tensor that is larger than a file may be has one alone."""
    if len({weight.name for weight in weights}) < len(weights):
        raise ValueError("two weights have one name")
    groups: list[list[Weight]] = [[]]
    size = 0
    for weight in sorted(weights, key=lambda each: each.name):
        own = _written_bytes(weight, dtype)
        if groups[-1] and max_bytes is not None and size + own > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(weight)
        size += own
    if len(groups) == 1:
        return [_Shard(name, tuple(_laid_down(groups[0], dtype)))]
    return [
        _Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", tuple(_laid_down(group, dtype)))
        for i, group in enumerate(groups, 1)
    ]


def _laid_down(weights: Sequence[Weight], dtype: SaveDtype | None) -> list[Weight]:
    return sorted(
        weights, key=lambda each: (_ORDER.index(target_dtype(each.dtype, dtype)), each.name)
    )


def _written_bytes(weight: Weight, dtype: SaveDtype | None) -> int:
    return weight.num_elements * ITEM_BYTES[target_dtype(weight.dtype, dtype)]


def _header(weights: Sequence[Weight], dtype: SaveDtype | None) -> bytes:
    header: dict[str, object] = {"__metadata__": _METADATA}
    position = 0
    for weight in weights:
        end = position + _written_bytes(weight, dtype)
        header[weight.name] = {
            "dtype": target_dtype(weight.dtype, dtype),
            "shape": list(weight.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _converted(
    weights: Sequence[Weight], dtype: SaveDtype | None, reader: RunReader
) -> Iterator[tuple[Weight, NDArray[np.uint8], bool]]:
    """(of which weight, its next bytes in `dtype`, whether numbers have become infinite in them)."""
    for weight in weights:
        target = target_dtype(weight.dtype, dtype)
        narrows = target == "F16" and (weight.dtype != "F16" or weight.change is not None)
        for data, source in _pieces(weight, reader, converts=target != weight.dtype):
            converted = convert(data, source, target)
            yield weight, converted, narrows and overflows(data, source, converted)


def _pieces(
    weight: Weight, reader: RunReader, *, converts: bool
) -> Iterator[tuple[NDArray[np.uint8], str]]:
    """(the next bytes of a weight, their dtype); what an adapter changes comes in fp32."""
    if weight.change is not None:
        yield from ((data, "F32") for data in stream_changed(weight, reader))
    else:
        yield from ((data, weight.dtype) for data in reader.pieces(weight, converts=converts))


def _write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """An unbuffered file may take a part only."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _write_index(
    path: Path, shards: Sequence[_Shard], weights: Sequence[Weight], dtype: SaveDtype | None
) -> None:
    index = {
        "metadata": {
            "total_parameters": sum(weight.num_elements for weight in weights),
            "total_size": written_bytes(weights, dtype),
        },
        "weight_map": {
            weight.name: shard.name
            for shard in shards
            for weight in sorted(shard.weights, key=lambda each: each.name)
        },
    }
    with open(path, "xb") as file:
        file.write(json.dumps(index, indent=2).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _first_difference(weight: Weight, dtype: str, target: Run, reader: RunReader) -> int | None:
    """The first element that is not the same, None when all are."""
    position, item = 0, ITEM_BYTES[dtype]
    for data, source in _pieces(weight, reader, converts=True):
        expected = convert(data, source, dtype)
        found = reader.read_beside(target.path, target.offset + position, expected.nbytes)
        if not np.array_equal(expected, found):
            return int(position + np.flatnonzero(expected != found)[0]) // item
        position += expected.nbytes
    return None
