"""The model that every peer trains, as its users load it: `from_pretrained` of an Auto class, fp32."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    set_seed,
)

from ftlaunch.peers.work import Work

_CLASSES = {
    "sequence-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "causal-lm": AutoModelForCausalLM,
    "masked-lm": AutoModelForMaskedLM,
}


def load_model(work: Work, rows: Any) -> Any:
    """In training mode on the CPU, the same on every rank. `rows` tell how many classes there are."""
    set_seed(work.seed)
    settings: dict[str, Any] = {"trust_remote_code": work.trust_remote_code}
    source = {"revision": work.revision} if work.revision is not None else {}
    if work.head in ("sequence-classification", "token-classification"):
        settings["num_labels"] = work.num_labels or len(set(rows["labels"]))
    config = AutoConfig.from_pretrained(work.model, **source, **settings)
    if work.dropout is not None:
        for name, value in vars(config).items():
            if "drop" in name and isinstance(value, float):
                setattr(config, name, work.dropout)
    if work.head == "causal-lm":
        config.use_cache = False
    chosen: dict[str, Any] = {"trust_remote_code": work.trust_remote_code, "dtype": torch.float32}
    if work.attention is not None:
        chosen["attn_implementation"] = work.attention
    auto = _CLASSES[work.head]
    if work.random_weights:
        model = auto.from_config(config, **chosen)
    else:
        model = auto.from_pretrained(work.model, config=config, **source, **chosen)
    if work.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def adamw(model: torch.nn.Module, work: Work) -> torch.optim.AdamW:
    """torch's fused AdamW, without decay of biases and norm weights, as the examples have it."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    undecayed = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": work.weight_decay},
            {"params": undecayed, "weight_decay": 0.0},
        ],
        lr=work.learning_rate,
        betas=(work.adam_beta1, work.adam_beta2),
        eps=work.adam_epsilon,
        fused=True,
    )
