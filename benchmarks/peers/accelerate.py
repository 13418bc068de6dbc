"""Accelerate with a plain loop, as its documentation has it.

    python -m ftlaunch.peers.accelerate WORK.json RESULT.json

Defaults of Accelerate (1.15) that count here: DDP without `gradient_as_bucket_view`, batches of all
ranks drawn from one shuffled order, the next batch fetched while one is computed, autocast by
`mixed_precision`. Not its default, and in its favour: fused AdamW.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import get_scheduler

from ftlaunch.peers import program
from ftlaunch.peers.meter import Meter
from ftlaunch.peers.model import adamw, load_model
from ftlaunch.peers.tokens import Collate, MicroBatches, load_rows, take_whole
from ftlaunch.peers.work import Result, Work

_MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def loader(work: Work, rows: Any, collate: Collate) -> DataLoader[Any]:
    """Of all ranks: `prepare` deals its batches to them in turn."""
    settings: dict[str, Any] = {
        "num_workers": work.loader_workers,
        "persistent_workers": work.loader_workers > 0,
        "pin_memory": work.device == "cuda",
    }
    if work.order is not None:
        made: DataLoader[Any] = DataLoader(
            MicroBatches(rows, work), batch_size=1, collate_fn=take_whole(collate), **settings
        )
        return made
    return DataLoader(
        rows, batch_size=work.micro_batch, shuffle=True, collate_fn=collate, **settings
    )


def endless(batches: DataLoader[Any]) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        yield from batches


def train(work: Work) -> Result:
    """Collective."""
    meter = Meter(work)
    accelerator = Accelerator(
        gradient_accumulation_steps=work.accumulation,
        mixed_precision=_MIXED[work.precision],
        cpu=work.device == "cpu",
    )
    rows, collate = load_rows(work, first=accelerator.main_process_first())
    model = load_model(work, rows)
    optimizer = adamw(model, work)
    num_ranks = accelerator.num_processes
    num_steps = work.total_steps(len(rows), num_ranks)
    scheduler = get_scheduler(
        work.lr_scheduler_type,
        optimizer,
        # A prepared scheduler makes a step for each rank in every step.
        num_warmup_steps=work.lr_warmup_steps * num_ranks,
        num_training_steps=num_steps * num_ranks,
    )
    model, optimizer, batches, scheduler = accelerator.prepare(
        model, optimizer, loader(work, rows, collate), scheduler
    )
    set_seed(work.seed + accelerator.process_index)
    meter.begin()
    done = 0
    for batch in endless(batches):
        meter.count(batch)
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients and work.max_grad_norm > 0:
                accelerator.clip_grad_norm_(model.parameters(), work.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        meter.add_loss(loss / work.accumulation)
        if accelerator.sync_gradients:
            meter.end_step()
            done += 1
            if done == num_steps:
                break
    return meter.result("accelerate", _settings(work))


def _settings(work: Work) -> dict[str, Any]:
    return {
        "defaults": {
            "gradient_as_bucket_view": False,
            "sampler": "shuffled, dealt to the ranks by batches",
            "batches fetched ahead": 1,
        },
        "chosen": {
            "optimizer": "AdamW, fused",
            "order": "given" if work.order is not None else "its own",
            "padding": work.padding,
        },
    }


if __name__ == "__main__":
    program.run(train)
