"""What a job does when something dies, hangs or runs out: how it ends, and how it goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ftlaunch.cluster.fork_server import SERVER_NAME
from ftlaunch.launcher.micro_batch import halve_micro_batch
from ftlaunch.launcher.plan import LaunchPlan
from ftlaunch.launcher.rehearsal import Fault, parse_fault
from ftlaunch.launcher.restarts import RestartPolicy
from tests.jobs import (
    SCRIPT,
    agent_processes,
    assert_mistake,
    assert_no_process_left,
    checkpoint_steps,
    finish,
    ftlaunch,
    metrics_of,
    process_name,
    processes_of,
    read_lines,
    said,
    start,
    summary_of,
    wait_until,
    write_model,
)
from tests.test_verdict import _failure
from tests.training_jobs import (
    Inputs,
    assert_same_training,
    wait_for_checkpoint,
    wait_for_step,
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return Inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def undisturbed(inputs):
    """The metrics of a job that nothing happens to."""
    out = inputs.folder / "undisturbed"
    result = ftlaunch(*inputs.command(out))
    assert result.returncode == 0, said(result)
    return metrics_of(out)


def events_of(out: Path, kind: str) -> list[dict[str, object]]:
    return [event for event in read_lines(out / "events.jsonl") if event["kind"] == kind]


# -- rehearsals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "culprit"),
    [
        ("kill-rank:1@step20", "rank 1 on node1: killed by SIGKILL"),
        ("kill-rank:0@evaluate", "rank 0 on node0: killed by SIGKILL"),
        ("kill-rank:1@save", "rank 1 on node1: killed by SIGKILL"),
        ("crash-rank:0@step20", "rank 0 on node0: segmentation fault"),
        pytest.param(
            "kill-agent:0@step20",
            "the agent on node0: killed by SIGKILL; rank 0 ended with it",
            marks=pytest.mark.long,
        ),
        ("kill-fork-server:0@step20", "the fork server on node"),
        pytest.param(
            "hang-node:1@step20",
            "the agent on node1: silent for 2 s; rank 1 ended with it",
            marks=pytest.mark.long,
        ),
        pytest.param(
            "stop-rank:1@step20",
            "does not answer: its process is stopped by a signal",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_rehearsed_fault_is_named_and_overcome(inputs, undisturbed, tmp_path, fault, culprit):
    out = tmp_path / "out"
    result = ftlaunch(
        "rehearse",
        *("--fault", fault, *inputs.command(out)),
        *("cluster.heartbeat_timeout_seconds=2", "cluster.stall_timeout_seconds=3"),
    )
    assert result.returncode == 0, said(result)
    assert culprit in result.stdout, said(result)
    assert "restart 1 of 3" in result.stdout
    assert_same_training(metrics_of(out), undisturbed)
    (restart,) = events_of(out, "restarted")
    assert culprit in str(restart["reason"])
    assert re.search(rf"\d\.\d\d s  fault: {fault.partition(':')[0]}", result.stdout)
    assert_no_process_left(out)


@pytest.mark.long
def test_ranks_that_are_executed_are_as_good(inputs, undisturbed, tmp_path):
    out = tmp_path / "out"
    result = ftlaunch(
        *("rehearse", "--fault", "kill-rank:1@step20", *inputs.command(out)),
        "cluster.start_method=exec",
    )
    assert result.returncode == 0, said(result)
    assert "rank 1 on node1: killed by SIGKILL; restart 1 of 3" in result.stdout
    assert_same_training(metrics_of(out), undisturbed)
    assert_no_process_left(out)


def test_a_rehearsed_interrupt(inputs, tmp_path):
    out = tmp_path / "out"
    result = ftlaunch("rehearse", "--fault", "interrupt@step20", *inputs.endless(out))
    assert result.returncode == 75, said(result)
    assert checkpoint_steps(out)[-1] >= 20


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("kill-rank:3@step5", Fault(kind="kill-rank", target=3, step=5)),
        ("hang-node:2@20s", Fault(kind="hang-node", target=2, seconds=20.0)),
        ("kill-agent:0@0.5s", Fault(kind="kill-agent", target=0, seconds=0.5)),
        ("stop-rank:1@save", Fault(kind="stop-rank", target=1, phase="save")),
        ("interrupt@step2", Fault(kind="interrupt", target=0, step=2)),
    ],
)
def test_faults_are_understood(text, fault):
    assert parse_fault(text) == fault


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        ("explode:1@step5", "kill-rank"),
        ("kill-rank:1", "KIND:NUMBER@MOMENT"),
        ("kill-rank@step5", "needs the number"),
        ("interrupt:1@step5", "takes no number"),
        ("kill-rank:1@lunch", "Moments: stepN"),
        ("kill-rank:-1@step5", "KIND:NUMBER@MOMENT"),
        ("kill-rank:7@step5", "the job has 2 ranks"),
        ("kill-agent:2@step5", "the job has 2 nodes"),
    ],
)
def test_faults_that_are_not_understood(inputs, tmp_path, fault, word):
    result = ftlaunch("rehearse", "--fault", fault, *inputs.command(tmp_path / "out"))
    assert result.returncode == 2
    assert word in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_rehearsal_without_a_fault(tmp_path):
    result = ftlaunch("rehearse", "--nodes", 2, cwd=tmp_path)
    assert result.returncode == 2
    assert "--fault kill-rank:0@step5" in result.stderr


def test_faults_are_done_to_no_other_machines_processes(tmp_path):
    """Their numbers are those of other processes here."""
    elsewhere = ("--cluster", "ssh", "cluster.hosts=[n1,n2]", "-o", tmp_path / "out")
    result = ftlaunch("rehearse", "--fault", "kill-rank:1@step5", *elsewhere)
    assert_mistake(result, "kill-rank 1", "processes of this machine", "--cluster local")
    assert not (tmp_path / "out").exists()


# -- restarts by cause --------------------------------------------------------------------------


def _decide(policy, cause, *, progressed=True, can_halve=True):
    failure = _failure(0, cause, "words", 1.0)
    return policy.decide(failure, progressed=progressed, can_halve=can_halve, goes_on="step 5")


def test_what_is_tried_again():
    for cause in ("user", "exception", "exit"):
        assert _decide(RestartPolicy(max_restarts=3), cause) is None
    for cause in ("signal", "lost", "stall"):
        policy = RestartPolicy(max_restarts=2)
        assert "restart 1 of 2 from step 5" in _decide(policy, cause).why
        assert _decide(policy, cause) is not None
        assert _decide(policy, cause) is None
        assert _decide(RestartPolicy(max_restarts=0), cause) is None


def test_two_failures_without_a_step_between_stop():
    policy = RestartPolicy(max_restarts=9)
    assert _decide(policy, "signal", progressed=False) is not None
    assert _decide(policy, "lost", progressed=False) is None


def test_want_of_memory_is_not_counted_and_ends_at_one_sample():
    policy = RestartPolicy(max_restarts=0)
    for _ in range(5):
        assert _decide(policy, "memory", progressed=False).halves_micro_batch
    assert _decide(policy, "memory", can_halve=False) is None


def test_half_a_micro_batch_has_the_same_global_batch(inputs, undisturbed):
    plan = LaunchPlan.read(inputs.folder / "undisturbed" / "plan.json")
    assert (plan.world_size, plan.global_batch_size, plan.micro_batch, plan.accumulation) == (
        2, 16, 4, 2,
    )  # fmt: skip
    half = halve_micro_batch(plan)
    assert half is not None
    assert (half.global_batch_size, half.micro_batch, half.accumulation) == (16, 2, 4)
    assert any("for want of memory" in reason.why for reason in half.reasons)
    one = halve_micro_batch(half)
    assert one is not None
    assert halve_micro_batch(one) is None


_HUNGRY = """\
import torch
from transformers import BertForSequenceClassification


class Hungry(BertForSequenceClassification):
    def forward(self, *args, **kwargs):
        rows = (kwargs.get("input_ids") if args == () else args[0]).shape[0]
        if rows > {limit}:
            torch.empty(1 << 50)  # a petabyte: torch's allocator says no
        return super().forward(*args, **kwargs)
"""


def _hungry_model(folder: Path, limit: int) -> Path:
    model = write_model(folder, auto_map={"AutoModelForSequenceClassification": "hungry.Hungry"})
    (model / "hungry.py").write_text(_HUNGRY.format(limit=limit))
    return model


@pytest.mark.long
def test_no_memory_is_answered_with_half_the_micro_batch(inputs, undisturbed, tmp_path):
    out = tmp_path / "out"
    model = _hungry_model(tmp_path / "model", 1)
    flags = ("model.trust_remote_code=true", "train.per_device_eval_batch_size=4")
    result = ftlaunch(*inputs.command(out, *flags, "--max-restarts", 0, model=model))
    assert result.returncode == 0, said(result)
    assert result.stdout.count("with half the micro-batch") == 2
    assert "can't allocate memory" in result.stdout
    # Four samples at once, then two, then one: the same global batch, the same training.
    assert_same_training(metrics_of(out), undisturbed)
    assert LaunchPlan.read(out / "plan.json").micro_batch == 1


def test_no_memory_for_one_sample_ends_the_job(inputs, tmp_path):
    out = tmp_path / "out"
    model = _hungry_model(tmp_path / "model", 0)
    result = ftlaunch(*inputs.command(out, "model.trust_remote_code=true", model=model))
    assert result.returncode == 1
    assert result.stdout.count("with half the micro-batch") == 2
    assert summary_of(out)["failure"]["cause"] == "memory"


def test_a_rank_that_dies_at_every_start(inputs, tmp_path):
    model = write_model(
        tmp_path / "model", auto_map={"AutoModelForSequenceClassification": "dies.Dies"}
    )
    (model / "dies.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    out = tmp_path / "out"
    result = ftlaunch(*inputs.command(out, "model.trust_remote_code=true", model=model))
    assert result.returncode == 1
    assert result.stdout.count("restart") == 1
    assert "killed by SIGKILL" in said(result)


@pytest.fixture
def memory_cgroup() -> Iterator[Path]:
    """A control group of 400 MB; making it takes root and a writable hierarchy."""
    roots = [Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")]
    name = f"ftlaunch-test-{os.getpid()}"
    for root, limit in zip(roots, ("memory.limit_in_bytes", "memory.max"), strict=True):
        folder = root / name
        try:
            folder.mkdir()
            (folder / limit).write_text("400000000")
        except OSError:
            if folder.is_dir():
                folder.rmdir()
            continue
        yield folder
        folder.rmdir()
        return
    pytest.skip("no control group with a memory limit can be made here")


def test_the_kernels_killer_is_told_from_a_kill(memory_cgroup, tmp_path):
    (tmp_path / "script.py").write_text(
        "import os, time\n"
        "held = []\n"
        "while os.environ['RANK'] == '1':\n"
        "    held.append(bytearray(10_000_000))\n"
        "    time.sleep(0.002)\n"
        "time.sleep(600)\n"
    )
    out = tmp_path / "out"
    join = f'echo $$ > {memory_cgroup}/cgroup.procs; exec "$@"'
    done = subprocess.run(
        [
            *("bash", "-c", join, "bash", *SCRIPT, "--nodes", "2", "--max-restarts", "0"),
            *("-o", str(out), "cluster.grace_seconds=0", "script.py"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 137, done.stdout + done.stderr
    assert "rank 1 on node1 failed: killed by the kernel for want of memory" in done.stdout
    assert summary_of(out)["failure"]["cause"] == "memory"
    assert_no_process_left(out)


# -- what vanishes without a word ---------------------------------------------------------------


def test_a_stall_without_restarts_shows_the_stack_of_the_odd_rank(inputs, tmp_path):
    model = write_model(
        tmp_path / "model", auto_map={"AutoModelForSequenceClassification": "sleeps.Sleeps"}
    )
    (model / "sleeps.py").write_text(
        "import os, time\n"
        "from transformers import BertForSequenceClassification\n\n"
        "class Sleeps(BertForSequenceClassification):\n"
        "    calls = 0\n\n"
        "    def forward(self, *args, **kwargs):\n"
        "        self.calls += 1\n"
        "        if os.environ['RANK'] == '1' and self.calls > 20:\n"
        "            self.rest()\n"
        "        return super().forward(*args, **kwargs)\n\n"
        "    def rest(self):\n"
        "        time.sleep(600)\n"
    )
    out = tmp_path / "out"
    result = ftlaunch(
        *inputs.command(out, "model.trust_remote_code=true", "--max-restarts", 0, model=model),
        "cluster.stall_timeout_seconds=3",
    )
    output = said(result)
    assert result.returncode == 1, output
    assert re.search(r"rank 1 on node1 failed: no progress for \d s .*rank 1 is in rest", output)
    assert 'sleeps.py", line 14 in rest' in output
    assert "in rest" in (out / "logs" / "rank-00001.log").read_text()
    # The others' stacks are in their logs.
    assert "most recent call first" in (out / "logs" / "rank-00000.log").read_text()
    assert summary_of(out)["failure"]["cause"] == "stall"


def test_a_coordinator_that_hangs_is_left(inputs, tmp_path):
    out = tmp_path / "out"
    command = inputs.endless(out, "cluster.heartbeat_timeout_seconds=2")
    with start(*command) as process:
        wait_for_step(process, out, 5)
        process.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        wait_until(lambda: len(processes_of(out)) == 1, 12, "agents and ranks are gone")
        assert time.monotonic() - stopped < 2 + 5 + 1
        process.send_signal(signal.SIGCONT)
        process.terminate()
        finish(process, 60)
    assert_no_process_left(out)


def test_a_fork_server_that_hangs_is_ended(inputs, undisturbed, tmp_path):
    out = tmp_path / "out"
    with start(*inputs.command(out, "cluster.heartbeat_timeout_seconds=2")) as process:
        wait_for_checkpoint(process, out, 12)
        (server,) = [pid for pid in processes_of(out) if process_name(pid) == SERVER_NAME]
        # Its ranks go on without it: what it cannot tell is that one has ended.
        os.kill(server, signal.SIGSTOP)
        result = finish(process, 120)
    assert result.returncode == 0, said(result)
    assert "the fork server on node" in result.stdout
    assert_same_training(metrics_of(out), undisturbed)
    assert_no_process_left(out)


def test_ctrl_z_suspends_the_command_and_not_the_job(inputs, tmp_path):
    out = tmp_path / "out"
    command = inputs.endless(out, "cluster.heartbeat_timeout_seconds=1")
    with start(*command) as process:
        wait_for_step(process, out, 5)
        process.send_signal(signal.SIGTSTP)
        wait_until(lambda: _state(process.pid) == "T", 5, "the command is stopped")
        time.sleep(3)
        assert len(processes_of(out)) >= 5
        process.send_signal(signal.SIGCONT)
        wait_for_step(process, out, metrics_of(out)[-1]["step"] + 50)
        process.terminate()
        result = finish(process, 60)
    assert result.returncode == 75, said(result)
    assert "restart" not in result.stdout


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


# -- full disks ---------------------------------------------------------------------------------


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)],
        capture_output=True,
        timeout=30,
    )
    if made.returncode:
        if os.environ.get("CI") == "true":
            pytest.fail("a small file system cannot be mounted here")
        pytest.skip("mounting takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=30)


def test_a_full_disk_under_the_logs_of_a_script(tiny_disk, tmp_path):
    (tmp_path / "script.py").write_text("while True:\n    print('x' * 1000)\n")
    out = tiny_disk / "out"
    result = ftlaunch(
        *("--nodes", 2, "-o", out, "cluster.grace_seconds=0", "script.py"),
        cwd=tmp_path,
        command=SCRIPT,
    )
    assert result.returncode == 1, said(result)[-2000:]
    assert "OSError: [Errno 28] No space left on device" in said(result)
    assert_no_process_left(out)


# -- at rest ------------------------------------------------------------------------------------


def test_at_rest_nothing_is_done(tmp_path):
    (tmp_path / "script.py").write_text("import time; print('up', flush=True); time.sleep(600)")
    out = tmp_path / "out"
    seconds = 5.0
    with start("--nodes", 4, "-o", out, "script.py", cwd=tmp_path, command=SCRIPT) as process:
        logs = [out / "logs" / f"rank-{rank:05d}.log" for rank in range(4)]
        wait_until(
            lambda: all(p.exists() and "up" in p.read_text() for p in logs), 60, "four ranks"
        )
        time.sleep(3)  # the store is still importing
        servers = [pid for pid in processes_of(out) if process_name(pid) == SERVER_NAME]
        watched = [process.pid, *agent_processes(out), *servers]
        assert len(watched) == 6
        before = sum(map(_cpu_seconds, watched))
        time.sleep(seconds)
        used = sum(map(_cpu_seconds, watched)) - before
        process.kill()
    assert used / seconds < 0.01
    assert_no_process_left(out)


def _cpu_seconds(pid: int) -> float:
    """By the scheduler's clock: the ticks of /proc/PID/stat are as long as what is measured."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
