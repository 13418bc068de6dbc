"""How many samples a rank computes at once: chosen, explained, and halved where memory is short."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from ftlaunch.launcher.config import RunConfig
from ftlaunch.launcher.layout import Reason

if TYPE_CHECKING:
    from ftlaunch.launcher.plan import LaunchPlan

# Upper bounds of a micro-batch that nobody chose. Small ones pad less, because a global batch is
# sorted by length before it is cut; an accelerator needs larger ones to be busy.
_MICRO_BATCH = {"cpu": 8, "cuda": 32, "ascend": 32}
_EVAL_FACTOR = 2


def choose_micro_batch(config: RunConfig, world_size: int, accelerator: str) -> tuple[int, int]:
    """(samples of a micro-batch at most, micro-batches of a rank in an optimizer step)."""
    share = math.ceil(config.train.global_batch_size / world_size)
    bound = config.train.per_device_train_batch_size or _MICRO_BATCH[accelerator]
    accumulation = math.ceil(share / bound)
    return math.ceil(share / accumulation), accumulation


def eval_micro_batch(config: RunConfig, micro_batch: int) -> int:
    """Samples that a rank evaluates at once, at most."""
    return config.train.per_device_eval_batch_size or _EVAL_FACTOR * micro_batch


def explain_batch(
    config: RunConfig,
    world_size: int,
    accelerator: str,
    micro_batch: int,
    accumulation: int,
    reasons: list[Reason],
) -> None:
    """Adds to `reasons` how many samples are computed at once, and how often in a step."""
    size = config.train.global_batch_size
    asked = config.train.per_device_train_batch_size
    bound = asked or _MICRO_BATCH[accelerator]
    origin = "train.per_device_train_batch_size" if asked else f"the default on {accelerator}"
    share = math.ceil(size / world_size)
    why = f"{share} samples a rank of a global batch of {size}, at most {bound} at once ({origin})"
    reasons.append(Reason(choice="micro-batch", value=str(micro_batch), why=why))
    why = f"{accumulation} micro-batch(es) a rank, then one exchange of gradients"
    reasons.append(Reason(choice="accumulation", value=str(accumulation), why=why))


def halve_micro_batch(plan: LaunchPlan) -> LaunchPlan | None:
    """The plan with half the memory for activations and the same global batch; None at one sample."""
    if plan.micro_batch == 1:
        return None
    micro_batch = plan.micro_batch // 2
    share = math.ceil(plan.global_batch_size / plan.world_size)
    accumulation = math.ceil(share / micro_batch)
    why = f"half of {plan.micro_batch}, for want of memory; the global batch is the same"
    changed = {
        "micro-batch": Reason(choice="micro-batch", value=str(micro_batch), why=why),
        "accumulation": Reason(
            choice="accumulation",
            value=str(accumulation),
            why=f"{accumulation} micro-batch(es) a rank, then one exchange of gradients",
        ),
    }
    return replace(
        plan,
        micro_batch=micro_batch,
        eval_micro_batch=max(1, plan.eval_micro_batch // 2),
        accumulation=accumulation,
        reasons=tuple(changed.get(reason.choice, reason) for reason in plan.reasons),
    )
