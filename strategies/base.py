"""The border between the loop and the frameworks: what a strategy takes, gives and must offer.

numpy is the only array library known here; torch and mindspore begin behind `Strategy`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ftlaunch.cluster.world import World
from ftlaunch.strategies.options import JobOptions, Precision
from ftlaunch.strategies.startup import Stages


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One micro-batch of one rank.

    inputs    the model's keyword arguments (input_ids, attention_mask, …), each (rows, length) int64;
              without attention_mask where position_ids that begin anew divide a row into samples
    labels    (rows,) int64 classes or float32 targets of a regression, (rows, outputs) float32, or
              (rows, length) int64 classes of tokens with -100 where there is none
    weights   float32 of the shape of the labels: the weight of each in the loss; 0 marks filler
    indices   (rows,) int64 sample numbers; -1 marks filler
    seed      of the random numbers (dropout) that this micro-batch may draw
    lengths   (rows,) tokens without padding, where there is no attention_mask to tell
    """

    inputs: Mapping[str, NDArray[np.int64]]
    labels: NDArray[Any]
    weights: NDArray[np.float32]
    indices: NDArray[np.int64]
    seed: int
    lengths: NDArray[np.int64] | None = None

    @property
    def num_samples(self) -> int:
        return int((self.indices >= 0).sum())

    @property
    def num_tokens(self) -> int:
        """Tokens without padding and without filler rows."""
        if self.lengths is not None:
            return int(self.lengths[self.indices >= 0].sum())
        return int(self.inputs["attention_mask"][self.indices >= 0].sum())

    @property
    def num_padded_tokens(self) -> int:
        return int(self.inputs["input_ids"].size)

    @property
    def is_of_tokens(self) -> bool:
        """Whether each token has a label; those of several outputs are not whole numbers."""
        return self.labels.ndim == 2 and self.labels.dtype.kind == "i"

    def one_row(self) -> Batch:
        """The first row with weight alone, as wide as it is here; the first of all where none has any."""
        row = int((self.weights != 0).reshape(len(self.weights), -1).any(axis=1).argmax())
        only = slice(row, row + 1)
        return Batch(
            inputs={name: values[only] for name, values in self.inputs.items()},
            labels=self.labels[only],
            weights=self.weights[only],
            indices=self.indices[only],
            seed=self.seed,
            lengths=None if self.lengths is None else self.lengths[only],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyRequest:
    """What a strategy is created from.

    accelerator   "cpu", "cuda" or "ascend"
    device        the place of the rank's NPU among the visible ones; the local rank elsewhere
    listen_fd     on rank 0 of several: the rendezvous socket, bound and listening, to be inherited
    loss          a `tasks.Loss`
    head          a `tasks.Head`
    num_outputs   width of the logits; 0 for the model's vocabulary
    label_names   in the order of their ids; empty for regression and for tokens of the vocabulary
    trained_head  the head must come from the model's own weights: there will be no training
    stages        told what is done when, for whoever wants to know where a start spends its time
    """

    world: World
    options: JobOptions
    precision: Precision
    accelerator: str
    device: int
    num_threads: int
    listen_fd: int | None
    timeout_seconds: float
    loss: str
    num_outputs: int
    label_names: tuple[str, ...]
    max_token_id: int
    pad_token_id: int
    trained_head: bool = False
    head: str = "sequence-classification"
    stages: Stages = field(default_factory=Stages)

    @property
    def packs_samples(self) -> bool:
        """Whether a row of training data may hold several samples, kept apart by their positions."""
        return not self.trained_head and self.options.data.packing == "samples"


class Said(NamedTuple):
    """What a rank tells the others with a step: whether it was asked to stop, and of the checkpoint that
    it writes.
    """

    stop: bool
    saving: float


Say = Callable[[], Said]


def say_nothing() -> Said:
    return Said(stop=False, saving=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """What one optimizer step did; equal on every rank.

    loss        weighted mean over the supervised items of the global batch
    grad_norm   global L2 norm before clipping; not finite when `applied` is False
    culprit     the first parameter with a non-finite gradient, when `applied` is False
    stop        some rank was asked to stop
    saving      the sum of what the ranks said of the checkpoint that they write
    """

    applied: bool
    loss: float
    grad_norm: float
    loss_scale: float
    culprit: str | None
    stop: bool
    saving: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """What a model makes of the labels of a batch of tokens.

    losses    (rows, length) float32 −log softmax(logits)[label], without weights; 0 where the label
              is -100
    winners   (rows, length) int64 class with the highest logit; 0 where the label is -100
    """

    losses: NDArray[np.float32]
    winners: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSlice:
    """A run of elements of one tensor of the training state, as its owner holds it.

    kind   "weight" (the fp32 master, or a buffer), "exp_avg" or "exp_avg_sq"
    start  of `values` in the row-major flattened tensor of `shape`
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    values: NDArray[Any]


class StateReader(Protocol):
    """Random access to the tensors of a checkpoint, whatever ranks and strategy wrote it."""

    def read(self, kind: str, name: str, start: int, stop: int) -> NDArray[Any]:
        """Elements [start, stop) of the flattened tensor. CheckpointDamaged if they are not there."""

    def names(self, kind: str) -> Mapping[str, tuple[int, ...]]:
        """Name → shape of every tensor of that kind."""


class Strategy(Protocol):
    """All that a framework must offer to the loop."""

    world: World

    def sum_across_ranks(self, values: NDArray[Any]) -> NDArray[Any]:
        """Collective: elementwise sum over ranks, in the dtype given (float32 or float64)."""

    def accumulate(
        self, batch: Batch, total_items: float, *, last: bool, say: Say = say_nothing
    ) -> None:
        """Collective if `last`: forward and backward of this rank's share of the global mean loss.

        say   asked once in a step, for what travels to the other ranks with what travels anyway: as late
              as it can, here with the last micro-batch or in `apply`
        """

    def prove(self, batch: Batch, *, accumulates: bool) -> None:
        """Collective, before the first `accumulate`: forward and backward of the batch with all else in
        memory that a step has there (gradients, moments), to see whether there is room.

        accumulates   a step may have several micro-batches

        Gradients, optimizer, random numbers, loss scale and weights are afterwards what they were.
        """

    def apply(self, learning_rate: float) -> StepOutcome:
        """Collective: clip and step, or skip what is not finite, the same everywhere; clear gradients."""

    def predict(self, batch: Batch) -> NDArray[np.float32]:
        """Collective (every rank the same number of calls): logits, (rows, outputs)."""

    def score(self, batch: Batch) -> TokenScores:
        """Like `predict`, for labels of tokens: the logits stay where they are."""

    def state_slices(self) -> Iterable[TensorSlice]:
        """The slices of weights and optimizer moments that this rank owns; together they are whole."""

    def load_state(
        self, reader: StateReader, *, optimizer_steps: int, loss_scale: Mapping[str, float]
    ) -> None:
        """Collective: take weights and, if `optimizer_steps` > 0, moments from a checkpoint."""

    def loss_scale_state(self) -> Mapping[str, float]:
        """What the manifest keeps of the loss scaler."""

    def aliases(self) -> Mapping[str, str]:
        """Other names of weights that several modules share → the name that `state_slices` has."""

    def model_files(self) -> Mapping[str, bytes]:
        """What a model's folder has beside its weights, by name: config.json and the like."""

    def peak_memory_bytes(self) -> int:
        """The most memory this rank's training has held."""

    def close(self) -> None:
        """Collective, after success only: leave the process group. The process must end soon."""
