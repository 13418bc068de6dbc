"""Whole tensors and their slices: what a rank saves of what every rank has, and what it loads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ftlaunch.cluster.world import World
from ftlaunch.strategies.base import StateReader, TensorSlice
from ftlaunch.strategies.shares import own_runs


def own_share(
    tensors: Sequence[tuple[str, str, torch.Tensor]], world: World
) -> Iterator[TensorSlice]:
    """Of (kind, name, tensor) that every rank has whole, the r-th of W equal runs of all elements.

    Floating-point values become fp32. On a CPU the slices are views.
    """
    for number, start, end in own_runs([tensor.numel() for _, _, tensor in tensors], world):
        kind, name, tensor = tensors[number]
        values = tensor.detach().reshape(-1)[start:end]
        if values.is_floating_point():
            values = values.float()
        yield TensorSlice(
            name=name,
            kind=kind,
            shape=tuple(tensor.shape),
            start=start,
            values=values.cpu().numpy(),
        )


def copy_whole(reader: StateReader, kind: str, name: str, tensor: torch.Tensor) -> None:
    """Take a whole tensor from a checkpoint. CheckpointDamaged when it is not all there."""
    if tensor.numel() == 0:
        return  # no slice holds it
    values = np.array(reader.read(kind, name, 0, tensor.numel()))
    tensor.data.copy_(torch.from_numpy(values).reshape(tensor.shape))
