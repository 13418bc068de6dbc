"""Measures torch ranks: the peak of a product of matrices, and what they wait for. See `Instruments`.

On CPUs a wait is seen by the host's clock. On GPUs it is seen by events in the default stream, which
computes: what passes in other streams meanwhile is hidden, and costs nothing.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from ftlaunch.strategies.base import Strategy, StrategyRequest
from ftlaunch.strategies.flops import Weight
from ftlaunch.strategies.torch.forward import DTYPES

_COLLECTIVES = (
    "all_reduce",
    "all_reduce_coalesced",
    "reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_into_tensor_coalesced",
    "_all_gather_base",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "_reduce_scatter_base",
    "all_to_all",
    "all_to_all_single",
    "barrier",
)
_SMALLEST_MATRIX = 256
_LARGEST_MATRIX = {"cpu": 2048, "cuda": 8192}
# Of one product; below it a larger one is tried.
_PRODUCT_SECONDS = 0.02
_PEAK_SECONDS = 0.6


class TorchInstruments:
    """Implements `instruments.Instruments`."""

    def __init__(self, request: StrategyRequest) -> None:
        cuda = request.accelerator == "cuda"
        self._device = (
            torch.device("cuda", request.world.local_rank) if cuda else torch.device("cpu")
        )
        self._dtype = DTYPES[request.precision]
        self._waits: list[tuple[Any, Any]] = []
        self._gradients_at: Any = None
        self._watches = False
        self._depth = 0
        self._replace_collectives()

    # -- time -------------------------------------------------------------------------------

    def stamp(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.default_stream(self._device))
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        if self._device.type != "cuda":
            return float(end - begin)
        return float(begin.elapsed_time(end)) / 1000

    def synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    # -- the model and the device -----------------------------------------------------------

    def weights(self, strategy: Strategy) -> list[Weight]:
        return model_weights(_model_of(strategy))

    def peak_flops(self) -> float:
        best, size = 0.0, _SMALLEST_MATRIX
        with torch.no_grad():
            # Larger ones are faster, up to what the device is made for; some precisions are emulated.
            while best < _PRODUCT_SECONDS and size < _LARGEST_MATRIX[self._device.type]:
                size *= 2
                best = self._product_seconds(size, 0.0)
            best = self._product_seconds(size, _PEAK_SECONDS)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        return 2.0 * size**3 / best

    def _product_seconds(self, size: int, at_least: float) -> float:
        """The fastest of those that fit into so many seconds, and of two; the first does not count."""
        a = torch.randn(size, size, device=self._device).to(self._dtype)
        b = torch.randn(size, size, device=self._device).to(self._dtype)
        torch.mm(a, b)
        self.synchronize()
        found: list[float] = []
        while len(found) < 2 or sum(found) < at_least:
            begin = self.stamp()
            torch.mm(a, b)
            end = self.stamp()
            self.synchronize()
            found.append(self.seconds(begin, end))
        return min(found)

    # -- waiting ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def watching(self, strategy: Strategy) -> Iterator[None]:
        handles = []
        if getattr(strategy, "exchanges_in_backward", False):
            # The reducer is C++: no call of it is seen, but the gradients that it waits to exchange.
            handles = [
                parameter.register_post_accumulate_grad_hook(self._note_gradient)
                for parameter in _model_of(strategy).parameters()
                if parameter.requires_grad
            ]
        self._watches = True
        try:
            yield
        finally:
            self._watches = False
            for handle in handles:
                handle.remove()

    def _note_gradient(self, _: torch.Tensor) -> None:
        self._gradients_at = self.stamp()

    def exchange_ended(self) -> None:
        if self._gradients_at is not None:
            self._waits.append((self._gradients_at, self.stamp()))
            self._gradients_at = None

    def take_waits(self) -> list[tuple[Any, Any]]:
        waits, self._waits = self._waits, []
        return waits

    def _replace_collectives(self) -> None:
        """For the rest of the process, which measures and ends."""
        for name in _COLLECTIVES:
            original = getattr(dist, name, None)
            if original is None:
                continue
            timed = self._timed(original)
            setattr(dist, name, timed)
            if hasattr(dist.distributed_c10d, name):
                setattr(dist.distributed_c10d, name, timed)

    def _timed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self._watches or self._depth:
                return original(*args, **kwargs)
            self._depth += 1
            begin = self.stamp()
            try:
                work = original(*args, **kwargs)
            finally:
                self._depth -= 1
            if isinstance(work, dist.Work):
                return _TimedWork(work, self)
            self._waits.append((begin, self.stamp()))
            return work

        return call


class _TimedWork:
    """A collective under way: waiting for it is a wait."""

    def __init__(self, work: Any, instruments: TorchInstruments) -> None:
        self._work = work
        self._instruments = instruments

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        begin = self._instruments.stamp()
        result = self._work.wait(*args, **kwargs)
        self._instruments._waits.append((begin, self._instruments.stamp()))
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def model_weights(model: Any) -> list[Weight]:
    """The parameters of a torch model, each once, in the order in which its modules were made."""
    looked_up = {
        id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)
    }
    head = getattr(model, "get_output_embeddings", lambda: None)()
    of_head = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    kinds = dict.fromkeys(looked_up, "embedding") | dict.fromkeys(of_head, "head")
    return [
        Weight(
            name=name,
            # ZeRO-3 leaves a rank a part of it.
            size=int(getattr(parameter, "ds_numel", parameter.numel())),
            kind=kinds.get(id(parameter), "token"),  # type: ignore[arg-type]
            trained=parameter.requires_grad,
        )
        for name, parameter in model.named_parameters()
        # Of a module that an adapter trains whole the original is kept, and not used.
        if ".original_module." not in name
    ]


def _model_of(strategy: Strategy) -> Any:
    """The model itself, below whatever wraps it."""
    engine = getattr(strategy, "_engine", None)
    return strategy.model if engine is None else engine.module  # type: ignore[attr-defined]
