"""The whole matrix of faults, `make test-faults`: each at random moments, many times."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from ftlaunch.cluster.agent import AGENT_NAME
from ftlaunch.cluster.fork_server import SERVER_NAME
from ftlaunch.cluster.linux import read_process
from tests.jobs import (
    SCRIPT,
    agent_processes,
    assert_no_process_left,
    finish,
    ftlaunch,
    metrics_of,
    process_name,
    processes_of,
    rank_process,
    said,
    start,
    wait_until,
)
from tests.training_jobs import (
    NUM_STEPS,
    Inputs,
    assert_every_checkpoint_whole,
    assert_same_training,
)

pytestmark = pytest.mark.faults

# An evaluation and a save every few steps. The schedule does not depend on how many steps there are.
BUSY = (
    "train.eval_strategy=steps",
    "train.eval_steps=6",
    "checkpoint.save_steps=4",
    "train.lr_scheduler_type=constant",
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return Inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def undisturbed(inputs):
    """The metrics of a job that nothing happens to."""
    out = inputs.folder / "undisturbed"
    result = ftlaunch(*inputs.command(out, *BUSY))
    assert result.returncode == 0, said(result)
    return metrics_of(out)


def _victim(process: subprocess.Popen[str], out: Path, kind: str) -> tuple[int, str] | None:
    """(process, who is to be named); None while it is not there."""
    try:
        if kind == "rank":
            return rank_process(out, 1), "rank 1 on node1"
        if kind == "agent":
            return agent_processes(out)[1], "the agent on node1"
        if kind == "server":
            (server,) = [pid for pid in processes_of(out) if process_name(pid) == SERVER_NAME]
            return server, "the fork server on node"
    except (AssertionError, IndexError, ValueError, OSError):
        return None
    return process.pid, ""


@pytest.mark.parametrize("number", range(10))
@pytest.mark.parametrize("method", ["fork", "exec"])
@pytest.mark.parametrize("kind", ["rank", "agent", "server", "coordinator"])
def test_kill_at_a_random_moment(inputs, undisturbed, tmp_path, kind, method, number):
    """From start-up to the end, with an evaluation and a save every few steps between."""
    out = tmp_path / "out"
    moment = random.Random(f"{kind} {number}").uniform(0.0, 7.0 if method == "fork" else 12.0)
    busy = [*BUSY, f"cluster.start_method={method}"]
    with start(*inputs.endless(out, *busy, "--max-restarts", 0)) as process:
        time.sleep(moment)
        victims: list[tuple[int, str]] = []

        def is_there() -> bool:
            found = _victim(process, out, kind)
            victims.extend([found] if found is not None else [])
            return bool(victims)

        wait_until(is_there, 30, f"the {kind}")
        pid, culprit = victims[0]
        before_ranks = not list((out / "logs").glob("rank-*"))
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        if kind == "server" and before_ranks:
            # Nothing is lost but its imports: the agents start another one, and the job goes on.
            wait_until(
                lambda: process.poll() is not None or metrics_of(out), 60, "the end, or a step"
            )
            if process.poll() is None:
                process.terminate()
                assert finish(process, 60).returncode == 75
                assert_no_process_left(out)
                return
        result = finish(process, 30)
        wait_until(lambda: not processes_of(out), 5 - (time.monotonic() - killed), "all are gone")
        seconds = time.monotonic() - killed
    print(f"{method}: {kind} after {moment:.2f} s: everything gone after {seconds:.2f} s")
    assert seconds < 5
    if kind == "coordinator":
        assert result.returncode == -signal.SIGKILL
    else:
        assert result.returncode == 1, said(result)
        assert f"error: {culprit}" in said(result), said(result)
        assert "killed by SIGKILL" in said(result)
    steps = assert_every_checkpoint_whole(out)
    done = len(metrics_of(out))
    again = ftlaunch(*inputs.command(out, *busy))
    if done > NUM_STEPS or (steps and steps[-1] > NUM_STEPS):
        return  # it was faster than the undisturbed one has steps: nothing to compare
    assert again.returncode == 0, said(again)
    if steps:
        assert f"resumed after step {steps[-1]}" in again.stdout
    # Also the steps from before the kill; the last of them a killed command has not written down.
    lines = metrics_of(out)
    recorded = {line["step"] for line in lines}
    unheard = range(1, steps[-1] + 1) if kind == "coordinator" and steps else ()
    expected = [x for x in undisturbed if x["step"] in recorded or x["step"] not in unheard]
    assert_same_training(lines, expected)


@pytest.mark.parametrize("number", range(10))
def test_kill_a_rank_while_zero3_saves(inputs, undisturbed, tmp_path, number):
    """The last whole checkpoint is what the job goes on from, with the losses of ddp."""
    chance = random.Random(number)
    out, saves = tmp_path / "out", chance.randint(2, 12)
    with start(*inputs.command(out, *BUSY, "--strategy", "zero3")) as process:
        begun: set[Path] = set()

        def is_saving() -> bool:
            begun.update((out / "checkpoints").glob("step-*"))
            return process.poll() is not None or len(begun) >= saves

        wait_until(is_saving, 90, f"save {saves}", every=0.001)
        assert process.poll() is None, said(finish(process, 10))
        time.sleep(chance.uniform(0.0, 0.03))
        os.kill(rank_process(out, 1), signal.SIGKILL)
        result = finish(process, 120)
    assert result.returncode == 0, said(result)
    assert "rank 1 on node1: killed by SIGKILL; restart 1 of 3" in result.stdout
    assert_every_checkpoint_whole(out)
    assert_same_training(metrics_of(out), undisturbed)
    assert_no_process_left(out)


def test_the_first_of_two_failures_20_times(tmp_path):
    """20 ms apart. Beside other work a sleep may last longer: each rank writes down when it failed."""
    (tmp_path / "script.py").write_text(
        "import os, time\n"
        "time.sleep(max(0, float(os.environ['START']) - time.monotonic()))\n"
        "if os.environ['RANK'] == '0':\n"
        "    time.sleep(0.02)\n"
        "with open(os.environ['WHEN'] + os.environ['RANK'], 'w') as file:\n"
        "    file.write(str(time.monotonic()))\n"
        "raise ValueError('rank ' + os.environ['RANK'])\n"
    )
    right = 0
    for number in range(20):
        out, when = tmp_path / f"out-{number}", tmp_path / f"when-{number}-"
        result = ftlaunch(
            *("--nodes", 2, "-o", out, "script.py"),
            cwd=tmp_path,
            command=SCRIPT,
            env={"START": str(time.monotonic() + 2.0), "WHEN": str(when)},
        )
        failed_at = [
            # One that was ended before it came to that was not the first.
            float(file.read_text()) if (file := Path(f"{when}{rank}")).exists() else math.inf
            for rank in (0, 1)
        ]
        first = failed_at.index(min(failed_at))
        right += f"error: rank {first} on node{first} failed: ValueError: rank {first}" in said(
            result
        )
    assert right == 20


_STARTS = """
import os
import numpy, torch
import torch.distributed as dist
from tokenizers import Tokenizer, models

torch.set_num_threads(2)
x = torch.ones(400, 400)
assert (x @ x)[0, 0] == 400
tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
os.environ["TOKENIZERS_PARALLELISM"] = "true"
assert len(tokenizer.encode_batch(["a"] * 200)) == 200
# What was inherited: gloo opens and closes connections of its own as it likes.
print("descriptors", len(os.listdir("/proc/self/fd")), flush=True)
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
assert total.item() == 2
dist.destroy_process_group()
if dist.is_available() and int(os.environ["TORCHELASTIC_RESTART_COUNT"]) < {restarts}:
    os.kill(os.getpid(), 9)
"""


def test_200_starts_from_one_fork_server(tmp_path):
    """Each attempt ends by a kill, so that the same fork server starts the next one."""
    starts = 200
    (tmp_path / "script.py").write_text(_STARTS.replace("{restarts}", str(starts - 1)))
    out = tmp_path / "out"
    command = ["--nodes", 2, "--max-restarts", starts, "-o", out]
    command += ["cluster.start_method=fork", "cluster.grace_seconds=0", "script.py"]
    seen: set[tuple[int, int, int]] = set()
    with start(*command, cwd=tmp_path, command=SCRIPT) as process:
        while process.poll() is None:
            for pid in processes_of(out):
                try:
                    # A rank has that name too, for the moment after its fork.
                    found = read_process(pid)
                    if (
                        process_name(pid) == SERVER_NAME
                        and found
                        and process_name(found.parent) == AGENT_NAME
                    ):
                        folder = Path(f"/proc/{pid}")
                        counts = [len(list((folder / name).iterdir())) for name in ("fd", "task")]
                        seen.add((pid, *counts))  # type: ignore[arg-type]
                except OSError:
                    pass
            time.sleep(0.5)
        result = finish(process, 60)
    assert result.returncode == 0, said(result)[-3000:]
    logs = (out / "logs" / "rank-00000.log").read_text()
    assert logs.count("descriptors") == starts
    # The same number in the first rank and in the last.
    assert len(set(re.findall(r"descriptors \d+", logs))) == 1
    assert len({pid for pid, _, _ in seen}) == 1
    assert {threads for _, _, threads in seen} == {1}
    assert max(descriptors for _, descriptors, _ in seen) < 16
    assert json.loads((out / "summary.json").read_text())["restarts"] == starts - 1
