"""Measures MindSpore ranks. See `instruments.Instruments`. On NPUs untested.

Its collectives return when they are asked for on NPUs; there every stamp waits for the device, so that
what is measured is done one after the other.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import ops

from ftlaunch.strategies.base import Strategy, StrategyRequest
from ftlaunch.strategies.flops import Weight
from ftlaunch.strategies.mindspore import data_parallel
from ftlaunch.strategies.mindspore.model import NamedModel

_DTYPES = {"fp32": ms.float32, "bf16": ms.bfloat16, "fp16": ms.float16}
_MATRIX = {"cpu": 1536, "ascend": 8192}
_PEAK_SECONDS = 0.6
_LEAST_PRODUCTS = 4


class MindSporeInstruments:
    """Implements `instruments.Instruments`."""

    def __init__(self, request: StrategyRequest) -> None:
        self._accelerator = request.accelerator
        self._dtype = _DTYPES[request.precision]
        self._waits: list[tuple[Any, Any]] = []

    def stamp(self) -> float:
        self.synchronize()
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def synchronize(self) -> None:
        if self._accelerator == "ascend":
            ms.runtime.synchronize()

    def weights(self, strategy: Strategy) -> list[Weight]:
        return model_weights(strategy._named)  # type: ignore[attr-defined]

    def peak_flops(self) -> float:
        size = _MATRIX[self._accelerator]
        generator = np.random.default_rng(0)
        a, b = (
            ms.Tensor(generator.standard_normal((size, size), dtype=np.float32)).astype(self._dtype)
            for _ in range(2)
        )
        ops.matmul(a, b)
        best, products, started = float("inf"), 0, time.perf_counter()
        while products < _LEAST_PRODUCTS or time.perf_counter() - started < _PEAK_SECONDS:
            begin = self.stamp()
            ops.matmul(a, b)
            best = min(best, self.seconds(begin, self.stamp()))
            products += 1
        if self._accelerator == "ascend":
            del a, b
            ms.runtime.reset_peak_memory_stats()
        return 2.0 * size**3 / best

    @contextlib.contextmanager
    def watching(self, strategy: Strategy) -> Iterator[None]:
        names = ("all_reduce", "gather", "sum_across_ranks")
        originals = {name: getattr(data_parallel, name) for name in names}
        for name, original in originals.items():
            setattr(data_parallel, name, self._timed(original))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(data_parallel, name, original)

    def exchange_ended(self) -> None:
        """Gradients are exchanged in `apply`."""

    def take_waits(self) -> list[tuple[Any, Any]]:
        waits, self._waits = self._waits, []
        return waits

    def _timed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = self.stamp()
            result = original(*args, **kwargs)
            self._waits.append((begin, self.stamp()))
            return result

        return call


def model_weights(named: NamedModel) -> list[Weight]:
    """Embeddings are told by the name of their module, as all families of `mindspore_models` have it; one
    that is the output layer as well is multiplied with.
    """
    head = named.model.get_output_embeddings()
    of_head = {id(each) for each in head._params.values()} if head is not None else set()
    return [
        Weight(
            name=name,
            size=int(parameter.size),
            kind="head"
            if id(parameter) in of_head
            else "embedding"
            if "embed" in name and parameter.ndim == 2
            else "token",
            trained=bool(parameter.requires_grad),
        )
        for name, parameter in named.parameters.items()
    ]
