"""The tokens of one split as a table over memory-mapped slices. Reads them; knows no text.

A split of n samples lies in files of `slice_rows(n)` samples each. Memory does not grow with n, but for
lengths, labels and numbers of supervised tokens as long as they are small: the maps belong to the page
cache, and only so many are open at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from ftlaunch.strategies.data.tasks import LabelLayout
from ftlaunch.strategies.data.token_samples import TokenSample
from ftlaunch.strategies.safetensors_file import FileDamaged, SafetensorsFile, open_file

# Fewer rows are not worth a file; more would make a rank hold too much while it writes one.
_MIN_SLICE_ROWS = 512
_MAX_SLICE_ROWS = 65_536
_USUAL_MAX_SLICES = 64
# Each map keeps a file descriptor.
_MAX_OPEN_SLICES = 128
# Of one of them, a million numbers. What is larger stays in the slices: to go through those of a step's
# samples takes 0.01 ms for each slice that they lie in.
_MAX_HELD_BYTES = 8 << 20


def slice_rows(num_samples: int) -> int:
    """Samples in each slice but the last: a function of the number of samples only."""
    wanted = math.ceil(num_samples / _USUAL_MAX_SLICES)
    return min(max(wanted, _MIN_SLICE_ROWS), _MAX_SLICE_ROWS)


def num_slices(num_samples: int) -> int:
    return math.ceil(num_samples / slice_rows(num_samples))


def slice_path(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-{number:05d}.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceFacts:
    """What a slice's header says about its rows."""

    num_tokens: int
    num_truncated: int
    max_token_id: int
    num_too_long: int = 0

    def to_metadata(self, key: str) -> dict[str, str]:
        facts = {
            "key": key,
            "num_tokens": str(self.num_tokens),
            "num_truncated": str(self.num_truncated),
            "max_token_id": str(self.max_token_id),
        }
        return facts | ({"num_too_long": str(self.num_too_long)} if self.num_too_long else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class TableShape:
    """What all slices of a split have in common."""

    folder: Path
    key: str
    split: str
    num_samples: int
    num_outputs: int
    layout: LabelLayout
    uses_token_type_ids: bool

    def count(self, number: int) -> int:
        """Rows in slice `number`."""
        rows = slice_rows(self.num_samples)
        return min(rows, self.num_samples - number * rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slice:
    """bounds   the offsets as Python's integers, which numpy gives a place of an array slowly"""

    input_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    bounds: memoryview
    token_type_ids: NDArray[np.uint8] | None
    labels: NDArray[Any]
    items: NDArray[np.int32] | None

    def column(self, name: str, rows: NDArray[np.int64] | slice = slice(None)) -> NDArray[Any]:
        if name == "lengths":
            ends = self.offsets[1:][rows]
            return ends - self.offsets[:-1][rows]
        values = self.labels if name == "labels" else self.items
        assert values is not None
        return values[rows]


def check_slice(shape: TableShape, number: int) -> SliceFacts:
    """Compare a slice's header with what it must hold. FileDamaged or OSError if not whole."""
    path = slice_path(shape.folder, shape.split, number)
    return _read_facts(open_file(path), shape, number)


class TokenTable:
    """Random access to token ids and labels by sample number."""

    def __init__(self, shape: TableShape) -> None:
        """FileDamaged or OSError when a slice is missing or not whole."""
        self._shape = shape
        self._slice_rows = slice_rows(shape.num_samples)
        facts = [check_slice(shape, i) for i in range(num_slices(shape.num_samples))]
        self.num_tokens = sum(f.num_tokens for f in facts)
        self.num_truncated = sum(f.num_truncated for f in facts)
        self.num_too_long = sum(f.num_too_long for f in facts)
        self.max_token_id = max(f.max_token_id for f in facts)
        self._slice = functools.lru_cache(_MAX_OPEN_SLICES)(self._open_slice)
        self._held: dict[str, NDArray[Any]] = {}

    def __len__(self) -> int:
        return self._shape.num_samples

    def lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of tokens of each sample."""
        return self._column("lengths", indices, np.dtype(np.int64))

    def labels(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """By row: (samples,) int64 classes or float32 targets; by output: (samples, outputs) float32."""
        assert self._shape.layout.per != "token"
        width = (self._shape.num_outputs,) if self._shape.layout.per == "output" else ()
        return self._column("labels", indices, self._shape.layout.dtype, width)

    def rows(
        self, indices: NDArray[np.int64]
    ) -> list[tuple[NDArray[np.int32], NDArray[np.uint8] | None]]:
        """(input_ids, token_type_ids) of each sample: read-only views of the files."""
        result: list[Any] = [None] * len(indices)
        for position, piece, begin, end in self._each(indices):
            types = piece.token_type_ids
            result[position] = (
                piece.input_ids[begin:end],
                None if types is None else types[begin:end],
            )
        return result

    def items(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of supervised tokens of each sample. Labels by token only."""
        return self._column("items", indices, np.dtype(np.int64))

    def _column(
        self,
        name: Literal["lengths", "labels", "items"],
        indices: NDArray[np.int64],
        dtype: np.dtype[Any],
        width: tuple[int, ...] = (),
    ) -> NDArray[Any]:
        """(samples, *width) What the rows have beside their tokens."""
        indices = np.asarray(indices, dtype=np.int64)
        if len(self) * math.prod(width) * dtype.itemsize <= _MAX_HELD_BYTES:
            if name not in self._held:
                columns = [self._slice(i).column(name) for i in range(num_slices(len(self)))]
                self._held[name] = np.concatenate([np.empty((0, *width), dtype), *columns])
            held = self._held[name]
            if len(indices):
                self._check(int(indices.min()), int(indices.max()))
            found: NDArray[Any] = held[indices]
            return found
        result = np.empty((len(indices), *width), dtype=dtype)
        for piece, where, rows in self._by_slice(indices):
            result[where] = piece.column(name, rows)
        return result

    def samples(self, indices: NDArray[np.int64]) -> list[TokenSample]:
        """Read-only views of the files. Labels by token only."""
        assert self._shape.layout.per == "token"
        result: list[Any] = [None] * len(indices)
        for position, piece, begin, end in self._each(indices):
            types = piece.token_type_ids
            result[position] = TokenSample(
                input_ids=piece.input_ids[begin:end],
                token_type_ids=None if types is None else types[begin:end],
                labels=piece.labels[begin:end],
            )
        return result

    def origins(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.asarray(indices, dtype=np.int64)

    def label_counts(self) -> NDArray[np.int64]:
        """(num_outputs,) samples of each class. Classification only."""
        assert self._shape.layout.per == "row" and self._shape.layout.dtype.kind == "i"
        counts = np.zeros(self._shape.num_outputs, dtype=np.int64)
        for number in range(num_slices(len(self))):
            counts += np.bincount(self._slice(number).labels, minlength=len(counts))
        return counts

    def _by_slice(
        self, indices: NDArray[np.int64]
    ) -> Iterator[tuple[_Slice, NDArray[np.int64], NDArray[np.int64]]]:
        """(slice, positions in `indices`, rows in the slice)."""
        # Sorted once, so that a slice costs what it gives and not a look at all samples.
        order, numbers, rows = self._places(indices)
        if not len(numbers):
            return
        begin = 0
        for end in [*(np.flatnonzero(numbers[1:] != numbers[:-1]) + 1).tolist(), len(indices)]:
            yield self._slice(int(numbers[begin])), order[begin:end], rows[begin:end]
            begin = end

    def _each(self, indices: NDArray[np.int64]) -> Iterator[tuple[int, _Slice, int, int]]:
        """(position in `indices`, slice, first of its tokens in the slice, first behind them).

        One by one: the few samples of a micro-batch lie in nearly as many slices.
        """
        order, numbers, rows = self._places(indices)
        for position, number, row in zip(
            order.tolist(), numbers.tolist(), rows.tolist(), strict=True
        ):
            piece = self._slice(number)
            yield position, piece, piece.bounds[row], piece.bounds[row + 1]

    def _places(
        self, indices: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """(positions in `indices`, slices, rows in them), slice by slice. IndexError for no sample."""
        order = np.argsort(indices)
        ascending = np.asarray(indices, dtype=np.int64)[order]
        if len(ascending):
            self._check(int(ascending[0]), int(ascending[-1]))
        numbers, rows = np.divmod(ascending, self._slice_rows)
        return order, numbers, rows

    def _check(self, least: int, most: int) -> None:
        if least < 0 or most >= len(self):
            raise IndexError(f"sample numbers must be 0 to {len(self) - 1}")

    def _open_slice(self, number: int) -> _Slice:
        file = open_file(slice_path(self._shape.folder, self._shape.split, number))
        _read_facts(file, self._shape, number)
        # A memoryview gives no numbers of an array that is not aligned; ours are.
        offsets = np.require(file.tensor("offsets"), requirements="A")
        return _Slice(
            input_ids=file.tensor("input_ids"),
            offsets=offsets,
            bounds=memoryview(cast(Any, offsets)),
            token_type_ids=(
                file.tensor("token_type_ids") if self._shape.uses_token_type_ids else None
            ),
            labels=file.tensor("labels"),
            items=file.tensor("items") if self._shape.layout.per == "token" else None,
        )


def _read_facts(file: SafetensorsFile, shape: TableShape, number: int) -> SliceFacts:
    try:
        facts = SliceFacts(
            num_tokens=int(file.metadata["num_tokens"]),
            num_truncated=int(file.metadata["num_truncated"]),
            max_token_id=int(file.metadata["max_token_id"]),
            num_too_long=int(file.metadata.get("num_too_long", 0)),
        )
    except (KeyError, ValueError):
        raise FileDamaged(file.path, "its counts are missing") from None
    rows = shape.count(number)
    layout = shape.layout
    labels_shape: dict[str, tuple[int, ...]] = {
        "row": (rows,),
        "output": (rows, shape.num_outputs),
        "token": (facts.num_tokens,),
    }
    expected: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
        "offsets": ((rows + 1,), np.dtype(np.int64)),
        "labels": (labels_shape[layout.per], layout.dtype),
        "input_ids": ((facts.num_tokens,), np.dtype(np.int32)),
    }
    if layout.per == "token":
        expected["items"] = ((rows,), np.dtype(np.int32))
    if shape.uses_token_type_ids:
        expected["token_type_ids"] = ((facts.num_tokens,), np.dtype(np.uint8))
    found = {name: (file.shape(name), file.dtype(name)) for name in file.names}
    if file.metadata.get("key") != shape.key or found != expected:
        raise FileDamaged(file.path, "it does not hold the rows that its name says")
    return facts
