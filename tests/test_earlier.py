"""Submissions that are ended in the middle: what they had set aside comes back, and nothing is lost."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ftlaunch.cluster.errors import UserError
from ftlaunch.launcher import cli, earlier, submission
from ftlaunch.launcher.output_folder import OWN_NAMES, OutputFolder
from tests.jobs import (
    MODULE,
    assert_mistake,
    ftlaunch,
    write_model,
)
from tests.test_submission import A_JOB, has_srun, sealed_of, used_folder


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
        assert {name: before[name] for name in after if name in before} == after
        assert set(before) - set(after) <= {"logs"}
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
