"""How much a rank computes at once: chosen, explained, and halved where memory is short."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ftlaunch.launcher.config import RunConfig
from ftlaunch.launcher.layout import Reason

if TYPE_CHECKING:
    from ftlaunch.launcher.plan import LaunchPlan

# Bounds of a micro-batch that nobody chose: samples, and padded tokens (0 for no such bound). Few
# samples pad less, because a global batch is sorted by length before it is cut; an accelerator needs
# many to be busy. On a CPU long samples are faster one by one than side by side, which fills the caches
# (benchmarks/micro_batches.py).
_SAMPLES = {"cpu": 8, "cuda": 32, "ascend": 32}
_TOKENS = {"cpu": 1024, "cuda": 0, "ascend": 0}
# Evaluation keeps nothing for a backward pass.
_EVAL_FACTOR = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Fits:
    """What a memory model says of one device: `samples` of `length` tokens each at once, no more.

    samples   1 or more
    length    tokens of the longest sample that there can be
    """

    samples: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What a rank computes at once, at most.

    samples, tokens     in training; tokens are padded ones (samples times the longest), None for no
                        such bound
    eval_samples, eval_tokens   the same in evaluation
    accumulation        micro-batches of a rank in an optimizer step: so many, with a bound in tokens
                        at least so many
    reasons             for the plan
    """

    samples: int
    tokens: int | None
    eval_samples: int
    eval_tokens: int | None
    accumulation: int
    reasons: tuple[Reason, ...]


def choose_micro_batch(
    config: RunConfig, world_size: int, accelerator: str, fits: Fits | None = None
) -> MicroBatch:
    """What the user set, else the defaults of the accelerator, else less where memory demands it.

    fits   None where nothing is known of the memory; what the user set is not lowered by it
    """
    train = config.train
    share = math.ceil(train.global_batch_size / world_size)
    asked_samples, asked_tokens = (
        train.per_device_train_batch_size,
        train.max_tokens_per_micro_batch,
    )
    if asked_samples is not None:
        bound, origin = asked_samples, "train.per_device_train_batch_size"
    elif asked_tokens:
        bound, origin = share, ""
    else:
        bound, origin = _SAMPLES[accelerator], f"the default on {accelerator}"
    tokens, tokens_origin = asked_tokens, "train.max_tokens_per_micro_batch"
    if tokens is None:
        tokens, tokens_origin = _TOKENS[accelerator], f"the default on {accelerator}"
        # Short samples may still be many: only what they add up to is bound.
        if fits is not None and asked_samples is None and fits.samples < min(bound, share):
            room = fits.samples * fits.length
            if not tokens or room < tokens:
                tokens = room
                tokens_origin = (
                    f"the memory of a device holds {fits.samples} of {fits.length:,} tokens"
                )
    accumulation = math.ceil(share / bound)
    samples = math.ceil(share / accumulation)
    why = f"{share} samples a rank of a global batch of {train.global_batch_size}"
    why += f", at most {bound} at once ({origin})" if origin else ", as many as the tokens allow"
    reasons = [Reason(choice="micro-batch", value=str(samples), why=why)]
    if tokens:
        why = f"padded tokens of a micro-batch at most ({tokens_origin}); a longer sample stands alone"
        reasons.append(Reason(choice="tokens", value=f"{tokens:,}", why=why))
    reasons.append(_accumulation(accumulation, tokens or None))
    eval_samples = train.per_device_eval_batch_size or _EVAL_FACTOR * samples
    return MicroBatch(
        samples=samples,
        tokens=tokens or None,
        eval_samples=eval_samples,
        eval_tokens=_EVAL_FACTOR * tokens if tokens else None,
        accumulation=accumulation,
        reasons=tuple(reasons),
    )


def explain_evaluation(chosen: MicroBatch) -> list[Reason]:
    """For the plan of a job that only evaluates."""
    why = "samples of a rank at once (train.per_device_eval_batch_size)"
    reasons = [Reason(choice="micro-batch", value=str(chosen.eval_samples), why=why)]
    if chosen.eval_tokens is not None:
        why = "padded tokens at once, at most: twice those of training"
        reasons.append(Reason(choice="tokens", value=f"{chosen.eval_tokens:,}", why=why))
    return reasons


def _accumulation(accumulation: int, tokens: int | None) -> Reason:
    why = f"{accumulation} micro-batch(es) a rank, then one exchange of gradients"
    if tokens is not None:
        why = f"{accumulation} micro-batch(es) a rank, more of long samples, then one exchange of gradients"
    return Reason(choice="accumulation", value=str(accumulation), why=why)


def halve_micro_batch(plan: LaunchPlan) -> LaunchPlan | None:
    """The plan with half the memory for activations and the same global batch; None at one sample."""
    evaluates = plan.mode == "eval"
    before, tokens_before = plan.micro_batch, plan.max_tokens_per_micro_batch
    if evaluates:
        before, tokens_before = plan.eval_micro_batch, plan.eval_max_tokens
    if before == 1:
        return None
    micro_batch, tokens = max(1, plan.micro_batch // 2), _half(plan.max_tokens_per_micro_batch)
    share = math.ceil(plan.global_batch_size / plan.world_size)
    accumulation = math.ceil(share / micro_batch)
    same = "" if evaluates else "; the global batch is the same"
    changed = {
        "micro-batch": Reason(
            choice="micro-batch",
            value=str(before // 2),
            why=f"half of {before}, for want of memory{same}",
        ),
        "accumulation": _accumulation(accumulation, tokens),
    }
    if tokens_before is not None:
        why = f"half of {tokens_before:,}, for want of memory"
        changed["tokens"] = Reason(choice="tokens", value=f"{_half(tokens_before):,}", why=why)
    return replace(
        plan,
        micro_batch=micro_batch,
        max_tokens_per_micro_batch=tokens,
        eval_micro_batch=max(1, plan.eval_micro_batch // 2),
        eval_max_tokens=_half(plan.eval_max_tokens),
        accumulation=accumulation,
        reasons=tuple(changed.get(reason.choice, reason) for reason in plan.reasons),
    )


def _half(tokens: int | None) -> int | None:
    return None if tokens is None else max(1, tokens // 2)
