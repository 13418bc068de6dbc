"""What the forward pass keeps, by where the first weight lies that is trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ftlaunch.strategies.memory.activations import Activations
from ftlaunch.strategies.memory.architecture import TensorSpec
from ftlaunch.strategies.memory.request import MemoryRequest


def trains_vocabulary(request: MemoryRequest) -> bool:
    """Whether the weight over the vocabulary is trained."""
    trainable = request.trainable
    if trainable is None:
        return True
    architecture = request.architecture
    width = architecture.vocab_size
    last = [t.name for t in architecture.tensors if t.shape[0] == width and len(t.shape) == 2]
    return bool(last) and trainable(last[-1])


def first_trained(request: MemoryRequest) -> int:
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


def cast_bytes(request: MemoryRequest, tensors: Iterable[TensorSpec]) -> int:
    """Bytes of weights that are cast for products: matrices, but no embeddings that are not tied."""
    if request.strategy != "ddp" or request.precision == "fp32":
        return 0
    tied = set(request.architecture.tied.values())
    return 2 * sum(
        t.num_elements
        for t in tensors
        if len(t.shape) > 1 and ("embed" not in t.name or t.name in tied)
    )


def kept_and_work(request: MemoryRequest, found: Activations, first: int) -> tuple[int, int, int]:
    """(kept at the end of the forward pass, how much less where the backward pass is widest, the most that
    the backward pass has beside it). `first`: `first_trained`.
    """
    layers = request.architecture.num_layers
    if first >= layers:
        kept = found.behind if first == layers else 0
        given = layers * found.boundary if request.gradient_checkpointing else 0
        return kept + given, kept, 0
    ends = found.ends - (found.front if first >= 0 else 0)
    passed = layers - max(0, first)
    # A product with a frozen weight keeps that, in the dtype of products.
    casts = cast_bytes(request, (t for t in _of_layers(request, first) if not request.trains(t)))
    layer = found.layer - _not_read(request, found, first)
    # The half that is first in the backward pass is the MLP; its part is free when attention's begins.
    work = max(found.mlp_work, found.attention_work - found.mlp)
    # The gradient of what the last layer gives is as wide as a boundary.
    less = found.behind - found.boundary
    if request.gradient_checkpointing:
        # It keeps what a layer is given, whether a gradient passes or not.
        return layers * found.boundary + ends, less, layer + casts // passed + work
    return passed * layer + casts + ends, less, work


def passing(request: MemoryRequest, found: Activations) -> int:
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
    trained = [t for t in _of_layers(request, first) if request.trains(t)]
    saved = 0
    if not any(inner in t.shape for t in trained):
        saved += found.mlp_inputs
    if all(len(t.shape) > 1 for t in trained):
        saved += found.norm_inputs
    return saved
