"""What a job's options mean for its data: how many steps, in which order, with which weights.

Knows numbers and labels; nothing of ranks or models.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.data.batches import Collator
from ftlaunch.strategies.data.sample_order import SampleOrder
from ftlaunch.strategies.data.token_cache import Tokens
from ftlaunch.strategies.options import JobOptions


def sample_order(options: JobOptions, tokens: Tokens) -> SampleOrder:
    return SampleOrder(
        num_samples=len(tokens.train),
        global_batch_size=options.train.global_batch_size,
        seed=options.train.seed,
    )


def total_steps(options: JobOptions, tokens: Tokens) -> int:
    """Optimizer steps of the whole job."""
    if options.train.max_steps is not None:
        return options.train.max_steps
    per_epoch = sample_order(options, tokens).steps_per_epoch
    return max(1, math.ceil(options.train.num_train_epochs * per_epoch))


def train_collator(
    options: JobOptions, tokens: Tokens, *, alive: Callable[[], None] = lambda: None
) -> Collator:
    return Collator(
        table=tokens.train,
        pad_token_id=tokens.pad_token_id,
        class_weights=class_weights(options, tokens),
        alive=alive,
    )


def class_weights(options: JobOptions, tokens: Tokens) -> NDArray[np.float32] | None:
    """Weight of each class. "balanced" is n / (classes · count), as in scikit-learn."""
    wanted = options.train.class_weights
    if wanted is None:
        return None
    if tokens.spec.problem != "classification":
        raise UserError(
            f"train.class_weights is set, but the labels in {tokens.spec.label_column!r} are "
            "numbers to predict, not classes. Leave it out."
        )
    names = tokens.spec.label_names
    if wanted == "balanced":
        counts = tokens.train.label_counts()
        if not counts.all():
            absent = [name for name, count in zip(names, counts, strict=True) if not count]
            raise UserError(
                f"train.class_weights=balanced: no training sample has the label "
                f"{', '.join(map(repr, absent))}. Give the weights as a list."
            )
        balanced: NDArray[np.float32] = (counts.sum() / (len(counts) * counts)).astype(np.float32)
        return balanced
    if len(wanted) != len(names):
        raise UserError(
            f"train.class_weights has {len(wanted)} values; the data has {len(names)} classes, in "
            f"this order: {', '.join(names)}. Give one weight for each."
        )
    return np.array(wanted, dtype=np.float32)
