"""What all ranks have to agree on: whether each of them could, and what rank 0 sees."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ftlaunch.cluster.errors import JobError, UserError
from ftlaunch.strategies.base import Strategy

# What a full disk, or a full share of one, says.
FULL = (errno.ENOSPC, errno.EDQUOT)
_ROUND_SECONDS = 2.0


def all_or_none(strategy: Strategy, write: Callable[[], None], what: str) -> None:
    """Collective: write, then agree that every rank could; else the same error on every rank."""
    failure: OSError | None = None
    try:
        write()
    except OSError as error:
        failure = error
    # So that all ranks can name the one that failed.
    codes = of_all_ranks(strategy, 0 if failure is None else failure.errno or errno.EIO)
    if np.isin(codes, FULL).any():
        raise UserError(
            f"no space left on the disk while writing {what}. Whole checkpoints, if any, are "
            "untouched. Free some space, or lower checkpoint.save_total_limit, and run the same "
            "command again to go on from the last."
        )
    if codes.any():
        rank = int(codes.argmax())
        raise JobError(f"rank {rank} could not write {what}: {os.strerror(int(codes[rank]))}")


def from_main(strategy: Strategy, value: float) -> float:
    """Collective: rank 0's value."""
    own = value if strategy.world.is_main else 0.0
    return float(strategy.sum_across_ranks(np.array([own], dtype=np.float64))[0])


def of_all_ranks(strategy: Strategy, value: float) -> NDArray[np.float64]:
    """Collective: (ranks,) the values of all ranks."""
    values = np.zeros(strategy.world.size, dtype=np.float64)
    values[strategy.world.rank] = value
    found: NDArray[np.float64] = strategy.sum_across_ranks(values)
    return found


def any_rank(strategy: Strategy, flag: bool) -> bool:
    """Collective: whether the flag is set on any rank."""
    return bool(strategy.sum_across_ranks(np.array([float(flag)], dtype=np.float64))[0])


def long_all_or_none(
    strategy: Strategy, write: Callable[[], None], what: str, *, alive: Callable[[], None]
) -> None:
    """Collective: `all_or_none` for what may take longer than a collective may.

    It runs in a thread of its own; meanwhile the ranks meet in short rounds, and say that they live.
    """
    failure: list[BaseException] = []

    def run() -> None:
        try:
            write()
        except BaseException as error:  # noqa: BLE001 - raised by the rank that waits for it
            failure.append(error)

    worker = threading.Thread(target=run, name="writer", daemon=True)
    worker.start()
    worker.join(_ROUND_SECONDS / 100)
    while any_rank(strategy, worker.is_alive()):
        alive()
        worker.join(_ROUND_SECONDS)

    def result() -> None:
        if failure:
            raise failure[0]

    all_or_none(strategy, result, what)
