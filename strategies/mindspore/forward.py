"""Forward passes of a MindSpore model: the summed loss of a micro-batch, and logits for evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import ops
from numpy.typing import NDArray

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.base import Batch

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


LOSSES: dict[str, LossSum] = {"cross_entropy": cross_entropy_sum, "mse": squared_error_sum}


def check_padding_inside(batch: Batch, pad_token_id: int) -> None:
    """UserError where the padding token stands in a text: mindone's Qwen2 takes what comes before the
    first one for the whole text, transformers what comes before the last.
    """
    inside = (batch.inputs["input_ids"] == pad_token_id) & (batch.inputs["attention_mask"] == 1)
    rows = inside.any(axis=1) & (batch.indices >= 0)
    if rows.any():
        raise UserError(
            f"sample {int(batch.indices[rows][0])} has the padding token (number {pad_token_id}) "
            "inside its text, which mindone's model would cut off there. Choose a tokenizer whose "
            "padding token is one of its own (model.tokenizer), or use --strategy ddp."
        )


def logits_of(model: Any, batch: Batch) -> Any:
    """(rows, outputs)"""
    inputs = {name: ms.Tensor(values) for name, values in batch.inputs.items()}
    return model(**inputs, return_dict=True).logits


def pad_to_buckets(
    batch: Batch, *, rows: int, pad_token_id: int, max_length: int | None = None
) -> Batch:
    """The same samples in one of a few shapes: lengths rounded up to a power of two or one and a half
    times that, from 16 on, or to the model's `max_length`; rows filled up to `rows` with rows of weight 0.

    An NPU compiles every operation anew for a shape that it has not seen.
    """
    present, length = batch.inputs["input_ids"].shape
    target = bucket(length) if max_length is None else min(bucket(length), max(length, max_length))
    inputs = {}
    for name, values in batch.inputs.items():
        filler = pad_token_id if name == "input_ids" else 0
        padded = np.full((rows, target), filler, dtype=values.dtype)
        padded[:present, :length] = values
        inputs[name] = padded
    # A row without any token to attend to would be a softmax over nothing.
    inputs["attention_mask"][present:, 0] = 1

    def fill(values: NDArray[Any], filler: float) -> NDArray[Any]:
        result = np.full((rows,), filler, dtype=values.dtype)
        result[:present] = values
        return result

    return Batch(
        inputs=inputs,
        labels=fill(batch.labels, 0),
        weights=fill(batch.weights, 0),
        indices=fill(batch.indices, -1),
        seed=batch.seed,
    )


def bucket(length: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, … that is not below `length`."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size
