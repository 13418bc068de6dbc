"""What DeepSpeed is told, and what a user's own DeepSpeed configuration may say beside it.

The loop, the precision, the schedule and the checkpoints are ours: a key that contradicts them is
refused with both values, "auto" takes ours, everything else is DeepSpeed's and passes through.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.memory.buckets import (
    MAX_LIVE,
    PREFETCH_BUCKET,
    REDUCE_BUCKET,
    ZeroBuffers,
)
from ftlaunch.strategies.options import DeepSpeedOptions, TrainOptions

# Of a buffer: no memory has more.
_MOST_ELEMENTS = 1 << 62
_MAX_BYTES = 1 << 20
_DEVICES = ("none", "cpu")
# Each of them trains something else than the loop does, or takes its place.
_NOT_HERE = (
    "amp",
    "autotuning",
    "compression_training",
    "curriculum_learning",
    "data_efficiency",
    "eigenvalue",
    "elasticity",
    "hybrid_engine",
    "pipeline",
    "progressive_layer_drop",
    "sequence_parallel_size",
    "tensor_parallel",
    "torch_autocast",
    "zenflow",
)
# What HF Trainer's users write for the schedules that `train.lr_scheduler_type` names.
_SCHEDULERS = {
    "constant": "WarmupLR",
    "linear": "WarmupDecayLR",
    "cosine": "WarmupCosineLR",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """What the plan has decided and DeepSpeed has keys for, too."""

    stage: int
    precision: str
    micro_batch: int
    accumulation: int


def read_deepspeed_config(path: str) -> dict[str, Any]:
    """A user's DeepSpeed JSON. UserError when it cannot be read, or is none."""
    try:
        with open(path, "rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UserError(
            f"deepspeed.config {path} cannot be read: {error.strerror}. Name a JSON file as "
            "DeepSpeed takes it."
        ) from None
    if len(raw) > _MAX_BYTES:
        raise UserError(
            f"deepspeed.config {path} has more than {_MAX_BYTES:,} bytes: it is no configuration."
        )
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"deepspeed.config {path} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise UserError(f"deepspeed.config {path} must hold a JSON object, {{…}}.")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return found


def stage_of(options: DeepSpeedOptions) -> Any:
    """The ZeRO stage that the user's configuration names; None when it names none."""
    stage = _get(_user(options), "zero_optimization.stage")
    return None if stage == "auto" else stage


def offload_devices(options: DeepSpeedOptions, stage: int) -> tuple[str, str]:
    """(where optimizer state, where parameters are kept): "none" (the device) or "cpu"."""
    if options.offload is not None:
        return options.offload, options.offload if stage == 3 else "none"
    user = _user(options)
    optimizer, parameters = (
        _get(user, f"zero_optimization.offload_{what}.device") or "none"
        for what in ("optimizer", "param")
    )
    return (
        "none" if optimizer == "auto" else optimizer,
        "none" if parameters == "auto" else parameters,
    )


def buffers_of(options: DeepSpeedOptions) -> ZeroBuffers:
    """The sizes that the user's configuration names; to refuse what is no size is DeepSpeed's."""

    def size(default: int, *names: str) -> int:
        for name in names:
            value = _get(_user(options), f"zero_optimization.{name}")
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and 0 <= value <= _MOST_ELEMENTS:
                return int(value)
        return default

    return ZeroBuffers(
        reduce_bucket=size(REDUCE_BUCKET, "reduce_bucket_size"),
        prefetch_bucket=size(
            PREFETCH_BUCKET, "stage3_prefetch_bucket_size", "prefetch_bucket_size"
        ),
        max_live=size(MAX_LIVE, "stage3_max_live_parameters", "max_live_parameters"),
    )


def check_deepspeed_config(
    options: DeepSpeedOptions, train: TrainOptions, decided: Decided
) -> list[str]:
    """One line for each key of the user's that contradicts the plan."""
    user = _user(options)
    lines = [
        f"deepspeed.config: {name!r} is not for ftlaunch: its loop, not DeepSpeed's, decides that. "
        "Take it out."
        for name in _NOT_HERE
        if _switched_on(user.get(name))
    ]
    for device, what in zip(
        offload_devices(options, decided.stage), ("optimizer", "param"), strict=True
    ):
        if device not in _DEVICES:
            lines.append(
                f"deepspeed.config: zero_optimization.offload_{what}.device is {device!r}: "
                "ftlaunch offloads to 'cpu' or not at all ('none')."
            )
    for key, ours, origin in _expected(options, train, decided):
        theirs = _get(user, key)
        if theirs is not None and theirs != "auto" and not _same(theirs, ours):
            lines.append(
                f"deepspeed.config: {key} is {json.dumps(theirs)}, the plan's is "
                f'{json.dumps(ours)} ({origin}). Change one of them, or write "auto".'
            )
    return lines + _scheduler_mistakes(user, train)


def make_deepspeed_config(
    options: DeepSpeedOptions,
    train: TrainOptions,
    *,
    stage: int,
    precision: str,
    accelerator: str,
    world_size: int,
) -> dict[str, Any]:
    """What the engine is given. Accumulation is ours: to it every micro-batch is one of one."""
    optimizer, parameters = offload_devices(options, stage)
    pin = accelerator != "cpu"
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        # On CPUs there is no second stream to overlap with.
        "overlap_comm": accelerator != "cpu",
    }
    ours: dict[str, Any] = {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.max_grad_norm,
        # Ours is torch's AdamW, as under ddp, also where the state is offloaded.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Without the check it steps on gradients that are not finite.
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": precision == "fp16"},
        "zero_optimization": {
            "stage": stage,
            "offload_optimizer": {"device": optimizer},
            "offload_param": {"device": parameters},
        },
    }
    if precision == "fp16":
        # The arithmetic of `LossScaler`: halve at once, double after a window, never below 1.
        ours["fp16"] |= _loss_scaling(train)
    defaults = {
        "steps_per_print": 1 << 60,
        "zero_optimization": zero
        | {"offload_optimizer": {"pin_memory": pin}, "offload_param": {"pin_memory": pin}},
    }
    user = {key: value for key, value in _user(options).items() if key not in _TAKEN}
    merged = _merge(_merge(defaults, _without_auto(user)), ours)
    for what in ("offload_optimizer", "offload_param"):
        if merged["zero_optimization"][what]["device"] == "none":
            del merged["zero_optimization"][what]
    return merged


# Sections that say what the loop does; what they may say was checked.
_TAKEN = ("optimizer", "scheduler", "bfloat16", *_NOT_HERE)


def _expected(
    options: DeepSpeedOptions, train: TrainOptions, decided: Decided
) -> Iterator[tuple[str, Any, str]]:
    """(key, our value, where that comes from)."""
    yield "train_batch_size", train.global_batch_size, "train.global_batch_size"
    origin = "train.per_device_train_batch_size, the ranks and the global batch"
    yield "train_micro_batch_size_per_gpu", decided.micro_batch, origin
    yield "gradient_accumulation_steps", decided.accumulation, origin
    yield "gradient_clipping", train.max_grad_norm, "train.max_grad_norm"
    yield "zero_optimization.stage", decided.stage, "--strategy"
    for name, precision in (("bf16", "bf16"), ("bfloat16", "bf16"), ("fp16", "fp16")):
        yield f"{name}.enabled", decided.precision == precision, "--precision"
    if decided.precision == "fp16":
        for name, value in _loss_scaling(train).items():
            yield f"fp16.{name}", value, "train.initial_loss_scale, train.loss_scale_window"
    if options.offload is not None:
        devices = offload_devices(options, decided.stage)
        for device, what in zip(devices, ("optimizer", "param"), strict=True):
            yield f"zero_optimization.offload_{what}.device", device, "deepspeed.offload"
    yield "bf16.check_grad_overflow", True, "a step that is not finite is skipped"
    for name in ("bf16.bf16_master_weights_and_grads", "fp16.fp16_master_weights_and_grads"):
        yield name, False, "checkpoints hold fp32 masters"
    # It splits over some of the ranks: those of one shard group would not be the whole of it.
    yield "zero_optimization.mics_shard_size", -1, "checkpoints hold what all ranks own, once"
    yield "zero_allow_untested_optimizer", True, "the optimizer is torch's AdamW"
    yield "zero_force_ds_cpu_optimizer", False, "the optimizer is torch's AdamW"
    kind = _get(_user(options), "optimizer.type")
    yield "optimizer.type", kind if kind in ("Adam", "AdamW") else "AdamW", "ftlaunch has AdamW"
    for name, value, origin in (
        ("lr", train.learning_rate, "train.learning_rate"),
        ("weight_decay", train.weight_decay, "train.weight_decay"),
        ("betas", [train.adam_beta1, train.adam_beta2], "train.adam_beta1, train.adam_beta2"),
        ("eps", train.adam_epsilon, "train.adam_epsilon"),
        ("adam_w_mode", True, "ftlaunch has AdamW"),
    ):
        yield f"optimizer.params.{name}", value, origin


def _loss_scaling(train: TrainOptions) -> dict[str, Any]:
    return {
        "loss_scale": 0,
        "initial_scale_power": round(math.log2(train.initial_loss_scale)),
        "loss_scale_window": train.loss_scale_window,
        "hysteresis": 1,
        "min_loss_scale": 1,
    }


def _scheduler_mistakes(user: Mapping[str, Any], train: TrainOptions) -> list[str]:
    kind = _get(user, "scheduler.type")
    ours = _SCHEDULERS[train.lr_scheduler_type]
    lines: list[str] = []
    if kind not in (None, "auto", ours):
        lines.append(
            f"deepspeed.config: scheduler.type is {json.dumps(kind)}, the plan's is {ours} "
            f"(train.lr_scheduler_type={train.lr_scheduler_type}). Change one of them, or take the "
            "scheduler out."
        )
    parameters = _get(user, "scheduler.params")
    for name, value in (parameters if isinstance(parameters, dict) else {}).items():
        if value != "auto":
            lines.append(
                f"deepspeed.config: scheduler.params.{name} is {json.dumps(value)}; the schedule is "
                "train.learning_rate's, train.warmup_steps' and train.lr_scheduler_type's. Write "
                '"auto", or take the scheduler out.'
            )
    return lines


def _user(options: DeepSpeedOptions) -> dict[str, Any]:
    return options.config if isinstance(options.config, dict) else {}


def _get(content: Mapping[str, Any], key: str) -> Any:
    found: Any = content
    for name in key.split("."):
        if not isinstance(found, dict):
            return None
        found = found.get(name)
    return found


def _switched_on(section: Any) -> bool:
    """Whether a section asks for something: it is there, and not {"enabled": false}."""
    if isinstance(section, dict):
        return bool(section) and section.get("enabled", True) is not False
    return section not in (None, False, "auto", 1)


def _same(theirs: Any, ours: Any) -> bool:
    if isinstance(ours, bool) or isinstance(theirs, bool):
        return theirs is ours
    if isinstance(ours, list):
        return isinstance(theirs, list) and theirs == ours
    return bool(theirs == ours)


def _without_auto(content: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in content.items()
        if value != "auto"
    }


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both, and `above` where they meet."""
    merged = dict(below)
    for key, value in above.items():
        before = merged.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            merged[key] = _merge(before, value)
        else:
            merged[key] = value
    return merged
