"""Models with weights for the tests of adapters, and adapters that peft itself has written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
