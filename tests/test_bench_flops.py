"""What a model needs by our formula, against torch's own count of the products in both passes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from ftlaunch.strategies.flops import is_countable, read_shape, step_flops
from ftlaunch.strategies.torch.instruments import model_weights
from tests.tiny import CONFIGS

ROWS, LENGTH = 3, 16


def counted(model) -> int:
    """Forward and backward on rows without padding. Sums and norms are no products: they are not counted."""
    ids = torch.randint(1, 100, (ROWS, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.sum().backward()
    return int(counter.get_total_flops())


def make(kind, family):
    config = AutoConfig.for_model(**CONFIGS[family])
    config._attn_implementation = "eager"
    model = kind.from_config(config)
    model.train()
    return model, read_shape(CONFIGS[family])


def size(model, *, axes, ending=""):
    return sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.dim() == axes and name.startswith(ending)
    )


def test_a_classifier():
    model, shape = make(AutoModelForSequenceClassification, "bert")
    found = step_flops(model_weights(model), shape, [LENGTH] * ROWS, 0)
    # Ours counts vectors as weights, and pooler and classifier for every token, not for one a row.
    vectors = 6 * ROWS * LENGTH * size(model, axes=1)
    once_a_row = size(model, axes=2, ending="bert.pooler") + size(model, axes=2, ending="class")
    extra = 6 * once_a_row * (ROWS * LENGTH - ROWS)
    assert found - vectors - extra == counted(model)


def test_a_frozen_body():
    """Only the classifier learns: torch computes no gradients below it, and none of its input."""
    model, shape = make(AutoModelForSequenceClassification, "bert")
    for parameter in model.bert.parameters():
        parameter.requires_grad = False
    found = step_flops(model_weights(model), shape, [LENGTH] * ROWS, 0)
    tokens = ROWS * LENGTH
    frozen_vectors = size(model, axes=1, ending="bert")
    vectors = 2 * tokens * frozen_vectors + 6 * tokens * size(model, axes=1, ending="class")
    pooler = size(model, axes=2, ending="bert.pooler")
    classifier = size(model, axes=2, ending="class")
    extra = 2 * pooler * (tokens - ROWS) + 6 * classifier * (tokens - ROWS)
    # The gradient of what comes out of a frozen body is needed by nobody.
    unneeded = 2 * classifier * ROWS
    assert found - vectors - extra - unneeded == counted(model)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_language_model(family):
    """With fewer key heads than query heads; every token is learned."""
    model, shape = make(AutoModelForCausalLM, family)
    found = step_flops(model_weights(model), shape, [LENGTH] * ROWS, ROWS * LENGTH)
    vectors = 6 * ROWS * LENGTH * size(model, axes=1)
    # torch also multiplies positions with frequencies, forward alone, once.
    positions = 2 * LENGTH * (32 // 2 // 2)
    difference = counted(model) - (found - vectors)
    assert difference in (0, positions, ROWS * positions)


def test_a_frozen_head_that_is_tied_to_the_embedding():
    """Its place is the embedding's; what it multiplies comes last, so gradients pass through it."""
    values = {**CONFIGS["qwen2"], "tie_word_embeddings": True}
    config = AutoConfig.for_model(**values)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).train()
    model.get_output_embeddings().weight.requires_grad = False
    weights, shape = model_weights(model), read_shape(values)
    assert shape is not None
    assert (weights[0].kind, weights[0].trained) == ("head", False)
    found = step_flops(weights, shape, [LENGTH] * ROWS, ROWS * LENGTH)
    difference = counted(model) - (found - 6 * ROWS * LENGTH * size(model, axes=1))
    positions = 2 * LENGTH * (32 // 2 // 2)
    assert difference in (0, positions, ROWS * positions)


ALBERT = {
    **{"model_type": "albert", "vocab_size": 120, "embedding_size": 16, "hidden_size": 32},
    **{"num_hidden_layers": 12, "num_attention_heads": 2, "intermediate_size": 48},
}
SHARED = "albert.encoder.albert_layer_groups"


def make_albert():
    config = AutoConfig.for_model(**ALBERT)
    config._attn_implementation = "eager"
    return AutoModelForSequenceClassification.from_config(config).train(), read_shape(ALBERT)


def test_layers_that_share_their_weights():
    """ALBERT's: one set for twelve layers. Vectors, pooler and classifier as in `test_a_classifier`."""
    model, shape = make_albert()
    found = step_flops(model_weights(model), shape, [LENGTH] * ROWS, 0)
    vectors = 6 * ROWS * LENGTH * (size(model, axes=1) + 11 * size(model, axes=1, ending=SHARED))
    once_a_row = size(model, axes=2, ending="albert.pooler") + size(model, axes=2, ending="class")
    assert found - vectors - 6 * once_a_row * (ROWS * LENGTH - ROWS) == counted(model)


def test_a_shared_weight_that_alone_is_trained():
    """Eleven times a gradient goes on to the layer before, by all that stands there."""
    model, shape = make_albert()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("attention.key.weight")
    found = step_flops(model_weights(model), shape, [LENGTH] * ROWS, 0)
    all_shared = sum(size(model, axes=axes, ending=SHARED) for axes in (1, 2))
    first = sum(size(model, axes=axes, ending="albert.encoder.embed") for axes in (1, 2))
    first += size(model, axes=1, ending="albert.embeddings")
    last = sum(size(model, axes=axes, ending=e) for axes in (1, 2) for e in ("albert.p", "class"))
    # The key's matrix of 32 times 32 has a gradient of its own in all twelve layers.
    for_a_token = 2 * first + 4 * 12 * all_shared + 2 * 12 * 32 * 32 + 4 * last
    assert found == ROWS * LENGTH * for_a_token + 12 * 32 * 12 * ROWS * LENGTH**2


def test_experts():
    """Two of four for each token."""
    experts = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    values = {**CONFIGS["llama"], **experts}
    config = AutoConfig.for_model(**values)
    config._attn_implementation = config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).train()
    weights, shape = model_weights(model), read_shape(values)
    assert shape is not None
    assert is_countable(weights, shape)
    found = step_flops(weights, shape, [LENGTH] * ROWS, ROWS * LENGTH)
    difference = counted(model) - (found - 6 * ROWS * LENGTH * size(model, axes=1))
    positions = 2 * LENGTH * (32 // 2 // 2)
    assert difference in (0, positions, ROWS * positions)


def test_a_head_that_an_adapter_trains_whole_is_counted_once():
    """peft keeps the original beside the copy that is trained."""
    peft = pytest.importorskip("peft", reason="an adapter is made by peft, an extra")
    bare, _ = make(AutoModelForSequenceClassification, "bert")
    head = sum(p.numel() for p in bare.classifier.parameters())
    model = peft.get_peft_model(
        bare,
        peft.LoraConfig(target_modules=["query"], modules_to_save=["classifier"], r=2),
    )
    weights = [weight for weight in model_weights(model) if "classifier" in weight.name]
    assert sum(weight.size for weight in weights) == head
    assert all(weight.trained for weight in weights)
