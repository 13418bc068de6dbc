"""Submitted jobs on a real SLURM: sealed, told, requeued, cancelled; exit codes; status and logs."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ftlaunch.launcher import submission
from tests.jobs import (
    SCRIPT,
    assert_mistake,
    checkpoint_steps,
    contents,
    ftlaunch,
    metrics_of,
    processes_of,
    rank_process,
    said,
    wait_until,
)
from tests.test_submission import write_snapshot
from tests.training_jobs import Inputs, assert_every_checkpoint_whole, assert_same_training

START_SECONDS = 120.0


@pytest.fixture
def bed(slurm):
    yield slurm
    slurm.clear()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return Inputs(tmp_path_factory.mktemp("inputs"))


def run(bed, *words, **options):
    """A command of ours as on a login node."""
    env = {"SLURM_CONF": bed.environment()["SLURM_CONF"], **options.pop("env", {})}
    return ftlaunch(*words, env=env, **options)


def submitted(bed, out: Path, *words, **options) -> str:
    result = run(bed, "submit", "-o", out, *words, **options)
    assert result.returncode == 0, said(result)
    job = submission.submitted_job(out)
    assert job is not None and f"submitted as job {job.job_id}\n" in result.stdout
    return job.job_id


def state_of(bed, out: Path) -> Any:
    result = run(bed, "status", out, "--json")
    assert result.returncode == 0, said(result)
    return json.loads(result.stdout)


def log_of(out: Path, job: str) -> str:
    path = out / "logs" / f"slurm-{job}.log"
    return path.read_text(errors="replace") if path.exists() else ""


def wait_for_step(out: Path, job: str, step: int) -> None:
    wait_until(
        lambda: (
            bool(metrics_of(out)) and metrics_of(out)[-1]["step"] >= step and checkpoint_steps(out)
        ),
        START_SECONDS,
        f"step {step}, with {log_of(out, job)}",
    )


def wait_for_words(out: Path, job: str, words: str, seconds: float = START_SECONDS) -> None:
    wait_until(lambda: words in log_of(out, job), seconds, f"{words!r} in {out}")


def runs_of(out: Path, job: str, kind: str) -> list[dict[str, Any]]:
    return [run for run in submission.runs_of(out / "submission", job) if run["kind"] == kind]


def write_script(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "job.py").write_text(text)
    return folder / "job.py"


# -- what is sealed -----------------------------------------------------------------------------


def test_edits_after_the_submission_change_nothing(bed, tmp_path):
    """The script, and with it what stands beside it by name; a hostile working folder is not looked at."""
    here, out = tmp_path / "here", tmp_path / "out"
    script = write_script(
        here / "code",
        "import sys, pathlib, helper\n"
        "print('first', helper.NAME, sys.argv, pathlib.Path(__file__).parent, sys.path[0])\n",
    )
    (script.parent / "helper.py").write_text("NAME = 'of the folder'\n")
    for name in ("submitit", "cluster", "launcher", "ftlaunch", "numpy", "torch"):
        (here / name).mkdir()
        (here / name / "__init__.py").write_text("raise SystemExit('hostile')\n")
    (here / "job.yaml").write_text("cluster: {show_output: all}\nslurm: {begin: now+1hour}\n")
    job = submitted(
        *(bed, out, "--nodes", 2, "--config", "job.yaml", "code/job.py", "--lr", "1 2", "-o", "x"),
        cwd=here,
        command=SCRIPT,
    )
    assert state_of(bed, out)["status"] == "pending"
    script.write_text("print('second')\n")
    (here / "job.yaml").write_text("cluster: {show_output: none}\n")
    bed.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    assert bed.wait_state(job, "COMPLETED", "FAILED", seconds=60) == "COMPLETED", log_of(out, job)
    log = log_of(out, job)
    for rank in (0, 1):
        assert re.search(rf"^\[\w+:{rank}\] first of the folder ", log, re.MULTILINE)
    folder = here / "code"
    assert f"['code/job.py', '--lr', '1 2', '-o', 'x'] {folder} {folder}" in log
    assert "second" not in log and "hostile" not in log
    assert state_of(bed, out)["exit_code"] == 0


@pytest.mark.long
def test_what_the_hub_has_is_sealed_with_its_commit(bed, tmp_path, inputs):
    """The job begins when `main` has moved on, and looks at the cache only."""
    cache, out = tmp_path / "hub", tmp_path / "out"
    first, second = "1" * 40, "2" * 40
    repo = write_snapshot(cache, "somebody/tiny-bert", first).parent.parent
    words = [word for word in inputs.command(out, "train.max_steps=6") if word not in ("-o", out)]
    words[words.index(inputs.model)] = "somebody/tiny-bert"
    words += ["slurm.begin=now+1hour"]
    job = submitted(bed, out, *words, env={"HF_HUB_CACHE": str(cache)})
    (repo / "refs" / "main").write_text(second)
    (repo / "snapshots" / second).mkdir()
    bed.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    assert bed.wait_state(job, "COMPLETED", "FAILED", seconds=90) == "COMPLETED", log_of(out, job)
    assert json.loads((out / "plan.json").read_text())["options"]["model"]["revision"] == first
    [fetched] = state_of(bed, out)["job"]["fetched"]
    assert fetched == {"what": "model", "name": "somebody/tiny-bert", "revision": first}
    # The job goes on with what it began with.
    again = submitted(bed, out, *words, "train.max_steps=8", env={"HF_HUB_CACHE": str(cache)})
    bed.run("scontrol", "update", f"JobId={again}", "StartTime=now")
    assert bed.wait_state(again, "COMPLETED", "FAILED", seconds=90) == "COMPLETED", log_of(
        out, again
    )
    assert metrics_of(out)[-1]["step"] == 8


def test_a_changed_code_is_refused(bed, tmp_path):
    out = tmp_path / "out"
    job = submitted(bed, out, "slurm.begin=now+1hour", write_script(tmp_path / "s", "print(1)\n"))
    with open(out / "submission/code/ftlaunch/launcher/page.py", "a") as file:
        file.write("# edited\n")
    bed.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    assert bed.wait_state(job, "COMPLETED", "FAILED", seconds=60) == "FAILED"
    assert "is not the one that was sealed" in log_of(out, job)
    assert bed.job(job)["ExitCode"] == "2:0"


def test_a_training_in_a_folder_with_an_evil_name(bed, tmp_path, inputs):
    out = tmp_path / 'a\'; echo foo $(touch x) `touch y` "z" ü #'
    words = [word for word in inputs.command(out, "train.max_steps=20") if word not in ("-o", out)]
    job = submitted(bed, out, *words, "slurm.comment='a''b; $(x) \"c\" \\ d'", cwd=tmp_path)
    assert bed.wait_state(job, "COMPLETED", "FAILED", seconds=90) == "COMPLETED", log_of(out, job)
    state = state_of(bed, out)
    assert (state["status"], state["exit_code"], state["step"]) == ("done", 0, 20)
    shown = run(bed, "logs", out).stdout
    assert "==> job: " in shown and "==> rank 1: " in shown and "done: 20 optimizer steps" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name]
    comment = bed.run("squeue", "--states=all", "-h", "-j", job, "-o", "%k").stdout
    assert comment == 'a\'b; $(x) "c" \\ d\n'


# -- exit codes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code"), [("raise SystemExit(7)", 7), ("1/0", 1), ("print('fine')", 0)]
)
def test_the_exit_code_of_the_job_is_that_of_the_command(bed, tmp_path, text, code):
    """A job that waits for this one by afterok runs, or never does."""
    out = tmp_path / "out"
    script = write_script(tmp_path / "s", text)
    job = submitted(bed, out, "slurm.begin=now+1hour", "cluster.max_restarts=0", script)
    after = bed.submit(f"--dependency=afterok:{job}", "--output=/dev/null", "--wrap", "true")
    bed.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    bed.wait_state(job, "COMPLETED", "FAILED", seconds=60)
    assert bed.job(job)["ExitCode"] == f"{code}:0", log_of(out, job)
    state = state_of(bed, out)
    assert (state["kind"], state["exit_code"], state["job"]["job_id"]) == ("ended", code, job)
    if code:
        wait_until(lambda: bed.job(after).get("Reason") == "DependencyNeverSatisfied", 30, "never")
    else:
        assert bed.wait_state(after, "COMPLETED", seconds=30)


# -- stopping and requeueing --------------------------------------------------------------------


def test_a_job_that_is_told_of_its_end_goes_on_from_there(bed, tmp_path, inputs):
    """What SLURM sends before the time limit: saved, requeued by us, resumed; then cancelled for good."""
    out = tmp_path / "out"
    words = [
        word
        for word in inputs.endless(out, "checkpoint.save_steps=100000")
        if word not in ("-o", out)
    ]
    job = submitted(bed, out, *words, "--time", "30")
    wait_until(lambda: len(metrics_of(out)) > 5, START_SECONDS, "steps")
    assert "running on" in run(bed, "status", out).stdout
    bed.run("scancel", "--batch", "--signal=USR1", job)
    wait_for_words(out, job, "goes back into the queue")
    bed.wait_state(job, "PENDING", seconds=30)
    [saved] = checkpoint_steps(out)
    assert state_of(bed, out)["requeues"] == 1
    assert processes_of(out) == []
    wait_for_words(out, job, f"resumed after step {saved} ")
    assert bed.job(job)["Restarts"] == "1"
    [first_end] = runs_of(out, job, "ended")
    assert (first_end["exit_code"], first_end["stop_signal"], first_end["requeues"]) == (
        75,
        "SIGUSR1",
        True,
    )

    wait_until(lambda: metrics_of(out)[-1]["step"] > saved + 5, START_SECONDS, "steps after")
    cancelled = run(bed, "cancel", out)
    assert cancelled.returncode == 0 and f"job {job} of SLURM is cancelled" in cancelled.stdout
    assert bed.wait_state(job, "CANCELLED", seconds=30)
    wait_until(lambda: not processes_of(out), 20, "the job is gone")
    time.sleep(2.0)
    assert bed.job_state(job) == "CANCELLED"
    assert state_of(bed, out)["status"] == "cancelled"
    assert bed.drained() == {}


@pytest.mark.long
def test_a_rank_that_is_killed_after_the_notice_keeps_no_job_from_the_queue(bed, tmp_path, inputs):
    out = tmp_path / "out"
    words = [word for word in inputs.endless(out) if word not in ("-o", out)]
    job = submitted(bed, out, *words, "--time", "30")
    wait_for_step(out, job, 13)
    # It cannot stop, so the others wait for it.
    rank = rank_process(out, 1)
    os.kill(rank, signal.SIGSTOP)
    bed.run("scancel", "--batch", "--signal=USR1", job)
    wait_for_words(out, job, "stopping")
    time.sleep(1.0)
    os.kill(rank, signal.SIGKILL)
    wait_for_words(out, job, "goes back into the queue")
    [end] = runs_of(out, job, "ended")
    assert (end["exit_code"], end["stop_signal"], end["requeues"]) == (1, "SIGUSR1", True)
    assert "rank 1 on" in log_of(out, job) and "killed by SIGKILL" in log_of(out, job)
    wait_for_words(out, job, "resumed after step ")
    bed.run("scancel", job)
    wait_until(lambda: not processes_of(out), 20, "the job is gone")


@pytest.mark.faults
def test_four_nodes_that_are_preempted_twice(bed, tmp_path, inputs):
    """By somebody's requeue, then by the notice before the limit: the losses of an undisturbed run."""
    changes = ("train.max_steps=300", "checkpoint.save_steps=20", "train.eval_strategy=no")
    whole, out = tmp_path / "whole", tmp_path / "out"
    done = ftlaunch(*inputs.command(whole, *changes, nodes=4))
    assert done.returncode == 0, said(done)
    words = [w for w in inputs.command(out, *changes, nodes=4) if w not in ("-o", out)]
    job = submitted(bed, out, *words, "--time", "30")

    wait_for_step(out, job, 25)
    assert bed.run("scontrol", "requeue", job).returncode == 0
    wait_for_words(out, job, "resumed after step", 90)
    first = checkpoint_steps(out)[-1]
    wait_until(lambda: metrics_of(out)[-1]["step"] > first + 15, 90, "steps after the requeue")
    bed.warn(job, batch=True)
    wait_for_words(out, job, "goes back into the queue")
    assert checkpoint_steps(out)[-1] < 300
    assert bed.wait_state(job, "COMPLETED", "FAILED", seconds=180) == "COMPLETED"

    assert bed.job(job)["Restarts"] == "2"
    assert_same_training(metrics_of(out), metrics_of(whole))
    assert_every_checkpoint_whole(out)
    assert state_of(bed, out)["exit_code"] == 0
    assert bed.drained() == {}


@pytest.mark.long
def test_a_script_at_its_time_limit(bed, tmp_path):
    """SLURM's own signal, of a limit of a minute; the script does not know of any of it."""
    out = tmp_path / "out"
    script = write_script(
        tmp_path / "s",
        "import os, time\n"
        "again = os.environ.get('SLURM_RESTART_COUNT')\n"
        "print('again' if again else 'begins')\n"
        "time.sleep(0 if again else 300)\n",
    )
    job = submitted(bed, out, "--time", "1", "slurm.signal_seconds=50", script)
    wait_for_words(out, job, "goes back into the queue", 90)
    assert bed.wait_state(job, "COMPLETED", "FAILED", "TIMEOUT", seconds=90) == "COMPLETED"
    log = log_of(out, job)
    assert log.index("begins") < log.index("again")
    assert [end["exit_code"] for end in runs_of(out, job, "ended")] == [128 + 10, 0]


@pytest.mark.parametrize("why", ["not allowed", pytest.param("in vain", marks=pytest.mark.long)])
def test_a_job_that_is_not_requeued(bed, tmp_path, why):
    out = tmp_path / "out"
    script = write_script(tmp_path / "s", "import time\nprint('begins')\ntime.sleep(300)\n")
    words = ["slurm.requeue=false"] if why == "not allowed" else []
    job = submitted(bed, out, *words, script)
    wait_for_words(out, job, "begins")
    bed.run("scancel", "--batch", "--signal=USR1", job)
    if why == "in vain":
        # The second run gets no further than the first.
        wait_until(lambda: log_of(out, job).count("begins") == 2, START_SECONDS, "a second run")
        bed.run("scancel", "--batch", "--signal=USR1", job)
    assert bed.wait_state(job, "FAILED", "COMPLETED", seconds=60) == "FAILED"
    assert bed.job(job)["ExitCode"] == f"{128 + 10}:0"
    reason = "slurm.requeue is false" if why == "not allowed" else "two runs in a row"
    assert f"not requeued: {reason}" in log_of(out, job)


@pytest.mark.long
def test_a_requeue_by_somebody_else_is_one_requeue(bed, tmp_path, inputs):
    out = tmp_path / "out"
    words = [word for word in inputs.endless(out) if word not in ("-o", out)]
    job = submitted(bed, out, *words)
    wait_for_step(out, job, 12)
    bed.run("scontrol", "requeue", job)
    wait_for_words(out, job, "resumed after step")
    assert bed.job(job)["Restarts"] == "1"
    assert "goes back into the queue" not in log_of(out, job)


def test_a_signal_before_the_job_has_begun(bed, tmp_path):
    out = tmp_path / "out"
    script = write_script(tmp_path / "s", "print('begins')\n")
    job = submitted(bed, out, "slurm.begin=now+1hour", script)
    # Until the number is there, the job waits for it.
    hidden = (out / "submission/job.json").rename(tmp_path / "job.json")
    bed.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_until(lambda: bool(runs_of(out, job, "started")), 30, "the start")
    bed.run("scancel", "--batch", "--signal=USR1", job)
    wait_until(lambda: bool(runs_of(out, job, "ended")), 30, "the end")
    hidden.rename(out / "submission/job.json")
    assert bed.wait_state(job, "FAILED", "COMPLETED", seconds=60) == "FAILED"
    assert bed.job(job)["ExitCode"] == "75:0"


# -- refusals -----------------------------------------------------------------------------------


def test_what_slurm_refuses_is_said_in_its_words_and_leaves_nothing(bed, tmp_path):
    out = tmp_path / "out"
    for flags, words in (
        (["--partition", "nope"], "invalid partition specified: nope"),
        (["--gpus-per-node", "8"], "Invalid generic resource (gres) specification"),
        (["slurm.nonsense=1"], "unrecognized option '--nonsense=1'"),
    ):
        result = run(bed, "submit", "-o", out, *flags)
        assert_mistake(result, words, "SLURM has not taken the job")
        assert result.stderr.index(words) < result.stderr.index("SLURM has not taken")
        assert not out.exists()
    job = submitted(bed, out, "slurm.begin=now+1hour")
    # Of a folder that has been used, all of it stays.
    assert run(bed, "cancel", out).returncode == 0
    bed.wait_state(job, "CANCELLED", seconds=10)
    (out / "checkpoints" / "step-00000007").mkdir(parents=True)
    (out / "checkpoints" / "step-00000007" / "weights").write_text("hours of work")
    before = contents(out)
    for flags in (["train.seed=1"], ["--overwrite"]):
        assert_mistake(run(bed, "submit", "-o", out, "--partition", "nope", *flags), "nope")
        assert contents(out) == before
    submitted(bed, out, "slurm.begin=now+1hour", "--overwrite")
    assert not (out / "checkpoints").exists()
    assert not (out / "submission" / "earlier").exists()
    assert run(bed, "cancel", out).returncode == 0


def test_a_folder_has_one_job(bed, tmp_path):
    out = tmp_path / "out"
    job = submitted(bed, out, "slurm.begin=now+1hour")
    before = (out / "submission/config.json").read_bytes()
    assert_mistake(run(bed, "submit", "-o", out, "train.seed=1"), f"job {job} is pending")
    assert (out / "submission/config.json").read_bytes() == before
    shown = run(bed, "status", out).stdout
    assert f"job {job} is pending: BeginTime; place 1 of 1 in partition main" in shown
    assert run(bed, "logs", out).stdout == "nothing has been printed yet\n"
    assert run(bed, "cancel", out).returncode == 0
    bed.wait_state(job, "CANCELLED", seconds=10)
    assert "ended: cancelled" in run(bed, "status", out).stdout
    assert submitted(bed, out, "slurm.begin=now+1hour") != job


def test_another_job_of_that_number_is_not_ours(bed, tmp_path):
    """Numbers begin anew when a site sets up its SLURM again."""
    out = tmp_path / "out"
    job = submitted(bed, out, "slurm.begin=now+1hour")
    run(bed, "cancel", out)
    other = bed.submit("--begin=now+1hour", "--output=/dev/null", "--wrap", "true")
    file = out / "submission/job.json"
    file.write_text(file.read_text().replace(f'"job_id": "{job}"', f'"job_id": "{other}"'))
    assert state_of(bed, out)["kind"] == "ended"
    assert "nothing to cancel" in run(bed, "cancel", out).stdout
    assert bed.job_state(other) == "PENDING"


def test_status_without_an_answer_of_slurm(bed, tmp_path):
    out = tmp_path / "out"
    submitted(bed, out, "slurm.begin=now+1hour")
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "squeue").write_text(
        "#!/bin/sh\necho 'slurm_load_jobs error: \x1b[31mdown' >&2\nexit 1\n"
    )
    (fake / "squeue").chmod(0o755)
    result = run(bed, "status", out, env={"PATH": f"{fake}:{os.environ['PATH']}"})
    assert result.returncode == 0
    assert "squeue says: slurm_load_jobs error: down" in result.stdout


def test_submitting_from_inside_of_an_allocation(bed, tmp_path):
    """What the surrounding job has set does not reach the one that is submitted."""
    out = tmp_path / "out"
    script = write_script(
        tmp_path / "s",
        "import os\nprint(os.environ['SLURM_JOB_NUM_NODES'], os.environ.get('SLURM_NTASKS'))\n",
    )
    words = ["-m", "ftlaunch.launcher", "submit", "-o", out, "--nodes", "2", script]
    env = {**bed.environment(), "SBATCH_TIMELIMIT": "7", "SBATCH_ARRAY_INX": "0-3"}
    done = bed.run("srun", "-N1", "--ntasks=3", "sh", "-c", 'test $SLURM_PROCID != 0 || exec "$@"', "x",
                   sys.executable, *words, env=env)  # fmt: skip
    assert done.returncode == 0, done.stderr
    job = submission.submitted_job(out)
    assert job is not None
    assert bed.wait_state(job.job_id, "COMPLETED", "FAILED", seconds=60) == "COMPLETED"
    # Of its own allocation, and of the step of one task that its rank runs in.
    assert "2 1\n" in log_of(out, job.job_id)
    assert bed.job(job.job_id)["NumNodes"] == "2"


def test_following_the_logs_until_the_end(bed, tmp_path):
    out = tmp_path / "out"
    text = "import time\nfor n in range(4):\n    print('line', n, flush=True)\n    time.sleep(1)\n"
    job = submitted(bed, out, "--nodes", 2, write_script(tmp_path / "s", text))
    result = run(bed, "logs", out, "--follow", timeout=120)
    assert result.returncode == 0
    for rank in (0, 1):
        lines = [line for line in result.stdout.splitlines() if line.startswith(f"[rank {rank}] ")]
        assert lines == [f"[rank {rank}] line {n}" for n in range(4)]
    assert result.stdout.endswith(f"job {job} has ended: done, exit code 0\n")
