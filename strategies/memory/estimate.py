"""The most memory that a step takes on one device, from an architecture and a job's numbers alone.

A prediction, not a measurement: `benchmarks/memory.py` compares it with the bytes that torch's
allocator hands out. What is not known here is an upper bound and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from ftlaunch.strategies.memory.activations import Activations, Setting, activations
from ftlaunch.strategies.memory.architecture import Architecture, TensorSpec
from ftlaunch.strategies.memory.buckets import BROADCAST_BYTES, ZeroBuffers, zero_traffic
from ftlaunch.strategies.memory.output import Output, output
from ftlaunch.strategies.memory.states import STRATEGIES, States, count_trainable, states

# Context, kernels and the workspace of the libraries of products: what a process holds before the first
# tensor. Assumptions from documentation for accelerators, not tested on the hardware.
FRAMEWORK_BYTES: Mapping[str, int] = {"cuda": 1 << 30, "ascend": 2 << 30, "cpu": 400 << 20}
_FP32 = 4
# transformers has no fused attention for them: the one bends its scores, the other adds positions to them.
_WRITTEN_OUT = ("gemma2", "deberta-v2")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRequest:
    """A job, as far as its memory depends on it.

    micro_batch   rows, each padded to `length` tokens
    accumulates   a step has more than one micro-batch
    attention     the implementation asked for: "eager", "sdpa", "flash_attention_2"; None: the model's
    trainable     whether a parameter is trained, by its name; None: all are
    zero          the sizes of DeepSpeed's buffers, where a user's configuration sets them
    """

    architecture: Architecture
    strategy: str
    precision: str
    world_size: int
    micro_batch: int
    length: int
    accelerator: str = "cuda"
    offload_optimizer: bool = False
    offload_parameters: bool = False
    accumulates: bool = False
    gradient_checkpointing: bool = False
    attention: str | None = None
    trainable: Callable[[str], bool] | None = None
    zero: ZeroBuffers = field(default_factory=ZeroBuffers)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What the phases are made of, in bytes.

    held       by every phase: weights, masters, moments
    kept       by autograd at the end of the forward pass
    left       of it when the backward pass is widest, with what it computes there
    passing    in a layer that keeps nothing, before anything is kept
    casts      of weights to the dtype of products, until the window's end
    largest    the gradient of the largest weight that is trained
    """

    held: int
    kept: int
    left: int
    passing: int
    casts: int
    largest: int
    output: Output


def estimate(request: MemoryRequest) -> MemoryEstimate:
    """The memory of a job. ValueError for numbers that no job can have."""
    _check(request)
    architecture = request.architecture
    trained, total = count_trainable(architecture, request.trainable)
    trained_tensors = [t for t in architecture.tensors if _trains(request, t)]
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
    first = _first_trained(request)
    kept, less, work = _kept_and_work(request, found, first)
    head = output(
        architecture,
        rows=request.micro_batch,
        length=request.length,
        width=setting.width,
        residual=setting.residual,
        is_trained=trained == total or _is_trained(request, architecture),
        in_pieces=request.strategy != "mindspore"
        and architecture.known
        and not architecture.caps_logits,
        on_cpu=request.accelerator == "cpu",
    )
    parts = _Parts(
        held=held.weights + held.masters + held.optimizer,
        kept=kept + head.kept,
        left=kept - less + work,
        passing=_passing(request, found) if first > 0 else 0,
        casts=_cast(request, trained_tensors),
        largest=max((t.num_elements for t in trained_tensors), default=0) * held.gradient_width,
        output=head,
    )
    if request.strategy in ("zero1", "zero2", "zero3"):
        phases, buckets = _zero_phases(request, parts, held, trained, total)
    else:
        phases, buckets = _data_parallel_phases(request, parts, held, trained, total)
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
    width = _FP32 if request.precision == "fp32" else 2
    is_autocast = request.strategy in ("ddp", "mindspore")
    # Eager attention and math paths are fp32, but for what `strategies/torch/attention.py` and
    # `group.use_device` do on CPUs.
    on_cpu = request.accelerator == "cpu" and request.strategy != "mindspore"
    is_eager = request.attention == "eager" or request.architecture.family in _WRITTEN_OUT
    matrix = width if on_cpu and not is_eager else _FP32
    by_bytes = on_cpu and not is_eager and not request.architecture.is_causal
    return Setting(
        rows=request.micro_batch,
        length=request.length,
        width=width,
        residual=_FP32 if is_autocast else width,
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


def _is_trained(request: MemoryRequest, architecture: Architecture) -> bool:
    """Whether the weight over the vocabulary is trained."""
    trainable = request.trainable
    if trainable is None:
        return True
    width = architecture.vocab_size
    last = [t.name for t in architecture.tensors if t.shape[0] == width and len(t.shape) == 2]
    return bool(last) and trainable(last[-1])


def _trains(request: MemoryRequest, tensor: TensorSpec) -> bool:
    return request.trainable is None or request.trainable(tensor.name)


def _first_trained(request: MemoryRequest) -> int:
    """What the backward pass reaches last: a layer, by its number, -1 for the embeddings, one more than the
    last layer's for what the base has behind them, two for a head alone.

    What lies before it keeps nothing. A bound where that is not known: of an unknown family, of MindSpore.
    """
    architecture = request.architecture
    if request.trainable is None or not architecture.known or request.strategy == "mindspore":
        return -1
    prefix = architecture.layer_prefix
    base = f"{prefix.partition('.')[0]}."
    # DeBERTa's layers read embeddings of its encoder's, too, which comes behind them in the modules' order.
    encoder = prefix.removesuffix("layer.")
    first = architecture.num_layers + 1
    place = -1
    for tensor in architecture.tensors:
        name = tensor.name
        if name.startswith(prefix):
            place = int(name[len(prefix) :].partition(".")[0])
        elif place >= 0:
            place = architecture.num_layers + (not name.startswith(base))
        is_shared = encoder != prefix and name.startswith(encoder) and not name.startswith(prefix)
        if request.trainable(name):
            first = min(first, -1 if is_shared else place)
    return first


def _cast(request: MemoryRequest, tensors: Iterable[TensorSpec]) -> int:
    """Bytes of weights that are cast for products: matrices, but no embeddings that are not tied."""
    if request.strategy != "ddp" or request.precision == "fp32":
        return 0
    tied = set(request.architecture.tied.values())
    return 2 * sum(
        t.num_elements
        for t in tensors
        if len(t.shape) > 1 and ("embed" not in t.name or t.name in tied)
    )


def _kept_and_work(request: MemoryRequest, found: Activations, first: int) -> tuple[int, int, int]:
    """(kept at the end of the forward pass, how much less where the backward pass is widest, the most that
    the backward pass has beside it). `first`: `_first_trained`.
    """
    layers = request.architecture.num_layers
    if first >= layers:
        kept = found.behind if first == layers else 0
        given = layers * found.boundary if request.gradient_checkpointing else 0
        return kept + given, kept, 0
    ends = found.ends - (found.front if first >= 0 else 0)
    passed = layers - max(0, first)
    # A product with a frozen weight keeps that, in the dtype of products.
    casts = _cast(request, (t for t in _of_layers(request, first) if not _trains(request, t)))
    layer = found.layer - _not_read(request, found, first)
    # The half that is first in the backward pass is the MLP; its part is free when attention's begins.
    work = max(found.mlp_work, found.attention_work - found.mlp)
    # The gradient of what the last layer gives is as wide as a boundary.
    less = found.behind - found.boundary
    if request.gradient_checkpointing:
        # It keeps what a layer is given, whether a gradient passes or not.
        return layers * found.boundary + ends, less, layer + casts // passed + work
    return passed * layer + casts + ends, less, work


def _passing(request: MemoryRequest, found: Activations) -> int:
    """The most that a layer has at a time whose results nobody keeps."""
    mlp = found.mlp
    if request.architecture.gated_mlp:
        mlp -= found.mlp_work // 2  # the gate is free once its activation is there
    return max(found.attention + found.attention_work, mlp) + found.boundary


def _of_layers(request: MemoryRequest, first: int) -> Iterator[TensorSpec]:
    """What the layers from `first` on have."""
    prefix = request.architecture.layer_prefix
    for tensor in request.architecture.tensors:
        place, _, rest = tensor.name.partition(prefix)
        if not place and rest and int(rest.partition(".")[0]) >= first:
            yield tensor


def _not_read(request: MemoryRequest, found: Activations, first: int) -> int:
    """What a layer need not keep, since no gradient is taken that would read it. 0 is a bound."""
    inner = request.architecture.intermediate_size
    trained = [t for t in _of_layers(request, first) if _trains(request, t)]
    saved = 0
    if not any(inner in t.shape for t in trained):
        saved += found.mlp_inputs
    if all(len(t.shape) > 1 for t in trained):
        saved += found.norm_inputs
    return saved


def _data_parallel_phases(
    request: MemoryRequest, parts: _Parts, held: States, trained: int, total: int
) -> tuple[dict[str, int], int]:
    """(phase → bytes, bytes of buckets) of ddp and mindspore."""
    gradients = _FP32 * trained
    alone = request.world_size == 1
    # A rank that is alone drops its gradients after each step; DDP keeps them in its buckets.
    before = 0 if alone and not request.accumulates else gradients
    base = parts.held + parts.casts
    loss = parts.kept + parts.output.weight + parts.output.work
    forward = base + before + max(parts.passing, loss)
    backward = base + before + parts.left + parts.output.weight
    # The embeddings are last; the head's gradient of a shared weight waits for theirs.
    end = base + gradients + parts.output.weight + parts.largest
    phases = {
        "forward": forward,
        "backward": backward,
        "end of backward": end,
        "optimizer": parts.held + gradients,
    }
    if alone or request.strategy == "mindspore":
        return phases, 0
    # After the first step DDP lays its buckets in the order that it has seen.
    phases["buckets laid anew"] = parts.held + 2 * gradients
    phases["start"] = _FP32 * (total + trained) + min(_FP32 * total, BROADCAST_BYTES)
    return phases, gradients


def _zero_phases(
    request: MemoryRequest, parts: _Parts, held: States, trained: int, total: int
) -> tuple[dict[str, int], int]:
    """(phase → bytes, bytes of buckets) of zero1, zero2 and zero3."""
    stage = int(request.strategy[-1])
    width = held.gradient_width
    traffic = zero_traffic(
        request.zero,
        stage=stage,
        width=width,
        num_parameters=total,
        num_trainable=trained,
        overlaps=request.accelerator != "cpu",
        is_gloo=request.accelerator == "cpu",
    )
    # Stage 3 has a place for its gradients, stages 1 and 2 keep those of micro-batches before.
    gradients = held.gradients if stage == 3 or request.accumulates else 0
    base = parts.held + gradients + (traffic.bucket if stage == 3 else 0)
    bucket = traffic.bucket if stage < 3 else 0
    weight = parts.output.weight
    whole = base + traffic.gathered
    loss = weight + parts.output.work
    left = round(parts.kept * (1 - traffic.filled))
    exchange = base + min(traffic.gathered, parts.largest) + left + weight
    exchange += bucket + traffic.copies
    if stage == 1 and not request.accumulates:
        exchange += held.gradients
    optimizer = base + held.stepping
    if stage == 1 and not request.accumulates:
        optimizer += held.gradients
    phases = {
        "forward": whole + max(parts.passing, parts.kept + max(traffic.fetched, loss)),
        "backward": whole + parts.left + weight + bucket,
        "exchange": exchange,
        "optimizer": optimizer,
    }
    return phases, traffic.bucket + traffic.copies + traffic.gathered + traffic.fetched
