"""Forward passes of a MindSpore model: its logits of a micro-batch, and batches in few shapes."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from numpy.typing import NDArray

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.base import Batch
from ftlaunch.strategies.data.tasks import UNSUPERVISED

# Families that mindone classifies by the token before the first padding token of a row, and transformers
# by the last token that is none.
CUT_AT_PADDING = ("llama", "qwen2")


def check_padding_inside(batch: Batch, pad_token_id: int) -> None:
    """UserError where the padding token stands in a text, for classifiers of `CUT_AT_PADDING`."""
    inside = (batch.inputs["input_ids"] == pad_token_id) & (batch.inputs["attention_mask"] == 1)
    rows = inside.any(axis=1) & (batch.indices >= 0)
    if rows.any():
        raise UserError(
            f"sample {int(batch.indices[rows][0])} has the padding token (number {pad_token_id}) "
            "inside its text, which mindone's model would take for the text's end. Choose a tokenizer "
            "whose padding token is one of its own (model.tokenizer), or use --strategy ddp."
        )


def logits_of(model: Any, batch: Batch) -> Any:
    """(rows, outputs), or (rows, length, outputs) of a model with outputs for tokens."""
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

    # Labels of tokens are as wide as the inputs.
    width = (target,) if batch.is_of_tokens else batch.labels.shape[1:]

    def fill(values: NDArray[Any], filler: float, *shape: int) -> NDArray[Any]:
        result = np.full((rows, *shape), filler, dtype=values.dtype)
        result[tuple(map(slice, values.shape))] = values
        return result

    return Batch(
        inputs=inputs,
        labels=fill(batch.labels, UNSUPERVISED if batch.is_of_tokens else 0, *width),
        weights=fill(batch.weights, 0, *width),
        indices=fill(batch.indices, -1),
        seed=batch.seed,
        lengths=None if batch.lengths is None else fill(batch.lengths, 0),
    )


def bucket(length: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, … that is not below `length`."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size
