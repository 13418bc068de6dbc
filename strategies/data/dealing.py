"""How a global batch is divided among ranks and micro-batches: a pure function of numbers and lengths.

The division never changes which samples an optimizer step sees; it only decides where they are
computed, so that little is padding and every rank carries about the same number of tokens.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """A global batch, divided.

    runs            runs[rank][i] are the samples of that rank's i-th micro-batch; every rank has as
                    many. A run may be empty where samples are too few.
    padded_tokens   of all runs together
    """

    runs: list[list[NDArray[np.int64]]]
    padded_tokens: int


def rows_at_once(length: int, micro_batch: int, max_tokens: int | None) -> int:
    """How many samples of that many tokens a micro-batch holds at most."""
    if max_tokens is None:
        return micro_batch
    return min(micro_batch, max(1, max_tokens // max(1, length)))


def divide(
    indices: NDArray[np.int64],
    lengths: NDArray[np.int64],
    *,
    world_size: int,
    micro_batch: int,
    max_tokens: int | None = None,
) -> Division:
    """Sorted by length and cut into runs, so that a run pads little; runs are dealt to the ranks in
    turn, forth and back, so that at every moment the ranks work on runs of about one cost, and carry
    about the same number of tokens in the end.

    micro_batch   samples of a run, at most
    max_tokens    padded tokens of a run (samples times the longest), at most, unless a sample is longer
                  by itself, which then stands alone; None for no such bound

    Without `max_tokens` the runs have equal numbers of samples. With it they have about equal numbers
    of padded tokens: there are as few as the bounds allow, and then none is larger than they need be.
    The costliest come first, of equal ones the longest, so that memory peaks in the first micro-batch;
    what two ranks carry differs by no more than the costliest run costs above the cheapest.
    """
    # Longest first; ties by number.
    order = np.lexsort((indices, -lengths))
    ordered, sizes = indices[order], lengths[order].tolist()
    if max_tokens is None:
        starts = _equal_starts(len(sizes), world_size, micro_batch)
    else:
        starts = _balanced_starts(sizes, world_size, micro_batch, max_tokens)
    ends = [*starts[1:], len(sizes)]
    costs = [
        (end - start) * sizes[start] if end > start else 0
        for start, end in zip(starts, ends, strict=True)
    ]
    places = list(range(len(starts)))
    if max_tokens is not None:
        places.sort(key=lambda place: -costs[place])
    runs: list[list[NDArray[np.int64]]] = [[] for _ in range(world_size)]
    for number, place in enumerate(places):
        turn, rank = divmod(number, world_size)
        runs[rank if turn % 2 == 0 else world_size - 1 - rank].append(
            ordered[starts[place] : ends[place]]
        )
    return Division(runs=runs, padded_tokens=sum(costs))


def deal(
    indices: NDArray[np.int64],
    lengths: NDArray[np.int64],
    *,
    world_size: int,
    micro_batch: int,
    max_tokens: int | None = None,
) -> list[list[NDArray[np.int64]]]:
    """The runs of `divide`: result[rank][i] are the samples of that rank's i-th micro-batch."""
    return divide(
        indices, lengths, world_size=world_size, micro_batch=micro_batch, max_tokens=max_tokens
    ).runs


def _equal_starts(size: int, world_size: int, micro_batch: int) -> list[int]:
    """Where runs begin that are equal in number, the first ones with one more where it does not divide."""
    count = max(1, math.ceil(size / (world_size * micro_batch))) * world_size
    each, more = divmod(size, count)
    return [number * each + min(number, more) for number in range(count)]


def _balanced_starts(
    sizes: list[int], world_size: int, micro_batch: int, max_tokens: int
) -> list[int]:
    """Where runs begin of which none pads to more than it must.

    sizes   lengths, descending
    """
    size = len(sizes)
    if size == 0:
        return [0] * world_size
    fewest = _filled(sizes, micro_batch, max_tokens, size)
    assert fewest is not None
    count = math.ceil(len(fewest) / world_size) * world_size
    # A larger bound never takes more runs: a run's first row is its longest, and what begins later
    # is shorter and so reaches at least as far. Hence the smallest that does can be searched for.
    starts, high = fewest, min(max_tokens, sizes[0] * micro_batch)
    low = max(1, min(high, max(sizes[0], sum(sizes) // count)))
    while low < high:
        middle = (low + high) // 2
        found = _filled(sizes, micro_batch, middle, count)
        if found is None:
            low = middle + 1
        else:
            starts, high = found, middle
    if len(starts) < count:
        starts = _split(starts, sizes, count)
    return starts


def _filled(sizes: list[int], micro_batch: int, max_tokens: int, at_most: int) -> list[int] | None:
    """Where runs begin that are filled one after the other; None where more than `at_most` are needed."""
    starts: list[int] = []
    place, size = 0, len(sizes)
    while place < size:
        if len(starts) == at_most:
            return None
        starts.append(place)
        rows = max_tokens // sizes[place] if sizes[place] else micro_batch
        place += micro_batch if rows > micro_batch else rows or 1
    return starts


def _split(starts: list[int], sizes: list[int], count: int) -> list[int]:
    """`starts` with the costliest runs halved until there are `count`, or no run has two rows."""
    size = len(sizes)
    # By cost, the first first; of single rows nothing can be taken.
    heap = [
        ((start - end) * sizes[start], start, end)
        for start, end in zip(starts, [*starts[1:], size], strict=True)
        if end - start > 1
    ]
    heapq.heapify(heap)
    added: list[int] = []
    while heap and len(starts) + len(added) < count:
        _, start, end = heapq.heappop(heap)
        middle = (start + end) // 2
        added.append(middle)
        for first, last in ((start, middle), (middle, end)):
            if last - first > 1:
                heapq.heappush(heap, ((first - last) * sizes[first], first, last))
    found = sorted(starts + added)
    return found + [size] * (count - len(found))
