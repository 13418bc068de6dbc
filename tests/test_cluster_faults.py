"""The fault matrix: what becomes of a job when something dies, on this machine, under SLURM, over ssh.

`make test-faults` runs all of it, `make test` a fixed sample of it: the cells that are named where
a test says at which places it runs.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ftlaunch.launcher.plan import LaunchPlan
from tests import beds
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
    assert_mistake,
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
# Of `Inputs.command`.
SAVE_STEPS = 10
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


def stop_in_a_step(out: Path, rank: int) -> float:
    """SIGSTOP where nobody saves, which may take three times as long as a step; when it was."""
    for _ in range(50):
        os.kill(rank, signal.SIGSTOP)
        stopped = time.monotonic()
        # What the other rank has said by then is recorded soon.
        time.sleep(0.5)
        if metrics_of(out)[-1]["step"] % SAVE_STEPS:
            return stopped
        os.kill(rank, signal.SIGCONT)
        time.sleep(0.05)
    raise AssertionError("it saves all the time")


def assert_goes_on(place, inputs, out, undisturbed, *, changes=(), unheard=False, model=None):
    """The same command goes on from the last whole checkpoint, as if nothing had happened.

    unheard   the command was killed: the last steps before the checkpoint may not be on record
    """
    steps = assert_every_checkpoint_whole(out)
    assert steps, "no checkpoint"
    last = steps[-1] + MORE_STEPS
    assert last <= LONGEST, f"the job was at step {steps[-1]} already: nothing to compare"
    again = place.run(*endless(inputs, out, f"train.max_steps={last}", *changes, model=model))
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
import glob
import os
import time

from transformers import BertForSequenceClassification


class Raises(BertForSequenceClassification):
    def forward(self, *args, **kwargs):
        ready = os.path.exists({armed!r}) and glob.glob({manifests!r})
        if os.environ["RANK"] == "1" and ready:
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
    (model / "raises.py").write_text(
        _RAISES.format(armed=str(armed), manifests=f"{out}/checkpoints/step-*/manifest.json")
    )
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
    assert_goes_on(place, inputs, out, undisturbed, changes=trusting, model=model)


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
        stopped = stop_in_a_step(out, rank_process(out, 1))
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


@places(of=("slurm", "ssh"))
def test_what_leads_to_a_node_is_killed(place, inputs, undisturbed, tmp_path, fault_table):
    """The `ssh` or `srun` beside the command: the agent at its end hears no more of us."""
    out, node = tmp_path / "out", place.node(1)
    with place.start(*endless(inputs, out, HEARTBEAT, *NO_RESTART)) as process:
        wait_for_checkpoint(process, out, 12)
        os.kill(place.transport(process, 1), signal.SIGKILL)
        killed = time.monotonic()
        output = wait_ended(process)
        seconds = place.wait_gone(out, killed, HEARTBEAT_SECONDS + GONE_SECONDS)
        fault_table.add("`kill -9` of an `ssh` or `srun`", place.kind, seconds)
    assert process.returncode == 1, output
    culprit = f"the agent on {node} failed: killed by SIGKILL; rank 1 ended with it"
    assert_failed(out, output, culprit, cause="lost", node=node)
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
    # salloc takes the end of its command by a signal for no failure.
    assert process.returncode == (0 if place.kind == "slurm" else -signal.SIGKILL)
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


# -- nodes --------------------------------------------------------------------------------------


def _lose(place: Place, out: Path, number: int) -> None:
    """A node is gone without a word: killed, cut off, or here, where there is none, stopped."""
    if place.kind == "slurm":
        place.slurm.kill_node(place.node(number))
    elif place.kind == "ssh":
        place.ssh.cut(place.node(number))
    else:
        signal_all(place.processes_on(out, number), signal.SIGSTOP)


def _bring_back(place: Place, number: int) -> None:
    if place.kind == "slurm":
        place.slurm.clear()
    elif place.kind == "ssh":
        place.ssh.mend(place.node(number))


@places("ssh")
def test_a_node_is_gone(place, inputs, undisturbed, tmp_path, fault_table):
    out = tmp_path / "out"
    with place.start(*endless(inputs, out, HEARTBEAT, *NO_RESTART)) as process:
        wait_for_checkpoint(process, out, 12)
        _lose(place, out, 1)
        lost = time.monotonic()
        try:
            output = wait_ended(process)
            seconds = place.wait_gone(out, lost, HEARTBEAT_SECONDS + GONE_SECONDS)
        finally:
            _bring_back(place, 1)
    fault = f"a node is gone, {HEARTBEAT_SECONDS:.0f} s to the loss of a heartbeat"
    fault_table.add(fault, place.kind, seconds)
    assert process.returncode == 1, output
    node = place.node(1)
    assert_failed(out, output, f"the agent on {node} failed: ", cause="lost", node=node)
    assert "rank 1 ended with it" in output
    assert_goes_on(place, inputs, out, undisturbed)


@places(of=("slurm", "ssh"))
def test_the_other_nodes_go_on(place, inputs, undisturbed, tmp_path):
    """With fewer ranks the training is the same; over ssh the lost one comes back, and takes part."""
    out = tmp_path / "out"
    # A busy machine may seem silent for so short a time, too.
    patience = (HEARTBEAT, "--max-restarts", 9)
    command = short(inputs, out, *patience, "cluster.min_nodes=2", nodes=3)
    # SLURM ends a job that loses a node, unless it is asked not to.
    with place.start(*command, nodes=3, allocation=["--no-kill"]) as process:
        wait_for_checkpoint(process, out, 12)
        _lose(place, out, 2)
        try:
            if place.kind == "ssh":
                _wait_for_restart(process, out, 1)
                place.ssh.mend("n3")
                os.kill(rank_process(out, 1), signal.SIGKILL)
            output = wait_ended(process, 180)
        finally:
            _bring_back(place, 2)
    assert process.returncode == 0, output
    assert "the agent on n3: " in output
    assert "going on with 2 nodes" in output
    if place.kind == "ssh":
        assert output.index("going on with 2 nodes") < output.index("going on with 3 nodes")
    # Memory was never short: a rank computes its whole share at once, with 3 nodes as with 2.
    plan = LaunchPlan.read(out / "plan.json")
    assert plan.micro_batch == -(-plan.global_batch_size // plan.num_nodes)
    assert plan.accumulation == 1
    assert_same_training(metrics_of(out), undisturbed)
    place.wait_gone(out, time.monotonic())


def _wait_for_restart(process: subprocess.Popen[str], out: Path, number: int) -> None:
    """Until the job has gone on after a restart, and has done a step."""

    def goes_on() -> bool:
        if process.poll() is not None:
            raise AssertionError(f"the job has ended:\n{said(finish(process, 30))}")
        resumed = [e for e in read_lines(out / "events.jsonl") if e["kind"] == "resumed"]
        return len(resumed) >= number and metrics_of(out)[-1]["step"] > resumed[-1]["after_step"]

    wait_until(goes_on, 90, f"a step after restart {number}")


# -- restarts -----------------------------------------------------------------------------------


@places("slurm", of=("slurm", "ssh"))
def test_a_rank_and_an_agent_are_replaced(place, inputs, undisturbed, tmp_path):
    out = tmp_path / "out"
    with place.start(*short(inputs, out)) as process:
        wait_for_checkpoint(process, out, 12)
        os.kill(rank_process(out, 1), signal.SIGKILL)
        _wait_for_restart(process, out, 1)
        os.kill(place.agent(out, 1), signal.SIGKILL)
        output = wait_ended(process, 180)
    assert process.returncode == 0, output
    node = place.node(1)
    assert f"rank 1 on {node}: killed by SIGKILL; restart 1 of 3 from" in output
    assert f"the agent on {node}: " in output
    assert "; rank 1 ended with it; restart 2 of 3 from" in output
    assert_same_training(metrics_of(out), undisturbed)
    place.wait_gone(out, time.monotonic())


@places()
def test_a_restart_takes_less_than_three_seconds(place, tmp_path, fault_table):
    """From the failure of a rank of the demo to the next optimizer step."""
    out = tmp_path / "out"
    job = ("--nodes", 4, "-o", out, "train.max_steps=60", "checkpoint.save_steps=10")
    with place.start(*job, nodes=4) as process:
        wait_for_checkpoint(process, out, 20)
        os.kill(rank_process(out, 2), signal.SIGKILL)
        killed = time.monotonic()
        _wait_for_restart(process, out, 1)
        seconds = time.monotonic() - killed
        output = wait_ended(process, 180)
    fault_table.add("(a killed rank of the demo: to the next step)", place.kind, seconds)
    assert process.returncode == 0, output
    assert seconds < 3


# -- what the job cannot have -------------------------------------------------------------------

_HOLDS = (
    "import socket; s = socket.socket(); s.bind(('', {port})); s.listen(); print('held'); input()"
)


@places("ssh")
def test_a_port_that_is_taken(place, inputs, tmp_path):
    out = tmp_path / "out"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    at_first = place.ssh.at("n1") if place.kind == "ssh" else []
    with subprocess.Popen(
        [*at_first, sys.executable, "-uc", _HOLDS.format(port=port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        try:
            result = place.run(*endless(inputs, out, f"cluster.port={port}"))
        finally:
            holder.communicate("\n")
    ended = time.monotonic()
    address = place.ssh.address("n1") if place.kind == "ssh" else "127.0.0.1"
    assert_mistake(result, f"{port}", address)
    assert not list((out / "logs").glob("rank-*"))
    place.wait_gone(out, ended)


@pytest.fixture
def small_disk(tmp_path):
    """8 MB; hosts that are played later see it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    made = subprocess.run(mount, capture_output=True, text=True, timeout=30)
    if made.returncode:
        reason = f"a small file system cannot be mounted here: {made.stderr.strip()}"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=30)


@pytest.fixture
def place_with_a_disk(request, small_disk):
    """A cluster of its own, whose hosts are younger than the disk."""
    with contextlib.ExitStack() as stack:
        found = Place(kind="local")
        if request.param == "slurm":
            found = Place(kind="slurm", bed=stack.enter_context(beds.slurm_cluster()))
        elif request.param == "ssh":
            found = Place(kind="ssh", bed=stack.enter_context(beds.ssh_cluster()))
        yield found
        found.clear()


@pytest.mark.faults
@pytest.mark.parametrize("place_with_a_disk", ["local", "slurm", "ssh"], indirect=True)
def test_a_full_disk(place_with_a_disk, inputs, undisturbed, small_disk, fault_table):
    place, out = place_with_a_disk, small_disk / "out"
    with place.start(*endless(inputs, out, "checkpoint.save_total_limit=100")) as process:
        wait_for_checkpoint(process, out, 12)
        _fill(small_disk / "filler")
        filled = time.monotonic()
        output = wait_ended(process)
        ended = time.monotonic()
        place.wait_gone(out, ended)
    # It is noticed where something is written next: at the next save at the latest.
    fault_table.add("output disk full", place.kind, time.monotonic() - filled)
    assert process.returncode == 2, output
    assert "no space left" in output.lower()
    assert "run the same command again" in output
    assert "Traceback" not in output
    (small_disk / "filler").unlink()
    assert_goes_on(place, inputs, out, undisturbed)


def _fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


# -- asked to stop ------------------------------------------------------------------------------


def assert_stopped(out: Path, by: str) -> None:
    """It has saved the last step that it did."""
    summary = summary_of(out)
    assert (summary["status"], summary["exit_code"]) == ("stopped", 75)
    assert summary["stop_signal"] == by
    assert checkpoint_steps(out)[-1] == metrics_of(out)[-1]["step"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
@places()
def test_a_signal_to_the_command(place, inputs, undisturbed, tmp_path, fault_table, name):
    out = tmp_path / "out"
    with place.start(*endless(inputs, out)) as process:
        wait_for_checkpoint(process, out, 12)
        os.kill(place.coordinator(process), signal.Signals[name])
        asked = time.monotonic()
        output = wait_ended(process)
        # The ranks finish their step and save first.
        seconds = place.wait_gone(out, asked, 2 * GONE_SECONDS)
        fault_table.add(f"{name} to the command", place.kind, seconds)
    assert process.returncode == 75, output
    assert f"stopped after step {checkpoint_steps(out)[-1]}" in output
    assert_stopped(out, name)
    assert_goes_on(place, inputs, out, undisturbed)


@places("slurm", of=("slurm",))
def test_scancel(place, inputs, undisturbed, tmp_path, fault_table):
    """All is gone before SLURM's patience ends, so that no node is drained."""
    out, bed = tmp_path / "out", place.slurm
    with submitted(bed, tmp_path, *endless(inputs, out)) as job:
        _wait_for_batch(out, 12)
        assert bed.run("scancel", job).returncode == 0
        seconds = place.wait_gone(out, time.monotonic(), bed.settings.kill_wait)
        fault_table.add("`scancel`", place.kind, seconds)
        bed.wait_state(job, "CANCELLED")
        bed.wait_idle()
    assert bed.drained() == {}
    assert_stopped(out, "SIGTERM")
    assert_goes_on(place, inputs, out, undisturbed)


_SLOW = """\
import time

from transformers import BertForSequenceClassification


class Slow(BertForSequenceClassification):
    def forward(self, *args, **kwargs):
        time.sleep(0.5)
        return super().forward(*args, **kwargs)
"""


@pytest.mark.parametrize(
    ("option", "warned", "by", "state"),
    [
        ((), False, "SIGTERM", "TIMEOUT"),
        (("--signal=B:USR1@30",), True, "SIGUSR1", "FAILED"),
        (("--signal=USR1@30",), True, "SIGUSR1", "FAILED"),
    ],
    ids=["term", "batch-usr1", "usr1"],
)
@places(of=("slurm",))
def test_the_time_limit(
    place, inputs, undisturbed, tmp_path, fault_table, option, warned, by, state
):
    """slurmctld looks at limits every 30 s; in so long a job must not come too far to compare it."""
    out, bed = tmp_path / "out", place.slurm
    model = write_model(
        tmp_path / "model", auto_map={"AutoModelForSequenceClassification": "slow.Slow"}
    )
    (model / "slow.py").write_text(_SLOW)
    trusting = ("model.trust_remote_code=true",)
    command = endless(inputs, out, *trusting, "checkpoint.save_steps=5", model=model)
    with submitted(bed, tmp_path, *command, options=["--time=30", *option]) as job:
        _wait_for_batch(out, 6)
        bed.near_limit(job, warned=warned)
        log = tmp_path / "job.log"
        wait_until(lambda: "stopping" in log.read_text(), 70, "the signal has come", every=0.01)
        # A warning leaves time until the limit, SLURM's SIGTERM until its SIGKILL.
        limit = 25 if warned else bed.settings.kill_wait
        seconds = place.wait_gone(out, time.monotonic(), limit)
        what = f"the time limit, {' '.join(option) or 'without a warning'}"
        fault_table.add(what, place.kind, seconds)
        assert bed.wait_state(job, "TIMEOUT", "FAILED") == state
        bed.wait_idle()
    assert bed.drained() == {}
    assert_stopped(out, by)
    assert_goes_on(place, inputs, out, undisturbed, changes=trusting, model=model)


# -- scripts, and where they are run ------------------------------------------------------------

# As its user runs it under torchrun: nothing in it knows of us.
_DDP = """
import os, sys, time
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
torch.manual_seed(1)
model = DistributedDataParallel(torch.nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
generator = torch.Generator().manual_seed(dist.get_rank())
for step in range(1_000_000):
    x = torch.randn(8, 4, generator=generator)
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    if sys.argv[1:] == ["fails"] and step == 5 and dist.get_rank() == 1:
        print("raised at", time.monotonic(), flush=True)
        raise ValueError("boom")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print("step", step, flush=True)
    time.sleep(0.05)
"""


@places("slurm", of=("slurm", "ssh"))
def test_an_exception_in_a_script(place, tmp_path, fault_table):
    out, node = tmp_path / "out", place.node(1)
    (tmp_path / "script.py").write_text(_DDP)
    command = ("--nodes", 2, "-o", out, "script.py", "fails")
    with place.start(*command, cwd=tmp_path, command=SCRIPT) as process:
        output = wait_ended(process, 120)
        raised = re.search(r"raised at (\S+)", _log(out, 1))
        assert raised, output
        seconds = place.wait_gone(out, float(raised[1]))
        fault_table.add("a script: exception in one rank", place.kind, seconds)
    assert process.returncode == 1, output
    assert f"error: rank 1 on {node} failed: ValueError: boom" in output
    assert 'script.py", line' in output
    assert "restart" not in output


@places("ssh", of=("slurm", "ssh"))
def test_a_killed_rank_of_a_script(place, tmp_path, fault_table):
    out, node = tmp_path / "out", place.node(1)
    (tmp_path / "script.py").write_text(_DDP)
    command = ("--nodes", 2, *NO_RESTART, "-o", out, "script.py")
    with place.start(*command, cwd=tmp_path, command=SCRIPT) as process:
        wait_until(lambda: "step 5\n" in _log(out, 1), 90, "step 5 of rank 1")
        os.kill(rank_process(out, 1), signal.SIGKILL)
        killed = time.monotonic()
        output = wait_ended(process)
        seconds = place.wait_gone(out, killed)
        fault_table.add("a script: `kill -9` of a rank", place.kind, seconds)
    assert process.returncode == 137, output
    assert f"error: rank 1 on {node} failed: killed by SIGKILL" in output


@places(of=("slurm", "ssh"))
def test_a_script_loses_a_node(place, tmp_path, fault_table):
    out, node = tmp_path / "out", place.node(1)
    (tmp_path / "script.py").write_text(_DDP)
    command = ("--nodes", 2, *NO_RESTART, "-o", out, HEARTBEAT, "script.py")
    with place.start(*command, cwd=tmp_path, command=SCRIPT) as process:
        wait_until(lambda: "step 5\n" in _log(out, 1), 90, "step 5 of rank 1")
        _lose(place, out, 1)
        lost = time.monotonic()
        try:
            output = wait_ended(process)
            seconds = place.wait_gone(out, lost, HEARTBEAT_SECONDS + GONE_SECONDS)
        finally:
            _bring_back(place, 1)
    fault_table.add("a script: a node is gone", place.kind, seconds)
    assert process.returncode == 1, output
    assert f"error: the agent on {node} failed: " in output


def _log(out: Path, rank: int) -> str:
    path = out / "logs" / f"rank-{rank:05d}.log"
    return path.read_text() if path.exists() else ""


_TRAPS = ("ftlaunch", "cluster", "launcher", "strategies", "torch", "datasets", "json", "numpy")


@places("slurm", "ssh", of=("slurm", "ssh"))
def test_a_hostile_working_folder(place, inputs, tmp_path):
    """Of what lies there nothing is imported, on no node."""
    here = tmp_path / 'it\'s "here" $(no) ünï'
    here.mkdir()
    trap = 'raise SystemExit("the working folder was imported")\n'
    for name in _TRAPS:
        (here / name).mkdir()
        (here / name / "__init__.py").write_text(trap)
    for name in ("sitecustomize", "usercustomize", "signal", "socket", "typing", "transformers"):
        (here / f"{name}.py").write_text(trap)
    out = here / "out put 'é' %s {x} ;#"
    command = short(inputs, Path(out.name), "train.max_steps=5")
    result = place.run(*command, cwd=here, command=SCRIPT)
    assert result.returncode == 0, said(result)
    assert [line["step"] for line in metrics_of(out)] == [1, 2, 3, 4, 5]
    place.wait_gone(out, time.monotonic())
