"""Encoders by their config.json: BERT and its kin, DistilBERT, DeBERTa-v2, ModernBERT."""

from __future__ import annotations

from collections.abc import Iterator

from ftlaunch.strategies.memory.architecture import Architecture, TensorSpec
from ftlaunch.strategies.memory.settings import Settings, head_size
from ftlaunch.strategies.memory.tensors import layers, linear, norm, tensor
from ftlaunch.strategies.model_config import POSITIONS_AFTER_PADDING

_ROBERTA = ("roberta", "xlm-roberta", "camembert")
FAMILIES = ("bert", *_ROBERTA, "electra", "distilbert", "deberta-v2", "modernbert")


def make(settings: Settings, family: str, head: str, num_outputs: int) -> Architecture | None:
    """None where the family has no such head. UserError where the configuration is nonsense."""
    if head == "causal-lm":
        return None
    if family == "modernbert":
        return _modernbert(settings, head, num_outputs)
    if family == "distilbert":
        return _distilbert(settings, head, num_outputs)
    return _bert(settings, family, head, num_outputs)


def _bert(settings: Settings, family: str, head: str, num_outputs: int) -> Architecture:
    is_deberta = family == "deberta-v2"
    is_electra = family == "electra"
    hidden = settings.size(
        "hidden_size", default=1536 if is_deberta else 256 if is_electra else 768
    )
    inner = settings.size(
        "intermediate_size", default=6144 if is_deberta else 1024 if is_electra else 3072
    )
    num_layers = settings.layers("num_hidden_layers", default=24 if is_deberta else 12)
    heads = settings.size(
        "num_attention_heads", default=24 if is_deberta else 4 if is_electra else 12
    )
    vocabulary = settings.size(
        "vocab_size", default=128100 if is_deberta else 50265 if family == "roberta" else 30522
    )
    positions = settings.size("max_position_embeddings", default=512)
    embedding = hidden
    if is_electra or is_deberta:
        embedding = settings.size("embedding_size", default=128 if is_electra else hidden)
    size = head_size(hidden, heads)
    base = "deberta" if is_deberta else "electra" if is_electra else "bert"
    base = "roberta" if family in _ROBERTA else base
    self_names = ("query_proj", "key_proj", "value_proj") if is_deberta else _BERT_NAMES

    def layer(prefix: str, _: int) -> Iterator[TensorSpec]:
        for name in self_names:
            yield from linear(f"{prefix}attention.self.{name}", hidden, hidden)
        if is_deberta:
            yield from _deberta_positions(settings, f"{prefix}attention.self.", hidden)
        yield from linear(f"{prefix}attention.output.dense", hidden, hidden)
        yield from norm(f"{prefix}attention.output.LayerNorm", hidden)
        yield from linear(f"{prefix}intermediate.dense", hidden, inner)
        yield from linear(f"{prefix}output.dense", inner, hidden)
        yield from norm(f"{prefix}output.LayerNorm", hidden)

    def tensors() -> Iterator[TensorSpec]:
        front = f"{base}.embeddings."
        yield from tensor(f"{front}word_embeddings.weight", vocabulary, embedding)
        if not is_deberta or settings.flag("position_biased_input", True):
            yield from tensor(f"{front}position_embeddings.weight", positions, embedding)
        types = settings.count("type_vocab_size", default=0 if is_deberta else 2)
        if types or not is_deberta:
            yield from tensor(f"{front}token_type_embeddings.weight", types, embedding)
        if is_deberta and embedding != hidden:
            yield from linear(f"{front}embed_proj", embedding, hidden, bias=False)
        yield from norm(f"{front}LayerNorm", hidden if is_deberta else embedding)
        if is_electra and embedding != hidden:
            yield from linear(f"{base}.embeddings_project", embedding, hidden)
        yield from layers(f"{base}.encoder.layer.", num_layers, layer)
        if is_deberta:
            yield from _deberta_encoder(settings, f"{base}.encoder.", hidden)
        yield from _bert_head(
            settings, family, base, head, hidden, embedding, vocabulary, num_outputs
        )

    products = 0
    if is_deberta:
        kinds = sum(kind in settings.texts("pos_att_type") for kind in ("c2p", "p2c"))
        products = kinds * 2 * _relative_positions(settings)
    limit = positions
    if family in POSITIONS_AFTER_PADDING:
        limit = max(1, positions - settings.count("pad_token_id", default=1) - 1)
    return Architecture(
        family=family,
        known=True,
        head=head,
        num_outputs=num_outputs,
        num_layers=num_layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_size=size,
        intermediate_size=inner,
        vocab_size=vocabulary,
        embedding_size=embedding,
        max_length=limit,
        tensors=tuple(tensors()),
        tied=_tied(settings, base, head),
        layer_prefix=f"{base}.encoder.layer.",
        block="bert",
        is_causal=False,
        gated_mlp=False,
        activation=settings.text("hidden_act", "gelu"),
        attention_dropout=settings.is_above_zero("attention_probs_dropout_prob", default=0.1),
        hidden_dropout=settings.is_above_zero("hidden_dropout_prob", default=0.1),
        position_products=products,
    )


_BERT_NAMES = ("query", "key", "value")


def _deberta_positions(settings: Settings, prefix: str, hidden: int) -> Iterator[TensorSpec]:
    """Projections of relative positions, where they are not the keys' and queries' own."""
    if not settings.flag("relative_attention", False) or settings.flag("share_att_key", False):
        return
    kinds = settings.texts("pos_att_type")
    if "c2p" in kinds:
        yield from linear(f"{prefix}pos_key_proj", hidden, hidden)
    if "p2c" in kinds:
        yield from linear(f"{prefix}pos_query_proj", hidden, hidden)


def _relative_positions(settings: Settings) -> int:
    """Distances to one side that have an embedding of their own; 0 without them."""
    if not settings.flag("relative_attention", False):
        return 0
    given = settings.values.get("max_relative_positions")
    positions = 0
    if given is not None and given != -1:
        positions = settings.count("max_relative_positions")
    positions = positions or settings.size("max_position_embeddings", default=512)
    buckets = settings.values.get("position_buckets")
    if buckets is not None and buckets != -1:
        positions = settings.count("position_buckets") or positions
    return positions


def _deberta_encoder(settings: Settings, prefix: str, hidden: int) -> Iterator[TensorSpec]:
    if positions := _relative_positions(settings):
        yield from tensor(f"{prefix}rel_embeddings.weight", 2 * positions, hidden)
    if "layer_norm" in settings.text("norm_rel_ebd", "none").lower():
        yield from norm(f"{prefix}LayerNorm", hidden)
    kernel = settings.count("conv_kernel_size", default=0)
    if kernel:
        groups = settings.size("conv_groups", default=1)
        yield from tensor(f"{prefix}conv.conv.weight", hidden, hidden // groups, kernel)
        yield from tensor(f"{prefix}conv.conv.bias", hidden)
        yield from norm(f"{prefix}conv.LayerNorm", hidden)


def _bert_head(
    settings: Settings,
    family: str,
    base: str,
    head: str,
    hidden: int,
    embedding: int,
    vocabulary: int,
    num_outputs: int,
) -> Iterator[TensorSpec]:
    if head == "token-classification":
        yield from linear("classifier", hidden, num_outputs)
    elif head == "sequence-classification" and (family == "electra" or base == "roberta"):
        yield from linear("classifier.dense", hidden, hidden)
        yield from linear("classifier.out_proj", hidden, num_outputs)
    elif head == "sequence-classification":
        pooled = hidden
        if base == "deberta":
            pooled = settings.size("pooler_hidden_size", default=hidden)
        name = "pooler.dense" if base == "deberta" else "bert.pooler.dense"
        yield from linear(name, pooled, pooled)
        yield from linear("classifier", pooled, num_outputs)
    elif family == "electra":
        yield from norm("generator_predictions.LayerNorm", embedding)
        yield from linear("generator_predictions.dense", hidden, embedding)
        yield from _vocabulary(settings, "generator_lm_head", embedding, vocabulary)
    elif base == "roberta":
        yield from tensor("lm_head.bias", vocabulary)
        yield from linear("lm_head.dense", hidden, hidden)
        yield from norm("lm_head.layer_norm", hidden)
        if not settings.flag("tie_word_embeddings", True):
            yield from linear("lm_head.decoder", hidden, vocabulary)
    else:
        yield from tensor("cls.predictions.bias", vocabulary)
        yield from linear("cls.predictions.transform.dense", hidden, embedding)
        yield from norm("cls.predictions.transform.LayerNorm", embedding)
        if not settings.flag("tie_word_embeddings", True):
            yield from linear("cls.predictions.decoder", embedding, vocabulary)


def _vocabulary(settings: Settings, name: str, width: int, vocabulary: int) -> Iterator[TensorSpec]:
    """A layer that gives logits, and whose weight is that of the embeddings unless it is said not to be."""
    if not settings.flag("tie_word_embeddings", True):
        yield from tensor(f"{name}.weight", vocabulary, width)
    yield from tensor(f"{name}.bias", vocabulary)


def _tied(settings: Settings, base: str, head: str) -> dict[str, str]:
    if head != "masked-lm" or not settings.flag("tie_word_embeddings", True):
        return {}
    names = {
        "electra": "generator_lm_head.weight",
        "roberta": "lm_head.decoder.weight",
        "distilbert": "vocab_projector.weight",
        "model": "decoder.weight",
    }
    word = "tok_embeddings" if base == "model" else "word_embeddings"
    name = names.get(base, "cls.predictions.decoder.weight")
    return {name: f"{base}.embeddings.{word}.weight"}


def _distilbert(settings: Settings, head: str, num_outputs: int) -> Architecture:
    hidden = settings.size("dim", "hidden_size", default=768)
    inner = settings.size("hidden_dim", default=3072)
    num_layers = settings.layers("n_layers", "num_hidden_layers", default=6)
    heads = settings.size("n_heads", "num_attention_heads", default=12)
    vocabulary = settings.size("vocab_size", default=30522)
    positions = settings.size("max_position_embeddings", default=512)

    def layer(prefix: str, _: int) -> Iterator[TensorSpec]:
        for name in ("q_lin", "k_lin", "v_lin", "out_lin"):
            yield from linear(f"{prefix}attention.{name}", hidden, hidden)
        yield from norm(f"{prefix}sa_layer_norm", hidden)
        yield from linear(f"{prefix}ffn.lin1", hidden, inner)
        yield from linear(f"{prefix}ffn.lin2", inner, hidden)
        yield from norm(f"{prefix}output_layer_norm", hidden)

    def tensors() -> Iterator[TensorSpec]:
        yield from tensor("distilbert.embeddings.word_embeddings.weight", vocabulary, hidden)
        yield from tensor("distilbert.embeddings.position_embeddings.weight", positions, hidden)
        yield from norm("distilbert.embeddings.LayerNorm", hidden)
        yield from layers("distilbert.transformer.layer.", num_layers, layer)
        if head == "masked-lm":
            yield from linear("vocab_transform", hidden, hidden)
            yield from norm("vocab_layer_norm", hidden)
            yield from _vocabulary(settings, "vocab_projector", hidden, vocabulary)
            return
        if head == "sequence-classification":
            yield from linear("pre_classifier", hidden, hidden)
        yield from linear("classifier", hidden, num_outputs)

    return Architecture(
        family="distilbert",
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
        tied=_tied(settings, "distilbert", head),
        layer_prefix="distilbert.transformer.layer.",
        block="bert",
        is_causal=False,
        gated_mlp=False,
        activation=settings.text("activation", "gelu"),
        attention_dropout=settings.is_above_zero("attention_dropout", default=0.1),
        hidden_dropout=settings.is_above_zero("dropout", default=0.1),
    )


def _modernbert(settings: Settings, head: str, num_outputs: int) -> Architecture:
    hidden = settings.size("hidden_size", default=768)
    inner = settings.size("intermediate_size", default=1152)
    num_layers = settings.layers("num_hidden_layers", default=22)
    heads = settings.size("num_attention_heads", default=12)
    vocabulary = settings.size("vocab_size", default=50368)
    norm_bias = settings.flag("norm_bias", False)
    in_attention = settings.flag("attention_bias", False)
    in_mlp = settings.flag("mlp_bias", False)

    def layer(prefix: str, index: int) -> Iterator[TensorSpec]:
        if index > 0:
            yield from norm(f"{prefix}attn_norm", hidden, bias=norm_bias)
        yield from linear(f"{prefix}attn.Wqkv", hidden, 3 * hidden, bias=in_attention)
        yield from linear(f"{prefix}attn.Wo", hidden, hidden, bias=in_attention)
        yield from norm(f"{prefix}mlp_norm", hidden, bias=norm_bias)
        yield from linear(f"{prefix}mlp.Wi", hidden, 2 * inner, bias=in_mlp)
        yield from linear(f"{prefix}mlp.Wo", inner, hidden, bias=in_mlp)

    def tensors() -> Iterator[TensorSpec]:
        yield from tensor("model.embeddings.tok_embeddings.weight", vocabulary, hidden)
        yield from norm("model.embeddings.norm", hidden, bias=norm_bias)
        yield from layers("model.layers.", num_layers, layer)
        yield from norm("model.final_norm", hidden, bias=norm_bias)
        yield from linear(
            "head.dense", hidden, hidden, bias=settings.flag("classifier_bias", False)
        )
        yield from norm("head.norm", hidden, bias=norm_bias)
        if head != "masked-lm":
            yield from linear("classifier", hidden, num_outputs)
            return
        if not settings.flag("tie_word_embeddings", True):
            yield from tensor("decoder.weight", vocabulary, hidden)
        if settings.flag("decoder_bias", True):
            yield from tensor("decoder.bias", vocabulary)

    return Architecture(
        family="modernbert",
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
        max_length=settings.size("max_position_embeddings", default=8192),
        tensors=tuple(tensors()),
        tied=_tied(settings, "model", head),
        layer_prefix="model.layers.",
        block="modernbert",
        is_causal=False,
        gated_mlp=True,
        activation=settings.text("hidden_activation", "gelu"),
        attention_dropout=settings.is_above_zero("attention_dropout"),
        hidden_dropout=settings.is_above_zero("mlp_dropout", "embedding_dropout"),
    )
