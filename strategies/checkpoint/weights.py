"""Weights as a merge sees them: a name, a shape, and runs of bytes in files. Reads no tensor data.

Dtypes are those of the safetensors format; which file format the bytes stand in does not matter.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# A tensor that is not contiguous is copied piece by piece, up to this many.
_MAX_RUNS = 1 << 16


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes [offset, offset + nbytes) of a file; `crc32` is their CRC-32 where the file says it."""

    path: Path
    offset: int
    nbytes: int
    crc32: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One tensor of a model.

    dtype   of the bytes in the files, such as "F32", "BF16" or "I64"
    runs    one after the other they are the row-major tensor, little-endian
    change  what an adapter makes of it
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    runs: tuple[Run, ...]
    change: LowRank | None = None

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """What an adapter makes of a matrix W: W + scale·L·R; with a magnitude each output's weights are
    then stretched to that length (DoRA).

    left       (rows of W, rank); (rank, rows) where `transposed`
    right      (rank, columns of W); (columns, rank) where `transposed`
    magnitude  (outputs,)
    transposed  W has a row for each input, as GPT-2's layers and embeddings have
    """

    left: Weight
    right: Weight
    scale: float
    magnitude: Weight | None
    transposed: bool


def strided_runs(
    path: Path, offset: int, shape: Sequence[int], strides: Sequence[int], item_bytes: int
) -> tuple[Run, ...]:
    """The runs of a tensor that begins at byte `offset`, in row-major order; strides in elements.

    ValueError for a tensor so scattered that it would take too many.
    """
    if math.prod(shape) == 0:
        return ()
    axes = [(size, stride) for size, stride in zip(shape, strides, strict=True) if size != 1]
    inner = 1
    while axes and axes[-1][1] == inner:
        inner *= axes.pop()[0]
    if math.prod(size for size, _ in axes) > _MAX_RUNS:
        raise ValueError(f"strides {tuple(strides)} for shape {tuple(shape)}")
    starts = _starts(axes)
    return tuple(Run(path, offset + start * item_bytes, inner * item_bytes) for start in starts)


def _starts(axes: Sequence[tuple[int, int]]) -> Iterator[int]:
    """Element offsets of the contiguous pieces, in row-major order."""
    for index in itertools.product(*(range(size) for size, _ in axes)):
        yield sum(i * stride for i, (_, stride) in zip(index, axes, strict=True))


def cut(runs: Sequence[Run], start: int, nbytes: int) -> tuple[Run, ...]:
    """Bytes [start, start + nbytes) of what the runs are together. ValueError if they lie outside."""
    if start < 0 or nbytes < 0:
        raise ValueError(f"bytes {start} to {start + nbytes}")
    found = []
    position = 0
    for run in runs:
        begin, end = max(start, position), min(start + nbytes, position + run.nbytes)
        if begin < end:
            found.append(Run(run.path, run.offset + begin - position, end - begin))
        position += run.nbytes
    if start + nbytes > position:
        raise ValueError(f"bytes {start} to {start + nbytes} of {position}")
    return tuple(found)
