"""Decoders that each have a shape of their own, by their config.json: GPT-2, OPT, GPT-NeoX, Phi."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ftlaunch.strategies.memory.architecture import Architecture, TensorSpec
from ftlaunch.strategies.memory.settings import Settings, head_size
from ftlaunch.strategies.memory.tensors import (
    conv1d,
    decoder_head,
    layers,
    linear,
    norm,
    tensor,
    tied_decoder_head,
)

FAMILIES = ("gpt2", "opt", "gpt_neox", "phi")


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
    return None if head == "token-classification" else _opt(settings, head, num_outputs)


def _architecture(
    family: str,
    head: str,
    num_outputs: int,
    *,
    hidden: int,
    heads: int,
    tensors: Iterable[TensorSpec],
    embeddings: str,
    is_tied: bool,
    **others: Any,
) -> Architecture:
    """What these have in common; `others` are fields of `Architecture`.

    embeddings   their name
    """
    common: dict[str, Any] = {
        "num_kv_heads": heads,
        "head_size": head_size(hidden, heads),
        "embedding_size": hidden,
    }
    return Architecture(
        family=family,
        known=True,
        head=head,
        num_outputs=num_outputs,
        hidden_size=hidden,
        num_heads=heads,
        tensors=tuple(tensors),
        tied=tied_decoder_head(head, embeddings) if is_tied else {},
        block="gpt2",
        is_causal=True,
        gated_mlp=False,
        **{**common, **others},
    )


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
        yield from decoder_head(head, "classifier", hidden, vocabulary, num_outputs, tied)

    return _architecture(
        "gpt2",
        head,
        num_outputs,
        num_layers=num_layers,
        hidden=hidden,
        heads=heads,
        intermediate_size=inner,
        vocab_size=vocabulary,
        max_length=positions,
        tensors=tensors(),
        embeddings="transformer.wte",
        is_tied=tied,
        layer_prefix="transformer.h.",
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
        yield from decoder_head(head, "classifier", hidden, vocabulary, num_outputs, tied)

    return _architecture(
        "gpt_neox",
        head,
        num_outputs,
        num_layers=num_layers,
        hidden=hidden,
        heads=heads,
        intermediate_size=inner,
        vocab_size=vocabulary,
        max_length=settings.size("max_position_embeddings", default=2048),
        tensors=tensors(),
        embeddings="gpt_neox.embed_in",
        is_tied=tied,
        layer_prefix="gpt_neox.layers.",
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
        yield from decoder_head(head, "score", hidden, vocabulary, num_outputs, tied, bias=True)

    return _architecture(
        "phi",
        head,
        num_outputs,
        num_layers=num_layers,
        hidden=hidden,
        heads=heads,
        num_kv_heads=kv_heads,
        head_size=size,
        intermediate_size=inner,
        vocab_size=vocabulary,
        max_length=settings.size("max_position_embeddings", default=2048),
        tensors=tensors(),
        embeddings="model.embed_tokens",
        is_tied=tied,
        layer_prefix="model.layers.",
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
        yield from decoder_head(head, "score", width, vocabulary, num_outputs, tied)

    return _architecture(
        "opt",
        head,
        num_outputs,
        num_layers=num_layers,
        hidden=hidden,
        heads=heads,
        intermediate_size=inner,
        vocab_size=vocabulary,
        embedding_size=width,
        max_length=positions,
        tensors=tensors(),
        embeddings="model.decoder.embed_tokens",
        is_tied=tied,
        layer_prefix="model.decoder.layers.",
        activation=settings.text("activation_function", "relu"),
        attention_dropout=settings.is_above_zero("attention_dropout"),
        hidden_dropout=settings.is_above_zero("dropout", default=0.1),
    )
