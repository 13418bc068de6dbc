"""Learning rates as a function of the number of optimizer steps applied so far. Nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ftlaunch.strategies.options import TrainOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Linear warmup to `peak`, then the named decay to 0 at `total_steps`.

    The same values as transformers.get_scheduler gives for these names.
    """

    name: str
    peak: float
    warmup_steps: int
    total_steps: int

    def learning_rate(self, applied_steps: int) -> float:
        """The rate of the next step, after `applied_steps` applied ones."""
        if applied_steps < self.warmup_steps:
            return self.peak * applied_steps / self.warmup_steps
        if self.name == "constant":
            return self.peak
        decay_steps = max(1, self.total_steps - self.warmup_steps)
        done = min(1.0, (applied_steps - self.warmup_steps) / decay_steps)
        if self.name == "linear":
            return self.peak * (1.0 - done)
        assert self.name == "cosine"
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * done))


def make_schedule(options: TrainOptions, total_steps: int) -> Schedule:
    warmup = options.warmup_steps
    return Schedule(
        name=options.lr_scheduler_type,
        peak=options.learning_rate,
        warmup_steps=math.ceil(warmup * total_steps) if warmup < 1 else int(warmup),
        total_steps=total_steps,
    )
