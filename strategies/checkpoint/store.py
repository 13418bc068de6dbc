"""The tensors of a checkpoint: each rank writes the slices it owns; any rank reads any range.

A shard is one safetensors file. Each of its tensors is a one-dimensional run of elements of one
tensor of the training state; the header's "slices" entry says of which, from where, and its CRC-32.
Which ranks or which strategy wrote them does not matter to the reader.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftlaunch.strategies.base import TensorSlice
from ftlaunch.strategies.checkpoint.manifest import CheckpointDamaged, Manifest
from ftlaunch.strategies.checkpoint.weights import Run, Weight
from ftlaunch.strategies.safetensors_file import (
    FileDamaged,
    SafetensorsFile,
    open_file,
    write_tensors,
)

# Of numpy before its version 2, and of what reads a merged file.
_MAX_AXES = 32


def shard_name(rank: int, world_size: int) -> str:
    return f"state-{rank:05d}-of-{world_size:05d}.safetensors"


def write_shard(path: Path, slices: Iterable[TensorSlice]) -> None:
    """Write one rank's slices, whole or not at all. OSError passes through (disk full).

    They are gone through twice, for the header and for the bytes, so that no more than one has to be
    in memory; both times they must be the same.
    """
    kinds: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
    table: list[dict[str, Any]] = []
    for piece in slices:
        values = _flat(piece)
        kinds[_key(piece)] = (values.dtype, values.shape)
        table.append(
            {
                "key": _key(piece),
                "kind": piece.kind,
                "name": piece.name,
                "shape": list(piece.shape),
                "start": piece.start,
                "crc32": _checksum(values),
            }
        )
    metadata = {"format": "ftlaunch", "slices": json.dumps(table)}
    write_tensors(path, kinds, ((_key(piece), _flat(piece)) for piece in slices), metadata)


def _key(piece: TensorSlice) -> str:
    return f"{piece.kind}/{piece.name}@{piece.start}"


def _flat(piece: TensorSlice) -> NDArray[Any]:
    return np.ascontiguousarray(piece.values).reshape(-1)


@dataclass(frozen=True, slots=True)
class _Slice:
    file: SafetensorsFile
    key: str
    start: int
    stop: int
    crc32: int


class CheckpointReader:
    """Random access to the tensors of a checkpoint. Implements `base.StateReader`."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        self._slices: dict[tuple[str, str], list[_Slice]] = {}
        self._verified: set[tuple[Path, str]] = set()
        for name in manifest.files:
            self._index(folder / name)
        for runs in self._slices.values():
            runs.sort(key=lambda run: run.start)

    def _index(self, path: Path) -> None:
        try:
            file = open_file(path)
            for entry in json.loads(file.metadata["slices"]):
                kind, name = str(entry["kind"]), str(entry["name"])
                shape = tuple(_number(n) for n in entry["shape"])
                if len(shape) > _MAX_AXES:
                    raise ValueError(f"a shape of {len(shape)} axes")
                start = _number(entry["start"])
                stop = start + file.tensor(entry["key"]).size
                if self._shapes.setdefault(kind, {}).setdefault(name, shape) != shape:
                    raise CheckpointDamaged(self.folder, f"two shapes for {kind} of {name}")
                run = _Slice(file, entry["key"], start, stop, _number(entry["crc32"]))
                self._slices.setdefault((kind, name), []).append(run)
        except FileDamaged as error:
            raise CheckpointDamaged(self.folder, str(error)) from None
        except (OSError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise CheckpointDamaged(self.folder, f"{path.name}: {error!r}") from None

    def names(self, kind: str) -> Mapping[str, tuple[int, ...]]:
        return self._shapes.get(kind, {})

    def read(self, kind: str, name: str, start: int, stop: int) -> NDArray[Any]:
        """Elements [start, stop) of the flattened tensor, every slice's checksum verified."""
        pieces = []
        position = start
        for run in self._slices.get((kind, name), []):
            if run.stop <= position or run.start >= stop:
                continue
            if run.start > position:
                break
            until = min(stop, run.stop)
            pieces.append(self._values(run)[position - run.start : until - run.start])
            position = until
        if position < stop or (start == stop and not self._slices.get((kind, name))):
            raise CheckpointDamaged(
                self.folder, f"elements {position} to {stop} of {kind} of {name} are not there"
            )
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.float32)

    def runs(self, kind: str, name: str) -> tuple[str, tuple[Run, ...]]:
        """(dtype as safetensors names it, where the bytes lie in order) of a whole tensor."""
        shape = self.names(kind).get(name)
        slices = self._slices.get((kind, name), [])
        position = 0
        found: list[Run] = []
        dtypes: set[str] = set()
        for run in slices:
            if run.start != position:
                break
            place = run.file.place(run.key)
            found.append(Run(run.file.path, place.offset, place.nbytes, run.crc32))
            dtypes.add(place.dtype)
            position = run.stop
        if shape is None or position != math.prod(shape) or len(found) < len(slices):
            raise CheckpointDamaged(
                self.folder, f"{kind} of {name} is there up to element {position} of {shape}"
            )
        if len(dtypes) != 1:
            raise CheckpointDamaged(self.folder, f"{kind} of {name} has dtypes {sorted(dtypes)}")
        return dtypes.pop(), tuple(found)

    def read_whole(self, kind: str, name: str) -> NDArray[Any]:
        """The tensor in its own shape."""
        shape = self.names(kind).get(name)
        if shape is None:
            raise CheckpointDamaged(self.folder, f"{kind} of {name} is not there")
        return self.read(kind, name, 0, math.prod(shape)).reshape(shape)

    def _values(self, run: _Slice) -> NDArray[Any]:
        values = run.file.tensor(run.key)
        seen = (run.file.path, run.key)
        if seen not in self._verified:
            found = _checksum(values)
            if found != run.crc32:
                raise CheckpointDamaged(
                    self.folder, f"{run.file.path.name}: the bytes of {run.key} have changed"
                )
            self._verified.add(seen)
        return values


def checkpoint_weights(folder: Path, manifest: Manifest) -> tuple[Weight, ...]:
    """The weights of a checkpoint as runs of bytes with their checksums; reads headers alone.

    Other names of shared weights (`manifest.aliases`) are not among them. An adapter's have the names
    that they have in the model. CheckpointDamaged when elements are missing.
    """
    reader = CheckpointReader(folder, manifest)
    names = reader.names("weight").keys() - manifest.aliases.keys()
    for alias, stored in manifest.aliases.items():
        if stored not in names:
            raise CheckpointDamaged(
                folder, f"{alias} is said to be another name of {stored}, which is not there"
            )
    weights = []
    for name, shape in reader.names("weight").items():
        if name in names:
            dtype, runs = reader.runs("weight", name)
            weights.append(Weight(name=name, dtype=dtype, shape=shape, runs=runs))
    return tuple(weights)


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 48:
        raise ValueError(f"{str(value)[:50]!r} where a count has to be")
    return value


def _checksum(values: NDArray[Any]) -> int:
    return zlib.crc32(values.view(np.uint8).data) if values.size else 0
