"""What a config.json says of a model, beside the model that transformers makes of it."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import (  # noqa: E402
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from ftlaunch.cluster.errors import UserError  # noqa: E402
from ftlaunch.strategies.memory import encoders  # noqa: E402
from ftlaunch.strategies.memory.architecture import read_architecture  # noqa: E402

MODELS = {
    "sequence-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "causal-lm": AutoModelForCausalLM,
    "masked-lm": AutoModelForMaskedLM,
}
_SMALL = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2}
_DEBERTA = {
    **_SMALL,
    "relative_attention": True,
    "position_buckets": 8,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_biased_input": False,
    "pooler_hidden_size": 32,
}
_GPT2 = {"vocab_size": 101, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
_DISTILBERT = {"vocab_size": 101, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48}
_OPT = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_CASES: list[tuple[str, dict[str, Any]]] = [
    ("bert", _SMALL),
    ("bert", {**_SMALL, "tie_word_embeddings": False}),
    ("roberta", _SMALL),
    ("roberta", {**_SMALL, "tie_word_embeddings": False}),
    ("xlm-roberta", _SMALL),
    ("camembert", _SMALL),
    ("electra", {**_SMALL, "embedding_size": 16}),
    ("electra", {**_SMALL, "embedding_size": 32, "tie_word_embeddings": False}),
    ("distilbert", _DISTILBERT),
    ("distilbert", {**_DISTILBERT, "tie_word_embeddings": False}),
    ("modernbert", {**_SMALL, "tie_word_embeddings": False, "decoder_bias": False}),
    ("deberta-v2", {**_DEBERTA, "tie_word_embeddings": False}),
    ("deberta-v2", _DEBERTA),
    ("deberta-v2", {**_DEBERTA, "share_att_key": False, "type_vocab_size": 2}),
    ("deberta-v2", {**_DEBERTA, "conv_kernel_size": 3, "position_biased_input": True}),
    ("deberta-v2", {**_DEBERTA, "max_relative_positions": 20, "position_buckets": -1}),
    ("modernbert", {**_SMALL, "cls_token_id": 1, "sep_token_id": 2}),
    ("modernbert", {**_SMALL, "attention_bias": True, "mlp_bias": True, "norm_bias": True}),
    ("gpt2", _GPT2),
    ("gpt2", {**_GPT2, "n_inner": 50, "tie_word_embeddings": False}),
    ("llama", _GROUPED),
    ("llama", {**_SMALL, "num_key_value_heads": None, "attention_bias": True, "mlp_bias": True}),
    ("llama", {**_GROUPED, "tie_word_embeddings": True, "head_dim": 24}),
    ("mistral", _GROUPED),
    ("qwen2", _GROUPED),
    ("qwen2", {**_GROUPED, "tie_word_embeddings": True}),
    ("qwen3", {**_GROUPED, "head_dim": 16}),
    ("gemma", {**_GROUPED, "head_dim": 16}),
    ("gemma2", {**_GROUPED, "head_dim": 16}),
    ("gemma3_text", {**_GROUPED, "head_dim": 16}),
    ("phi", _GROUPED),
    ("phi", {**_SMALL, "qk_layernorm": True}),
    ("phi3", _GROUPED),
    ("opt", {**_OPT, "word_embed_proj_dim": 16}),
    ("opt", {**_OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    ("gpt_neox", _SMALL),
    ("gpt_neox", {**_SMALL, "attention_bias": False, "tie_word_embeddings": True}),
    ("mixtral", {**_GROUPED, "num_local_experts": 3}),
    ("qwen3_moe", {**_GROUPED, "num_experts": 5, "moe_intermediate_size": 24, "head_dim": 16}),
    (
        "qwen3_moe",
        {**_GROUPED, "num_experts": 5, "moe_intermediate_size": 24, "mlp_only_layers": [1]}
        | {"decoder_sparse_step": 2},
    ),
]
_FAMILIES = sorted({family for family, _ in _CASES})


def _model(family: str, config: dict[str, Any], head: str, num_outputs: int) -> Any:
    """On the meta device; None where the family has no such head."""
    made = AutoConfig.for_model(family, **config)
    if head in ("sequence-classification", "token-classification"):
        made.num_labels = num_outputs
    try:
        with torch.device("meta"):
            return MODELS[head].from_config(made)
    except ValueError as error:
        assert "Unrecognized configuration class" in str(error)
        return None


def _parameters(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _compare(family: str, config: dict[str, Any], head: str) -> bool:
    if head == "causal-lm" and family in ("bert", "roberta", "xlm-roberta", "camembert", "electra"):
        return False  # they would read both ways
    model = _model(family, config, head, 3)
    found = read_architecture({**config, "model_type": family}, head=head, num_outputs=3)
    assert found.known == (model is not None)
    if model is None:
        return False
    # Of two names of one weight transformers gives the one whose module comes first.
    expected = {found.tied.get(n, n): shape for n, shape in _parameters(model).items()}
    assert {t.name: t.shape for t in found.tensors} == expected
    assert len(found.tensors) == len(expected)
    assert found.num_parameters == sum(p.numel() for p in model.parameters())
    aliases = {
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if name not in expected and name.endswith("weight")
    }
    assert set(found.tied) == aliases, (family, head)
    assert set(found.tied.values()) <= set(expected)
    inside = [name for name in expected if name.startswith(found.layer_prefix)]
    assert inside and {name[len(found.layer_prefix)] for name in inside} == {"0", "1", "2"}
    return True


@pytest.mark.parametrize("head", MODELS)
def test_the_tensors_are_those_of_transformers(head: str) -> None:
    compared = [(family, config) for family, config in _CASES if _compare(family, config, head)]
    assert len({family for family, _ in compared}) >= 5


@pytest.mark.parametrize("family", _FAMILIES)
def test_a_key_that_is_missing_has_the_default_of_transformers(family: str) -> None:
    name = {"gpt2": "n_layer", "distilbert": "n_layers"}.get(family, "num_hidden_layers")
    head = "sequence-classification"
    model = _model(family, {name: 1}, head, 3)
    found = read_architecture({name: 1, "model_type": family}, head=head, num_outputs=3)
    assert {t.name: t.shape for t in found.tensors} == _parameters(model)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "768"),
        ("hidden_size", -768),
        ("hidden_size", 0),
        ("hidden_size", 768.0),
        ("hidden_size", True),
        ("hidden_size", [768]),
        ("hidden_size", 10**400),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", 7),
        ("vocab_size", {"a": {}}),
        ("hidden_dropout_prob", "0.1"),
        ("hidden_dropout_prob", 1.5),
        ("hidden_dropout_prob", float("nan")),
        ("tie_word_embeddings", "yes"),
        ("hidden_act", 3),
        ("model_type", ["bert"]),
    ],
)
def test_nonsense_is_refused_with_its_name(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=r"hidden size" if value == 7 else key) as told:
        read_architecture({"model_type": "bert", key: value}, head="masked-lm")
    assert len(str(told.value)) < 250


def test_a_value_nested_without_end_is_refused() -> None:
    value: Any = []
    for _ in range(100_000):
        value = [value]
    for each in (value, 10**5000):
        with pytest.raises(UserError, match="vocab_size"):
            read_architecture({"model_type": "bert", "vocab_size": each}, head="masked-lm")


# -- families that are not known ----------------------------------------------------------------


# DeBERTa and DistilBERT have sizes that no other family has, or by other names.
@pytest.mark.parametrize("head", ["sequence-classification", "causal-lm"])
@pytest.mark.parametrize(
    ("family", "config"), [c for c in _CASES if c[0] not in ("deberta-v2", "distilbert")]
)
def test_an_unknown_family_has_a_bound(family: str, config: dict[str, Any], head: str) -> None:
    """Played by known ones: the bound is above what they have."""
    known = read_architecture({**config, "model_type": family}, head="sequence-classification")
    found = read_architecture({**config, "model_type": "something-new"}, head=head)
    assert not found.known
    assert found.num_parameters >= known.num_parameters
    assert found.num_layers == known.num_layers


@pytest.mark.parametrize("config", [{}, {"model_type": "x"}, {"model_type": "x", "hidden_size": 8}])
def test_an_unknown_family_without_sizes_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="none of"):
        read_architecture(config, head="causal-lm")


def test_a_model_of_text_and_pictures_is_bound_by_its_text() -> None:
    text = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 10}
    found = read_architecture({"model_type": "new", "text_config": text}, head="causal-lm")
    assert (found.known, found.hidden_size, found.num_layers) == (False, 64, 2)


def test_encoders_are_what_the_ranks_refuse_for_causal_lm() -> None:
    """A plan refuses them as well, without transformers."""
    assert set(encoders.FAMILIES) <= set(MODEL_FOR_MASKED_LM_MAPPING_NAMES)
