"""Whether all ranks can add up numbers, and how fast: a test of the network between them.

Knows no framework: each has its `exchange` module with `open_exchange`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ftlaunch.cluster.errors import JobError
from ftlaunch.cluster.world import World

# What a rank says of itself, in this order.
STAGES = ("begun", "joined", "added")
KIND_STAGE, KIND_SPEED = "exchange_stage", "exchange_speed"
_REPEATS = 7


class Exchange(Protocol):
    """The ranks of a framework, after they have met."""

    def add(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Collective: the elementwise sum over the ranks."""
        ...

    def time(self, num_bytes: int, repeats: int) -> list[float]:
        """Collective: the seconds of each of `repeats` sums of so many bytes, after one unmeasured."""
        ...

    def leave(self) -> None:
        """Collective: nobody leaves while another still needs it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeRequest:
    """device    the place of the rank's device among the visible ones
    listen_fd   on rank 0 of torch: the rendezvous socket
    sizes       bytes of the sums to be timed
    """

    world: World
    accelerator: str
    device: int
    num_threads: int
    timeout_seconds: float
    listen_fd: int | None
    sizes: tuple[int, ...]


def sizes_for(accelerator: str) -> tuple[int, ...]:
    """A small one for the latency, larger ones for the bandwidth; CPUs are spared the largest."""
    return (1 << 10, 1 << 20, (16 if accelerator == "cpu" else 64) << 20)


def run_exchange(
    request: ExchangeRequest,
    open_exchange: Callable[[ExchangeRequest], Exchange],
    say: Callable[[Mapping[str, Any]], None],
) -> None:
    """Collective. JobError when a sum is wrong."""
    say({"kind": KIND_STAGE, "stage": "begun"})
    exchange = open_exchange(request)
    say({"kind": KIND_STAGE, "stage": "joined"})
    _check(exchange, request.world)
    say({"kind": KIND_STAGE, "stage": "added"})
    for num_bytes in request.sizes:
        seconds = statistics.median(exchange.time(num_bytes, _REPEATS))
        say({"kind": KIND_SPEED, "num_bytes": num_bytes, "seconds": seconds})
    exchange.leave()


def _check(exchange: Exchange, world: World) -> None:
    """Numbers small enough to be added exactly, in any order."""
    rank, size = world.rank, world.size
    own = np.array([1.0, rank + 1, -rank, 0.5], dtype=np.float32)
    expected = [size, size * (size + 1) / 2, -size * (size - 1) / 2, size / 2]
    found = exchange.add(own).tolist()
    if found != expected:
        raise JobError(
            f"the sum over {size} ranks is {found} on rank {rank}; it should be {expected}. The "
            "network, a device or the communication library changes data on its way."
        )


def bus_bandwidth(num_bytes: int, seconds: float, world_size: int) -> float:
    """Bytes a second that each link carries: 2 (W - 1) / W times size over time, as nccl-tests
    define it (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md)."""
    return 2 * (world_size - 1) / world_size * num_bytes / seconds


def behind(stages: Mapping[int, str], world_size: int) -> tuple[list[int], str]:
    """The ranks that are at the earliest stage, and that stage; "" for one that has said nothing."""
    order: Sequence[str] = ("", *STAGES)
    places = {rank: order.index(stages.get(rank, "")) for rank in range(world_size)}
    least = min(places.values())
    return [rank for rank, place in places.items() if place == least], order[least]
