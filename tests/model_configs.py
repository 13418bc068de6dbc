"""Configurations of models that nobody has to have, for plans; and the numbers that follow from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# As Llama-3.1-70B has it. Parameters by hand, with h = 8192, f = 28672, 80 layers and 8 of 64 heads of 128
# for keys and values:
#   embedding and output   2 · 128256 · h                  =  2,101,346,304
#   a layer                2·h² + 2·h·1024 + 3·h·f + 2·h   =    855,654,400, 80 times 68,452,352,000
#   last norm              h                               =          8,192
LLAMA_70B: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
PARAMETERS_70B = 70_553_706_496

# Some 1.2 billion parameters: with 8 ranks every strategy needs another amount.
LLAMA_1B: Mapping[str, Any] = {
    **LLAMA_70B,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
}
BERT_BASE: Mapping[str, Any] = {
    "architectures": ["BertForMaskedLM"],
    "model_type": "bert",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "vocab_size": 30522,
}


def write_json(folder: Path, content: object) -> Path:
    """The config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(content))
    return path
