"""Tiny models and tables of random tokens, made on the spot."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftlaunch.cluster.world import World
from ftlaunch.strategies.base import StrategyRequest
from ftlaunch.strategies.checkpoint.manifest import Manifest
from ftlaunch.strategies.data.batches import Collator
from ftlaunch.strategies.data.sample_order import SampleOrder
from ftlaunch.strategies.loop import Windows
from ftlaunch.strategies.options import (
    DeepSpeedOptions,
    JobOptions,
    LoraOptions,
    ModelOptions,
    TrainOptions,
)

VOCABULARY = 120

_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", **_SMALL},
    "modernbert": {
        "model_type": "modernbert",
        **_SMALL,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "global_attn_every_n_layers": 2,
        "local_attention": 16,
    },
    "qwen2": {"model_type": "qwen2", **_SMALL, "num_key_value_heads": 1, "bos_token_id": 1},
    "llama": {"model_type": "llama", **_SMALL, "num_key_value_heads": 1, "bos_token_id": 1},
}


def write_config(folder: Path, family: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[family]))
    return folder


@dataclass
class Table:
    """Random rows in memory; what `batches.SampleTable` asks for."""

    input_ids: list[NDArray[np.int32]]
    targets: NDArray[Any]

    def __len__(self) -> int:
        return len(self.input_ids)

    def lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.array([len(self.input_ids[i]) for i in indices], dtype=np.int64)

    def labels(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        return self.targets[indices]

    def rows(self, indices: NDArray[np.int64]) -> list[tuple[NDArray[Any], None]]:
        return [(self.input_ids[i], None) for i in indices]


def random_table(num_samples: int, *, regression: bool = False, seed: int = 0) -> Table:
    """Rows of 5 to 40 tokens, none of them padding (0); labels 0..2 or normal targets."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(5, 41, num_samples)
    rows = [generator.integers(3, VOCABULARY, n).astype(np.int32) for n in lengths]
    if regression:
        return Table(rows, generator.standard_normal(num_samples).astype(np.float32))
    return Table(rows, generator.integers(0, 3, num_samples))


def request(
    world: World,
    listen_fd: int | None,
    folder: Path,
    *,
    regression: bool = False,
    precision: Any = "fp32",
    model: dict[str, Any] | None = None,
    deepspeed: DeepSpeedOptions | None = None,
    lora: LoraOptions | None = None,
    **train: Any,
) -> StrategyRequest:
    """What creates a strategy for a tiny model with random weights and no dropout."""
    options = JobOptions(
        model=ModelOptions(
            **{
                "name_or_path": str(folder),
                "random_weights": True,
                "dropout": 0.0,
                **(model or {}),
            }
        ),
        train=TrainOptions(**{"learning_rate": 1e-3, "seed": 7, **train}),
        deepspeed=deepspeed or DeepSpeedOptions(),
        lora=lora or LoraOptions(),
    )
    return StrategyRequest(
        world=world,
        options=options,
        precision=precision,
        accelerator="cpu",
        device=world.local_rank,
        num_threads=1,
        listen_fd=listen_fd,
        timeout_seconds=60.0,
        loss="mse" if regression else "cross_entropy",
        num_outputs=1 if regression else 3,
        label_names=() if regression else ("a", "b", "c"),
        max_token_id=VOCABULARY - 1,
        pad_token_id=0,
    )


def windows(
    world: World,
    table: Table,
    *,
    global_batch: int,
    micro_batch: int,
    max_tokens: int | None = None,
) -> Windows:
    return Windows(
        order=SampleOrder(num_samples=len(table), global_batch_size=global_batch, seed=7),
        collator=Collator(table=table, pad_token_id=0),
        rank=world.rank,
        world_size=world.size,
        micro_batch=micro_batch,
        max_tokens=max_tokens,
    )


def full_batch(table: Table, indices: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """All rows in one piece, padded to the longest."""
    longest = int(table.lengths(indices).max())
    ids = np.zeros((len(indices), longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, index in enumerate(indices):
        values = table.input_ids[index]
        ids[row, : len(values)] = values
        mask[row, : len(values)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def manifest(step: int, *, world_size: int = 1, best: dict[str, Any] | None = None) -> Manifest:
    """Of a checkpoint whose tensors alone matter."""
    return Manifest(
        identity={},
        step=step,
        applied_steps=step,
        epoch=0.0,
        world_size=world_size,
        strategy="ddp",
        precision="fp32",
        loss_scale={"scale": 1.0, "applied_in_a_row": 0, "enabled": 0},
        best=best,
        evaluation=None,
        evaluations_without_gain=0,
        schedule={},
        files={},
    )
