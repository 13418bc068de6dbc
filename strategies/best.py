"""Which evaluation was the best so far, and whether it is time to give up waiting for a better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.options import CheckpointOptions

_LOWER_IS_BETTER = ("loss", "mse", "mae", "rmse", "perplexity")


class BestTracker:
    """Remembers the best evaluation by one metric.

    best           {"step", "metric", "value", "metrics"} of the best evaluation, None before the first
    without_gain   evaluations since the last that was better by more than `threshold`
    """

    def __init__(
        self, options: CheckpointOptions, *, patience: int | None, threshold: float
    ) -> None:
        self.metric = options.metric_for_best_model.removeprefix("eval_")
        lower = self.metric in _LOWER_IS_BETTER or self.metric.endswith("_loss")
        greater = options.greater_is_better
        self._sign = 1.0 if (not lower if greater is None else greater) else -1.0
        self._patience = patience
        self._threshold = threshold
        self.best: Mapping[str, Any] | None = None
        self.without_gain = 0

    def load(self, best: Mapping[str, Any] | None, without_gain: int) -> None:
        """Take over what a manifest holds; another metric is looked up in the same evaluation."""
        if best is None or self.metric not in best["metrics"]:
            return
        same = best["metric"] == self.metric
        value = best["metrics"][self.metric]
        self.best = {**best, "metric": self.metric, "value": value}
        self.without_gain = without_gain if same else 0

    def check(self, metric_names: Sequence[str]) -> None:
        """UserError when the metric is not among those that evaluation yields."""
        if self.metric not in metric_names:
            raise UserError(
                f"checkpoint.metric_for_best_model is {self.metric!r}, which evaluation does not "
                f"yield. It yields: {', '.join(metric_names)}. Choose one, or add it to train.metrics."
            )

    def observe(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Take an evaluation into account; True when it is the best so far."""
        value = metrics[self.metric]
        if self.best is None:
            gain = float("inf")
        else:
            gain = self._sign * (value - float(self.best["value"]))
        self.without_gain = 0 if gain > self._threshold else self.without_gain + 1
        # NaN is never better, and never the first.
        if not gain > 0 or value != value:
            return False
        self.best = {
            "step": step,
            "metric": self.metric,
            "value": value,
            "metrics": dict(metrics),
        }
        return True

    @property
    def exhausted(self) -> bool:
        return self._patience is not None and self.without_gain >= self._patience
