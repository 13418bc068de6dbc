"""The most memory that a step takes on one device, from an architecture and a job's numbers alone.

A prediction, not a measurement: `benchmarks/memory.py` compares it with the bytes that torch's
allocator hands out. What is not known here is an upper bound and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ftlaunch.strategies.memory.activations import activations
from ftlaunch.strategies.memory.architecture import Architecture
from ftlaunch.strategies.memory.states import STRATEGIES, count_trainable, states

# Context, kernels and the workspace of the libraries of products. Assumptions from documentation, none
# of them tested on the hardware: what a process holds of a device before the first tensor.
FRAMEWORK_BYTES: Mapping[str, int] = {"cuda": 1 << 30, "ascend": 2 << 30, "cpu": 400 << 20}
_DDP_BUCKET = 25 << 20
_ZERO_BUCKET_ELEMENTS = 500_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRequest:
    """A job, as far as its memory depends on it.

    micro_batch   rows, each padded to `length` tokens
    accumulates   a step has more than one micro-batch
    attention     the implementation asked for: "eager", "sdpa", "flash_attention_2"; None: the model's
    trainable     whether a parameter is trained, by its name; None: all are
    """

    architecture: Architecture
    strategy: str
    precision: str
    world_size: int
    micro_batch: int
    length: int
    accelerator: str = "cuda"
    offload: bool = False
    accumulates: bool = False
    gradient_checkpointing: bool = False
    attention: str | None = None
    trainable: Callable[[str], bool] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes on the fullest device, `host` in the memory of its host, for each rank.

    The parts need not exist at the same time: `phases` says what a step holds at most in each of its
    phases, `peak` is the most of these. `framework` is in every phase.
    """

    weights: int
    masters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buckets: int
    framework: int
    host: int
    is_bound: bool
    phases: Mapping[str, int]

    @property
    def peak(self) -> int:
        """What has to fit into the device."""
        return max(self.phases.values())

    @property
    def tensors(self) -> int:
        """The same without what the framework takes for itself: what an allocator counts."""
        return self.peak - self.framework


def estimate(request: MemoryRequest) -> MemoryEstimate:
    """The memory of a job. ValueError for numbers that no job can have."""
    _check(request)
    architecture = request.architecture
    trained, total = count_trainable(architecture, request.trainable)
    held = states(
        strategy=request.strategy,
        offload=request.offload,
        precision=request.precision,
        world_size=request.world_size,
        num_parameters=total,
        num_trainable=trained,
    )
    is_autocast = request.strategy == "ddp" and request.precision != "fp32"
    kept = activations(
        architecture,
        rows=request.micro_batch,
        length=request.length,
        precision=request.precision,
        is_autocast=is_autocast,
        keeps_attention=_keeps_attention(request),
        chunks_logits=request.strategy != "mindspore",
    )
    layers = architecture.num_layers
    if request.gradient_checkpointing:
        stored = layers * kept.boundary + kept.layer
    else:
        stored = layers * kept.layer
    if is_autocast:
        stored += 2 * total
    stored += kept.ends + kept.working
    buckets = _buckets(request, trained)
    framework = FRAMEWORK_BYTES.get(request.accelerator, 0)
    forward = framework + held.on_device + stored + kept.logits + buckets
    return MemoryEstimate(
        weights=held.weights,
        masters=held.masters,
        gradients=held.gradients,
        optimizer=held.optimizer,
        activations=stored,
        logits=kept.logits,
        buckets=buckets,
        framework=framework,
        host=held.host,
        is_bound=not architecture.known,
        phases={
            "forward and backward": forward,
            "optimizer": framework + held.on_device + held.stepping + buckets,
        },
    )


def largest_micro_batch(request: MemoryRequest, capacity_bytes: int, at_most: int) -> int:
    """The most rows, up to `at_most`, whose peak is within the capacity; 0 when one row is too many."""
    fits, too_many = 0, max(0, at_most) + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if estimate(_with_rows(request, middle)).peak <= capacity_bytes:
            fits = middle
        else:
            too_many = middle
    return fits


def _with_rows(request: MemoryRequest, rows: int) -> MemoryRequest:
    from dataclasses import replace

    return replace(request, micro_batch=rows)


def _check(request: MemoryRequest) -> None:
    if request.strategy not in STRATEGIES:
        raise ValueError(f"strategy is {request.strategy!r}, one of {STRATEGIES} is expected")
    if request.precision not in ("fp32", "bf16", "fp16"):
        raise ValueError(f"precision is {request.precision!r}")
    for name in ("world_size", "micro_batch", "length"):
        if getattr(request, name) < 1:
            raise ValueError(f"{name} is {getattr(request, name)}, at least 1 is expected")


def _keeps_attention(request: MemoryRequest) -> bool:
    """Whether the kernel of attention keeps its matrices for the backward pass."""
    if request.attention == "eager" or not request.architecture.known:
        return True
    if request.accelerator == "cpu":
        return request.architecture.attention_dropout
    return request.strategy == "mindspore"


def _buckets(request: MemoryRequest, trained: int) -> int:
    """What gradients travel in."""
    if request.world_size == 1 and request.strategy in ("ddp", "mindspore"):
        return 0
    if request.strategy == "ddp":
        # DDP lays its buckets anew after the first step, while the gradients still lie in the old ones.
        return 4 * trained
    if request.strategy == "mindspore":
        return min(4 * trained, _DDP_BUCKET)
    width = 4 if request.precision == "fp32" else 2
    return width * min(trained, _ZERO_BUCKET_ELEMENTS)
