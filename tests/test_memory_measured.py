"""The memory of small jobs beside what torch's allocator hands out to real ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from benchmarks.memory import Cell, measure_rank, predict
from ftlaunch.strategies.memory import output
from ftlaunch.strategies.options import LoraOptions
from ftlaunch.strategies.torch import chunked_loss, model
from tests.ranks import run_ranks

_SIZES = {"vocab_size": 2000, "hidden_size": 128, "num_hidden_layers": 4, "pad_token_id": 0}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": (
        "sequence-classification",
        {"model_type": "bert", "num_attention_heads": 4, "intermediate_size": 512, **_SIZES},
    ),
    "llama": (
        "causal-lm",
        {
            "model_type": "llama",
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 384,
            "tie_word_embeddings": True,
            **_SIZES,
        },
    ),
}
# Of each layer's linear modules, of which there are six.
_ON_TWO = LoraOptions(r=8, target_modules=("query", "value"))


def _cell(name: str, strategy: str, **changes: Any) -> Cell:
    head, config = _MODELS[name]
    settings: dict[str, Any] = {"length": 128, "rows": 8, "checkpointing": False, **changes}
    return Cell(name=name, head=head, config=config, strategy=strategy, **settings)


def _measured(cell: Cell, folder: Path) -> int:
    """Of the fuller of two ranks."""
    found = run_ranks(2, _measure, cell, folder)
    return max(int(max(rank["accumulate"], rank["apply"])) for rank in found)


def _measure(world: Any, listen_fd: int | None, cell: Cell, folder: Path) -> dict[str, int]:
    place = folder / str(world.rank)
    place.mkdir()
    return measure_rank(world, listen_fd, cell, place)


_WITHOUT_FUSED_KERNELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": (
        "causal-lm",
        {
            "model_type": "gemma2",
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "intermediate_size": 384,
            **_SIZES,
        },
    ),
    "deberta-v2": (
        "sequence-classification",
        {
            "model_type": "deberta-v2",
            "num_attention_heads": 4,
            "intermediate_size": 384,
            "relative_attention": True,
            "position_buckets": 256,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
            "type_vocab_size": 0,
            **_SIZES,
        },
    ),
}


@pytest.mark.parametrize("name", _WITHOUT_FUSED_KERNELS)
def test_what_has_no_fused_attention_takes_what_was_predicted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Which weights they are is no matter here.
    monkeypatch.setattr(model, "check_random_weights", lambda config: None)
    head, config = _WITHOUT_FUSED_KERNELS[name]
    cell = Cell(
        name=name, head=head, config=config, strategy="ddp", length=128, rows=8, checkpointing=False
    )
    assert predict(cell).tensors == pytest.approx(_measured(cell, tmp_path), rel=0.1)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("bert", {}),
        ("bert", {"checkpointing": True}),
        ("llama", {}),
        ("llama", {"checkpointing": True}),
        ("bert", {"freeze": ("bert.embeddings", "bert.encoder.layer.[01].*")}),
        pytest.param("bert", {"freeze": ("base_model",)}, marks=pytest.mark.long),
        pytest.param("bert", {"lora": _ON_TWO}, marks=pytest.mark.long),
        pytest.param("bert", {"lora": _ON_TWO, "precision": "bf16"}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_ddp_takes_what_was_predicted(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    cell = _cell(name, "ddp", **changes)
    assert predict(cell).tensors == pytest.approx(_measured(cell, tmp_path), rel=0.1)


def test_pieces_of_logits_are_as_large_as_they_are() -> None:
    assert output.CHUNK_ELEMENTS == chunked_loss.CHUNK_ELEMENTS
    assert output.ACCELERATOR_CHUNK_ELEMENTS == chunked_loss.ACCELERATOR_CHUNK_ELEMENTS
