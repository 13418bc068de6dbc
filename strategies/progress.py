"""What a worker tells about its training: typed messages that travel as JSON to the coordinator.

Nothing here knows how they travel (`cluster.events`) or how they are shown (`launcher.console`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args

PhaseName = Literal["data", "model", "prove", "train", "evaluate", "save"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReady:
    """The tokens are there. Sent once by rank 0; `notes` are lines for the user (guessed columns, …).

    longest_sample        tokens of the longest training sample; 0 where there is none
    longest_eval_sample   the same of evaluation
    """

    kind: ClassVar[str] = "data_ready"
    num_train_samples: int
    num_eval_samples: int
    steps_per_epoch: int
    total_steps: int
    seconds: float
    notes: tuple[str, ...]
    longest_sample: int = 0
    longest_eval_sample: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """Training goes on after `step` optimizer steps of an earlier run, from `checkpoint`."""

    kind: ClassVar[str] = "resumed"
    step: int
    epoch: float
    checkpoint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Proved:
    """The largest micro-batches fit into memory: (samples, padded length) of each that was computed.

    peak_memory_bytes   the most that a rank had held by then
    """

    kind: ClassVar[str] = "proved"
    shapes: Sequence[Sequence[int]]
    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """One optimizer step, applied or skipped. `step` counts from 1, `epoch` is fractional.

    samples_digest   of the sample numbers of the global batch, in no particular order
    num_tokens       of all ranks, without padding; num_padded_tokens with it
    culprit          first parameter with a non-finite gradient, when not applied
    """

    kind: ClassVar[str] = "step_done"
    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    loss_scale: float
    applied: bool
    samples_per_second: float
    tokens_per_second: float
    samples_digest: str
    num_samples: int
    num_tokens: int
    num_padded_tokens: int
    culprit: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Startup:
    """The first step of an attempt is done. Sent by rank 0 before that step's `StepDone`.

    seconds           of each of its stages (`startup.Stage`), which follow one another
    preload_seconds   what its fork server has spent on imports before it; 0 where it imports itself
    """

    kind: ClassVar[str] = "startup"
    seconds: Mapping[str, float]
    preload_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """Evaluation after `step`; `metrics` holds "loss" and the task's metrics."""

    kind: ClassVar[str] = "evaluated"
    step: int
    epoch: float
    metrics: Mapping[str, float]
    num_samples: int
    seconds: float
    is_best: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint is whole on disk.

    seconds           until it was
    blocked_seconds   of these, those that training waited for
    """

    kind: ClassVar[str] = "saved"
    step: int
    path: str
    seconds: float
    blocked_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """A line for the user, worth keeping in the report."""

    kind: ClassVar[str] = "note"
    text: str
    warning: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """What is being done from now on; how long it may take without a word depends on it."""

    kind: ClassVar[str] = "phase"
    name: PhaseName


@dataclass(frozen=True, slots=True, kw_only=True)
class Alive:
    """Work goes on, within a phase that has nothing else to tell yet."""

    kind: ClassVar[str] = "alive"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was measured of some steps; sent once by rank 0 (`strategies.measurement`).

    step_seconds   of each measured step, on the rank for which it took longest
    seconds        of all of them together
    num_tokens     of all ranks, without padding; num_padded_tokens with it
    model_flops    that the steps needed (`flops.step_flops`); None for a model whose shape is not known
    ranks          of each rank: the shares of its time, which sum to 1, `peak_flops_per_second` and
                   `peak_memory_bytes`
    share_steps    the steps of their own in which the shares were measured
    """

    kind: ClassVar[str] = "measured"
    step_seconds: tuple[float, ...]
    seconds: float
    num_samples: int
    num_tokens: int
    num_padded_tokens: int
    skipped_steps: int
    model_flops: float | None
    ranks: tuple[Mapping[str, float], ...]
    share_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The worker's part is over. `stopped`: on request, before the end, with a checkpoint.

    metrics   of the evaluation that describes `model_dir`: the best step where asked for, else the last
    """

    kind: ClassVar[str] = "finished"
    stopped: bool
    reason: str
    step: int
    epoch: float
    model_dir: str | None
    metrics: Mapping[str, float]
    train_seconds: float
    peak_memory_bytes: int


Progress = (
    DataReady
    | Resumed
    | Proved
    | StepDone
    | Startup
    | Evaluated
    | Saved
    | Note
    | Phase
    | Alive
    | Measured
    | Finished
)
_KINDS: dict[str, type[Any]] = {cls.kind: cls for cls in get_args(Progress)}


# Not asdict, which copies every value.
_FIELDS = {cls: tuple(field.name for field in fields(cls)) for cls in _KINDS.values()}


def to_dict(message: Progress) -> dict[str, Any]:
    """Its values are the message's own."""
    names = _FIELDS[type(message)]
    return {"kind": message.kind, **{name: getattr(message, name) for name in names}}


def from_dict(payload: Mapping[str, Any]) -> Progress:
    """ValueError when the payload is not one of ours."""
    fields = dict(payload)
    cls = _KINDS.get(fields.pop("kind", ""))
    if cls is None:
        raise ValueError(f"unknown progress message: {str(payload)[:200]}")
    try:
        return cls(**fields)  # type: ignore[no-any-return]
    except TypeError as error:
        raise ValueError(f"malformed progress message {cls.kind}: {error}") from None
