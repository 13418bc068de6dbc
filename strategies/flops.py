"""Floating point operations that a model needs for one optimizer step. Arithmetic alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

# A product of a matrix of n elements with a vector: n multiplications and n additions.
_PER_ELEMENT = 2
# ALBERT has groups of layers, each with one set of weights for several layers of the model.
_LAYER = re.compile(r"\.(\d+)\.(?:albert_layers\.(\d+)\.)?")
_SHARED = ".albert_layer_groups."
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEAD_KEYS = ("num_attention_heads", "n_head", "n_heads")
_WIDTH_KEYS = ("hidden_size", "n_embd", "d_model", "dim")
# In the name of every weight of experts, as most families have it.
_EXPERTS = ".experts."
_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One parameter of a model, in the order in which the model uses them.

    size      elements of the whole parameter, wherever they are
    kind      "token": multiplied with every token; "head": the output layer of a language model, which is
              multiplied with the tokens that are learned; "embedding": looked up
    trained   it has a gradient
    """

    name: str
    size: int
    kind: Literal["token", "head", "embedding"]
    trained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What of config.json attention costs.

    num_layers     of attention
    width          heads times the size of a head
    expert_share   of the experts' weights those that one token uses; None where nothing is said of it
    """

    num_layers: int
    width: int
    expert_share: float | None = None


def read_shape(config: Mapping[str, Any]) -> Shape | None:
    """Of a model's config.json; None where it has no names that are known, or nonsense behind them."""
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, dict) else config
    layers, width = _count(config, _LAYER_KEYS), _count(config, _WIDTH_KEYS)
    heads, head_size = _count(config, _HEAD_KEYS), _count(config, ("head_dim",))
    if layers is None or width is None:
        return None
    if heads is not None and head_size is not None:
        width = heads * head_size
    experts, active = _count(config, _EXPERT_KEYS), _count(config, ("num_experts_per_tok",))
    share = min(1.0, active / experts) if experts and active else None
    inner = _count(config, ("inner_group_num",)) or 1
    return Shape(num_layers=layers * inner, width=width, expert_share=share)


def _count(config: Mapping[str, Any], names: Sequence[str]) -> int | None:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def is_countable(weights: Sequence[Weight], shape: Shape) -> bool:
    """Not so of experts when it is not known which weights are theirs, or how many of them a token uses."""
    has_experts = any(_EXPERTS in weight.name for weight in weights)
    return has_experts == (shape.expert_share is not None) or shape.expert_share == 1.0


def step_flops(
    weights: Sequence[Weight], shape: Shape, lengths: Sequence[int], num_learned_tokens: int
) -> float:
    """What the model needs for the forward and backward passes of these samples.

    With n weights that every token is multiplied with, T tokens in samples of l tokens each, and a layer's
    attention of width a:

        weights     2 n T forward, 2 n T for the gradient of their input, 2 n T for their own: 6 n T.
                    A frozen weight has no gradient of its own: 4 n T; where nothing that stands before
                    it is trained, none of its input either: 2 n T.
        attention   scores and weighted values are 2 a l² each: 4 a l² forward, 8 a l² backward, 12 a l² a
                    layer; a layer that no gradient passes through: 4 a l².

    That is 6 N + 12 · layers · hidden · length for a token where everything is trained, as in Chowdhery and
    others, "PaLM", 2022, appendix B. As there, embeddings and norms' sums cost nothing, and causal
    attention counts whole. Weights that several layers share count in each of them. A language model's
    output layer is multiplied with the tokens that are learned only. What the machine does beyond that is
    not counted: padding, and the second forward pass of gradient checkpointing. So what is divided by the
    device's peak is the *model's* utilisation (MFU), not the hardware's (HFU).

    lengths              tokens of each sample, without padding
    num_learned_tokens   of them with a label; used where there is a weight of kind "head"
    """
    trained = [place for place, weight in enumerate(weights) if weight.trained]
    if not trained:
        return 0.0
    first = trained[0]
    shared = [place for place, weight in enumerate(weights) if _SHARED in weight.name]
    sets = {_layer_of(weights[place].name) for place in shared}
    times = shape.num_layers / len(sets) if sets else 1.0
    if first in shared:
        # Gradients pass what stands before it, too: on their way to the layer before.
        first = shared[0]
    num_tokens = sum(lengths)
    total = 0.0
    passed_layers = set()
    for place, weight in enumerate(weights):
        if place >= first and (layer := _layer_of(weight.name)) is not None:
            passed_layers.add(layer)
        if weight.kind == "embedding":
            continue
        # A tied head has the embedding's place, and stands behind everything all the same.
        is_passed = weight.kind == "head" or place >= first
        passes = 1 + is_passed + weight.trained
        tokens = num_learned_tokens if weight.kind == "head" else num_tokens
        share = (shape.expert_share or 1.0) if _EXPERTS in weight.name else 1.0
        share *= times if _SHARED in weight.name else 1.0
        total += passes * _PER_ELEMENT * weight.size * share * tokens
    squares = sum(length * length for length in lengths)
    backward = min(shape.num_layers, len(passed_layers) * times)
    total += 4.0 * shape.width * squares * (shape.num_layers + 2 * backward)
    return total


def _layer_of(name: str) -> tuple[str | None, ...] | None:
    found = _LAYER.search(name)
    return found.groups() if found else None


def utilisation(flops: float, seconds: float, peaks: Sequence[float]) -> float | None:
    """MFU: what the model needed a second over what the devices of all ranks can do. None without peaks."""
    peak = sum(peaks)
    if peak <= 0 or seconds <= 0:
        return None
    return flops / seconds / peak
