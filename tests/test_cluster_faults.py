"""The fault matrix: what becomes of a job when something dies, on this machine, under SLURM, over ssh.

`make test-faults` runs all of it, `make test` a fixed sample of it: the cells that are named where
a test says at which places it runs.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster_jobs import (
    GONE_SECONDS,
    Place,
    batch_coordinator,
    signal_all,
    submitted,
    wait_ended,
    wait_until,
)
from tests.jobs import (
    SCRIPT,
    checkpoint_steps,
    finish,
    ftlaunch,
    metrics_of,
    rank_process,
    read_lines,
    said,
    summary_of,
    write_model,
)
from tests.training_jobs import (
    NUM_STEPS,
    Inputs,
    assert_every_checkpoint_whole,
    assert_same_training,
    wait_for_checkpoint,
    wait_for_step,
)

HEARTBEAT_SECONDS = 3.0
STALL_SECONDS = 5.0
# A schedule that does not depend on how many steps there are: jobs of any length can be compared.
STEADY = (
    "train.lr_scheduler_type=constant",
    "train.eval_strategy=no",
    "train.per_device_train_batch_size=16",
)
HEARTBEAT = f"cluster.heartbeat_timeout_seconds={HEARTBEAT_SECONDS}"
STALL = f"cluster.stall_timeout_seconds={STALL_SECONDS}"
NO_RESTART = ("--max-restarts", 0)
LONGEST = NUM_STEPS
# After a fault a job goes on for so many steps, to be compared with one that was not disturbed.
MORE_STEPS = 12


def places(*sample, of=("local", "slurm", "ssh")):
    """Run at every place `of` the matrix; in `make test` at those of the sample."""
    faults = pytest.mark.faults
    cells = [pytest.param(kind, marks=() if kind in sample else faults) for kind in of]
    return pytest.mark.parametrize("place", cells, indirect=True)


@pytest.fixture
def place(request):
    fixtures = {"slurm": "slurm", "ssh": "ssh_hosts"}
    name = fixtures.get(request.param)
    found = Place(kind=request.param, bed=request.getfixturevalue(name) if name else None)
    yield found
    found.clear()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return Inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def undisturbed(inputs):
    """The metrics of a job on this machine that nothing happens to."""
    out = inputs.folder / "undisturbed"
    result = ftlaunch(*inputs.command(out, *STEADY))
    assert result.returncode == 0, said(result)
    return metrics_of(out)


def endless(inputs: Inputs, out: Path, *changes: object, nodes: int = 2, **options) -> list[object]:
    """It ends by nothing but a fault."""
    return short(inputs, out, "train.max_steps=1000000", *changes, nodes=nodes, **options)


def short(inputs: Inputs, out: Path, *changes: object, nodes: int = 2, **options) -> list[object]:
    """As long as the undisturbed one: it has to overcome its faults."""
    return inputs.command(out, *STEADY, *changes, nodes=nodes, **options)


def assert_goes_on(place, inputs, out, undisturbed, *, nodes=2, unheard=False, **options):
    """The same command goes on from the last whole checkpoint, as if nothing had happened.

    unheard   the command was killed: the last steps before the checkpoint may not be on record
    """
    steps = assert_every_checkpoint_whole(out)
    assert steps, "no checkpoint"
    last = steps[-1] + MORE_STEPS
    assert last <= LONGEST, f"the job was at step {steps[-1]} already: nothing to compare"
    command = endless(inputs, out, f"train.max_steps={last}", nodes=nodes, **options)
    again = place.run(*command, nodes=nodes)
    assert again.returncode == 0, said(again)
    assert f"resumed after step {steps[-1]}" in again.stdout
    lines = metrics_of(out)
    recorded = {line["step"] for line in lines}
    assert recorded >= set(range(steps[-1] + 1, last + 1))
    expected = [x for x in undisturbed[:last] if not unheard or x["step"] in recorded]
    assert_same_training(lines, expected)
    place.wait_gone(out, time.monotonic())


def assert_failed(out: Path, output: str, culprit: str, *, cause: str, node: str) -> None:
    assert f"error: {culprit}" in output, output
    summary = summary_of(out)
    assert (summary["status"], summary["exit_code"], summary["restarts"]) == ("failed", 1, 0)
    assert (summary["failure"]["cause"], summary["failure"]["node"]) == (cause, node)


# -- one rank -----------------------------------------------------------------------------------

_RAISES = """\
import os
import time

from transformers import BertForSequenceClassification


class Raises(BertForSequenceClassification):
    calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        if os.environ["RANK"] == "1" and self.calls == 15 and os.path.exists({armed!r}):
            os.rename({armed!r}, {armed!r} + "-" + str(time.monotonic()))
            raise ValueError("boom")
        return super().forward(*args, **kwargs)
"""


@places("slurm")
def test_an_exception_in_one_rank(place, inputs, undisturbed, tmp_path, fault_table):
    out, armed = tmp_path / "out", tmp_path / "armed"
    armed.touch()
    model = write_model(
        tmp_path / "model", auto_map={"AutoModelForSequenceClassification": "raises.Raises"}
    )
    (model / "raises.py").write_text(_RAISES.format(armed=str(armed)))
    trusting = ("model.trust_remote_code=true",)
    with place.start(*endless(inputs, out, *trusting, model=model)) as process:
        output = wait_ended(process)
        (raised,) = [float(path.name[6:]) for path in tmp_path.glob("armed-*")]
        fault_table.add("exception in one rank", place.kind, place.wait_gone(out, raised))
    assert process.returncode == 1, output
    node = place.node(1)
    assert_failed(
        out, output, f"rank 1 on {node} failed: ValueError: boom", cause="exception", node=node
    )
    assert output.count("Traceback") == 1
    assert 'raises.py", line' in output
    assert_goes_on(place, inputs, out, undisturbed, model=model)


@places("ssh")
def test_a_killed_rank(place, inputs, undisturbed, tmp_path, fault_table):
    out = tmp_path / "out"
    with place.start(*endless(inputs, out, *NO_RESTART)) as process:
        wait_for_checkpoint(process, out, 12)
        os.kill(rank_process(out, 1), signal.SIGKILL)
        killed = time.monotonic()
        output = wait_ended(process)
        fault_table.add("`kill -9` of a rank", place.kind, place.wait_gone(out, killed))
    assert process.returncode == 1, output
    node = place.node(1)
    assert_failed(
        out, output, f"rank 1 on {node} failed: killed by SIGKILL", cause="signal", node=node
    )
    assert_goes_on(place, inputs, out, undisturbed)


@places("ssh")
def test_a_stopped_rank(place, inputs, undisturbed, tmp_path, fault_table):
    out = tmp_path / "out"
    with place.start(*endless(inputs, out, STALL, *NO_RESTART)) as process:
        wait_for_checkpoint(process, out, 12)
        os.kill(rank_process(out, 1), signal.SIGSTOP)
        stopped = time.monotonic()
        output = wait_ended(process)
        seconds = place.wait_gone(out, stopped, STALL_SECONDS + GONE_SECONDS)
        fault_table.add(f"SIGSTOP of a rank, {STALL_SECONDS:.0f} s to stall", place.kind, seconds)
    assert process.returncode == 1, output
    node = place.node(1)
    assert_failed(out, output, f"rank 1 on {node} failed: no progress", cause="stall", node=node)
    assert "does not answer: its process is stopped by a signal" in output
    assert_goes_on(place, inputs, out, undisturbed)


# -- agents and the command ---------------------------------------------------------------------


@places("slurm")
def test_a_killed_agent(place, inputs, undisturbed, tmp_path, fault_table):
    out = tmp_path / "out"
    with place.start(*endless(inputs, out, *NO_RESTART)) as process:
        wait_for_checkpoint(process, out, 12)
        os.kill(place.agent(out, 1), signal.SIGKILL)
        killed = time.monotonic()
        output = wait_ended(process)
        fault_table.add("`kill -9` of an agent", place.kind, place.wait_gone(out, killed))
    assert process.returncode == 1, output
    node = place.node(1)
    assert_failed(out, output, f"the agent on {node} failed: ", cause="lost", node=node)
    assert "rank 1 ended with it" in output
    assert_goes_on(place, inputs, out, undisturbed)


@places("ssh")
def test_a_killed_coordinator(place, inputs, undisturbed, tmp_path, fault_table):
    out = tmp_path / "out"
    with place.start(*endless(inputs, out)) as process:
        wait_for_checkpoint(process, out, 12)
        os.kill(place.coordinator(process), signal.SIGKILL)
        killed = time.monotonic()
        wait_ended(process)
        fault_table.add("`kill -9` of the command", place.kind, place.wait_gone(out, killed))
    assert process.returncode != 0
    assert_goes_on(place, inputs, out, undisturbed, unheard=True)


@places(of=("slurm",))
def test_a_killed_coordinator_of_a_batch_job(place, inputs, undisturbed, tmp_path, fault_table):
    out = tmp_path / "out"
    with submitted(place.slurm, tmp_path, *endless(inputs, out)) as job:
        _wait_for_batch(out, 12)
        os.kill(batch_coordinator(out), signal.SIGKILL)
        killed = time.monotonic()
        seconds = place.wait_gone(out, killed)
        fault_table.add("`kill -9` of the command, in a batch job", place.kind, seconds)
        assert place.slurm.wait_state(job, "FAILED") == "FAILED"
    assert place.slurm.job(job)["ExitCode"] == "0:9"
    assert_goes_on(place, inputs, out, undisturbed, unheard=True)


def _wait_for_batch(out: Path, step: int) -> None:
    def reached() -> bool:
        lines = metrics_of(out)
        return bool(lines and lines[-1]["step"] >= step and checkpoint_steps(out))

    wait_until(reached, 120, f"step {step} and a checkpoint")
