"""Decoders by their config.json: Llama and its kin with experts or without, GPT-2, OPT, GPT-NeoX, Phi."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ftlaunch.strategies.memory.architecture import Architecture, TensorSpec
from ftlaunch.strategies.memory.settings import Settings, head_size
from ftlaunch.strategies.memory.tensors import Tensors, conv1d, layers, linear, norm, tensor


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


_QWEN2 = _Llama(
    vocabulary=151936, inner=22016, kv_heads=32, positions=32768, qkv_bias=True, hidden=4096
)
_LLAMAS = {
    "llama": _Llama(qkv_bias=None, mlp_bias=True),
    "mistral": _Llama(inner=14336, kv_heads=8, positions=131072),
    "qwen2": _QWEN2,
    "qwen3": _Llama(
        vocabulary=151936,
        inner=22016,
        kv_heads=32,
        head_dim=128,
        positions=32768,
        qkv_bias=None,
        head_norms=True,
    ),
    "gemma": _Llama(
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
    ),
    "gemma2": _Llama(
        vocabulary=256000,
        hidden=2304,
        inner=9216,
        layers=26,
        heads=8,
        kv_heads=4,
        head_dim=256,
        positions=8192,
        tied=True,
        qkv_bias=None,
        norms=4,
        activation="gelu_pytorch_tanh",
    ),
    "gemma3_text": _Llama(
        vocabulary=262208,
        hidden=2304,
        inner=9216,
        layers=26,
        heads=8,
        kv_heads=4,
        head_dim=256,
        positions=131072,
        tied=True,
        qkv_bias=None,
        head_norms=True,
        norms=4,
        activation="gelu_pytorch_tanh",
    ),
    "phi3": _Llama(vocabulary=32064, hidden=3072, inner=8192, positions=4096, joined=True),
    "mixtral": _Llama(inner=14336, kv_heads=8, positions=131072, experts=8, experts_per_token=2),
    "qwen3_moe": _Llama(
        vocabulary=151936,
        hidden=2048,
        inner=6144,
        layers=24,
        kv_heads=4,
        positions=32768,
        qkv_bias=None,
        head_norms=True,
        experts=128,
        experts_per_token=8,
        expert_inner=768,
    ),
}
FAMILIES = (*_LLAMAS, "gpt2", "opt", "gpt_neox", "phi")


def make(settings: Settings, family: str, head: str, num_outputs: int) -> Architecture | None:
    """None where the family has no such head. UserError where the configuration is nonsense."""
    if head == "masked-lm":
        return None
    if family == "gpt2":
        return _gpt2(settings, head, num_outputs)
    if family == "gpt_neox":
        return _gpt_neox(settings, head, num_outputs)
    if family == "phi":
        return _phi(settings, head, num_outputs)
    if family == "opt":
        return None if head == "token-classification" else _opt(settings, head, num_outputs)
    if family == "gemma3_text" and head == "token-classification":
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
        yield from _head(head, "score", hidden, vocabulary, num_outputs, tied)

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
        tied=_tied(head, tied, "lm_head", "model.embed_tokens"),
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


def _head(
    head: str,
    classifier: str,
    hidden: int,
    vocabulary: int,
    num_outputs: int,
    tied: bool,
    *,
    name: str = "lm_head",
    bias: bool = False,
) -> Tensors:
    if head == "sequence-classification":
        return linear("score", hidden, num_outputs, bias=False)
    if head == "token-classification":
        return linear(classifier, hidden, num_outputs)
    if not tied:
        return linear(name, hidden, vocabulary, bias=bias)
    return tensor(f"{name}.bias", vocabulary) if bias else ()


def _tied(head: str, tied: bool, name: str, embedding: str) -> dict[str, str]:
    return {f"{name}.weight": f"{embedding}.weight"} if tied and head == "causal-lm" else {}


def _gpt2(settings: Settings, head: str, num_outputs: int) -> Architecture:
    hidden = settings.size("n_embd", "hidden_size", default=768)
    inner = settings.size("n_inner", default=4 * hidden)
    num_layers = settings.layers("n_layer", "num_hidden_layers", default=12)
    heads = settings.size("n_head", "num_attention_heads", default=12)
    vocabulary = settings.size("vocab_size", default=50257)
    positions = settings.size("n_positions", "max_position_embeddings", default=1024)
    tied = settings.flag("tie_word_embeddings", True)

    def layer(prefix: str, _: int) -> Iterator[TensorSpec]:
        yield from norm(f"{prefix}ln_1", hidden)
        yield from conv1d(f"{prefix}attn.c_attn", hidden, 3 * hidden)
        yield from conv1d(f"{prefix}attn.c_proj", hidden, hidden)
        yield from norm(f"{prefix}ln_2", hidden)
        yield from conv1d(f"{prefix}mlp.c_fc", hidden, inner)
        yield from conv1d(f"{prefix}mlp.c_proj", inner, hidden)

    def tensors() -> Iterator[TensorSpec]:
        yield from tensor("transformer.wte.weight", vocabulary, hidden)
        yield from tensor("transformer.wpe.weight", positions, hidden)
        yield from layers("transformer.h.", num_layers, layer)
        yield from norm("transformer.ln_f", hidden)
        yield from _head(head, "classifier", hidden, vocabulary, num_outputs, tied)

    return Architecture(
        family="gpt2",
        known=True,
        head=head,
        num_outputs=num_outputs,
        num_layers=num_layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_size=head_size(hidden, heads),
        intermediate_size=inner,
        vocab_size=vocabulary,
        embedding_size=hidden,
        max_length=positions,
        tensors=tuple(tensors()),
        tied=_tied(head, tied, "lm_head", "transformer.wte"),
        layer_prefix="transformer.h.",
        block="gpt2",
        is_causal=True,
        gated_mlp=False,
        activation=settings.text("activation_function", "gelu_new"),
        attention_dropout=settings.is_above_zero("attn_pdrop", default=0.1),
        hidden_dropout=settings.is_above_zero("resid_pdrop", "embd_pdrop", default=0.1),
    )


def _gpt_neox(settings: Settings, head: str, num_outputs: int) -> Architecture:
    hidden = settings.size("hidden_size", default=6144)
    inner = settings.size("intermediate_size", default=24576)
    num_layers = settings.layers("num_hidden_layers", default=44)
    heads = settings.size("num_attention_heads", default=64)
    vocabulary = settings.size("vocab_size", default=50432)
    bias = settings.flag("attention_bias", True)
    tied = settings.flag("tie_word_embeddings", False)

    def layer(prefix: str, _: int) -> Iterator[TensorSpec]:
        yield from norm(f"{prefix}input_layernorm", hidden)
        yield from norm(f"{prefix}post_attention_layernorm", hidden)
        yield from linear(f"{prefix}attention.query_key_value", hidden, 3 * hidden, bias=bias)
        yield from linear(f"{prefix}attention.dense", hidden, hidden, bias=bias)
        yield from linear(f"{prefix}mlp.dense_h_to_4h", hidden, inner)
        yield from linear(f"{prefix}mlp.dense_4h_to_h", inner, hidden)

    def tensors() -> Iterator[TensorSpec]:
        yield from tensor("gpt_neox.embed_in.weight", vocabulary, hidden)
        yield from layers("gpt_neox.layers.", num_layers, layer)
        yield from norm("gpt_neox.final_layer_norm", hidden)
        yield from _head(head, "classifier", hidden, vocabulary, num_outputs, tied)

    return Architecture(
        family="gpt_neox",
        known=True,
        head=head,
        num_outputs=num_outputs,
        num_layers=num_layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_size=head_size(hidden, heads),
        intermediate_size=inner,
        vocab_size=vocabulary,
        embedding_size=hidden,
        max_length=settings.size("max_position_embeddings", default=2048),
        tensors=tuple(tensors()),
        tied=_tied(head, tied, "lm_head", "gpt_neox.embed_in"),
        layer_prefix="gpt_neox.layers.",
        block="gpt2",
        is_causal=True,
        gated_mlp=False,
        activation=settings.text("hidden_act", "gelu"),
        attention_dropout=settings.is_above_zero("attention_dropout"),
        hidden_dropout=settings.is_above_zero("hidden_dropout"),
    )


def _phi(settings: Settings, head: str, num_outputs: int) -> Architecture:
    hidden = settings.size("hidden_size", default=2048)
    inner = settings.size("intermediate_size", default=8192)
    num_layers = settings.layers("num_hidden_layers", default=24)
    heads = settings.size("num_attention_heads", default=32)
    kv_heads = settings.size("num_key_value_heads", default=heads)
    size = head_size(hidden, heads)
    vocabulary = settings.size("vocab_size", default=51200)
    tied = settings.flag("tie_word_embeddings", False)
    head_norms = settings.flag("qk_layernorm", False)

    def layer(prefix: str, _: int) -> Iterator[TensorSpec]:
        for name, width in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            yield from linear(f"{prefix}self_attn.{name}_proj", hidden, width * size)
        yield from linear(f"{prefix}self_attn.dense", heads * size, hidden)
        if head_norms:
            yield from norm(f"{prefix}self_attn.q_layernorm", size)
            yield from norm(f"{prefix}self_attn.k_layernorm", size)
        yield from linear(f"{prefix}mlp.fc1", hidden, inner)
        yield from linear(f"{prefix}mlp.fc2", inner, hidden)
        yield from norm(f"{prefix}input_layernorm", hidden)

    def tensors() -> Iterator[TensorSpec]:
        yield from tensor("model.embed_tokens.weight", vocabulary, hidden)
        yield from layers("model.layers.", num_layers, layer)
        yield from norm("model.final_layernorm", hidden)
        yield from _head(head, "score", hidden, vocabulary, num_outputs, tied, bias=True)

    return Architecture(
        family="phi",
        known=True,
        head=head,
        num_outputs=num_outputs,
        num_layers=num_layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=size,
        intermediate_size=inner,
        vocab_size=vocabulary,
        embedding_size=hidden,
        max_length=settings.size("max_position_embeddings", default=2048),
        tensors=tuple(tensors()),
        tied=_tied(head, tied, "lm_head", "model.embed_tokens"),
        layer_prefix="model.layers.",
        block="gpt2",
        is_causal=True,
        gated_mlp=False,
        activation=settings.text("hidden_act", "gelu_new"),
        attention_dropout=settings.is_above_zero("attention_dropout"),
        hidden_dropout=settings.is_above_zero("resid_pdrop", "embd_pdrop"),
        head_norms=head_norms,
    )


def _opt(settings: Settings, head: str, num_outputs: int) -> Architecture:
    hidden = settings.size("hidden_size", default=768)
    inner = settings.size("ffn_dim", default=3072)
    num_layers = settings.layers("num_hidden_layers", default=12)
    heads = settings.size("num_attention_heads", default=12)
    vocabulary = settings.size("vocab_size", default=50272)
    width = settings.size("word_embed_proj_dim", default=768)
    positions = settings.size("max_position_embeddings", default=2048)
    bias = settings.flag("enable_bias", True)
    affine = settings.flag("layer_norm_elementwise_affine", True)
    tied = settings.flag("tie_word_embeddings", True)
    last_norm = settings.flag("do_layer_norm_before", True)
    last_norm = last_norm and not settings.flag("_remove_final_layer_norm", False)

    def layer(prefix: str, _: int) -> Iterator[TensorSpec]:
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from linear(f"{prefix}self_attn.{name}", hidden, hidden, bias=bias)
        if affine:
            yield from norm(f"{prefix}self_attn_layer_norm", hidden)
        yield from linear(f"{prefix}fc1", hidden, inner, bias=bias)
        yield from linear(f"{prefix}fc2", inner, hidden, bias=bias)
        if affine:
            yield from norm(f"{prefix}final_layer_norm", hidden)

    def tensors() -> Iterator[TensorSpec]:
        front = "model.decoder."
        yield from tensor(f"{front}embed_tokens.weight", vocabulary, width)
        # The first two are never reached.
        yield from tensor(f"{front}embed_positions.weight", positions + 2, hidden)
        if width != hidden:
            yield from linear(f"{front}project_out", hidden, width, bias=False)
            yield from linear(f"{front}project_in", width, hidden, bias=False)
        if last_norm and affine:
            yield from norm(f"{front}final_layer_norm", hidden)
        yield from layers(f"{front}layers.", num_layers, layer)
        yield from _head(head, "score", width, vocabulary, num_outputs, tied)

    return Architecture(
        family="opt",
        known=True,
        head=head,
        num_outputs=num_outputs,
        num_layers=num_layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_size=head_size(hidden, heads),
        intermediate_size=inner,
        vocab_size=vocabulary,
        embedding_size=width,
        max_length=positions,
        tensors=tuple(tensors()),
        tied=_tied(head, tied, "lm_head", "model.decoder.embed_tokens"),
        layer_prefix="model.decoder.layers.",
        block="gpt2",
        is_causal=True,
        gated_mlp=False,
        activation=settings.text("activation_function", "relu"),
        attention_dropout=settings.is_above_zero("attention_dropout"),
        hidden_dropout=settings.is_above_zero("dropout", default=0.1),
    )
