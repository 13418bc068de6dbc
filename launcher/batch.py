"""What a submitted job does on its first node: run what was sealed, and put itself back into the queue.

It is the only party that requeues: submitit's handlers are replaced before they could.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from ftlaunch.cluster.errors import EXIT_DONE, EXIT_STOPPED, UserError
from ftlaunch.cluster.slurm_queue import SlurmSilent, find_job, requeue_job, was_preempted
from ftlaunch.launcher import submission
from ftlaunch.launcher.cli import exit_code_of
from ftlaunch.launcher.console import Console
from ftlaunch.launcher.output_folder import owner_of
from ftlaunch.launcher.restarts import OUTSIDE
from ftlaunch.launcher.submission import Sealed

# By which SLURM announces the time limit (slurm.signal_seconds), or a preemption where it is told to.
_ANNOUNCEMENTS = (signal.SIGUSR1, signal.SIGUSR2)
_STOPS = (signal.SIGTERM, signal.SIGINT, *_ANNOUNCEMENTS)
# submitit's handlers, and what its shell line has set for itself.
_SUBMITITS = ("SUBMITIT_EXECUTOR", "SUBMITIT_FOLDER", "SUBMITIT_LOG_LEVEL")
# The command that has submitted this job writes its number down as soon as SLURM has told it.
_NUMBER_SECONDS = 60.0
# The run before, on another node, may not have left yet.
_LEAVE_SECONDS = 120.0
_POLL_SECONDS = 0.2


class _Stopped(BaseException):
    """A request to stop before, or after, there was a job that could be stopped in order."""


def run_sealed(folder: str) -> None:
    """Called by submitit with the folder of a submission. SystemExit: the exit code of the job."""
    signals = _Signals()
    own = os.environ.get("SLURM_JOB_ID", "")
    _leave_submitit(folder)
    sys.exit(_run(Path(folder), own, signals))


def _run(folder: Path, job_id: str, signals: _Signals) -> int:
    began, before = time.monotonic(), newest_step(folder.parent)
    summary_before = _summary_time(folder.parent)
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    submission.note_run(
        folder, "started", job_id=job_id, restarts=restarts, host=os.uname().nodename
    )
    sealed: Sealed | None = None

    def work() -> int:
        nonlocal sealed
        sealed = _sealed(folder, job_id)
        return _work(sealed, folder.parent)

    try:
        code = exit_code_of(work)
    except _Stopped:
        code = EXIT_STOPPED
    signals.rest()
    seconds = time.monotonic() - began
    is_script = sealed is not None and sealed.script is not None
    progressed = seconds > 60 if is_script else newest_step(folder.parent) > before
    requeues, why = False, ""
    first = signals.first
    has_summary = _summary_time(folder.parent) != summary_before
    if first is None and has_summary:
        first = _heard_elsewhere(folder.parent)
    stopped = code == EXIT_STOPPED or (is_script and first is not None and code == 128 + first)
    # What failed from outside may well succeed when the job comes back.
    stopped = stopped or (code != EXIT_DONE and has_summary and _failed_outside(folder.parent))
    if sealed is not None and stopped and first is not None:
        repeats = _was_in_vain(folder, job_id) and not progressed
        requeues, why = _decide(sealed, job_id, first, in_vain=repeats)
    submission.note_run(
        folder,
        "ended",
        job_id=job_id,
        exit_code=code,
        stop_signal=None if first is None else signal.Signals(first).name,
        progressed=progressed,
        requeues=requeues,
        why=why,
        seconds=round(seconds, 3),
    )
    if why:
        print(why, flush=True)
    if requeues:
        refused = requeue_job(job_id)
        if refused is not None:
            print(f"SLURM did not put the job back: {refused}", flush=True)
            submission.note_run(folder, "not_requeued", job_id=job_id, why=refused)
    return code


def _sealed(folder: Path, job_id: str) -> Sealed:
    """UserError when this job is not the folder's, or not what was submitted."""
    deadline = time.monotonic() + _NUMBER_SECONDS
    while (job := submission.submitted_job(folder.parent)) is None:
        if time.monotonic() > deadline:
            break
        time.sleep(_POLL_SECONDS)
    if job is None or job.job_id != job_id:
        has = "no job" if job is None else f"job {job.job_id}"
        raise UserError(
            f"this is job {job_id}, and {folder} belongs to {has}: it was submitted anew, or its "
            "submission was ended in the middle. Submit it again."
        )
    sealed = submission.read_sealed(folder)
    submission.check_code(sealed)
    return sealed


def _work(sealed: Sealed, output_dir: Path) -> int:
    from ftlaunch.launcher.job import run_job
    from ftlaunch.launcher.script_job import run_script

    deadline = time.monotonic() + _LEAVE_SECONDS
    while owner_of(output_dir) is not None and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    try:
        os.chdir(sealed.working_dir)
    except OSError as error:
        raise UserError(
            f"the folder {sealed.working_dir}, in which the job was submitted, cannot be entered on "
            f"{os.uname().nodename}: {error.strerror}. Submit from a folder that all nodes share."
        ) from None
    with Console(sys.stdout) as console:
        if sealed.script is not None:
            return run_script(sealed.config, sealed.script, console, overwrite=False)
        # Everything that the hub has to give was fetched when the job was submitted.
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
        return run_job(sealed.config, console, overwrite=False)


def _decide(sealed: Sealed, job_id: str, first: int, *, in_vain: bool) -> tuple[bool, str]:
    """(whether to requeue, a line that says why or why not; "" where there is nothing to say)."""
    try:
        found = find_job(job_id)
        if found is not None and found.state not in ("RUNNING", "SUSPENDED"):
            # Cancelled, or SLURM itself puts it back: either is decided.
            return False, ""
        announced = first in _ANNOUNCEMENTS or (first == signal.SIGTERM and was_preempted(job_id))
    except SlurmSilent as error:
        return False, f"not requeued: {error}"
    if not announced:
        return False, ""
    if not sealed.config.slurm.requeue:
        return False, "not requeued: slurm.requeue is false. Submit the job again to go on."
    if in_vain:
        return False, (
            "not requeued: two runs in a row have ended without getting on. Give it more time "
            "(slurm.time), or less notice (slurm.signal_seconds), and submit it again."
        )
    place = "its last checkpoint" if sealed.script is None else "the beginning of the script"
    return True, f"job {job_id} goes back into the queue, and on from {place}"


def _was_in_vain(folder: Path, job_id: str) -> bool:
    """Whether the run before this one was requeued, too, and had got nothing done."""
    ends = [line for line in submission.runs_of(folder, job_id) if line.get("kind") == "ended"]
    return bool(ends) and ends[-1].get("requeues") is True and not ends[-1].get("progressed")


def _heard_elsewhere(output_dir: Path) -> int | None:
    """The signal of a preemption may come to the agents of the nodes alone; the summary names it."""
    try:
        name = json.loads((output_dir / "summary.json").read_bytes()).get("stop_signal")
    except (OSError, ValueError, AttributeError):
        return None
    return next((int(number) for number in _STOPS if number.name == name), None)


def _failed_outside(output_dir: Path) -> bool:
    """Whether nobody's code is to blame for how the last run ended."""
    try:
        failure = json.loads((output_dir / "summary.json").read_bytes()).get("failure")
        return failure is not None and failure.get("cause") in OUTSIDE
    except (OSError, ValueError, AttributeError):
        return False


def _summary_time(output_dir: Path) -> int:
    try:
        return (output_dir / "summary.json").stat().st_mtime_ns
    except OSError:
        return 0


def newest_step(output_dir: Path) -> int:
    """Of the newest checkpoint that has a manifest; 0 for none."""
    found = (output_dir / "checkpoints").glob("step-*/manifest.json")
    names = [path.parent.name.removeprefix("step-") for path in found]
    return max((int(name) for name in names if name.isdecimal()), default=0)


class _Signals:
    """Notes which request to stop came first, whoever handles it.

    Before and after the job has handlers of its own, a request ends what is going on with `_Stopped`.
    """

    def __init__(self) -> None:
        self._reading, self._writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._first: int | None = None
        # Every signal that has a handler in Python is written down there, by the interpreter.
        signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        for number in _STOPS:
            signal.signal(number, self._stop)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)

    @property
    def first(self) -> int | None:
        if self._first is None:
            try:
                heard: bytes = os.read(self._reading, 4096)
            except BlockingIOError:
                heard = b""
            self._first = next((number for number in heard if number in _STOPS), None)
        return self._first

    def rest(self) -> None:
        """What comes now changes nothing: what was to be saved is saved."""
        for number in _STOPS:
            signal.signal(number, lambda number, frame: None)

    def _stop(self, number: int, frame: FrameType | None) -> Any:
        raise _Stopped


def _leave_submitit(folder: str) -> None:
    """The environment and the path as they are for the same command at a prompt."""
    for name in _SUBMITITS:
        os.environ.pop(name, None)
    here = os.path.realpath(folder)
    # `python -m` has put the folder in which the job began before everything else.
    sys.path[:] = [path for path in sys.path if path and os.path.realpath(path) != here]
