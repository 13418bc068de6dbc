"""Runs a peer: another library's own training loop, as a program of its own on this machine.

The programs are those of the package ftlaunch.peers, which nothing here imports: they are told what
to do, and tell what they did, in JSON (`benchmarks/peers/work.py`). Knows processes and files;
nothing of how a peer trains.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ftlaunch.cluster.errors import JobError, UserError
from ftlaunch.cluster.linux import kill_exactly, processes_with
from ftlaunch.cluster.process_tree import end_families

_PACKAGE = "ftlaunch.peers"
# What each peer imports beside torch and transformers, and what it is called by those who use it.
PEERS: Mapping[str, tuple[str, ...]] = {
    "hf": ("accelerate",),
    "accelerate": ("accelerate",),
    "torchrun": (),
    "deepspeed": ("deepspeed",),
}
_ALWAYS = ("torch", "transformers")
# Every process of a peer has it in its environment, whatever its parent or session is.
_MARK = "FTLAUNCH_PEER"
# Named in `benchmarks/peers/owned.py`, through which torchrun and every rank are started.
_OWNED = f"{_PACKAGE}.owned"
_OWNER = "FTLAUNCH_PEER_OWNER"
# What tells a rank of another launcher its place: a peer that has it from us has none of that.
_PLACES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_END_SECONDS = 30.0
_TAIL_CHARACTERS = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRun:
    """What a peer did (`Result` in benchmarks/peers/work.py), and how long its command took."""

    result: Mapping[str, Any]
    wall_seconds: float


def check_peer(name: str) -> None:
    """UserError for a peer that does not exist, or whose packages are not installed."""
    if name not in PEERS:
        raise UserError(
            f"{name!r} is no peer to compare with: the known ones are {', '.join(PEERS)}. "
            "Name some of them, with commas between: --compare hf,torchrun."
        )
    missing = [package for package in (*_ALWAYS, *PEERS[name]) if find_spec(package) is None]
    if missing:
        raise UserError(
            f"the peer {name} needs {' and '.join(missing)}, which this Python ({sys.executable}) "
            f"does not have. Install it: pip install {' '.join(missing)}."
        )


def run_program(
    name: str,
    work: Mapping[str, Any],
    *,
    ranks: int,
    folder: Path,
    timeout_seconds: float,
    environment: Mapping[str, str] | None = None,
) -> PeerRun:
    """Run a peer in `folder`, which is made, and wait for it; nothing of it outlives this call, nor this
    process, should that be killed.

    work          what stands in WORK.json; its paths are absolute
    environment   beside this process's own
    JobError when it fails or takes too long, with its last words; its log stays in the folder.
    """
    check_peer(name)
    folder.mkdir(parents=True)
    work_file, result_file, log = (
        folder / each for each in ("WORK.json", "RESULT.json", "log.txt")
    )
    work_file.write_text(json.dumps(work) + "\n")
    words = [f"{_PACKAGE}.{name}", str(work_file), str(result_file)]
    command = [sys.executable, "-m", _OWNED]
    if ranks > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += ["-m", _OWNED]
    mark = uuid.uuid4().hex
    variables = {key: value for key, value in os.environ.items() if key not in _PLACES}
    variables |= {**_threads(work), **_devices(work, ranks), **(environment or {})}
    variables |= {_MARK: mark, _OWNER: str(os.getpid())}
    started = time.perf_counter()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*command, *words],
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # Ctrl-C comes by here as well. torchrun's ranks have sessions of their own.
            end_families([process.pid], seconds=_END_SECONDS)
            for left in processes_with(_MARK, mark):
                kill_exactly(left)
            process.wait(timeout=_END_SECONDS)
    seconds = time.perf_counter() - started
    result = _read(result_file)
    # torch can abort while a finished rank is taken down; the result was there before.
    if result is None or code is None:
        what = f"took more than {timeout_seconds:.0f} s" if code is None else f"ended with {code}"
        tail = log.read_text(errors="replace")[-_TAIL_CHARACTERS:]
        raise JobError(f"the peer {name} {what}; its last words ({log}):\n{tail}")
    return PeerRun(result=result, wall_seconds=seconds)


def _threads(work: Mapping[str, Any]) -> dict[str, str]:
    """OpenMP's threads are those of the work, from the first import on."""
    threads = work.get("threads")
    return {} if threads is None else {"OMP_NUM_THREADS": str(threads)}


def _devices(work: Mapping[str, Any], ranks: int) -> dict[str, str]:
    """As many GPUs as ranks: the Trainer would spread one rank over all that it sees."""
    if work.get("device") != "cuda":
        return {}
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = [str(number) for number in range(ranks)] if given is None else given.split(",")
    return {"CUDA_VISIBLE_DEVICES": ",".join(visible[:ranks])}


def _read(file: Path) -> Mapping[str, Any] | None:
    try:
        result = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) else None
