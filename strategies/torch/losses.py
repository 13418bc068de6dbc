"""Sums of item losses in fp32. Never a mean: the division by the global count is the caller's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

LossSum = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def cross_entropy_sum(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Sum over rows of weight · −log softmax(logits)[label]; logits (rows, classes)."""
    losses = functional.cross_entropy(logits.float(), labels, reduction="none")
    return (losses * weights).sum()


def squared_error_sum(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Sum over rows of weight · (logit − target)²; logits (rows, 1)."""
    return (weights * (logits.float().squeeze(-1) - labels) ** 2).sum()


LOSSES: dict[str, LossSum] = {"cross_entropy": cross_entropy_sum, "mse": squared_error_sum}
