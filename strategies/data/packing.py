"""Several samples in one row: whole ones side by side, or one stream of text cut into blocks.

Pure views of a table: nothing is copied, and every rank finds the same. Rows that are packed keep the
borders of their samples (`TokenSample.parts`); blocks of a stream have none.
"""

from __future__ import annotations

import bisect

import numpy as np
from numpy.typing import NDArray

from ftlaunch.strategies.data.tasks import UNSUPERVISED
from ftlaunch.strategies.data.token_samples import TokenSample, TokenSamples


def pack(lengths: NDArray[np.int64], capacity: int) -> list[NDArray[np.int64]]:
    """Which samples share a row: best fit, the longest first. Each sample is in exactly one row.

    lengths   of the samples, none above `capacity`
    """
    rows: list[list[int]] = []
    # Rows by the room that is left in them, and the rooms that occur, ascending.
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for number in np.lexsort((np.arange(len(lengths)), -lengths)).tolist():
        length = int(lengths[number])
        place = bisect.bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room]
                rooms.pop(place)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(number)
        left = room - length
        if left not in by_room:
            by_room[left] = []
            bisect.insort(rooms, left)
        by_room[left].append(row)
    return [np.array(row, dtype=np.int64) for row in rows]


class PackedSamples:
    """Rows of several samples each. Implements `TokenSamples`."""

    def __init__(self, table: TokenSamples, max_length: int) -> None:
        """table   samples of 1 to `max_length` tokens"""
        everything = np.arange(len(table))
        lengths, items = table.lengths(everything), table.items(everything)
        self._table = table
        self._rows = pack(lengths, max_length)
        self._lengths = np.array([lengths[row].sum() for row in self._rows], dtype=np.int64)
        self._items = np.array([items[row].sum() for row in self._rows], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._lengths[indices]

    def items(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._items[indices]

    def samples(self, indices: NDArray[np.int64]) -> list[TokenSample]:
        return [self._row(self._rows[number]) for number in indices.tolist()]

    def origins(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.asarray(indices, dtype=np.int64)

    def _row(self, members: NDArray[np.int64]) -> TokenSample:
        samples = self._table.samples(members)
        types = [s.token_type_ids for s in samples if s.token_type_ids is not None]
        return TokenSample(
            input_ids=np.concatenate([s.input_ids for s in samples]),
            token_type_ids=np.concatenate(types) if types else None,
            labels=np.concatenate([s.labels for s in samples]),
            parts=tuple(len(s.input_ids) for s in samples),
        )


class Blocks:
    """All rows as one stream of tokens, cut into pieces of equal length; each token but the first of a
    piece is to be predicted. The last piece is what is left. Implements `TokenSamples`.
    """

    def __init__(self, table: TokenSamples, length: int) -> None:
        ends = np.cumsum(table.lengths(np.arange(len(table))), dtype=np.int64)
        self._table = table
        self._starts = np.concatenate([[0], ends])
        self._total = int(self._starts[-1])
        self._length = length
        # A piece of one token has nothing to predict.
        whole, rest = divmod(self._total, length)
        self._count = (whole if length > 1 else 0) + (rest > 1)

    def __len__(self) -> int:
        return self._count

    def lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        begins = np.asarray(indices, dtype=np.int64) * self._length
        return np.minimum(begins + self._length, self._total) - begins

    def items(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.lengths(indices) - 1

    def samples(self, indices: NDArray[np.int64]) -> list[TokenSample]:
        return [self._block(number) for number in indices.tolist()]

    def origins(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.asarray(indices, dtype=np.int64)

    def _block(self, number: int) -> TokenSample:
        begin = number * self._length
        end = min(begin + self._length, self._total)
        first = int(np.searchsorted(self._starts, begin, side="right")) - 1
        last = int(np.searchsorted(self._starts, end, side="left"))
        rows = self._table.samples(np.arange(first, last))
        stream = np.concatenate([row.input_ids for row in rows])
        offset = begin - int(self._starts[first])
        ids = stream[offset : offset + end - begin]
        labels = np.append(ids[1:], UNSUPERVISED).astype(np.int32)
        return TokenSample(input_ids=ids, token_type_ids=None, labels=labels)
