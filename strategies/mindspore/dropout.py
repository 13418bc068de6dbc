"""Dropout without a state: what a micro-batch drops follows from its seed alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import mint, nn, ops
from numpy.typing import NDArray

_MAX_SEED = 2**31


class _Masks:
    """The generator of the masks that are drawn on the host."""

    generator = np.random.Generator(np.random.SFC64(0))


def seed_dropout(seed: int) -> None:
    """Before each micro-batch. MindSpore's own generator serves where it has the kernel."""
    ms.manual_seed(seed % _MAX_SEED)
    _Masks.generator = np.random.Generator(np.random.SFC64(seed))


@contextlib.contextmanager
def without_trace() -> Iterator[None]:
    """Random numbers are afterwards what they were."""
    generator, state = _Masks.generator, ms.get_rng_state()
    try:
        yield
    finally:
        _Masks.generator = generator
        ms.set_rng_state(state)


def draw_mask(shape: tuple[int, ...], p: float) -> NDArray[np.float32]:
    """1 / (1 − p) with probability 1 − p, else 0."""
    kept = _Masks.generator.random(shape, dtype=np.float32) >= np.float32(p)
    scaled: NDArray[np.float32] = kept.astype(np.float32) * np.float32(1.0 / (1.0 - p))
    return scaled


def _construct(cell: Any, x: Any) -> Any:
    if not cell.training or cell.p == 0.0:
        return x
    return mint.nn.functional.dropout(x, cell.p, True)


def _function(input: Any, p: float = 0.5, training: bool = True, seed: int | None = None) -> Any:
    if not training or p == 0.0:
        return input
    return mint.nn.functional.dropout(input, p, True)


def make_dropout_stateless() -> None:
    """Everything draws through one function. The classic ones have a generator of their own, in their
    kernel, that no seed sets back.
    """
    for cell in (nn.Dropout, mint.nn.Dropout):
        cell.construct = _construct
    ops.dropout = _function
