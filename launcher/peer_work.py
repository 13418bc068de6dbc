"""What a peer is told to do so that it does what a plan does: WORK.json, the same samples, the same batches.

Its settings are described in `benchmarks/peers/work.py`. Knows plans and tokens; starts nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftlaunch.cluster.errors import UserError
from ftlaunch.launcher.micro_batch import tokens_that_fit
from ftlaunch.launcher.plan import LaunchPlan
from ftlaunch.strategies.adapter import adapter_folder, with_tokenizer
from ftlaunch.strategies.data.dealing import deal, rows_at_once
from ftlaunch.strategies.data.sample_file import write_samples
from ftlaunch.strategies.data.sample_order import SampleOrder
from ftlaunch.strategies.data.token_cache import Tokens, prepare_tokens
from ftlaunch.strategies.data.tokenizer import TokenizerSource
from ftlaunch.strategies.job_data import make_collator
from ftlaunch.strategies.model_config import max_length_of, read_model_config
from ftlaunch.strategies.registry import entry
from ftlaunch.strategies.schedule import make_schedule


def check_comparable(plan: LaunchPlan, *, on_one_machine: bool) -> None:
    """UserError for a job that no peer can do as the plan does it."""
    options = plan.options
    why = None
    if entry(plan.strategy).package == "mindspore":
        why = f"the strategy is {plan.strategy}, and the peers are torch's"
    elif plan.accelerator not in ("cpu", "cuda"):
        why = f"the accelerator is {plan.accelerator}, which the peers are not written for"
    elif not on_one_machine:
        why = "the job is on several machines, and the peers are started on this one alone"
    elif options.lora.r is not None or adapter_folder(options.model) is not None:
        why = "an adapter is trained, and the peers train the whole model"
    elif options.model.freeze:
        why = "model.freeze is set, and the peers train the whole model"
    elif options.train.class_weights is not None:
        why = "train.class_weights is set, and the peers weigh all classes alike"
    elif options.deepspeed.offload == "cpu" or options.deepspeed.config is not None:
        why = (
            "deepspeed.offload or deepspeed.config is set, and the peers have DeepSpeed's defaults"
        )
    elif options.data.packing == "samples" and options.data.name_or_path is not None:
        why = "data.packing is samples, and the peers would let the samples of a row see each other"
    if why is not None:
        raise UserError(f"--compare cannot be done: {why}. Leave out one of the two.")


def plan_tokens(plan: LaunchPlan) -> Tokens:
    """The tokens of a plan, which are made where no run of ours has left them in the cache."""
    options = plan.options
    own, model = options.model.tokenizer, with_tokenizer(options.model)
    return prepare_tokens(
        options.task,
        options.data,
        TokenizerSource(
            name_or_path=own or str(model.name_or_path),
            revision=None if own else model.revision,
            trust_remote_code=options.model.trust_remote_code,
        ),
        seed=options.train.seed,
        model_max_length=max_length_of(read_model_config(options.model)),
    )


def make_peer_work(
    plan: LaunchPlan, tokens: Tokens, folder: Path, *, warmup_steps: int, steps: int
) -> dict[str, Any]:
    """What all peers are told; the samples are written into `folder`.

    Peers are given our global batches, dealt by length into equally many samples: what a plan
    without a bound in tokens computes, micro-batch for micro-batch. A peer knows no such bound, and
    most have the same number of micro-batches in every step. Where our bound is one of memory, the
    number is one that keeps it with the longest sample, too. Of a benchmark's plan it is the order of
    `strategies.measurement`, of a training job's that of its first epoch.

    steps   those that are measured
    """
    options, train = plan.options, plan.options.train
    total = warmup_steps + steps
    num_samples = len(tokens.train)
    whole = num_samples // plan.global_batch_size
    if plan.mode == "bench":
        # A benchmark leaves out what an epoch has left at its end: every step has a whole global batch.
        num_samples = whole * plan.global_batch_size
    elif total > whole:
        raise UserError(
            f"{total} steps are compared, and the {num_samples} samples have {whole} whole global batches "
            f"of {plan.global_batch_size}: peers have no other. Compare fewer steps, or use more data."
        )
    order = SampleOrder(
        num_samples=num_samples, global_batch_size=plan.global_batch_size, seed=train.seed
    )
    batches = [order.global_batch(step) for step in range(total)]
    lengths = [tokens.train.lengths(indices) for indices in batches]
    rows = rows_at_once(
        max(int(each.max()) for each in lengths), plan.micro_batch, tokens_that_fit(plan)
    )
    runs_a_step = -(-plan.global_batch_size // (plan.world_size * rows)) * plan.world_size
    if plan.global_batch_size < runs_a_step:
        raise UserError(
            f"--compare cannot be done: a global batch of {plan.global_batch_size} leaves some of "
            f"{runs_a_step} micro-batches empty ({plan.world_size} ranks, at most {rows} samples at once), "
            "and a peer computes none without samples. Set train.global_batch_size to a multiple of "
            f"{plan.world_size * rows}, or raise train.per_device_train_batch_size."
        )
    dealt = []
    for indices, sizes in zip(batches, lengths, strict=True):
        runs = deal(indices, sizes, world_size=plan.world_size, micro_batch=rows)
        dealt.append([[run.tolist() for run in share] for share in runs])
    numbers = sorted({n for step in dealt for share in step for run in share for n in run})
    collator = make_collator(options, tokens, tokens.train, class_weights=None)
    file = folder / "samples.safetensors"
    write_samples(file, collator, numbers, labels_are_next=tokens.spec.head == "causal-lm")
    place = {number: i for i, number in enumerate(numbers)}
    return {
        "model": options.model.name_or_path,
        "revision": options.model.revision,
        "trust_remote_code": options.model.trust_remote_code,
        "head": tokens.spec.head,
        "num_labels": tokens.spec.num_outputs or None,
        "random_weights": options.model.random_weights,
        "dropout": options.model.dropout,
        "attention": options.model.attn_implementation,
        "gradient_checkpointing": options.model.gradient_checkpointing,
        "tokens": str(file),
        "pad_token_id": tokens.pad_token_id,
        "max_length": tokens.max_length,
        "order": _renumbered(dealt, place),
        "micro_batch": rows,
        "accumulation": len(dealt[0][0]),
        "precision": plan.precision,
        "device": plan.accelerator,
        "steps": total,
        "warmup_steps": warmup_steps,
        "threads": plan.threads_per_rank,
        "seed": train.seed,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.lr_scheduler_type,
        "lr_warmup_steps": make_schedule(train, total).warmup_steps,
        "weight_decay": train.weight_decay,
        "adam_beta1": train.adam_beta1,
        "adam_beta2": train.adam_beta2,
        "adam_epsilon": train.adam_epsilon,
        "max_grad_norm": train.max_grad_norm,
        "zero_stage": entry(plan.strategy).zero_stage or 0,
    }


def _renumbered(
    dealt: Sequence[Sequence[Sequence[Sequence[int]]]], place: dict[int, int]
) -> list[list[list[list[int]]]]:
    return [[[[place[n] for n in run] for run in share] for share in step] for step in dealt]
