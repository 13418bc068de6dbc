"""What a job's options mean for its data: how many steps, in which order, with which weights.

Knows numbers and labels; nothing of ranks or models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import numpy as np
from numpy.typing import NDArray

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.data.batches import Batches, Collator
from ftlaunch.strategies.data.sample_order import SampleOrder
from ftlaunch.strategies.data.tasks import TokenTask, load_task
from ftlaunch.strategies.data.token_batches import TokenCollator
from ftlaunch.strategies.data.token_cache import Tokens
from ftlaunch.strategies.data.token_samples import TokenSamples
from ftlaunch.strategies.data.token_table import TokenTable
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


def make_collator(
    options: JobOptions,
    tokens: Tokens,
    table: TokenTable | TokenSamples,
    *,
    class_weights: NDArray[np.float32] | None,
    alive: Callable[[], None] = lambda: None,
) -> Batches:
    """What makes batches of the samples of `table`, one of those in `tokens`."""
    if tokens.spec.layout.per != "token":
        return Collator(
            table=cast(TokenTable, table),
            pad_token_id=tokens.pad_token_id,
            class_weights=class_weights,
            alive=alive,
        )
    return TokenCollator(
        table=table,
        task=cast(TokenTask, load_task(tokens.spec.task)),
        spec=tokens.spec,
        pad_token_id=tokens.pad_token_id,
        seed=options.train.seed,
        class_weights=class_weights,
        alive=alive,
    )


def class_weights(options: JobOptions, tokens: Tokens) -> NDArray[np.float32] | None:
    """Weight of each class. "balanced" is n / (classes · count), as in scikit-learn."""
    wanted = options.train.class_weights
    if wanted is None:
        return None
    names = tokens.spec.label_names
    if not names:
        what = (
            "numbers to predict" if tokens.spec.problem == "regression" else "a text's own tokens"
        )
        raise UserError(
            f"train.class_weights is set, but the labels{_in_column(tokens)} are {what}, not classes. "
            "Leave it out."
        )
    if wanted == "balanced":
        if tokens.spec.problem != "classification":
            raise UserError(
                "train.class_weights=balanced counts samples of each class, and a sample here has "
                "several labels. Give the weights as a list."
            )
        counts = cast(TokenTable, tokens.train).label_counts()
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


def _in_column(tokens: Tokens) -> str:
    return f" in {tokens.spec.label_column!r}" if tokens.spec.label_column else ""
