"""64 agents on one machine: they start, are restarted and end, and cost nothing while they wait."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.jobs import (
    MODULE,
    assert_no_process_left,
    finish,
    rank_process,
    said,
    start,
    wait_until,
)

pytestmark = pytest.mark.faults

NODES = 64
# Of one core, over 5 s: what the command alone may use while nothing happens.
IDLE_SHARE = 0.01
SCRIPT = """
import os, pathlib, sys, time
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
number = torch.ones(1)
dist.all_reduce(number)
assert number.item() == dist.get_world_size() == 64
folder = pathlib.Path(sys.argv[1])
(folder / f"{os.environ['TORCHELASTIC_RESTART_COUNT']}-{os.environ['RANK']}").touch()
while not (folder / "end").exists():
    time.sleep(0.5)
"""


def test_64_nodes(tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    (tmp_path / "one.py").write_text(SCRIPT)
    out = tmp_path / "out"
    flags = ("--nodes", NODES, "-o", out, "cluster.start_method=fork")
    with start(*flags, tmp_path / "one.py", marks, command=MODULE) as command:
        _wait_for_all(marks, 0, command)
        before = _threads_and_descriptors(command.pid)
        used = _cpu_seconds(command.pid)
        time.sleep(5)
        share = (_cpu_seconds(command.pid) - used) / 5
        os.kill(rank_process(out, 40), signal.SIGKILL)
        _wait_for_all(marks, 1, command)
        after = _threads_and_descriptors(command.pid)
        (marks / "end").touch()
        done = finish(command, 120)
    assert done.returncode == 0, said(done)
    print(f"threads, descriptors: {before}, after a restart {after}; {share:.2%} of a core idle")
    assert after == before
    assert share < IDLE_SHARE
    assert_no_process_left(out)


def _wait_for_all(marks: Path, restart: int, command) -> None:
    def all_there() -> bool:
        assert command.poll() is None, said(finish(command, 30))
        return len(list(marks.glob(f"{restart}-*"))) == NODES

    wait_until(all_there, 240, f"{NODES} ranks of attempt {restart}", every=0.2)
    # What began with them has to end, too.
    time.sleep(2)


def _threads_and_descriptors(pid: int) -> tuple[int, int]:
    threads, descriptors = (list(Path(f"/proc/{pid}/{each}").iterdir()) for each in ("task", "fd"))
    return len(threads), len(descriptors)


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
