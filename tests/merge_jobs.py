"""Merges for tests: the checkpoints that they read, and commands that stop in the middle."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.deepspeed_jobs import Job, Saved, make_checkpoints

# Sub-groups, gaps between parameters, shuffled parameters: what moves the weights about in the files.
JOBS = [
    *(Job(name=f"zero{s}-{r}", stage=s, ranks=r) for s in (1, 2, 3) for r in (2, 3)),
    *(Job(name=f"zero{s}-bf16", stage=s, ranks=2, bf16=True) for s in (1, 2, 3)),
    Job(name="zero0", stage=0, ranks=2),
    Job(name="zero0-bf16", stage=0, ranks=2, bf16=True),
    Job(
        name="zero1-bf16-fp32-gradients",
        stage=1,
        ranks=3,
        bf16=True,
        config={"data_types": {"grad_accum_dtype": "fp32"}},
    ),
    Job(
        name="zero2-aligned",
        stage=2,
        ranks=2,
        zero={"parameter_alignment": True, "round_robin_gradients": True},
    ),
    Job(name="zero3-sub-groups", stage=3, ranks=3, zero={"sub_group_size": 40}),
    Job(name="zero1-later", stage=1, ranks=3, steps=4),
    Job(name="zero3-later", stage=3, ranks=3, steps=4),
    Job(name="mlm2", stage=2, ranks=2, model="bert"),
    Job(name="mlm3", stage=3, ranks=2, model="bert"),
]
# What the command does with its arguments, but at its Nth read of weights it gets a signal.
_DISTURBED = """
import os, signal, sys
# Where the tests themselves run in the background of a script, Ctrl-C is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from ftlaunch.strategies.checkpoint.run_reader import RunReader
fill, left = RunReader._fill, [int(sys.argv[1])]
def disturbed(*args):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), int(sys.argv[2]))
    return fill(*args)
RunReader._fill = disturbed
from ftlaunch.launcher.cli import run
sys.exit(run(sys.argv[3:]))
"""


_MADE: dict[str, Saved] = {}


def saved_jobs(folders: pytest.TempPathFactory) -> dict[str, Saved]:
    """Every job of JOBS, trained and saved once, however many files of tests ask for it."""
    if not _MADE:
        _MADE.update(make_checkpoints(folders.mktemp("deepspeed"), JOBS))
    return _MADE


def start_disturbed(*args: object, at: int, signal: int) -> subprocess.Popen[str]:
    """`ftlaunch` with these arguments, which sends itself a signal at its `at`-th read of weights."""
    words = [str(word) for word in (at, int(signal), *args)]
    return subprocess.Popen(
        [sys.executable, "-c", _DISTURBED, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def peak_kib(code: str, *args: object) -> int:
    """The most memory that a fresh interpreter has held when it has run `code`.

    By its own account (Linux): what wait4 tells includes the memory of the process it was forked from.
    """
    code = f"{code}\nprint(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    words = [sys.executable, "-c", code, *(str(word) for word in args)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    return int(done.stdout.splitlines()[-1])


def write_torch_checkpoint(folder: Path, module: dict[str, Any]) -> Path:
    """A DeepSpeed checkpoint without ZeRO that holds these tensors."""
    import torch

    folder.mkdir(parents=True)
    state: dict[str, Any] = {
        "module": module,
        "buffer_names": [],
        "param_shapes": None,
        "shared_params": None,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_version": "0.19.8",
    }
    torch.save(state, folder / "mp_rank_00_model_states.pt")
    return folder
