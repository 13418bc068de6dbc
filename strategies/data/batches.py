"""Samples as padded arrays. Which of them share a micro-batch is decided in `dealing`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ftlaunch.strategies.base import Batch
from ftlaunch.strategies.data.dealing import deal

FILLER = -1
# What is drawn for an evaluation is the same in every one.
EVALUATION_EPOCH = -1


class SampleTable(Protocol):
    """What is read of the token cache: random access by sample number."""

    def __len__(self) -> int: ...

    def lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]: ...

    def labels(self, indices: NDArray[np.int64]) -> NDArray[Any]: ...

    def rows(
        self, indices: NDArray[np.int64]
    ) -> Sequence[tuple[NDArray[Any], NDArray[Any] | None]]: ...


class Lengths(Protocol):
    """What is read of any table of samples to divide them."""

    def __len__(self) -> int: ...

    def lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]: ...


class Batches(Protocol):
    """Padded batches of a table: `Collator`, and `token_batches.TokenCollator` for labels of tokens."""

    @property
    def table(self) -> Lengths: ...

    def total_items(self, indices: NDArray[np.int64], *, epoch: int = 0) -> float: ...

    def batch(self, indices: NDArray[np.int64], *, seed: int, epoch: int = 0) -> Batch: ...

    def batches(
        self, runs: Sequence[NDArray[np.int64]], *, seeds: Sequence[int], epoch: int = 0
    ) -> Iterator[Batch]:
        """`batch` of each run with its seed, one after the other."""
        ...


def micro_batch_seed(seed: int, step: int, rank: int, number: int) -> int:
    """Seed of one micro-batch's random numbers: no generator state has to be saved."""
    text = f"{seed}/{step}/{rank}/{number}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Collator:
    """Turns sample numbers into a padded `Batch`.

    class_weights   weight of each class in the loss, or None for 1
    pad_to_multiple of the padded length
    alive           called for every batch: a sign that work goes on
    """

    table: SampleTable
    pad_token_id: int
    class_weights: NDArray[np.float32] | None = None
    pad_to_multiple: int = 1
    alive: Callable[[], None] = lambda: None

    def weights(self, labels: NDArray[Any]) -> NDArray[np.float32]:
        if self.class_weights is None:
            return np.ones(labels.shape, dtype=np.float32)
        if labels.ndim == 2:
            return np.repeat(self.class_weights[None, :], len(labels), axis=0)
        weights: NDArray[np.float32] = self.class_weights[labels]
        return weights

    def total_items(self, indices: NDArray[np.int64], *, epoch: int = 0) -> float:
        """Sum of the loss weights of these samples: what the window's loss is divided by."""
        if self.class_weights is None:
            # One for each label: as many as one sample has.
            return float(len(indices) * self.table.labels(indices[:1]).size)
        return float(self.weights(self.table.labels(indices)).sum(dtype=np.float64))

    def batch(self, indices: NDArray[np.int64], *, seed: int, epoch: int = 0) -> Batch:
        """A batch of these samples, the same in every epoch; of one weightless sample where there are
        none.
        """
        return next(self.batches([indices], seeds=[seed], epoch=epoch))

    def batches(
        self, runs: Sequence[NDArray[np.int64]], *, seeds: Sequence[int], epoch: int = 0
    ) -> Iterator[Batch]:
        """All runs are looked up at once: each look goes through the files that the samples lie in."""
        taken = [run if len(run) else np.zeros(1, dtype=np.int64) for run in runs]
        together = np.concatenate(taken)
        all_rows, all_labels = self.table.rows(together), self.table.labels(together)
        begin = 0
        for run, indices, seed in zip(runs, taken, seeds, strict=True):
            self.alive()
            end = begin + len(indices)
            labels = all_labels[begin:end]
            yield Batch(
                inputs=pad_inputs(all_rows[begin:end], self.pad_token_id, self.pad_to_multiple),
                labels=labels,
                weights=self.weights(labels)
                if len(run)
                else np.zeros(labels.shape, dtype=np.float32),
                indices=indices if len(run) else np.full(1, FILLER, dtype=np.int64),
                seed=seed,
            )
            begin = end


def pad_inputs(
    rows: Sequence[tuple[NDArray[Any], NDArray[Any] | None]], pad_token_id: int, multiple: int = 1
) -> dict[str, NDArray[np.int64]]:
    """Rows of (input_ids, token_type_ids) as arrays of the longest one's length, rounded up."""
    lengths = [len(ids) for ids, _ in rows]
    length = math.ceil(max(lengths) / multiple) * multiple
    is_token = np.arange(length) < np.array(lengths)[:, None]
    input_ids = np.full(is_token.shape, pad_token_id, dtype=np.int64)
    input_ids[is_token] = np.concatenate([ids for ids, _ in rows])
    inputs = {"input_ids": input_ids, "attention_mask": is_token.astype(np.int64)}
    if rows[0][1] is not None:
        token_type_ids = np.zeros_like(input_ids)
        token_type_ids[is_token] = np.concatenate([types for _, types in rows if types is not None])
        inputs["token_type_ids"] = token_type_ids
    return inputs


def evaluation_batches(
    collator: Batches,
    *,
    rank: int,
    world_size: int,
    micro_batch: int,
    max_tokens: int | None = None,
) -> Iterator[Batch]:
    """Every sample of the table exactly once over all ranks, the same number of batches on each."""
    indices = np.arange(len(collator.table))
    dealt = deal(
        indices,
        collator.table.lengths(indices),
        world_size=world_size,
        micro_batch=micro_batch,
        max_tokens=max_tokens,
    )
    for run in dealt[rank]:
        yield collator.batch(run, seed=0, epoch=EVALUATION_EPOCH)
