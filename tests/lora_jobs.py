"""Models with weights for the tests of adapters, and adapters that peft itself has written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests import tiny

peft = pytest.importorskip("peft", reason="peft is not installed")


def write_bert(folder: Path, **config: Any) -> Path:
    """A BERT with random weights, which no job has trained, with a head for two labels."""
    torch.manual_seed(0)
    values = {**tiny.CONFIGS["bert"], "initializer_range": 0.1, **config}
    values.pop("model_type")
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**values))
    model.save_pretrained(folder)
    return folder


SMALL = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_qwen(folder: Path, **changes: Any) -> Any:
    """A language model of 20 words, loaded from the folder."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**{**SMALL, **changes})
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def adapt(model: Any, folder: Path, **settings: Any) -> Any:
    """peft's adapter of the model with numbers of its own in every part."""
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, **settings)).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    adapted.save_pretrained(folder)
    return adapted


def inputs() -> Any:
    return torch.from_numpy(np.random.default_rng(0).integers(3, 20, (3, 11)))


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model.eval()(inputs()).logits


def assert_same(found: Any, expected: Any) -> None:
    """To 1e-5 of the largest: the weights are large, so that a wrong one shows."""
    assert float((found - expected).abs().max()) < 1e-5 * max(1.0, float(expected.abs().max()))
