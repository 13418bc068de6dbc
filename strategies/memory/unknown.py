"""A model of a family that is not known here: an upper bound of its tensors, from the sizes that every
config.json gives under one name or another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ftlaunch.strategies.memory.architecture import Architecture, TensorSpec
from ftlaunch.strategies.memory.settings import Settings
from ftlaunch.strategies.memory.tensors import layers, linear, norm, tensor

_HIDDEN = ("hidden_size", "d_model", "n_embd", "dim", "model_dim", "embed_dim")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads")
_INNER = ("intermediate_size", "d_ff", "ffn_dim", "n_inner", "hidden_dim", "encoder_ffn_dim")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_ACTIVE = ("num_experts_per_tok", "moe_k", "moe_top_k", "num_experts_per_token")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
_DECODER_LAYERS = ("decoder_layers", "num_decoder_layers")


def make(settings: Settings, family: str, head: str, num_outputs: int) -> Architecture:
    """The largest of what is common: an attention with as many keys as queries and biases, a gated MLP
    (every expert), four norms and norms of heads, absolute positions, nothing tied.

    UserError where not even the width, the layers and the vocabulary are told.
    """
    inside = settings.values.get("text_config")
    if isinstance(inside, Mapping) and not settings.has(*_HIDDEN):
        settings = Settings(values=inside)
    hidden = settings.size(*_HIDDEN)
    # Those of encoder and decoder, where there are both.
    num_layers = settings.layers(*_LAYERS) + settings.count(*_DECODER_LAYERS, default=0, most=4096)
    vocabulary = settings.size("vocab_size")
    heads = settings.size(*_HEADS, default=max(1, hidden // 64))
    size = settings.size("head_dim", "d_kv", default=-(-hidden // heads))
    inner = settings.size(*_INNER, default=4 * hidden)
    experts = settings.count(*_EXPERTS, default=0)
    expert_inner = settings.size("moe_intermediate_size", default=inner)
    positions = settings.size(*_POSITIONS) if settings.has(*_POSITIONS) else None
    shared = settings.count("n_shared_experts", default=0) * expert_inner
    shared += settings.count("shared_expert_intermediate_size", default=0)

    def layer(prefix: str, _: int) -> Iterator[TensorSpec]:
        for name in ("query", "key", "value"):
            yield from linear(f"{prefix}{name}", hidden, heads * size)
        yield from linear(f"{prefix}output", heads * size, hidden)
        yield from norm(f"{prefix}query_norm", heads * size)
        yield from norm(f"{prefix}key_norm", heads * size)
        if experts:
            yield from linear(f"{prefix}router", hidden, experts)
            yield from tensor(f"{prefix}experts", experts, 3 * expert_inner, hidden)
        width = inner if not experts else shared
        if width:
            yield from linear(f"{prefix}gate", hidden, width)
            yield from linear(f"{prefix}up", hidden, width)
            yield from linear(f"{prefix}down", width, hidden)
        for number in range(4):
            yield from norm(f"{prefix}norm{number}", hidden)

    def tensors() -> Iterator[TensorSpec]:
        yield from tensor("embeddings.weight", vocabulary, hidden)
        if positions is not None:
            yield from tensor("positions.weight", positions + 2, hidden)
        yield from norm("embeddings.norm", hidden)
        yield from layers("layers.", num_layers, layer)
        yield from norm("norm", hidden)
        yield from linear("head.dense", hidden, hidden)
        yield from norm("head.norm", hidden)
        is_language_model = head in ("causal-lm", "masked-lm")
        yield from linear("head.output", hidden, vocabulary if is_language_model else num_outputs)

    return Architecture(
        family=family[:80],
        known=False,
        head=head,
        num_outputs=num_outputs,
        num_layers=num_layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_size=size,
        intermediate_size=(expert_inner + shared) if experts else inner,
        vocab_size=vocabulary,
        embedding_size=hidden,
        max_length=positions,
        tensors=tuple(tensors()),
        tied={},
        layer_prefix="layers.",
        block="llama",
        is_causal=head == "causal-lm",
        gated_mlp=True,
        attention_dropout=True,
        hidden_dropout=True,
        head_norms=True,
        num_experts=experts,
        experts_per_token=settings.size(*_ACTIVE, default=min(8, experts) or 1) if experts else 0,
    )
