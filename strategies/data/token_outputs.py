"""What an evaluation found on samples with a label for each token, and the numbers that follow from it.

Knows sums and classes of tokens; nothing of ranks, models or text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ftlaunch.strategies.data.tasks import TaskSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOutputs:
    """Of every sample, in the order of the table; the same on every rank.

    loss_sums    (samples,) float64, sum over the supervised tokens of weight times loss
    weight_sums  (samples,) float64
    num_items    (samples,) int64 supervised tokens
    num_correct  (samples,) int64 of these, predicted right
    origins      (samples,) int64 row of the data
    winners      for each sample the class with the highest logit at each token, (tokens,) int64, and
    labels       the same for the labels, `UNSUPERVISED` where there is none;
                 both None unless `TaskSpec.keeps_winners`
    """

    loss_sums: NDArray[np.float64]
    weight_sums: NDArray[np.float64]
    num_items: NDArray[np.int64]
    num_correct: NDArray[np.int64]
    origins: NDArray[np.int64]
    winners: list[NDArray[np.int64]] | None = None
    labels: list[NDArray[np.int64]] | None = None


TokenMetric = Callable[[TokenOutputs, "TaskSpec"], Mapping[str, float]]


def mean_loss(outputs: TokenOutputs) -> float:
    """Weighted mean over all supervised tokens."""
    weight = float(outputs.weight_sums.sum())
    return float(outputs.loss_sums.sum()) / weight if weight else math.nan


def perplexity(outputs: TokenOutputs, spec: TaskSpec) -> dict[str, float]:
    """exp of the mean loss; infinite where that is too large for a number."""
    try:
        return {"perplexity": math.exp(mean_loss(outputs))}
    except OverflowError:
        return {"perplexity": math.inf}


def token_accuracy(outputs: TokenOutputs, spec: TaskSpec) -> dict[str, float]:
    """Share of the supervised tokens that got the highest logit."""
    return {"token_accuracy": int(outputs.num_correct.sum()) / max(1, int(outputs.num_items.sum()))}


def sample_records(outputs: TokenOutputs) -> list[dict[str, Any]]:
    """One record a sample: its mean loss, its supervised tokens, the share of them predicted right."""
    return [
        {
            "index": int(outputs.origins[i]),
            "loss": float(outputs.loss_sums[i]) / (float(outputs.weight_sums[i]) or 1.0),
            "num_tokens": int(outputs.num_items[i]),
            "token_accuracy": int(outputs.num_correct[i]) / max(1, int(outputs.num_items[i])),
        }
        for i in range(len(outputs.num_items))
    ]
