"""Sums of item losses in fp32. Never a mean: the division by the global count is the caller's.

Weights are None where all are 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from ftlaunch.strategies.torch.chunked_loss import LogitsLoss

LossSum = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def cross_entropy_sum(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """Sum over rows of weight · −log softmax(logits)[label]; logits (rows, classes)."""
    if weights is None:
        return functional.cross_entropy(logits.float(), labels, reduction="sum")
    losses = functional.cross_entropy(logits.float(), labels, reduction="none")
    return (losses * weights).sum()


def squared_error_sum(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """Sum over rows of weight · (logit − target)²; logits (rows, 1)."""
    return _weighted_sum((logits.float().squeeze(-1) - labels) ** 2, weights)


def binary_cross_entropy_sum(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """Sum over rows and outputs of weight · −log of the probability of the label, 0 or 1; all of them
    (rows, outputs).
    """
    losses = functional.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none")
    return _weighted_sum(losses, weights)


def token_cross_entropy_sum(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """Sum over tokens of weight · −log softmax(logits)[label], in pieces; logits (tokens, classes). Only
    of tokens with a label: to choose them here would make everyone wait for the device.
    """
    total: torch.Tensor = LogitsLoss.apply(  # type: ignore[no-untyped-call]
        logits, labels, weights
    )
    return total


def _weighted_sum(losses: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    return (losses if weights is None else losses * weights).sum()


LOSSES: dict[str, LossSum] = {
    "cross_entropy": cross_entropy_sum,
    "mse": squared_error_sum,
    "binary_cross_entropy": binary_cross_entropy_sum,
    "token_cross_entropy": token_cross_entropy_sum,
}
