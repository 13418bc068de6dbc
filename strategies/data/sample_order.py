"""Which samples make up each optimizer step: a pure function of (seed, epoch, step).

Nothing here knows ranks or lengths: those only divide a global batch (`batches`), they never
choose it. The permutation is computed, not stored: O(1) memory for any number of samples.
Its numbers are part of every checkpoint's meaning: a change would break all cursors.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_MASK64 = (1 << 64) - 1
# So many positions are permuted together, at least a global batch.
_AT_ONCE = 1024


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection that spreads every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed


def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    """One 64-bit key a round from splitmix64 of (seed, epoch), in Python's exact integers."""
    state = (seed * 0x9E3779B97F4A7C15 + epoch * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) & _MASK64
    keys = []
    for _ in range(_ROUNDS):
        state = (state + 0x9E3779B97F4A7C15) & _MASK64
        keys.append(int(_mix(np.array([state], dtype=np.uint64))[0]))
    return tuple(keys)


def permute(
    positions: NDArray[np.int64], num_samples: int, *, seed: int, epoch: int
) -> NDArray[np.int64]:
    """The samples at `positions` of the epoch's permutation of range(num_samples).

    A balanced Feistel network over the smallest even number of bits that holds num_samples;
    a value that falls outside is sent round again (cycle walking), fewer than four times on
    average. Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002.
    """
    half_bits = max(1, math.ceil((num_samples - 1).bit_length() / 2))
    half = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    keys = [np.uint64(key) for key in _round_keys(seed, epoch)]

    values = positions.astype(np.uint64)
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        values[outside] = (left << half) | right
        outside = values >= np.uint64(num_samples)
    return values.astype(np.int64)


@functools.lru_cache(maxsize=2)
def _permuted(first: int, size: int, num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The samples of several steps: numpy takes nearly as long for the few of one."""
    positions = np.arange(first, min(first + size, num_samples))
    return permute(positions, num_samples, seed=seed, epoch=epoch)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOrder:
    """The order of `num_samples` samples in global batches of `global_batch_size`.

    The last step of an epoch takes what is left: every sample once an epoch, none dropped.
    """

    num_samples: int
    global_batch_size: int
    seed: int

    def __post_init__(self) -> None:
        assert self.num_samples > 0
        assert self.global_batch_size > 0

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_samples / self.global_batch_size)

    def epoch(self, step: int) -> int:
        """The epoch of optimizer step `step`, both counted from 0."""
        return step // self.steps_per_epoch

    def global_batch(self, step: int) -> NDArray[np.int64]:
        """The sample numbers of optimizer step `step`, counted from 0 over all epochs."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        steps = max(1, _AT_ONCE // self.global_batch_size)
        block, step_in_block = divmod(step_in_epoch, steps)
        size = steps * self.global_batch_size
        samples = _permuted(block * size, size, self.num_samples, self.seed, epoch)
        first = step_in_block * self.global_batch_size
        own: NDArray[np.int64] = samples[first : first + self.global_batch_size].copy()
        return own

    def epochs_after(self, num_steps: int) -> float:
        """Passes over the data after `num_steps` steps: 1.5 is the middle of the second epoch."""
        epoch, steps = divmod(num_steps, self.steps_per_epoch)
        return epoch + min(steps * self.global_batch_size, self.num_samples) / self.num_samples


def samples_digest(indices: NDArray[np.int64]) -> str:
    """A digest of a set of sample numbers, whatever their order."""
    ordered = np.sort(indices).astype("<i8")
    return hashlib.blake2b(ordered.tobytes(), digest_size=8).hexdigest()
