"""Llama and its kin by their config.json, with experts or without: they differ in a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ftlaunch.strategies.memory.architecture import Architecture, TensorSpec
from ftlaunch.strategies.memory.settings import Settings, head_size
from ftlaunch.strategies.memory.tensors import (
    decoder_head,
    layers,
    linear,
    norm,
    tensor,
    tied_decoder_head,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Llama:
    """What a family takes where its config.json is silent, and how it differs from Llama.

    kv_heads        0: as many as heads
    head_dim        0: hidden size / heads
    qkv_bias        of three projections; None: where attention_bias says so, then the output's, too
    head_norms      of queries and keys
    norms           of a layer: 2, or 4 with those behind attention and MLP
    joined          one matrix for queries, keys and values, one for gate and up
    """

    vocabulary: int = 32000
    hidden: int = 4096
    inner: int = 11008
    layers: int = 32
    heads: int = 32
    kv_heads: int = 0
    head_dim: int = 0
    positions: int = 2048
    tied: bool = False
    qkv_bias: bool | None = False
    mlp_bias: bool = False
    head_norms: bool = False
    norms: int = 2
    joined: bool = False
    activation: str = "silu"
    experts: int = 0
    experts_per_token: int = 0
    expert_inner: int = 0


_QWEN2 = _Llama(vocabulary=151936, inner=22016, kv_heads=32, positions=32768, qkv_bias=True)
_GEMMA = _Llama(
    vocabulary=256000,
    hidden=3072,
    inner=24576,
    layers=28,
    heads=16,
    kv_heads=16,
    head_dim=256,
    positions=8192,
    tied=True,
    qkv_bias=None,
    activation="gelu_pytorch_tanh",
)
_GEMMA2 = replace(_GEMMA, hidden=2304, inner=9216, layers=26, heads=8, kv_heads=4, norms=4)
_LLAMAS = {
    "llama": _Llama(qkv_bias=None, mlp_bias=True),
    "mistral": _Llama(inner=14336, kv_heads=8, positions=131072),
    "qwen2": _QWEN2,
    "qwen3": replace(_QWEN2, head_dim=128, qkv_bias=None, head_norms=True),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, vocabulary=262208, positions=131072, head_norms=True),
    "phi3": _Llama(vocabulary=32064, hidden=3072, inner=8192, positions=4096, joined=True),
    "mixtral": _Llama(inner=14336, kv_heads=8, positions=131072, experts=8, experts_per_token=2),
    "qwen3_moe": replace(
        _QWEN2,
        hidden=2048,
        inner=6144,
        layers=24,
        kv_heads=4,
        qkv_bias=None,
        head_norms=True,
        experts=128,
        experts_per_token=8,
        expert_inner=768,
    ),
}
FAMILIES = tuple(_LLAMAS)


def make(settings: Settings, family: str, head: str, num_outputs: int) -> Architecture | None:
    """None where the family has no such head. UserError where the configuration is nonsense."""
    if head == "masked-lm" or (family == "gemma3_text" and head == "token-classification"):
        return None
    return _llama(settings, family, head, num_outputs)


def _llama(settings: Settings, family: str, head: str, num_outputs: int) -> Architecture:
    kind = _LLAMAS[family]
    hidden = settings.size("hidden_size", default=kind.hidden)
    inner = settings.size("intermediate_size", default=kind.inner)
    num_layers = settings.layers("num_hidden_layers", default=kind.layers)
    heads = settings.size("num_attention_heads", default=kind.heads)
    vocabulary = settings.size("vocab_size", default=kind.vocabulary)
    # null means something else than silence: as many as heads.
    silent = "num_key_value_heads" not in settings.values
    kv_heads = settings.size(
        "num_key_value_heads", default=(kind.kv_heads if silent else 0) or heads
    )
    if settings.has("head_dim") or kind.head_dim:
        size = settings.size("head_dim", default=kind.head_dim)
    else:
        size = head_size(hidden, heads)
    bias = settings.flag("attention_bias", False) if kind.qkv_bias is None else kind.qkv_bias
    output_bias = bias and kind.qkv_bias is None
    mlp_bias = kind.mlp_bias and settings.flag("mlp_bias", False)
    experts = 0
    expert_inner = inner
    active = 0
    if kind.experts:
        experts = settings.size("num_local_experts", "num_experts", default=kind.experts)
        active = min(experts, settings.size("num_experts_per_tok", default=kind.experts_per_token))
        if kind.expert_inner:
            expert_inner = settings.size("moe_intermediate_size", default=kind.expert_inner)

    def attention(prefix: str) -> Iterator[TensorSpec]:
        if kind.joined:
            yield from linear(f"{prefix}o_proj", heads * size, hidden, bias=False)
            width = (heads + 2 * kv_heads) * size
            yield from linear(f"{prefix}qkv_proj", hidden, width, bias=False)
            return
        yield from linear(f"{prefix}q_proj", hidden, heads * size, bias=bias)
        yield from linear(f"{prefix}k_proj", hidden, kv_heads * size, bias=bias)
        yield from linear(f"{prefix}v_proj", hidden, kv_heads * size, bias=bias)
        yield from linear(f"{prefix}o_proj", heads * size, hidden, bias=output_bias)
        if kind.head_norms:
            yield from norm(f"{prefix}q_norm", size, bias=False)
            yield from norm(f"{prefix}k_norm", size, bias=False)

    def mlp(prefix: str, index: int) -> Iterator[TensorSpec]:
        if experts and _is_sparse(settings, index):
            yield from linear(f"{prefix}gate", hidden, experts, bias=False)
            yield from tensor(f"{prefix}experts.gate_up_proj", experts, 2 * expert_inner, hidden)
            yield from tensor(f"{prefix}experts.down_proj", experts, hidden, expert_inner)
        elif kind.joined:
            yield from linear(f"{prefix}gate_up_proj", hidden, 2 * inner, bias=False)
            yield from linear(f"{prefix}down_proj", inner, hidden, bias=False)
        else:
            yield from linear(f"{prefix}gate_proj", hidden, inner, bias=mlp_bias)
            yield from linear(f"{prefix}up_proj", hidden, inner, bias=mlp_bias)
            yield from linear(f"{prefix}down_proj", inner, hidden, bias=mlp_bias)

    def layer(prefix: str, index: int) -> Iterator[TensorSpec]:
        yield from attention(f"{prefix}self_attn.")
        yield from mlp(f"{prefix}mlp.", index)
        yield from norm(f"{prefix}input_layernorm", hidden, bias=False)
        yield from norm(f"{prefix}post_attention_layernorm", hidden, bias=False)
        if kind.norms == 4:
            yield from norm(f"{prefix}pre_feedforward_layernorm", hidden, bias=False)
            yield from norm(f"{prefix}post_feedforward_layernorm", hidden, bias=False)

    tied = settings.flag("tie_word_embeddings", kind.tied)
    caps = settings.values.get("final_logit_softcapping", 30.0 if family == "gemma2" else None)

    def tensors() -> Iterator[TensorSpec]:
        yield from tensor("model.embed_tokens.weight", vocabulary, hidden)
        yield from layers("model.layers.", num_layers, layer)
        yield from norm("model.norm", hidden, bias=False)
        yield from decoder_head(head, "score", hidden, vocabulary, num_outputs, tied)

    return Architecture(
        family=family,
        known=True,
        head=head,
        num_outputs=num_outputs,
        num_layers=num_layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=size,
        intermediate_size=expert_inner if experts else inner,
        vocab_size=vocabulary,
        embedding_size=hidden,
        max_length=settings.size("max_position_embeddings", default=kind.positions),
        tensors=tuple(tensors()),
        tied=tied_decoder_head(head, "model.embed_tokens") if tied else {},
        layer_prefix="model.layers.",
        block="llama",
        is_causal=True,
        gated_mlp=True,
        activation=settings.text(
            "hidden_activation" if settings.has("hidden_activation") else "hidden_act",
            kind.activation,
        ),
        attention_dropout=settings.is_above_zero("attention_dropout"),
        hidden_dropout=False,
        head_norms=kind.head_norms,
        num_experts=experts,
        experts_per_token=active,
        caps_logits=head == "causal-lm" and caps is not None,
    )


def _is_sparse(settings: Settings, index: int) -> bool:
    dense = settings.values.get("mlp_only_layers")
    if isinstance(dense, list) and index in dense:
        return False
    return (index + 1) % settings.size("decoder_sparse_step", default=1) == 0
