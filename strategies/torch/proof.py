"""A forward and a backward pass that take the memory of a step and leave nothing behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def without_trace(model: Any, device: torch.device) -> Iterator[None]:
    """Random generators and the model's buffers are afterwards what they were."""
    on_cuda = device.type == "cuda"
    state = torch.get_rng_state()
    cuda_state = torch.cuda.get_rng_state(device) if on_cuda else None
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        torch.set_rng_state(state)
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state, device)
        with torch.no_grad():
            for buffer, values in buffers:
                buffer.copy_(values)


def taken(like: Iterable[torch.Tensor], times: int = 1) -> list[torch.Tensor]:
    """Memory as for so many fp32 tensors of each, written to: the host gives pages only then."""
    return [
        torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device).fill_(0.0)
        for tensor in like
        for _ in range(times)
    ]
