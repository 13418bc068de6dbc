"""Padded batches of samples that have a label for each token. How they are dealt is in `batches`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftlaunch.strategies.base import Batch
from ftlaunch.strategies.data.batches import FILLER, pad_inputs
from ftlaunch.strategies.data.tasks import UNSUPERVISED, TaskSpec, TokenTask
from ftlaunch.strategies.data.token_samples import TokenSample, TokenSamples


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCollator:
    """Turns sample numbers into a padded `Batch`. Implements `batches.Batches`.

    seed            of the job: what is drawn for a sample depends on it, the epoch and the sample
    class_weights   weight of each class in the loss, or None for 1
    pad_to_multiple of the padded length
    alive           called for every batch: a sign that work goes on
    """

    table: TokenSamples
    task: TokenTask
    spec: TaskSpec
    pad_token_id: int
    seed: int
    class_weights: NDArray[np.float32] | None = None
    pad_to_multiple: int = 1
    alive: Callable[[], None] = lambda: None

    def samples(self, indices: NDArray[np.int64], epoch: int) -> list[TokenSample]:
        """As they are seen in that epoch, wherever they are computed."""
        found = self.table.samples(indices)
        if not self.spec.drawn:
            return found
        return [
            self.task.draw(sample, self.spec, sample_generator(self.seed, epoch, number))
            for sample, number in zip(found, indices.tolist(), strict=True)
        ]

    def weights(self, labels: NDArray[Any]) -> NDArray[np.float32]:
        """Of the labels' shape; 0 where there is nothing to learn."""
        real = labels != UNSUPERVISED
        if self.class_weights is None:
            return np.asarray(real, dtype=np.float32)
        return np.where(real, self.class_weights[np.where(real, labels, 0)], np.float32(0))

    def total_items(self, indices: NDArray[np.int64], *, epoch: int = 0) -> float:
        """Sum of the loss weights of these samples: what the window's loss is divided by.

        1 where nothing at all was drawn to be learned: the gradient is 0 then.
        """
        if not self.spec.drawn and self.class_weights is None:
            return float(self.table.items(indices).sum())
        sums = [
            self.weights(sample.labels).sum(dtype=np.float64)
            for sample in self.samples(indices, epoch)
        ]
        return float(sum(sums)) or 1.0

    def batch(self, indices: NDArray[np.int64], *, seed: int, epoch: int = 0) -> Batch:
        """A batch of these samples; of one weightless sample where there are none."""
        self.alive()
        real = len(indices) > 0
        taken = indices if real else np.zeros(1, dtype=np.int64)
        samples = self.samples(taken, epoch)
        rows = [(sample.input_ids, sample.token_type_ids) for sample in samples]
        inputs = pad_inputs(rows, self.pad_token_id, self.pad_to_multiple)
        lengths = np.array([len(ids) for ids, _ in rows], dtype=np.int64)
        if any(sample.parts for sample in samples):
            # transformers takes positions that begin anew for the borders of samples, but only if
            # there is no mask of padding: padding becomes one more sample.
            del inputs["attention_mask"]
            inputs["position_ids"] = _positions(samples, inputs["input_ids"].shape[1])
        labels = np.full(inputs["input_ids"].shape, UNSUPERVISED, dtype=np.int64)
        if real:
            for row, sample in enumerate(samples):
                labels[row, : len(sample.labels)] = sample.labels
        return Batch(
            inputs=inputs,
            labels=labels,
            weights=self.weights(labels),
            indices=taken if real else np.full(1, FILLER, dtype=np.int64),
            seed=seed,
            lengths=lengths,
        )

    def batches(
        self, runs: Sequence[NDArray[np.int64]], *, seeds: Sequence[int], epoch: int = 0
    ) -> Iterator[Batch]:
        """`batch` of each run with its seed, one after the other."""
        for run, seed in zip(runs, seeds, strict=True):
            yield self.batch(run, seed=seed, epoch=epoch)


def _positions(samples: list[TokenSample], length: int) -> NDArray[np.int64]:
    """(rows, length), from 0 in every part; what follows the parts is one more."""
    positions = np.empty((len(samples), length), dtype=np.int64)
    for row, sample in enumerate(samples):
        parts = [*(sample.parts or (len(sample.input_ids),))]
        parts.append(length - sum(parts))
        positions[row] = np.concatenate([np.arange(part) for part in parts])
    return positions


def sample_generator(seed: int, epoch: int, number: int) -> np.random.Generator:
    """Random numbers of one sample in one epoch: no generator state has to be saved."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{number}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype="<u8")))
