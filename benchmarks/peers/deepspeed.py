"""DeepSpeed's own engine loop, as its documentation has it: stage 0 (no ZeRO) to 3.

    python -m ftlaunch.peers.deepspeed WORK.json RESULT.json

Defaults of DeepSpeed (0.19) that count here: bf16 and fp16 are the dtype of the weights, with fp32
masters in the optimizer, and not autocast; gradients are reduced in every micro-batch from stage 2
on; bucket sizes. Not its default, and in its favour: torch's fused AdamW, since DeepSpeed's own
optimizers are extensions that a CPU has to compile first.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any

import torch
import torch.distributed as dist
from transformers import get_scheduler

from ftlaunch.peers import program
from ftlaunch.peers.meter import Meter
from ftlaunch.peers.model import adamw, load_model
from ftlaunch.peers.tokens import load_rows
from ftlaunch.peers.torchrun import batches, first_rank_first
from ftlaunch.peers.work import Result, Work


def engine_config(work: Work, num_ranks: int) -> dict[str, Any]:
    return {
        "train_batch_size": work.micro_batch * work.accumulation * num_ranks,
        "train_micro_batch_size_per_gpu": work.micro_batch,
        "gradient_accumulation_steps": work.accumulation,
        "gradient_clipping": work.max_grad_norm,
        "bf16": {"enabled": work.precision == "bf16"},
        "fp16": {"enabled": work.precision == "fp16"},
        "zero_optimization": {"stage": work.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
    }


def train(work: Work) -> Result:
    """Collective."""
    meter = Meter(work)
    device = program.device(work)
    # It looks for an accelerator at its import, and takes what it is told.
    os.environ["DS_ACCELERATOR"] = work.device
    _meet_alone()
    import deepspeed

    # Its all-reduce over shared memory is for inference, and would be compiled first.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if work.device == "cuda" else "gloo")
    rows, collate = load_rows(work, first=first_rank_first())
    model = load_model(work, rows).to(device)
    optimizer = adamw(model, work)
    num_ranks = dist.get_world_size()
    num_steps = work.total_steps(len(rows), num_ranks)
    scheduler = get_scheduler(
        work.lr_scheduler_type,
        optimizer,
        num_warmup_steps=work.lr_warmup_steps,
        num_training_steps=num_steps,
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        config=engine_config(work, num_ranks),
    )
    data = batches(work, rows, collate)
    torch.manual_seed(work.seed + program.rank())
    meter.begin()
    for _ in range(num_steps):
        for _ in range(work.accumulation):
            batch = {name: x.to(device, non_blocking=True) for name, x in next(data).items()}
            meter.count(batch)
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            meter.add_loss(loss.float() / work.accumulation)
        meter.end_step()
    return meter.result("deepspeed", _settings(work))


def _meet_alone() -> None:
    """One rank has a process group too, which torchrun describes where there are more."""
    if "RANK" in os.environ:
        return
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _settings(work: Work) -> dict[str, Any]:
    return {
        "defaults": {"16-bit weights": work.precision != "fp32", "bucket sizes": "DeepSpeed's"},
        "chosen": {
            "zero_stage": work.zero_stage,
            "optimizer": "AdamW of torch, fused",
            "order": "given" if work.order is not None else "its own",
            "padding": work.padding,
        },
    }


if __name__ == "__main__":
    program.run(train)
