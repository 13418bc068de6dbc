"""What every peer's program begins and ends with."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ftlaunch.peers.work import Result, Work


def run(peer: Callable[[Work], Result]) -> None:
    """Never returns after success: WORK.json and RESULT.json are this program's arguments."""
    work_file, result_file = map(Path, sys.argv[1:])
    work = Work.read(work_file)
    if work.threads is not None:
        torch.set_num_threads(work.threads)
    result = peer(work)
    if rank() == 0:
        result.write(result_file)
    # Taking the reducer apart can wait for ever: it holds the interpreter's lock and joins gloo's
    # thread, which may want that lock to let go of the last tensor (torch 2.13).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def num_ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def device(work: Work) -> torch.device:
    """This rank's, made the current one."""
    if work.device == "cpu":
        return torch.device("cpu")
    chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(chosen)
    return chosen
