"""Whether the planned micro-batch fits into memory: found out before the first step, not at the worst.

Knows which samples make the largest micro-batches; how one is computed is the strategy's affair.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ftlaunch.strategies.base import Strategy
from ftlaunch.strategies.data.batches import Batches, Lengths
from ftlaunch.strategies.data.dealing import rows_at_once

# Lengths are looked at so many at a time: memory does not grow with the data.
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What fitted on every rank.

    shapes              (samples, padded length) of the micro-batches that were computed
    peak_memory_bytes   the most that a rank had held by then
    """

    shapes: tuple[tuple[int, int], ...]
    seconds: float
    peak_memory_bytes: int


def prove(
    strategy: Strategy,
    collator: Batches,
    *,
    micro_batch: int,
    max_tokens: int | None,
    accumulates: bool,
) -> Proof:
    """Collective: forward and backward of the largest micro-batches that the data can make.

    accumulates   a rank may have several micro-batches in an optimizer step

    Whatever the allocator raises passes through. Nothing is left behind: `Strategy.prove`.
    """
    started = time.perf_counter()
    shapes = []
    for indices in largest_runs(collator.table, micro_batch, max_tokens):
        batch = collator.batch(indices, seed=0)
        strategy.prove(batch, accumulates=accumulates)
        rows, length = batch.inputs["input_ids"].shape
        shapes.append((int(rows), int(length)))
    # Nobody says that it fits before everybody knows.
    world = strategy.world
    peaks = np.zeros(world.size, dtype=np.float64)
    peaks[world.rank] = strategy.peak_memory_bytes()
    peak = int(strategy.sum_across_ranks(peaks).max())
    seconds = time.perf_counter() - started
    return Proof(shapes=tuple(shapes), seconds=seconds, peak_memory_bytes=peak)


def longest_sample(table: Lengths) -> int:
    """Tokens of the longest sample; 0 where there is none."""
    return max((int(lengths.max()) for _, lengths in _chunks(table)), default=0)


def largest_runs(
    table: Lengths, micro_batch: int, max_tokens: int | None
) -> list[NDArray[np.int64]]:
    """Samples of the micro-batch with the longest sample and, where it is another one, of the
    micro-batch with the most padded tokens, which the bound in tokens may allow of shorter samples.
    """
    counts = np.zeros(1, dtype=np.int64)
    for _, lengths in _chunks(table):
        found = np.bincount(lengths)
        counts, more = (counts, found) if len(counts) >= len(found) else (found, counts)
        counts[: len(more)] += more
    present = np.flatnonzero(counts)
    if not len(present):
        return []
    # Samples that are no longer than each length: so many can share a micro-batch with one of it.
    no_longer = np.cumsum(counts[present])
    rows = [
        min(rows_at_once(length, micro_batch, max_tokens), int(available))
        for length, available in zip(present.tolist(), no_longer, strict=True)
    ]
    tokens = [length * each for length, each in zip(present.tolist(), rows, strict=True)]
    last = len(present) - 1
    # Of equal ones the longest: attention takes memory by the square of the length.
    most = max(range(len(present)), key=lambda place: (tokens[place], place))
    places = [last] if tokens[most] == tokens[last] else [last, most]
    return [_longest_up_to(table, int(present[place]), rows[place]) for place in places]


def _longest_up_to(table: Lengths, length: int, rows: int) -> NDArray[np.int64]:
    """The `rows` longest samples that are no longer than `length`; of equal ones the first."""
    kept = np.zeros(0, dtype=np.int64)
    kept_lengths = np.zeros(0, dtype=np.int64)
    for indices, lengths in _chunks(table):
        fitting = lengths <= length
        kept = np.concatenate([kept, indices[fitting]])
        kept_lengths = np.concatenate([kept_lengths, lengths[fitting]])
        order = np.lexsort((kept, -kept_lengths))[:rows]
        kept, kept_lengths = kept[order], kept_lengths[order]
    return kept


def _chunks(table: Lengths) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    for start in range(0, len(table), _CHUNK):
        indices = np.arange(start, min(start + _CHUNK, len(table)))
        yield indices, table.lengths(indices)
