"""Dealing a global batch by padded tokens: bounds kept, ranks alike, the same samples whatever the bound."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ftlaunch.strategies.data.dealing import deal, divide, rows_at_once


def _cost(run, lengths):
    """Padded tokens: rows times the longest."""
    return len(run) * int(lengths[run].max()) if len(run) else 0


def _cases(first, count):
    """(lengths, ranks, samples at most, tokens at most), drawn anew by number."""
    for seed in range(first, first + count):
        draw = np.random.default_rng(seed)
        size = int(draw.integers(1, 80))
        kind = seed % 4
        if kind == 0:
            lengths = draw.integers(1, 513, size)
        elif kind == 1:
            lengths = np.full(size, int(draw.integers(1, 100)))
        elif kind == 2:
            lengths = np.minimum(512, np.exp(draw.normal(4, 1, size)).astype(int) + 1)
        else:
            lengths = np.where(draw.random(size) < 0.1, 4000, draw.integers(1, 30, size))
        yield (
            lengths,
            int(draw.integers(1, 8)),
            int(draw.integers(1, 40)),
            int(draw.integers(1, 3000)),
        )


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_what_holds_of_every_division(first):
    for case in _cases(first, 100):
        _check(*case)


def _check(lengths, ranks, micro_batch, max_tokens):
    indices = np.arange(len(lengths))
    bounds = {"world_size": ranks, "micro_batch": micro_batch, "max_tokens": max_tokens}
    division = divide(indices, lengths, **bounds)
    dealt = division.runs
    runs = [run for runs in dealt for run in runs]
    # Each sample once; every rank as many micro-batches.
    assert sorted(i for run in runs for i in run.tolist()) == indices.tolist()
    assert len(dealt) == ranks
    assert len({len(each) for each in dealt}) == 1
    # Within the bounds; what does not fit by itself stands alone.
    assert all(len(run) <= micro_batch for run in runs)
    assert all(_cost(run, lengths) <= max_tokens or len(run) == 1 for run in runs)
    # Filler only where there are fewer samples than places.
    assert sum(not len(run) for run in runs) == max(0, len(runs) - len(indices))
    costs = [[_cost(run, lengths) for run in each] for each in dealt]
    assert division.padded_tokens == sum(map(sum, costs))
    # The costliest first, on every rank and from rank to rank.
    turns = [sorted(turn) for turn in zip(*costs, strict=True)]
    assert all(late[-1] <= early[0] for early, late in itertools.pairwise(turns))
    # In turn j two ranks differ by d_j at most, in favour of one and then of the other, and the turns
    # lie one below the other: the sum of all d_j is at most what lies between costliest and cheapest.
    totals = [sum(each) for each in costs]
    flat = [cost for each in costs for cost in each]
    assert max(totals) - min(totals) <= max(flat) - min(flat)
    # No more micro-batches than filling one after the other takes, rounded up to whole turns.
    fewest = _fewest(sorted(lengths.tolist(), reverse=True), micro_batch, max_tokens)
    assert len(dealt[0]) == -(-fewest // ranks)
    # A function of the set of samples, not of their order.
    shuffled = np.random.default_rng(1).permutation(len(indices))
    again = deal(indices[shuffled], lengths[shuffled], **bounds)
    assert [[r.tolist() for r in each] for each in again] == [
        [r.tolist() for r in each] for each in dealt
    ]


def _fewest(lengths, micro_batch, max_tokens):
    """Micro-batches that lengths, descending, take: by looking at each sample in turn."""
    count = rows = longest = 0
    for length in lengths:
        if not rows or rows == micro_batch or (rows + 1) * longest > max_tokens:
            count, rows, longest = count + 1, 0, length
        rows += 1
    return count


def _smallest_largest(lengths, count, micro_batch):
    """By trying every way to cut `lengths`, descending, into `count` runs: the least largest cost."""
    best = None
    for cuts in itertools.combinations(range(1, len(lengths)), count - 1):
        ends = [0, *cuts, len(lengths)]
        pieces = list(itertools.pairwise(ends))
        if all(end - start <= micro_batch for start, end in pieces):
            worst = max((end - start) * lengths[start] for start, end in pieces)
            best = worst if best is None else min(best, worst)
    return best


@pytest.mark.parametrize("seed", range(60))
def test_no_run_is_larger_than_it_must_be(seed):
    """Against every possible cut of few samples into as many runs."""
    draw = np.random.default_rng(1000 + seed)
    size, micro_batch = int(draw.integers(2, 10)), int(draw.integers(1, 6))
    lengths = draw.integers(1, 60, size)
    ranks, max_tokens = int(draw.integers(1, 4)), int(draw.integers(30, 200))
    division = divide(
        np.arange(size), lengths, world_size=ranks, micro_batch=micro_batch, max_tokens=max_tokens
    )
    runs = [run for each in division.runs for run in each if len(run)]
    best = _smallest_largest(sorted(lengths.tolist(), reverse=True), len(runs), micro_batch)
    assert max(_cost(run, lengths) for run in runs) == best


def test_long_and_short_samples_cost_what_they_weigh():
    """Lengths 100, 40, 40, 20, 20, 20, 20, 20 in 100 tokens: 100 | 40 40 | 20 20 20 20 20, costs 100, 80
    and 100. On one rank the costliest come first, the longest of equals before the others.
    """
    lengths = np.array([20, 40, 20, 100, 20, 40, 20, 20])
    (runs,) = deal(np.arange(8), lengths, world_size=1, micro_batch=8, max_tokens=100)
    assert [run.tolist() for run in runs] == [[3], [0, 2, 4, 6, 7], [1, 5]]


def test_no_more_is_put_together_than_evens_out():
    """Eight samples of 10 on two ranks: 80 tokens would do in one run, but each rank takes 40."""
    dealt = deal(np.arange(8), np.full(8, 10), world_size=2, micro_batch=8, max_tokens=80)
    assert [[run.tolist() for run in runs] for runs in dealt] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]


def test_a_sample_above_the_bound_stands_alone():
    lengths = np.array([500, 3, 500, 3])
    (runs,) = deal(np.arange(4), lengths, world_size=1, micro_batch=4, max_tokens=10)
    assert [run.tolist() for run in runs] == [[0], [2], [1, 3]]
    assert rows_at_once(500, 4, 10) == 1
    assert rows_at_once(3, 4, 10) == 3
    assert rows_at_once(1, 4, 10) == 4
    assert rows_at_once(500, 4, None) == 4


def test_fewer_samples_than_ranks_leave_filler():
    dealt = deal(np.array([7, 9]), np.array([5, 6]), world_size=4, micro_batch=8, max_tokens=1000)
    assert [[run.tolist() for run in runs] for runs in dealt] == [[[9]], [[7]], [[]], [[]]]


def test_nothing_to_deal():
    empty = np.array([], dtype=np.int64)
    for max_tokens in (None, 100):
        division = divide(empty, empty, world_size=2, micro_batch=8, max_tokens=max_tokens)
        assert [[run.tolist() for run in runs] for runs in division.runs] == [[[]], [[]]]
        assert division.padded_tokens == 0


def test_without_a_bound_in_tokens_samples_are_counted():
    """What numpy's array_split makes of the samples by length, dealt forth and back."""
    draw = np.random.default_rng(5)
    for size, ranks, micro_batch in itertools.product(
        (1, 7, 32, 33, 100), (1, 2, 3, 7), (1, 4, 64)
    ):
        indices, lengths = draw.permutation(1000)[:size], draw.integers(1, 100, size)
        division = divide(indices, lengths, world_size=ranks, micro_batch=micro_batch)
        per_rank = max(1, -(-size // (ranks * micro_batch)))
        split = np.array_split(indices[np.lexsort((indices, -lengths))], per_rank * ranks)
        for rank, runs in enumerate(division.runs):
            for turn, run in enumerate(runs):
                place = rank if turn % 2 == 0 else ranks - 1 - rank
                assert run.tolist() == split[turn * ranks + place].tolist()
        length_of = dict(zip(indices.tolist(), lengths.tolist(), strict=True))
        assert division.padded_tokens == sum(
            len(run) * max(length_of[i] for i in run.tolist()) for run in split if len(run)
        )


def test_absurd_bounds():
    lengths = np.array([3, 2, 1])
    for max_tokens in (1, 10**18):
        runs = deal(np.arange(3), lengths, world_size=1, micro_batch=10**12, max_tokens=max_tokens)
        assert sorted(i for run in runs[0] for i in run.tolist()) == [0, 1, 2]


def test_a_hundred_thousand_samples():
    """As many as an evaluation may divide at once."""
    draw = np.random.default_rng(0)
    lengths = np.minimum(512, np.exp(draw.normal(5, 0.7, 100_000)).astype(int) + 5)
    division = divide(np.arange(100_000), lengths, world_size=3, micro_batch=16, max_tokens=2048)
    runs = [run for each in division.runs for run in each]
    assert sum(map(len, runs)) == 100_000
    assert max(_cost(run, lengths) for run in runs) <= 2048
    # Sorted by length there is next to no padding.
    assert division.padded_tokens < 1.01 * lengths.sum()
