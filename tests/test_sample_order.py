"""The order of samples: a permutation each epoch, the same in every release."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

from ftlaunch.strategies.data.sample_order import SampleOrder, permute, samples_digest


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 100, 1023, 1024, 1025, 4097])
def test_every_sample_once(size):
    assert sorted(permute(np.arange(size), size, seed=5, epoch=2)) == list(range(size))


def test_the_order_of_this_release():
    """A change here would break every checkpoint's cursor: never adapt these numbers."""
    assert permute(np.arange(20), 20, seed=3, epoch=1).tolist() == [
        0, 6, 4, 18, 10, 14, 5, 19, 9, 17, 8, 16, 13, 12, 3, 1, 2, 15, 7, 11,
    ]  # fmt: skip
    far = permute(np.array([0, 1, 999_999_999]), 10**9, seed=42, epoch=0)
    assert far.tolist() == [728310799, 610384623, 672337023]


def test_seeds_and_epochs_differ():
    orders = {
        permute(np.arange(50), 50, seed=seed, epoch=epoch).tobytes()
        for seed in range(10)
        for epoch in range(10)
    }
    assert len(orders) == 100


def test_no_place_prefers_a_sample():
    """7 samples, 7000 seeds: each comes first 1000 times, standard deviation 29; 5 of them is 146."""
    counts = np.zeros(7)
    for seed in range(7000):
        counts[permute(np.arange(1), 7, seed=seed, epoch=0)[0]] += 1
    assert np.abs(counts - 1000).max() < 146


def test_windows_of_an_epoch():
    """10 samples in batches of 4: 4, 4 and 2; the fourth step begins the second epoch."""
    order = SampleOrder(num_samples=10, global_batch_size=4, seed=1)
    assert order.steps_per_epoch == 3
    windows = [order.global_batch(step).tolist() for step in range(6)]
    assert [len(window) for window in windows] == [4, 4, 2, 4, 4, 2]
    assert sorted(chain(*windows[:3])) == sorted(chain(*windows[3:])) == list(range(10))
    assert windows[:3] != windows[3:]
    assert [order.epochs_after(step) for step in (0, 1, 3, 4, 6)] == [0.0, 0.4, 1.0, 1.4, 2.0]


def test_digest_is_of_the_set():
    one = samples_digest(np.array([3, 1, 2]))
    assert one == samples_digest(np.array([1, 2, 3]))
    assert one != samples_digest(np.array([1, 2, 4]))
