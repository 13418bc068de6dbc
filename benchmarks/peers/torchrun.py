"""A plain DDP loop, as torch's documentation has it; one rank has no DDP.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m ftlaunch.peers.torchrun \
        WORK.json RESULT.json

Nothing between the loop and torch. In its favour, and not a default of torch: fused AdamW, gradients
that are views of DDP's buckets, no synchronisation while accumulating, batches copied from pinned
memory on CUDA.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, Sampler
from transformers import get_scheduler

from ftlaunch.peers import program
from ftlaunch.peers.meter import Meter
from ftlaunch.peers.model import adamw, load_model
from ftlaunch.peers.tokens import Collate, MicroBatches, load_rows, take_whole
from ftlaunch.peers.work import Result, Work

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextlib.contextmanager
def first_rank_first() -> Iterator[None]:
    """Collective: rank 0 goes through the block before the others do."""
    if dist.is_initialized() and program.rank() > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and program.rank() == 0:
        dist.barrier()


def batches(work: Work, rows: Any, collate: Collate) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's micro-batches, epoch after epoch, without an end."""
    settings: dict[str, Any] = {
        "num_workers": work.loader_workers,
        "persistent_workers": work.loader_workers > 0,
        "pin_memory": work.device == "cuda",
    }
    if work.order is not None:
        made = MicroBatches(rows, work, program.rank())
        yield from DataLoader(made, batch_size=1, collate_fn=take_whole(collate), **settings)
        return
    sampler: Sampler[int]
    if dist.is_initialized():
        sampler = DistributedSampler(rows, shuffle=True, seed=work.seed)
    else:
        sampler = RandomSampler(rows, generator=torch.Generator().manual_seed(work.seed))
    loader: DataLoader[Any] = DataLoader(
        rows, batch_size=work.micro_batch, sampler=sampler, collate_fn=collate, **settings
    )
    epoch = 0
    while True:
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def autocast(work: Work) -> contextlib.AbstractContextManager[Any]:
    if work.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(work.device, dtype=_DTYPES[work.precision])


def train(work: Work) -> Result:
    """Collective."""
    meter = Meter(work)
    device = program.device(work)
    if program.num_ranks() > 1:
        dist.init_process_group("nccl" if work.device == "cuda" else "gloo")
    rows, collate = load_rows(work, first=first_rank_first())
    module = load_model(work, rows).to(device)
    model: Any = module
    if program.num_ranks() > 1:
        on_cuda = work.device == "cuda"
        model = DistributedDataParallel(
            module, device_ids=[device.index] if on_cuda else None, gradient_as_bucket_view=True
        )
    optimizer = adamw(module, work)
    num_steps = work.total_steps(len(rows), program.num_ranks())
    scheduler = get_scheduler(
        work.lr_scheduler_type,
        optimizer,
        num_warmup_steps=work.lr_warmup_steps,
        num_training_steps=num_steps,
    )
    scaler = torch.amp.GradScaler(work.device, enabled=work.precision == "fp16")
    data = batches(work, rows, collate)
    torch.manual_seed(work.seed + program.rank())
    meter.begin()
    for _ in range(num_steps):
        for number in range(work.accumulation):
            batch = {name: x.to(device, non_blocking=True) for name, x in next(data).items()}
            meter.count(batch)
            alone = number == work.accumulation - 1 or program.num_ranks() == 1
            with contextlib.nullcontext() if alone else model.no_sync():
                with autocast(work):
                    loss = model(**batch).loss / work.accumulation
                scaler.scale(loss).backward()
            meter.add_loss(loss)
        if work.max_grad_norm > 0:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(module.parameters(), work.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
        meter.end_step()
    return meter.result("torchrun", _settings(work))


def _settings(work: Work) -> dict[str, Any]:
    return {
        "defaults": {"sampler": "DistributedSampler, shuffled", "loader_workers": 0},
        "chosen": {
            "optimizer": "AdamW, fused",
            "gradient_as_bucket_view": True,
            "no_sync": work.accumulation > 1,
            "order": "given" if work.order is not None else "its own",
            "padding": work.padding,
        },
    }


if __name__ == "__main__":
    program.run(train)
