"""Data-parallel gradients with a few numbers beside them, so that ranks tell each other something in a step
without an exchange of its own.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.nn.parallel import DistributedDataParallel


class DataParallel:
    """DDP around a model. `backward` says numbers, `heard` has their sums over the ranks.

    They are the gradient of a parameter of ours that stands beside the model, and so lie in one of the
    buckets that DDP exchanges anyway. In fp32, as all gradients here.
    """

    def __init__(
        self, model: Any, device: torch.device, *, num_entries: int, has_unused: bool
    ) -> None:
        """Collective.

        has_unused   some parameter gets no gradient: DDP looks for them in every step. The same on all
                     ranks.
        """
        self._beside = _WithEntries(model, num_entries, device)
        arguments: dict[str, Any] = {
            "device_ids": [device.index] if device.type == "cuda" else None,
            "gradient_as_bucket_view": True,
            "find_unused_parameters": has_unused,
            **_without_buffer_sync(),
        }
        self.ddp = DistributedDataParallel(self._beside, **arguments)
        self._entries: Any = None

    def __call__(self, **inputs: Any) -> Any:
        output, self._entries = self.ddp(**inputs)
        return output

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Gradients of what is called herein stay with this rank."""
        return cast(contextlib.AbstractContextManager[None], self.ddp.no_sync())

    def backward(self, loss: torch.Tensor, said: torch.Tensor) -> None:
        """Collective: gradients of the mean of the ranks' losses; said (entries,) fp32."""
        if self._beside.entries.grad is not None:
            self._beside.entries.grad.zero_()
        # DDP divides by the number of ranks.
        gradient = said * self.ddp.process_group.size()
        torch.autograd.backward([loss, self._entries], cast(Any, [None, gradient]))

    def heard(self) -> torch.Tensor:
        """(entries,) The sums of what all ranks have said with the last `backward`, until the next one. Equal
        on all ranks, and off by a rounding where the number of ranks is no power of two.
        """
        assert self._beside.entries.grad is not None, "heard before backward"
        return self._beside.entries.grad


class _WithEntries(torch.nn.Module):
    def __init__(self, model: Any, num_entries: int, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self.entries = torch.nn.Parameter(torch.zeros(num_entries, device=device))

    def forward(self, **inputs: Any) -> Sequence[Any]:
        # Where DDP looks for unused parameters it looks at how what is returned was computed.
        return self.model(**inputs), self.entries.view_as(self.entries)


def _without_buffer_sync() -> dict[str, bool]:
    """Buffers are equal everywhere from the start; torch 2.13 renamed the switch."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return {name: False}
