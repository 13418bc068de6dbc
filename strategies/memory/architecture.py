"""What a model is made of, by its config.json alone: tensors by name and shape, and what activations
depend on. Neither weights nor a framework are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

from ftlaunch.cluster.errors import UserError

HEADS = ("sequence-classification", "token-classification", "causal-lm", "masked-lm")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One parameter, under transformers' name."""

    name: str
    shape: tuple[int, ...]
    num_elements: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_elements", prod(self.shape))


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A model with its head.

    known          False: of a family that is not known here, every number is an upper bound
    lacks_head     the family is known, but not with this head: a bound as well
    tensors        its parameters, each once, in the order of the modules
    tied           names of weights that are another tensor → that tensor's name
    layer_prefix   what the names of a layer's tensors begin with, before its number
    max_length     tokens that a row can have at most; None: no limit is known
    block          order of norms and residuals, which decides what is kept for the backward pass
    attention_dropout, hidden_dropout   whether their probability is above 0
    num_experts    of a layer's MLP; 0 where it is one
    position_products   embeddings of relative positions that each token of each head is multiplied with
    caps_logits    logits are more than what a linear layer gives, so that they exist as a whole
    """

    family: str
    known: bool
    head: str
    num_outputs: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    vocab_size: int
    embedding_size: int
    max_length: int | None
    tensors: tuple[TensorSpec, ...]
    tied: Mapping[str, str]
    layer_prefix: str
    block: Literal["bert", "modernbert", "gpt2", "llama"]
    is_causal: bool
    gated_mlp: bool
    activation: str = "gelu"
    attention_dropout: bool = False
    hidden_dropout: bool = False
    head_norms: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    position_products: int = 0
    caps_logits: bool = False
    lacks_head: bool = False

    @property
    def num_parameters(self) -> int:
        return sum(tensor.num_elements for tensor in self.tensors)


def read_architecture(
    config: Mapping[str, Any], *, head: str, num_outputs: int = 2
) -> Architecture:
    """The model of a config.json with a head. UserError where the configuration is nonsense.

    head          one of `HEADS`, as `StrategyRequest.head`
    num_outputs   of a classification: labels. Without meaning for language models

    A family that is not known, or not with that head, gives an upper bound (`known` is False).
    """
    from ftlaunch.strategies.memory import decoders, encoders, llama, unknown
    from ftlaunch.strategies.memory.settings import Settings

    if head not in HEADS:
        raise ValueError(f"head is {head!r}, one of {HEADS} is expected")
    if num_outputs < 1 and head in HEADS[:2]:
        raise ValueError(f"num_outputs is {num_outputs}, at least 1 is expected")
    family = config.get("model_type")
    # It is shown: surrogates could not be printed.
    if family is not None and not (isinstance(family, str) and family.isprintable()):
        raise UserError("config.json: model_type must be a text that can be printed. Correct it.")
    settings = Settings(values=config)
    makers: dict[str, Callable[[Settings, str, str, int], Architecture | None]] = {
        **dict.fromkeys(encoders.FAMILIES, encoders.make),
        **dict.fromkeys(decoders.FAMILIES, decoders.make),
        **dict.fromkeys(llama.FAMILIES, llama.make),
    }
    maker = makers.get(family or "")
    made = maker(settings, family or "", head, num_outputs) if maker else None
    if made is not None:
        return made
    bound = unknown.make(settings, family or "unknown", head, num_outputs)
    return replace(bound, lacks_head=maker is not None)
