"""The most memory that a step takes on one device, from an architecture and a job's numbers alone.

A prediction, not a measurement: `benchmarks/memory.py` compares it with the bytes that torch's
allocator hands out. What is not known here is an upper bound and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ftlaunch.strategies.memory.activations import Setting, activations
from ftlaunch.strategies.memory.kept import (
    cast_bytes,
    first_trained,
    kept_and_work,
    passing,
    trains_vocabulary,
)
from ftlaunch.strategies.memory.output import output
from ftlaunch.strategies.memory.phases import Parts, data_parallel_phases, zero_phases
from ftlaunch.strategies.memory.request import FP32_BYTES, MemoryRequest
from ftlaunch.strategies.memory.states import STRATEGIES, count_trainable, states

# Context, kernels and the workspace of the libraries of products: what a process holds before the first
# tensor. Assumptions from documentation for accelerators, not tested on the hardware.
FRAMEWORK_BYTES: Mapping[str, int] = {"cuda": 1 << 30, "ascend": 2 << 30, "cpu": 400 << 20}
# transformers has no fused attention for them: the one bends its scores, the other adds positions to them.
_WRITTEN_OUT = ("gemma2", "deberta-v2")


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
    trained_tensors = [t for t in architecture.tensors if request.trains(t)]
    held = states(
        strategy=request.strategy,
        offload_optimizer=request.offload_optimizer,
        offload_parameters=request.offload_parameters,
        precision=request.precision,
        world_size=request.world_size,
        num_parameters=total,
        num_trainable=trained,
    )
    setting = _setting(request)
    found = activations(architecture, setting)
    first = first_trained(request)
    kept, less, work = kept_and_work(request, found, first)
    head = output(
        architecture,
        rows=request.micro_batch,
        length=request.length,
        width=setting.width,
        residual=setting.residual,
        is_trained=trained == total or trains_vocabulary(request),
        in_pieces=request.strategy != "mindspore"
        and architecture.known
        and not architecture.caps_logits,
        on_cpu=request.accelerator == "cpu",
    )
    parts = Parts(
        held=held.weights + held.masters + held.optimizer,
        kept=kept + head.kept,
        left=kept - less + work,
        passing=passing(request, found) if first > 0 else 0,
        casts=cast_bytes(request, trained_tensors),
        largest=max((t.num_elements for t in trained_tensors), default=0) * held.gradient_width,
        output=head,
    )
    if request.strategy in ("zero1", "zero2", "zero3"):
        phases, buckets = zero_phases(request, parts, held, trained, total)
    else:
        phases, buckets = data_parallel_phases(request, parts, trained, total)
    framework = FRAMEWORK_BYTES.get(request.accelerator, 0)
    return MemoryEstimate(
        weights=held.weights,
        masters=held.masters,
        gradients=held.gradients,
        optimizer=held.optimizer,
        activations=kept + head.kept + work + parts.casts,
        logits=head.work + head.weight,
        buckets=buckets,
        framework=framework,
        host=held.host,
        is_bound=not architecture.known,
        phases={name: framework + size for name, size in phases.items()},
    )


def largest_micro_batch(request: MemoryRequest, capacity_bytes: int, at_most: int) -> int:
    """The most rows, up to `at_most`, whose peak is within the capacity; 0 when one row is too many."""
    fits, too_many = 0, max(0, at_most) + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if estimate(replace(request, micro_batch=middle)).peak <= capacity_bytes:
            fits = middle
        else:
            too_many = middle
    return fits


def _check(request: MemoryRequest) -> None:
    if request.strategy not in STRATEGIES:
        raise ValueError(f"strategy is {request.strategy!r}, one of {STRATEGIES} is expected")
    if request.precision not in ("fp32", "bf16", "fp16"):
        raise ValueError(f"precision is {request.precision!r}")
    for name in ("world_size", "micro_batch", "length"):
        if getattr(request, name) < 1:
            raise ValueError(f"{name} is {getattr(request, name)}, at least 1 is expected")


def _setting(request: MemoryRequest) -> Setting:
    width = FP32_BYTES if request.precision == "fp32" else 2
    is_autocast = request.strategy in ("ddp", "mindspore")
    # Eager attention and math paths are fp32, but for what `strategies/torch/attention.py` and
    # `group.use_device` do on CPUs.
    on_cpu = request.accelerator == "cpu" and request.strategy != "mindspore"
    is_eager = request.attention == "eager" or request.architecture.family in _WRITTEN_OUT
    matrix = width if on_cpu and not is_eager else FP32_BYTES
    by_bytes = on_cpu and not is_eager and not request.architecture.is_causal
    return Setting(
        rows=request.micro_batch,
        length=request.length,
        width=width,
        residual=FP32_BYTES if is_autocast else width,
        # CPUs keep a factor for each element, GPUs a flag.
        noise=width if request.accelerator == "cpu" else 1,
        matrix=matrix,
        matrix_noise=1 if by_bytes or not on_cpu else matrix,
        kernel=_kernel(request),
        padded=request.micro_batch > 1,
    )


def _kernel(request: MemoryRequest) -> str:
    """Which of `Setting.kernel` the attention has."""
    if request.attention == "eager" or not request.architecture.known:
        return "matrices"
    family = request.architecture.family
    if request.strategy == "mindspore" or family == "deberta-v2":
        return "matrices"
    if request.attention is not None and request.attention.startswith("flash_attention"):
        return "varlen"
    if family in _WRITTEN_OUT:
        return "matrices"
    # torch's fused kernel for CPUs has no dropout.
    if request.accelerator == "cpu" and request.architecture.attention_dropout:
        return "matrices"
    return "fused"
