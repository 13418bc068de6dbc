"""Checkpoints that DeepSpeed itself has saved, and the weights that its training held just then.

The weights are asked of the engine while it is alive, by DeepSpeed's own functions, and never read
from a file.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.ranks import run_ranks

STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained and how; the name is that of its folder."""

    name: str
    stage: int
    ranks: int
    bf16: bool = False
    model: str = "net"
    steps: int = STEPS
    config: Mapping[str, Any] = field(default_factory=dict)
    zero: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """weights and buffers by name, tied ones under each of their names; what zero_to_fp32 makes of it."""

    folder: Path
    held: dict[str, np.ndarray]
    peer: dict[str, np.ndarray] | None


class Net(torch.nn.Module):
    """Sizes that neither 2 nor 3 divides, frozen parameters, tied weights, buffers of two dtypes."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(13, 5)
        self.frozen = torch.nn.Linear(5, 7)
        self.inner = torch.nn.Linear(7, 5)
        self.norm = torch.nn.LayerNorm(5)
        self.head = torch.nn.Linear(5, 13)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor([1.0, 0.1, 3.0]))
        self.register_buffer("count", torch.arange(4))
        self.register_buffer("not_saved", torch.arange(4), persistent=False)
        self.frozen.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.norm(self.inner(self.frozen(self.embedding(ids)))))
        return out * self.scale[1]


def make_checkpoints(folder: Path, jobs: list[Job]) -> dict[str, Saved]:
    """Train and save every job, each on ranks of its own, forked from one process with deepspeed."""
    [saved] = run_ranks(1, _make_all, folder, jobs)
    return saved  # type: ignore[no-any-return]


def _make_all(world, listen_fd, folder, jobs):
    # It looks for an accelerator at its import, and takes what it is told.
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    # Otherwise each rank would compile it, for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.ERROR)
    saved = {}
    for job in jobs:
        here = folder / job.name
        held = run_ranks(job.ranks, _train, here, job)[0]
        peer = None
        if job.stage > 0 and "data_types" not in job.config:
            tensors = get_fp32_state_dict_from_zero_checkpoint(str(here))
            peer = {name: _array(tensor) for name, tensor in tensors.items()}
        saved[job.name] = Saved(folder=here, held=held, peer=peer)
    return saved


def _train(world, listen_fd, folder, job):
    import deepspeed
    import torch.distributed as dist

    os.environ |= {"RANK": str(world.rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world.size)}
    torch.set_num_threads(1)
    # All ranks are of one machine: they meet at a file, the listening socket is not needed.
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}.store", rank=world.rank, world_size=world.size
    )
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    torch.manual_seed(1)
    model = Net() if job.model == "net" else _masked_lm()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(groups, lr=1e-2),
        config={
            "train_batch_size": world.size,
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": job.stage, **job.zero},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1 << 60,
            "bf16": {"enabled": job.bf16},
            **job.config,
        },
    )
    ids = (torch.arange(12).reshape(2, 6) + world.rank) % 13
    for _ in range(job.steps):
        out = engine(ids)
        out = out if isinstance(out, torch.Tensor) else out.logits
        engine.backward(out.float().pow(2).mean() + out.float()[0, 0, 3])
        engine.step()
    held = _held(engine.module, job.stage)
    # HF's Trainer saves into checkpoint-N in the same way.
    engine.save_checkpoint(str(folder))
    dist.barrier()
    return held


def _held(module: torch.nn.Module, stage: int) -> dict[str, np.ndarray]:
    """Collective: fp32 masters of what is trained, everything else as it is."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    held = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        master = safe_get_full_fp32_param(parameter) if parameter.requires_grad and stage else None
        if master is None:
            with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
                master = parameter.detach().float().clone()
        held[name] = _array(master)
    absent = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, each in module.named_modules()
        for name in each._non_persistent_buffers_set
    }
    for name, buffer in module.named_buffers():
        if name not in absent:
            held[name] = _array(buffer)
    return held


def _array(tensor: torch.Tensor) -> np.ndarray:
    """A copy; floating-point numbers in fp32, to which bf16 goes exactly."""
    tensor = tensor.detach()
    return np.array((tensor.float() if tensor.is_floating_point() else tensor).numpy())


def _masked_lm() -> torch.nn.Module:
    """A BERT with its embeddings tied to its head, one layer frozen."""
    from transformers import BertConfig, BertForMaskedLM

    model = BertForMaskedLM(BertConfig(**BERT))
    model.bert.encoder.layer[0].requires_grad_(False)
    return model  # type: ignore[no-any-return]


BERT = {
    "vocab_size": 23,
    "hidden_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 14,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
