"""What a low-rank adapter makes of a matrix: W + scale·B·A in fp32, some rows at a time.

Knows numbers, not where they come from or what their names are. The formulas are peft's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import numpy as np
from numpy.typing import NDArray

from ftlaunch.strategies.checkpoint.conversion import convert
from ftlaunch.strategies.checkpoint.run_reader import RunReader
from ftlaunch.strategies.checkpoint.weights import LowRank, Weight, cut

# Of the rows that are computed at once, in fp32.
_PIECE_BYTES = 4 << 20

# (first row, one past the last) → these rows, (rows, columns)
Rows = Callable[[int, int], NDArray[np.float32]]


def stream_changed(weight: Weight, reader: RunReader) -> Iterator[NDArray[np.uint8]]:
    """The changed matrix from its files, fp32 bytes of whole rows at a time."""
    change = weight.change
    assert change is not None
    num_rows, num_columns = weight.shape
    row_bytes = sum(run.nbytes for run in weight.runs) // max(1, num_rows)

    def rows(first: int, last: int) -> NDArray[np.float32]:
        parts = [
            convert(
                reader.read_beside(run.path, run.offset, run.nbytes), weight.dtype, "F32"
            ).copy()
            for run in cut(weight.runs, first * row_bytes, (last - first) * row_bytes)
        ]
        values = np.concatenate(parts).view(np.float32)
        return cast("NDArray[np.float32]", values.reshape(last - first, num_columns))

    for piece in changed_rows(change, rows, weight.shape, reader):
        yield piece.reshape(-1).view(np.uint8)


def changed_rows(
    change: LowRank, rows: Rows, shape: tuple[int, ...], reader: RunReader
) -> Iterator[NDArray[np.float32]]:
    """The changed matrix of `shape`, some rows at a time, in order."""
    left, right = read_floats(change.left, reader), read_floats(change.right, reader)
    if change.transposed:
        left, right = left.T, right.T
    # Once, and on the smaller side.
    left = np.ascontiguousarray(left) * np.float32(change.scale)
    step = max(1, _PIECE_BYTES // max(1, 4 * shape[1]))
    blocks = [(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]

    def added(first: int, last: int) -> NDArray[np.float32]:
        return cast("NDArray[np.float32]", rows(first, last) + left[first:last] @ right)

    if change.magnitude is None:
        yield from (added(first, last) for first, last in blocks)
        return
    magnitude = read_floats(change.magnitude, reader)
    with np.errstate(divide="ignore", invalid="ignore"):
        if not change.transposed:
            for first, last in blocks:
                values = added(first, last)
                factor = (magnitude[first:last] / np.sqrt(_squares(values, axis=1))).astype("<f4")
                yield cast("NDArray[np.float32]", values * factor[:, None])
            return
        total = np.zeros(shape[1], dtype=np.float64)
        for first, last in blocks:
            total += _squares(added(first, last), axis=0)
        factor = (magnitude / np.sqrt(total)).astype("<f4")
        for first, last in blocks:
            yield cast("NDArray[np.float32]", added(first, last) * factor)


def read_floats(weight: Weight, reader: RunReader) -> NDArray[np.float32]:
    """A whole tensor in its shape, fp32."""
    parts = [
        convert(data, weight.dtype, "F32").copy() for data in reader.pieces(weight, converts=True)
    ]
    values = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint8)
    return cast("NDArray[np.float32]", values.view(np.float32).reshape(weight.shape))


def _squares(values: NDArray[np.float32], *, axis: int) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.einsum(
        "ij,ij->i" if axis == 1 else "ij,ij->j", values, values, dtype=np.float64
    )
    return found
