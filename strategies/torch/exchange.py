"""The exchange test of torch's ranks: gloo on CPUs, NCCL on GPUs."""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ftlaunch.strategies.exchange import ExchangeRequest
from ftlaunch.strategies.torch.group import leave_process_group, meet


def open_exchange(request: ExchangeRequest) -> TorchExchange:
    """Collective: meet the other ranks."""
    torch.set_num_threads(request.num_threads)
    device = torch.device("cpu")
    if request.accelerator == "cuda":
        device = torch.device("cuda", request.device)
        torch.cuda.set_device(device)
    meet(
        request.world,
        device,
        listen_fd=request.listen_fd,
        timeout_seconds=request.timeout_seconds,
    )
    return TorchExchange(device)


class TorchExchange:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def add(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        tensor = torch.from_numpy(values.copy()).to(self._device)
        dist.all_reduce(tensor)
        summed: NDArray[np.float32] = tensor.cpu().numpy()
        return summed

    def time(self, num_bytes: int, repeats: int) -> list[float]:
        tensor = torch.zeros(num_bytes // 4, dtype=torch.float32, device=self._device)
        # The first one opens connections.
        self._time_one(tensor)
        return [self._time_one(tensor) for _ in range(repeats)]

    def _time_one(self, tensor: torch.Tensor) -> float:
        started = time.perf_counter()
        dist.all_reduce(tensor)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - started

    def leave(self) -> None:
        leave_process_group()
