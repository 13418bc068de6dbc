"""Sums of item losses in fp32, and what a model makes of labels of tokens. Never a mean: the division by
the global count is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import ops
from numpy.typing import NDArray

from ftlaunch.strategies.base import TokenScores
from ftlaunch.strategies.data.tasks import UNSUPERVISED
from ftlaunch.strategies.mindspore.forward import bucket

LossSum = Callable[[Any, NDArray[Any], NDArray[np.float32]], Any]


def cross_entropy_sum(logits: Any, labels: NDArray[Any], weights: NDArray[np.float32]) -> Any:
    """Sum over rows of weight · −log softmax(logits)[label]; logits (rows, classes)."""
    chosen = np.zeros(tuple(logits.shape), dtype=np.float32)
    chosen[np.arange(len(labels)), labels] = weights
    return -(ops.log_softmax(logits.astype(ms.float32), -1) * ms.Tensor(chosen)).sum()


def squared_error_sum(logits: Any, labels: NDArray[Any], weights: NDArray[np.float32]) -> Any:
    """Sum over rows of weight · (logit − target)²; logits (rows, 1)."""
    targets = ms.Tensor(labels.astype(np.float32))
    errors = logits.astype(ms.float32).squeeze(-1) - targets
    return (ms.Tensor(weights) * ops.square(errors)).sum()


def binary_cross_entropy_sum(
    logits: Any, labels: NDArray[Any], weights: NDArray[np.float32]
) -> Any:
    """Sum over rows and outputs of weight · −log of the probability of the label, 0 or 1; all of them
    (rows, outputs).
    """
    # −log sigmoid(x) where the label is 1, −log sigmoid(−x) where it is 0.
    signs = ms.Tensor((2 * labels - 1).astype(np.float32))
    return (ms.Tensor(weights) * ops.softplus(-signs * logits.astype(ms.float32))).sum()


def token_cross_entropy_sum(logits: Any, labels: NDArray[Any], weights: NDArray[np.float32]) -> Any:
    """Sum over tokens of weight · −log softmax(logits)[label]; logits (rows, length, classes), labels
    and weights (rows, length). Tokens without weight may hold anything.
    """
    positions = np.flatnonzero(weights)
    found = _chosen_logits(logits, positions)
    flat = np.zeros(found.shape[0], dtype=np.float32)
    flat[: len(positions)] = weights.reshape(-1)[positions]
    return (_token_losses(found, labels.reshape(-1)[positions]) * ms.Tensor(flat)).sum()


def token_scores(logits: Any, labels: NDArray[Any]) -> TokenScores:
    """Loss and winner of each token that has a label; logits (rows, length, classes), labels
    (rows, length).
    """
    positions = np.flatnonzero(labels != UNSUPERVISED)
    count = len(positions)
    found = _chosen_logits(logits, positions)
    losses = np.zeros(labels.size, dtype=np.float32)
    losses[positions] = _token_losses(found, labels.reshape(-1)[positions]).asnumpy()[:count]
    winners = np.zeros(labels.size, dtype=np.int64)
    winners[positions] = ops.argmax(found, -1).asnumpy()[:count]
    return TokenScores(losses=losses.reshape(labels.shape), winners=winners.reshape(labels.shape))


def _chosen_logits(logits: Any, positions: NDArray[np.int64]) -> Any:
    """Those of the tokens at `positions`, as fp32; then more of the first token, up to one of a few
    numbers: an NPU compiles every operation anew for a shape that it has not seen.
    """
    places = np.zeros(bucket(len(positions)), dtype=np.int32)
    places[: len(positions)] = positions
    flat = logits.reshape(-1, logits.shape[-1])
    return ops.gather(flat, ms.Tensor(places), 0).astype(ms.float32)


def _token_losses(logits: Any, labels: NDArray[Any]) -> Any:
    """(tokens,) −log softmax(logits)[label]; logits (tokens, classes), labels of the first of them."""
    wanted = np.zeros((logits.shape[0], 1), dtype=np.int32)
    wanted[: len(labels), 0] = labels
    return -ops.gather_elements(ops.log_softmax(logits, -1), 1, ms.Tensor(wanted)).squeeze(-1)


LOSSES: dict[str, LossSum] = {
    "cross_entropy": cross_entropy_sum,
    "mse": squared_error_sum,
    "binary_cross_entropy": binary_cross_entropy_sum,
    "token_cross_entropy": token_cross_entropy_sum,
}
