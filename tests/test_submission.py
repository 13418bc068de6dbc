"""Jobs that are submitted: what the batch file says, what is sealed, what is refused."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.machine import code_fingerprint
from ftlaunch.cluster.slurm_queue import client_environment, is_job_id
from ftlaunch.cluster.submit import BatchJob, batch_file
from ftlaunch.launcher import batch, earlier, submission
from ftlaunch.launcher.config import load_config
from ftlaunch.launcher.output_folder import OWN_NAMES
from ftlaunch.launcher.script_plan import Script
from ftlaunch.launcher.slurm_options import SlurmOptions, signal_lead, time_limit_seconds
from ftlaunch.launcher.submission import Sealed, SubmittedJob
from ftlaunch.strategies.hub import fetch_model
from ftlaunch.strategies.options import ModelOptions
from tests.jobs import (
    assert_mistake,
    assert_no_process_left,
    checkpoint_steps,
    finish,
    ftlaunch,
    metrics_of,
    said,
    start,
    summary_of,
    write_model,
)
from tests.training_jobs import Inputs, wait_for_checkpoint

has_srun = pytest.mark.usefixtures("srun")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def config_of(*overrides: str):
    return load_config(file=None, flags={}, overrides=overrides)


# -- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        (30, 1800),
        ("30:15", 1815),
        ("4:00:00", 14400),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("1-02:03:04", 93784),
        ("UNLIMITED", math.inf),
        ("4h", None),
        ("", None),
        ("1:2:3:4", None),
        ("-5", None),
    ],
)
def test_a_time_limit_is_read_as_sbatch_reads_it(text, seconds):
    assert time_limit_seconds(text) == seconds


def test_a_time_in_yaml_is_no_number_of_base_60(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("slurm:\n  time: 4:00:00\n  mem: 64G\n  cpus-per-task: 8\n  exclusive: true\n")
    options = load_config(file=file, flags={}, overrides=[]).slurm
    assert (options.time, options.mem) == ("4:00:00", "64G")
    assert options.parameters() == {
        "time": "4:00:00",
        "mem": "64G",
        "cpus-per-task": "8",
        "exclusive": True,
    }
    assert config_of("slurm.time=2:30:00").slurm.time == "2:30:00"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ('slurm.partition="a\\n#SBATCH --wrap=reboot"', "one line of printable characters"),
        ('slurm.licenses="x\\u2028y"', "one line of printable characters"),
        ("slurm.account=' '", "one line of printable characters"),
        ("slurm.time=4h", "SLURM reads minutes"),
        ("slurm.partiton=gpu", "Did you mean slurm.partition"),
        ("slurm.output=/tmp/x", "set by ftlaunch submit itself"),
        ("slurm.array=0-9", "one submission for each job"),
        ("slurm.no_requeue=true", "Use slurm.requeue"),
        ("slurm.additional={'a b': 1}", "not an option of sbatch"),
        ("slurm.additional={'x\\n': 1}", "not an option of sbatch"),
        ("slurm.signal_seconds=0", "greater than or equal to 1"),
        ("slurm.nested={a: {b: 1}}", "slurm.additional"),
    ],
)
def test_what_may_not_stand_in_a_batch_file_is_refused(override, said):
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        config_of(override)


def test_more_notice_than_time_is_refused():
    with pytest.raises(UserError, match="told of its end before it begins"):
        config_of("slurm.time=1", "slurm.signal_seconds=60")


@pytest.mark.parametrize(
    ("options", "saves", "step", "seconds"),
    [
        # Nothing measured: the default.
        (SlurmOptions(), [], 0.0, 120),
        # 2 × (100 + 10) + 30
        (SlurmOptions(), [20.0, 100.0], 10.0, 250),
        # 2 × (1 + 1) + 30 = 34: SLURM itself is no more exact than a minute.
        (SlurmOptions(), [1.0], 1.0, 60),
        (SlurmOptions(signal_seconds=7), [100.0], 1.0, 7),
        # Half of two minutes.
        (SlurmOptions(time="2"), [100.0], 1.0, 60),
        (SlurmOptions(time="UNLIMITED"), [], 1.0, 120),
        (SlurmOptions(time="0"), [], 1.0, 120),
    ],
)
def test_the_notice_follows_the_time_of_a_save(options, saves, step, seconds):
    assert signal_lead(options, saves, step)[0] == seconds


def test_a_run_that_is_not_submitted_says_that_slurm_is_not_asked(tmp_path):
    script = tmp_path / "hello.py"
    script.write_text("print('hello')\n")
    result = ftlaunch("slurm.partition=gpu", "-o", tmp_path / "out", script)
    assert result.returncode == 0, said(result)
    assert "slurm.* is for ftlaunch submit" in result.stdout


# -- the batch file -----------------------------------------------------------------------------


def batch_job(folder: Path, **changes) -> BatchJob:
    values = {
        "name": "ftlaunch-out",
        "folder": folder,
        "code": "code",
        "log": "../logs/slurm-%j.log",
        "num_nodes": 2,
        "lead_seconds": 90,
        "requeue": True,
        "function": print,
        "argument": str(folder),
        **changes,
    }
    return BatchJob(**values)


def directives(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("#SBATCH")]


@has_srun
def test_the_batch_file_asks_for_what_was_asked_for(tmp_path):
    text = batch_file(batch_job(tmp_path, parameters={"time": "4:00:00", "exclusive": True}))
    assert directives(text) == [
        "#SBATCH --exclusive",
        "#SBATCH --job-name=ftlaunch-out",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --open-mode=append",
        "#SBATCH --output=../logs/slurm-%j.log",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR1@90",
        "#SBATCH --time=4:00:00",
    ]
    assert "srun" not in text
    text = batch_file(batch_job(tmp_path, requeue=False))
    assert "#SBATCH --no-requeue" in text
    assert "--requeue" not in directives(text)


@has_srun
def test_no_path_stands_in_a_directive(tmp_path):
    folder = tmp_path / "a'; echo foo $(x) `y` \"z ü"
    folder.mkdir()
    text = batch_file(batch_job(folder))
    assert not any(str(folder) in line for line in directives(text))
    # The one line of shell is read back by a shell.
    [line] = [line for line in text.splitlines() if line.startswith("exec env")]
    words = subprocess.run(
        ["bash", "-c", line.replace("exec env", "printf '%s\\0'")], capture_output=True, check=True
    ).stdout.split(b"\0")
    assert words[-2] == os.fsencode(folder)
    path = next(word for word in words if word.startswith(b"PYTHONPATH="))
    assert path.startswith(b"PYTHONPATH=" + os.fsencode(folder / "code"))


@pytest.mark.parametrize("name", ["50%j", "12:30", "a\\b", "a\nb", "a\x1bb"])
def test_a_folder_that_slurm_reads_otherwise_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="--output-dir"):
        submission.check_folder_name(tmp_path / name)


def test_a_surrounding_job_adds_nothing():
    environ = {"SLURM_JOB_ID": "7", "SLURM_CONF": "/c", "SLURM_MEM_PER_NODE": "1", "PATH": "/bin"}
    assert client_environment(environ) == {"SLURM_CONF": "/c", "PATH": "/bin"}


@pytest.mark.parametrize("text", ["", "0", "-1", "1_2", "12 13", "9" * 30, 12, None])
def test_what_is_no_number_of_a_job(text):
    assert not is_job_id(text)


# -- sealing ------------------------------------------------------------------------------------


A_JOB = SubmittedJob(
    job_id="12",
    name="n",
    submitted=submission.now(),
    host="h",
    num_nodes=2,
    lead_seconds=60,
    parameters={"time": "4:00:00", "exclusive": True},
    fetched=[{"what": "model", "name": "a/b", "revision": COMMIT}],
)


def sealed_of(*overrides: str, script: Script | None = None) -> Sealed:
    return Sealed(
        config=config_of(*overrides),
        script=script,
        working_dir="/",
        code_fingerprint=code_fingerprint(),
        lead_seconds=60,
    )


def test_what_is_sealed_is_read_back(tmp_path):
    ds = tmp_path / "ds.json"
    ds.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8}}')
    sealed = sealed_of(
        "train.learning_rate=2e-5",
        "train.class_weights=[1,2.5]",
        "data.text_columns=a,b",
        f"deepspeed.config={ds}",
        "slurm.licenses=x:2",
        "slurm.exclusive=true",
    )
    with submission.only_submission(tmp_path / "out") as folder:
        submission.seal(folder, sealed)
        assert submission.read_sealed(folder) == sealed
        assert folder.stat().st_mode & 0o777 == 0o700


def test_the_code_is_sealed_whole(tmp_path):
    """An interpreter that has the copy first on its path runs nothing else of ours."""
    with submission.only_submission(tmp_path / "out") as folder:
        submission.seal(folder, sealed_of())
    code = "import ftlaunch.launcher.batch as b, ftlaunch.cluster.machine as m; "
    code += "print(b.__file__); print(m.code_fingerprint())"
    environ = {**os.environ, "PYTHONPATH": str(folder / submission.CODE)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    path, fingerprint = done.stdout.split()
    assert Path(path).is_relative_to(folder)
    assert fingerprint == code_fingerprint()


def test_a_script_is_sealed_under_its_own_name(tmp_path):
    script = tmp_path / "torch.py"
    script.write_text("print('first')\n")
    with submission.only_submission(tmp_path / "out") as folder:
        as_given = Script(kind="path", target=str(script), arguments=("--a", "b c"))
        sealed = submission.seal(folder, sealed_of(script=as_given))
        assert submission.read_sealed(folder).script == sealed.script
    script.write_text("print('second')\n")
    assert sealed.script is not None and sealed.script.copy is not None
    assert Path(sealed.script.copy).read_text() == "print('first')\n"
    assert sealed.script.words() == ["copy", sealed.script.copy, str(script), "--a", "b c"]
    # Not where it would be imported in the place of the real one.
    assert not (folder / "torch.py").exists()


def test_a_submission_replaces_the_one_before(tmp_path):
    out = tmp_path / "out"
    with submission.only_submission(out) as folder:
        submission.seal(folder, sealed_of())
        submission.note_run(folder, "ended", job_id="1", exit_code=0)
        (folder / "code" / "ftlaunch" / "old.py").write_text("")
        submission.seal(folder, sealed_of("train.seed=2"))
        submission.withdraw(folder, was_there=True)
        assert submission.read_sealed(folder).config.train.seed == 42
        assert (folder / "code" / "ftlaunch" / "old.py").exists()
        submission.seal(folder, sealed_of("train.seed=1"))
        assert not (folder / "code" / "ftlaunch" / "old.py").exists()
        assert submission.read_sealed(folder).config.train.seed == 1
        assert [run["exit_code"] for run in submission.runs_of(folder, "1")] == [0]
        with (
            pytest.raises(UserError, match="another ftlaunch submit"),
            submission.only_submission(out),
        ):
            pass


def used_folder(out: Path) -> None:
    """An output folder with something of a job that was submitted to it."""
    with submission.only_submission(out) as folder:
        submission.seal(folder, sealed_of("train.seed=1"))
        submission.settle(folder, A_JOB)
        earlier.remove_settled(folder)
        submission.note_run(folder, "ended", job_id=A_JOB.job_id, exit_code=0)
    (out / "checkpoints" / "step-00000007").mkdir(parents=True)
    (out / "metrics.jsonl").write_text("{}\n")


def test_what_is_overwritten_stays_until_slurm_has_the_job(tmp_path):
    used_folder(tmp_path)
    with submission.only_submission(tmp_path) as folder:
        submission.seal(folder, sealed_of("train.seed=2"))
        earlier.set_output_aside(folder, OWN_NAMES)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["submission"]
        (tmp_path / "logs").mkdir()
        submission.withdraw(folder, was_there=True)
        assert (tmp_path / "checkpoints" / "step-00000007").is_dir()
        assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"
        assert submission.submitted_job(tmp_path) == A_JOB
        assert submission.runs_of(folder, A_JOB.job_id)
        submission.seal(folder, sealed_of("train.seed=2"))
        earlier.set_output_aside(folder, OWN_NAMES)
        submission.settle(folder, replace(A_JOB, job_id="13"))
        earlier.remove_settled(folder)
        assert sorted(path.name for path in folder.iterdir()) == [
            "code", "config.json", "job.json", "lock",
        ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["submission"]


def test_a_submission_that_was_killed_in_the_middle_is_undone(tmp_path):
    with submission.only_submission(tmp_path) as folder:
        submission.seal(folder, sealed_of("train.seed=3"))
    # There was nothing before it.
    used_folder(tmp_path)
    with submission.only_submission(tmp_path) as folder:
        submission.seal(folder, sealed_of("train.seed=2"))
        earlier.set_output_aside(folder, OWN_NAMES)
    with submission.only_submission(tmp_path) as folder:
        assert (tmp_path / "checkpoints" / "step-00000007").is_dir()
        assert submission.read_sealed(folder).config.train.seed == 1
        submission.seal(folder, sealed_of("train.seed=2"))
        earlier.set_output_aside(folder, OWN_NAMES)
        # Killed after SLURM had taken it, while what it replaces was being removed.
        (folder / "job.json").write_text("{}")
    with submission.only_submission(tmp_path) as folder:
        assert not (tmp_path / "checkpoints").exists()
        assert not (folder / "earlier").exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"job_id": 1}', '{"job_id": "x; rm"}', "[" * 100_000]
)
def test_a_damaged_job_file_is_none(tmp_path, text):
    folder = tmp_path / "submission"
    folder.mkdir()
    (folder / "job.json").write_text(text)
    assert submission.submitted_job(tmp_path) is None


def test_a_job_file_is_read_back(tmp_path):
    (tmp_path / "submission").mkdir()
    submission.settle(tmp_path / "submission", A_JOB)
    assert submission.submitted_job(tmp_path) == A_JOB


# -- what goes back into the queue ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "goes_back"),
    [
        ({"cause": "signal"}, True),
        ({"cause": "lost"}, True),
        ({"cause": "stall"}, True),
        ({"cause": "exception"}, False),
        ({"cause": "exit"}, False),
        ({"cause": "memory"}, False),
        ({"cause": "user"}, False),
        ("text", False),
        (None, False),
    ],
)
def test_whose_fault_a_failure_after_the_notice_is(tmp_path, failure, goes_back):
    assert not batch._failed_outside(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps({"failure": failure}))
    assert batch._failed_outside(tmp_path) is goes_back


# -- the hub ------------------------------------------------------------------------------------


def write_snapshot(cache: Path, name: str, commit: str = COMMIT) -> Path:
    """A model as the hub's library keeps it, with `main` at that commit."""
    repo = cache / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots").mkdir()
    return write_model(repo / "snapshots" / commit)


def test_the_revision_of_a_cached_model_is_sealed(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    write_snapshot(tmp_path, "somebody/tiny-bert")
    options = ModelOptions(name_or_path="somebody/tiny-bert", random_weights=True)
    sealed, fetched = fetch_model(options, lambda text: None)
    assert sealed.revision == COMMIT
    assert [(each.what, each.name, each.revision) for each in fetched] == [
        ("model", "somebody/tiny-bert", COMMIT)
    ]
    options = ModelOptions(name_or_path=str(tmp_path), tokenizer="somebody/tiny-bert")
    sealed, _ = fetch_model(options, lambda text: None)
    assert Path(str(sealed.tokenizer)).name == COMMIT
    assert sealed.revision is None


def test_local_paths_are_left_alone(tmp_path):
    options = ModelOptions(name_or_path=str(write_model(tmp_path / "m")))
    assert fetch_model(options, lambda text: None) == (options, [])


@has_srun
def test_a_model_that_cannot_be_fetched_is_refused_at_submission(tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text('{"text": "a", "label": 0}\n')
    out = tmp_path / "out"
    command = ["submit", "--model", "nobody/nothing", "--dataset", data, "-o", out]
    result = ftlaunch(*command, env={"SLURM_CONF": str(tmp_path / "none")}, cwd=tmp_path)
    assert_mistake(result, "nobody/nothing", "fetched when it is submitted")
    assert not out.exists()


# -- the command --------------------------------------------------------------------------------


@has_srun
def test_the_dry_run_prints_the_file_and_leaves_nothing(tmp_path):
    result = ftlaunch(
        *("submit", "--nodes", 3, "--time", "4:00:00", "-o", tmp_path / "out", "--dry-run"),
        *("slurm.constraint=a100|h100", "slurm.exclude=n[1-2]"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, said(result)
    for line in (
        "#SBATCH --nodes=3",
        "#SBATCH --time=4:00:00",
        "#SBATCH --constraint='a100|h100'",
        "#SBATCH --exclude='n[1-2]'",
        "#SBATCH --signal=B:USR1@120",
    ):
        assert f"    {line}\n" in result.stdout
    assert "nothing was fetched, written or submitted" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cluster.kind=local"], ["takes its nodes from SLURM"]),
        (["cluster.hostfile=hosts"], ["cluster.hostfile", "takes its nodes from SLURM"]),
        (["--nodes", "64"], ["global batch of 32", "64 nodes"]),
        (["--time", "4h"], ["slurm.time is '4h'"]),
        (["--strategy", "nonsense"], ["nonsense"]),
        (["--model", "./none", "--dataset", "./none"], ["does not exist"]),
        (["missing.py"], ["missing.py", "cannot be read"]),
        (["-o", "100%"], ["'%'", "--output-dir"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_found_before_slurm_is_asked(tmp_path, arguments, words):
    result = ftlaunch("submit", "-o", "out", *arguments, cwd=tmp_path)
    assert_mistake(result, *words)
    assert list(tmp_path.iterdir()) == []


def test_without_sbatch_this_is_no_login_node(tmp_path):
    result = ftlaunch("submit", "-o", "out", cwd=tmp_path, env={"PATH": str(tmp_path)})
    assert_mistake(result, "sbatch", "login node")
    assert list(tmp_path.iterdir()) == []


# -- jobs that were not submitted ----------------------------------------------------------------


@pytest.mark.parametrize("command", ["status", "logs", "cancel"])
def test_a_folder_without_a_job(tmp_path, command):
    assert_mistake(ftlaunch(command, tmp_path / "none"), "no folder")
    assert_mistake(ftlaunch(command, tmp_path), "holds no job")


def test_a_job_of_this_machine_from_its_start_to_its_cancellation(tmp_path):
    inputs, out = Inputs(tmp_path / "in"), tmp_path / "out"
    with start(*inputs.endless(out)) as process:
        wait_for_checkpoint(process, out, 12)
        state = json.loads(ftlaunch("status", out, "--json").stdout)
        assert (state["kind"], state["owner"]["pid"]) == ("running", process.pid)
        assert state["total_steps"] == 1_000_000
        assert state["step"] >= 12
        assert state["seconds_left"] > 0
        shown = ftlaunch("status", out).stdout
        assert f"running: process {process.pid}" in shown
        assert "samples/s" in shown
        another = ftlaunch("submit", *inputs.endless(out)[2:])
        assert_mistake(another, "in use by another job", str(process.pid))
        cancelled = ftlaunch("cancel", out)
        assert cancelled.returncode == 0
        assert f"process {process.pid} was told to stop" in cancelled.stdout
        assert finish(process, 60).returncode == 75
    assert checkpoint_steps(out)[-1] == summary_of(out)["optimizer_steps"]
    assert "ended: stopped, exit code 75" in ftlaunch("status", out).stdout
    assert "nothing to cancel" in ftlaunch("cancel", out).stdout
    assert_no_process_left(out)


def test_the_logs_of_a_script(tmp_path):
    script, out = tmp_path / "talk.py", tmp_path / "out"
    script.write_text(
        "import os; print('\\x1b]0;title\\x07I am', os.environ['RANK'], '\\x9b31m')\n"
    )
    assert ftlaunch("--nodes", 2, "-o", out, script).returncode == 0
    result = ftlaunch("logs", out)
    assert "I am 0" in result.stdout and "I am 1" in result.stdout
    assert "\x1b" not in result.stdout and "\x07" not in result.stdout
    assert ftlaunch("logs", out, "--rank", 1).stdout == "I am 1 \n"
    assert_mistake(ftlaunch("logs", out, "--rank", 2), "ranks 0 to 1")
    followed = ftlaunch("logs", out, "--follow").stdout
    assert "[rank 0] I am 0" in followed
    assert followed.endswith("job has ended: done, exit code 0\n")


def test_a_job_whose_process_was_killed_is_lost(tmp_path):
    inputs, out = Inputs(tmp_path / "in"), tmp_path / "out"
    with start(*inputs.endless(out)) as process:
        wait_for_checkpoint(process, out, 12)
        os.kill(process.pid, signal.SIGKILL)
        finish(process, 30)
    assert "ended: lost" in ftlaunch("status", out).stdout
    # Its owner file is still there, and its number may be somebody else's by now.
    owner = json.loads((out / ".ftlaunch-owner").read_text())
    (out / ".ftlaunch-owner").write_text(json.dumps({**owner, "pid": os.getpid()}))
    assert "nothing to cancel" in ftlaunch("cancel", out).stdout
    assert metrics_of(out)
