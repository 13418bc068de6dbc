"""What measuring asks of a framework beside `Strategy`, and how waiting is told apart. No framework."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from ftlaunch.strategies.base import Strategy, StrategyRequest
from ftlaunch.strategies.flops import Weight
from ftlaunch.strategies.registry import entry


class Instruments(Protocol):
    """One rank's. Made before the strategy: what a library keeps of a collective is then watched, too.

    A stamp is a point in time of whatever executes: the host's clock on a CPU, an event in the stream of a
    GPU. Seconds between stamps may be asked for after `synchronize`.
    """

    def stamp(self) -> Any: ...

    def seconds(self, begin: Any, end: Any) -> float: ...

    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it."""

    def weights(self, strategy: Strategy) -> list[Weight]:
        """The model's parameters in its own order."""

    def peak_flops(self) -> float:
        """Floating point operations a second of a product of matrices at the job's precision.

        To be called by all ranks at once, since they may share what they run on. What the device has
        held at most counts anew from its end on, where it is counted by the framework.
        """

    def watching(self, strategy: Strategy) -> AbstractContextManager[None]:
        """While it is open, `waits` are collected."""

    def exchange_ended(self) -> None:
        """The last backward pass of a step, gradient exchange included, has been asked for."""

    def take_waits(self) -> list[tuple[Any, Any]]:
        """(begin, end) of each wait for a collective since the last call, in their order."""


def make_instruments(name: str, request: StrategyRequest) -> Instruments:
    """Of the strategy's framework."""
    module, _, function = entry(name).instruments.partition(":")
    instruments: Instruments = getattr(importlib.import_module(module), function)(request)
    return instruments


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Of a rank's time; their sum is 1.

    communication   a collective is waited for although every rank has come to it
    idle            waiting until the slowest rank comes to a collective
    data            on the way from one step to the next and between micro-batches: dealing, reading,
                    collating, waiting for a batch
    compute         the rest: forward, backward, clipping, AdamW
    """

    compute: float
    communication: float
    data: float
    idle: float


def split_waits(waits: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """(communication, idle) seconds of each rank. waits[rank][i]: of its i-th collective, the same on all.

    Whoever comes last to a collective waits for nothing but the collective. So the shortest wait of
    all ranks is communication, and what a rank waits beyond that is for others. No clocks are compared.
    """
    shortest = [min(each) for each in zip(*waits, strict=True)]
    communication = sum(shortest)
    return [(communication, sum(of_rank) - communication) for of_rank in waits]


def make_shares(total: float, calls: float, communication: float, idle: float) -> Shares:
    """Of `total` seconds, `calls` were spent within the strategy, waits included."""
    if total <= 0:
        return Shares(compute=1.0, communication=0.0, data=0.0, idle=0.0)
    calls = min(max(calls, 0.0), total)
    waits = min(max(communication, 0.0), calls)
    idle = min(max(idle, 0.0), calls - waits)
    return Shares(
        compute=(calls - waits - idle) / total,
        communication=waits / total,
        data=(total - calls) / total,
        idle=idle / total,
    )
