"""How much a rank computes at once: chosen, explained, and halved where memory is short."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ftlaunch.launcher.config import RunConfig
from ftlaunch.launcher.layout import Reason
from ftlaunch.strategies.progress import PhaseName

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
    is_proven           the largest micro-batch is computed once before training
    accumulation        micro-batches of a rank in an optimizer step: so many, with a bound in tokens
                        at least so many
    reasons             for the plan
    """

    samples: int
    tokens: int | None
    eval_samples: int
    eval_tokens: int | None
    accumulation: int
    is_proven: bool
    reasons: tuple[Reason, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeLimit:
    """What want of memory has left of a micro-batch, as in `MicroBatch`; None: it took nothing there."""

    samples: int | None = None
    tokens: int | None = None
    eval_samples: int | None = None
    eval_tokens: int | None = None


def choose_micro_batch(
    config: RunConfig, world_size: int, accelerator: str, fits: Fits | None = None
) -> MicroBatch:
    """What the user set, else the defaults of the accelerator, else less where memory demands it.

    fits   None where nothing is known of the memory; what the user set is not lowered by it
    """
    train = config.train
    share = -(-train.global_batch_size // world_size)
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
    if fits is not None and asked_samples is None and fits.samples < min(bound, share):
        held = f"the memory of a device holds {fits.samples} of {fits.length:,} tokens"
        # Short samples may still be many: only what they add up to is bound, unless that was excluded.
        room = fits.samples * fits.length
        if asked_tokens == 0:
            bound, origin = fits.samples, held
        elif asked_tokens is None and (not tokens or room < tokens):
            tokens, tokens_origin = room, held
    accumulation = -(-share // bound)
    samples = -(-share // accumulation)
    why = f"{share} samples a rank of a global batch of {train.global_batch_size}"
    why += f", at most {bound} at once ({origin})" if origin else ", as many as the tokens allow"
    reasons = [Reason(choice="micro-batch", value=str(samples), why=why)]
    if tokens:
        why = f"padded tokens of a micro-batch at most ({tokens_origin}); a longer sample stands alone"
        reasons.append(Reason(choice="tokens", value=f"{tokens:,}", why=why))
    reasons.append(_accumulation(accumulation, tokens or None))
    is_proven = train.prove_micro_batch
    if is_proven is None:
        is_proven = accelerator != "cpu"
    if is_proven:
        why = "one forward and backward of the largest micro-batch before training"
        reasons.append(Reason(choice="proof", value="yes", why=why))
    eval_samples = train.per_device_eval_batch_size or _EVAL_FACTOR * samples
    return MicroBatch(
        samples=samples,
        tokens=tokens or None,
        eval_samples=eval_samples,
        eval_tokens=_EVAL_FACTOR * tokens if tokens else None,
        accumulation=accumulation,
        is_proven=is_proven,
        reasons=tuple(reasons),
    )


def tokens_that_fit(plan: LaunchPlan) -> int | None:
    """The bound in tokens that memory sets, or whoever runs the job: larger ones may not fit.

    Not a CPU's own, which is there for speed.
    """
    tokens = plan.max_tokens_per_micro_batch
    asked = plan.options.train.max_tokens_per_micro_batch
    return None if asked is None and tokens == _TOKENS[plan.accelerator] else tokens


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


def can_halve(plan: LaunchPlan, *, phase: PhaseName, longest_sample: int) -> bool:
    """Whether half of the micro-batch takes less memory.

    phase            what was being done when memory ran out
    longest_sample   tokens of the longest sample of that phase, 0 where it is not known
    """
    if phase in ("data", "model"):
        return False  # there was no micro-batch yet
    evaluates = phase == "evaluate"
    samples = plan.eval_micro_batch if evaluates else plan.micro_batch
    tokens = plan.eval_max_tokens if evaluates else plan.max_tokens_per_micro_batch
    if samples == 1:
        return False
    # The longest one stands alone already, and weighs more than any others together.
    return tokens is None or not longest_sample or tokens > longest_sample


def halve_micro_batch(plan: LaunchPlan, phase: PhaseName = "train") -> LaunchPlan | None:
    """The plan with half the memory for activations and the same global batch; None at one sample.

    Where memory ran out in an evaluation, training keeps what fits.
    """
    if plan.mode == "eval" or phase == "evaluate":
        return _halve_evaluation(plan)
    if plan.micro_batch == 1:
        return None
    micro_batch, tokens = plan.micro_batch // 2, _half(plan.max_tokens_per_micro_batch)
    accumulation = -(-plan.global_batch_size // (plan.world_size * micro_batch))
    same = "; the global batch is the same"
    changed = [
        _halved("micro-batch", plan.micro_batch, same),
        _halved("tokens", plan.max_tokens_per_micro_batch),
        _accumulation(accumulation, tokens),
    ]
    return replace(
        plan,
        micro_batch=micro_batch,
        max_tokens_per_micro_batch=tokens,
        eval_micro_batch=max(1, plan.eval_micro_batch // 2),
        eval_max_tokens=_half(plan.eval_max_tokens),
        accumulation=accumulation,
        reasons=_with(plan.reasons, changed),
    )


def _halve_evaluation(plan: LaunchPlan) -> LaunchPlan | None:
    if plan.eval_micro_batch == 1:
        return None
    changed = []
    if plan.mode == "eval":
        changed = [
            _halved("micro-batch", plan.eval_micro_batch),
            _halved("tokens", plan.eval_max_tokens),
        ]
    return replace(
        plan,
        eval_micro_batch=plan.eval_micro_batch // 2,
        eval_max_tokens=_half(plan.eval_max_tokens),
        reasons=_with(plan.reasons, changed),
    )


def _halved(choice: str, before: int | None, more: str = "") -> Reason | None:
    if before is None:
        return None
    why = f"half of {before:,}, for want of memory{more}"
    return Reason(choice=choice, value=f"{max(1, before // 2):,}", why=why)


def _with(reasons: Sequence[Reason], changed: Sequence[Reason | None]) -> tuple[Reason, ...]:
    """The reasons with those of the same choices exchanged; a bound that is new comes after the samples."""
    others = {reason.choice: reason for reason in changed if reason is not None}
    known = {reason.choice for reason in reasons}
    made: list[Reason] = []
    for reason in reasons:
        made.append(others.get(reason.choice, reason))
        if reason.choice == "micro-batch" and "tokens" in others.keys() - known:
            made.append(others["tokens"])
    return tuple(made)


def _half(tokens: int | None) -> int | None:
    return None if tokens is None else max(1, tokens // 2)


def limit_after(limit: SizeLimit, plan: LaunchPlan, phase: PhaseName) -> SizeLimit:
    """What `halve_micro_batch` left in that phase, for every plan that comes later."""
    limit = replace(limit, eval_samples=plan.eval_micro_batch, eval_tokens=plan.eval_max_tokens)
    if plan.mode == "eval" or phase == "evaluate":
        return limit
    return replace(limit, samples=plan.micro_batch, tokens=plan.max_tokens_per_micro_batch)


def keep_within(plan: LaunchPlan, limit: SizeLimit) -> LaunchPlan:
    """The plan with no more than memory has left of a micro-batch, and the same global batch."""
    samples = _least(plan.micro_batch, limit.samples)
    tokens = _least(plan.max_tokens_per_micro_batch, limit.tokens)
    eval_samples = _least(plan.eval_micro_batch, limit.eval_samples)
    eval_tokens = _least(plan.eval_max_tokens, limit.eval_tokens)
    assert samples is not None, "a plan has a number of samples"
    assert eval_samples is not None, "a plan has a number of samples"
    accumulation = -(-plan.global_batch_size // (plan.world_size * samples))
    if plan.mode == "eval":
        changed = [
            _lowered("micro-batch", plan.eval_micro_batch, eval_samples),
            _lowered("tokens", plan.eval_max_tokens, eval_tokens),
        ]
    else:
        changed = [
            _lowered("micro-batch", plan.micro_batch, samples),
            _lowered("tokens", plan.max_tokens_per_micro_batch, tokens),
            _accumulation(accumulation, tokens),
        ]
    return replace(
        plan,
        micro_batch=samples,
        max_tokens_per_micro_batch=tokens,
        eval_micro_batch=eval_samples,
        eval_max_tokens=eval_tokens,
        accumulation=accumulation,
        reasons=_with(plan.reasons, changed),
    )


def _least(planned: int | None, left: int | None) -> int | None:
    """Of two bounds that may be none."""
    return min((size for size in (planned, left) if size is not None), default=None)


def _lowered(choice: str, planned: int | None, now: int | None) -> Reason | None:
    if now is None or now == planned:
        return None
    instead = "" if planned is None else f"instead of {planned:,}: "
    why = f"{instead}memory ran out with twice as many before"
    return Reason(choice=choice, value=f"{now:,}", why=why)


def size_in_words(plan: LaunchPlan, phase: PhaseName) -> str:
    """ "8 samples, 1,024 padded tokens": what is computed at once in that phase, at most."""
    evaluates = plan.mode == "eval" or phase == "evaluate"
    samples = plan.eval_micro_batch if evaluates else plan.micro_batch
    tokens = plan.eval_max_tokens if evaluates else plan.max_tokens_per_micro_batch
    words = f"{samples} sample{'s' if samples > 1 else ''}"
    return words if tokens is None else f"{words}, {tokens:,} padded tokens"


def size_to_json(plan: LaunchPlan) -> dict[str, int | None]:
    """The same for events.jsonl."""
    return {
        "micro_batch": plan.micro_batch,
        "max_tokens_per_micro_batch": plan.max_tokens_per_micro_batch,
        "eval_micro_batch": plan.eval_micro_batch,
        "eval_max_tokens": plan.eval_max_tokens,
    }


def without_memory(plan: LaunchPlan, phase: PhaseName) -> str:
    """What to do where there is nothing to halve."""
    options, is_torch = plan.options, plan.strategy != "mindspore"
    loads, trains = phase in ("data", "model"), plan.mode == "train"
    ways = [] if loads else ["lower data.max_length"]
    if trains and is_torch:
        if not (loads or options.model.gradient_checkpointing):
            ways.append("set model.gradient_checkpointing=true")
        if plan.strategy != "zero3":
            ways.append("use --strategy zero3, which divides the model among the ranks")
        # On a CPU it is the same memory.
        if options.deepspeed.offload != "cpu" and plan.accelerator != "cpu":
            ways.append("set deepspeed.offload=cpu with zero1, zero2 or zero3")
        if options.lora.r is None:
            ways.append("train an adapter (lora.r=16)")
    ways.append("take a smaller model or devices with more memory")
    what = "The model by itself" if loads else "One sample at a time"
    listed = " or ".join([", ".join(ways[:-1]), ways[-1]] if len(ways) > 1 else ways)
    return f"{what} does not fit into the memory: {listed}."
