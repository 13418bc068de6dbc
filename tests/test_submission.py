"""Jobs that are submitted: what the batch file says, what is sealed, what is refused."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.machine import code_fingerprint
from ftlaunch.cluster.slurm_queue import client_environment, is_job_id
from ftlaunch.cluster.submit import BatchJob, batch_file
from ftlaunch.launcher import cli, earlier, submission
from ftlaunch.launcher.config import load_config
from ftlaunch.launcher.output_folder import OWN_NAMES, OutputFolder
from ftlaunch.launcher.script_plan import Script
from ftlaunch.launcher.slurm_options import SlurmOptions, signal_lead, time_limit_seconds
from ftlaunch.launcher.submission import Sealed, SubmittedJob
from ftlaunch.strategies.hub import fetch_model
from ftlaunch.strategies.options import ModelOptions
from tests import beds, slurm_bed
from tests.jobs import (
    MODULE,
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

# submitit looks for it. Asked when a test runs: earlier ones may have installed it.
has_srun = pytest.mark.usefixtures("srun")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def srun():
    if shutil.which("srun") is None:
        beds.require(slurm_bed.PROGRAMS)


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


# -- submissions that are ended in the middle ----------------------------------------------------


def small_seal(monkeypatch) -> None:
    """What is sealed of our code are a few files: the tests below seal them often."""
    monkeypatch.setattr(submission, "_PACKAGES", ("strategies.mindspore",))


def tree(out: Path) -> dict[str, bytes | None]:
    """Every file with its text, every folder; not the files that are locks."""
    return {
        str(path.relative_to(out)): path.read_bytes() if path.is_file() else None
        for path in sorted(out.rglob("*"))
        if path.name not in ("lock", ".ftlaunch-owner")
    }


_CHANGES = ("os.rename", "os.rmdir", "os.remove", "os.mkdir")


def comes_to_its_end(action: Callable[[], None], at: int, what: Callable[[str], None]) -> bool:
    """Run `action` in a child; `what` comes before the change of that number to the file system.

    False when the child was killed.
    """
    pid = os.fork()
    if pid == 0:
        left = at

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event in _CHANGES:
                left -= 1
                if left == 0:
                    what(str(arguments[0]))

        code = 1
        try:
            sys.addaudithook(hook)
            action()
            code = 0 if left > 0 else 3
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) in (0, 3)
    return os.WEXITSTATUS(status) == 0


def kill(path: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt(path: str) -> None:
    raise KeyboardInterrupt


def refused(out: Path, *, overwrite: bool) -> Callable[[], None]:
    """A submission that SLURM refuses, or that Ctrl-C ends."""

    def action() -> None:
        with submission.only_submission(out) as folder:
            with contextlib.suppress(KeyboardInterrupt):
                submission.seal(folder, sealed_of("train.seed=2"))
                if overwrite:
                    earlier.set_output_aside(folder, OWN_NAMES)
                earlier.make_logs(folder)
            submission.withdraw(folder, was_there=True)

    return action


def full_folder(out: Path) -> None:
    used_folder(out)
    (out / ".ftlaunch").touch()
    (out / "submission" / "script").mkdir()
    (out / "submission" / "script" / "train.py").write_text("print(1)\n")
    (out / "logs").mkdir()
    (out / "logs" / "slurm-12.log").write_text("done\n")
    (out / "model").mkdir()
    (out / "model" / "weights").write_text("hours of work")


@pytest.mark.parametrize("logs", ["none", "empty", "full"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_submission_that_is_killed_anywhere_loses_nothing(tmp_path, monkeypatch, overwrite, logs):
    small_seal(monkeypatch)
    full_folder(tmp_path)
    if logs != "full":
        shutil.rmtree(tmp_path / "logs")
    if logs == "empty":
        (tmp_path / "logs").mkdir()
    before = tree(tmp_path)
    for number in range(1, 500):
        done = comes_to_its_end(refused(tmp_path, overwrite=overwrite), number, kill)
        with submission.only_submission(tmp_path):
            pass
        assert tree(tmp_path) == before, number
        if done:
            break
    assert 20 < number < 499


@pytest.mark.parametrize("overwrite", [False, True])
def test_ctrl_c_anywhere_loses_nothing(tmp_path, monkeypatch, overwrite):
    small_seal(monkeypatch)
    full_folder(tmp_path)
    before = tree(tmp_path)
    # From the first change of `seal` to the last before SLURM would be asked.
    for number in range(2, 18 if overwrite else 12):
        assert not (comes_to_its_end(refused(tmp_path, overwrite=overwrite), number, interrupt)), (
            number
        )
        assert tree(tmp_path) == before, number


def test_what_undoes_a_submission_may_itself_be_killed(tmp_path, monkeypatch):
    small_seal(monkeypatch)
    full_folder(tmp_path)
    before = tree(tmp_path)

    def undo() -> None:
        with submission.only_submission(tmp_path):
            pass

    for number in range(1, 500):
        with submission.only_submission(tmp_path) as folder:
            submission.seal(folder, sealed_of("train.seed=2"))
            earlier.set_output_aside(folder, OWN_NAMES)
            earlier.make_logs(folder)
        done = comes_to_its_end(undo, number, kill)
        undo()
        assert tree(tmp_path) == before, number
        if done:
            break
    assert 10 < number < 499


def test_a_job_that_slurm_has_gets_nothing_old_back(tmp_path, monkeypatch):
    """Killed anywhere from its number on: it is the new submission, or all of the old one."""
    small_seal(monkeypatch)
    full_folder(tmp_path / "old")
    before = tree(tmp_path / "old")
    seen = set()
    for number in range(1, 500):
        out = tmp_path / str(number)
        shutil.copytree(tmp_path / "old", out)
        with submission.only_submission(out) as folder:
            submission.seal(folder, sealed_of("train.seed=2"))
            earlier.set_output_aside(folder, OWN_NAMES)

            def take(folder: Path = folder) -> None:
                submission.settle(folder, replace(A_JOB, job_id="13"))
                earlier.remove_settled(folder)

            done = comes_to_its_end(take, number, kill)
        with OutputFolder(out, overwrite=False):
            has_old = (out / "model").exists()
            job = submission.submitted_job(out)
            assert job is not None and (job.job_id == "12") == has_old
        with submission.only_submission(out):
            pass
        left = tree(out)
        seen.add(has_old)
        if has_old:
            assert left == before
        else:
            names = {name for name in left if not name.startswith("submission/code/")}
            files = (
                ".ftlaunch",
                "submission",
                "submission/code",
                "submission/config.json",
                "submission/job.json",
            )
            assert names == set(files)
        if done:
            break
    assert 5 < number < 499 and False in seen


def killed(out: Path) -> None:
    """A folder of a job, after `submit --overwrite` was killed while it asked SLURM."""
    used_folder(out)
    (out / ".ftlaunch").touch()
    with submission.only_submission(out) as folder:
        submission.seal(folder, sealed_of("train.seed=2"))
        earlier.set_output_aside(folder, OWN_NAMES)
        earlier.make_logs(folder)


def test_nothing_that_a_run_has_written_is_deleted(tmp_path):
    killed(tmp_path)
    new = tmp_path / "checkpoints" / "step-00000001"
    new.mkdir(parents=True)
    (new / "weights").write_text("new")
    before = tree(tmp_path)
    for using in (submission.only_submission(tmp_path), OutputFolder(tmp_path, overwrite=False)):
        with pytest.raises(UserError) as raised, using:
            pass
        assert "checkpoints" in str(raised.value)
        assert str(tmp_path / "submission" / "earlier") in str(raised.value)
        after = tree(tmp_path)
        assert {name: after[name] for name in before if name in after} == after
        assert set(before) - set(after) <= {"logs", ".ftlaunch"}
    # As the message says: either is kept.
    shutil.move(tmp_path / "checkpoints", tmp_path / "mine")
    with OutputFolder(tmp_path, overwrite=False):
        assert (tmp_path / "checkpoints" / "step-00000007").is_dir()
    assert submission.submitted_job(tmp_path) == A_JOB


def test_a_job_that_nobody_waited_for_leaves_its_log(tmp_path):
    """SLURM had taken it, but the submission was killed before it could note the number."""
    used_folder(tmp_path)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "slurm-12.log").write_text("old")
    with submission.only_submission(tmp_path) as folder:
        submission.seal(folder, sealed_of("train.seed=2"))
        earlier.set_output_aside(folder, OWN_NAMES)
        earlier.make_logs(folder)
    (tmp_path / "logs" / "slurm-13.log").write_text("new")
    submission.note_run(folder, "started", job_id="13")
    with submission.only_submission(tmp_path) as folder:
        assert (tmp_path / "logs" / "slurm-12.log").read_text() == "old"
        assert (tmp_path / "logs" / "slurm-13.log").read_text() == "new"
        assert submission.runs_of(folder, "12")
        assert not (folder / "earlier").exists()
        assert not (folder / "earlier.part").exists()


def test_a_run_finds_what_a_killed_submission_set_aside(tmp_path):
    killed(tmp_path)
    shown = ftlaunch("status", tmp_path).stdout
    assert f"{tmp_path / 'submission' / 'earlier'}" in shown
    assert "killed" in shown
    script = tmp_path / "script.py"
    script.write_text("print('hello')\n")
    # The training job is seen again, so a script does not replace its plan.
    assert_mistake(ftlaunch("-o", tmp_path, script), "holds a training job")
    assert (tmp_path / "checkpoints" / "step-00000007").is_dir()
    assert "earlier" not in ftlaunch("status", tmp_path).stdout


def test_an_evaluation_finds_the_model_that_was_set_aside(tmp_path):
    out = tmp_path / "out"
    used_folder(out)
    (out / ".ftlaunch").touch()
    write_model(out / "model")
    with submission.only_submission(out) as folder:
        submission.seal(folder, sealed_of("train.seed=2"))
        earlier.set_output_aside(folder, OWN_NAMES)
    ftlaunch("eval", out, "--dataset", tmp_path / "none", cwd=tmp_path)
    assert (out / "model").is_dir()
    assert (out / "checkpoints").is_dir()


def test_a_folder_of_a_live_submission_is_nobody_elses(tmp_path):
    killed(tmp_path)
    before = tree(tmp_path)
    with open(tmp_path / ".ftlaunch-owner", "w+", encoding="utf-8") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        with (
            pytest.raises(UserError, match="in use by another job"),
            OutputFolder(tmp_path, overwrite=False),
        ):
            pass
        assert tree(tmp_path) == before


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)


def slurm_that(tmp_path: Path, sbatch: str) -> dict[str, str]:
    """An environment in which sbatch is that shell script, and SLURM has forgotten every job."""
    write_program(tmp_path / "bin" / "sbatch", sbatch)
    write_program(tmp_path / "bin" / "squeue", "echo 'Invalid job id specified' >&2; exit 1\n")
    return {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


@has_srun
def test_the_folder_is_held_until_slurm_has_answered(tmp_path):
    out, script, heard = tmp_path / "out", tmp_path / "script.py", tmp_path / "heard"
    script.write_text("print('hello')\n")
    used_folder(out)
    (out / ".ftlaunch").touch()
    before = tree(out)
    command = shlex.join([*MODULE, "-o", str(out), str(script)])
    env = slurm_that(tmp_path, f"cd /\n{command} >{heard} 2>&1\necho code $? >>{heard}\nexit 1\n")
    result = ftlaunch("submit", "--overwrite", "-o", out, script, cwd=tmp_path, env=env)
    assert_mistake(result, "SLURM has not taken the job")
    assert "in use by another job" in heard.read_text()
    assert "code 2" in heard.read_text()
    assert tree(out) == before
    # A folder that was made for it is gone again.
    result = ftlaunch("submit", "-o", tmp_path / "new", script, cwd=tmp_path, env=env)
    assert_mistake(result, "SLURM has not taken the job")
    assert not (tmp_path / "new").exists()


@has_srun
def test_a_submission_that_dies_while_it_asks_slurm_is_undone_by_a_run(tmp_path):
    out, script = tmp_path / "out", tmp_path / "script.py"
    script.write_text("print('hello')\n")
    full_folder(out)
    (out / "metrics.jsonl").unlink()
    before = tree(out)
    env = slurm_that(tmp_path, "kill -KILL $PPID\n")
    result = ftlaunch("submit", "--overwrite", "-o", out, script, cwd=tmp_path, env=env)
    assert result.returncode == -signal.SIGKILL
    assert not (out / "model").exists() and not (out / "checkpoints").exists()
    assert ftlaunch("-o", out, script, cwd=tmp_path).returncode == 0
    after = tree(out)
    assert {name: after.get(name) for name in before} == before
    assert not list((out / "submission").glob("earlier*"))


@has_srun
def test_a_number_is_told_whatever_becomes_of_the_earlier_results(tmp_path, monkeypatch, capfd):
    out, script = tmp_path / "out", tmp_path / "script.py"
    script.write_text("print('hello')\n")
    used_folder(out)
    (out / ".ftlaunch").touch()
    env = slurm_that(tmp_path, "echo Submitted batch job 13\n")
    monkeypatch.setenv("PATH", env["PATH"])

    def is_busy(event: str, arguments: tuple[object, ...]) -> None:
        if event == "os.rmdir" and str(arguments[0]).endswith("step-00000007"):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), arguments[0])

    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            sys.addaudithook(is_busy)
            code = cli.run(["submit", "--overwrite", "-o", str(out), str(script)])
            sys.stdout.flush()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert "submitted as job 13\n" in capfd.readouterr().out
    assert list((out / "submission").rglob("step-00000007"))
    assert not (out / "checkpoints").exists()
    with OutputFolder(out, overwrite=False):
        assert not (out / "checkpoints").exists()
    # The next submission removes it.
    with submission.only_submission(out):
        assert not list((out / "submission").rglob("step-00000007"))


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
