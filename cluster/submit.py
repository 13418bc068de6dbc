"""Batch jobs through submitit: the file that SLURM gets, and its submission. Knows nothing of training.

The only module that imports submitit. Of submitit's own machinery the job uses the batch file and
the start of a Python function; its signal handlers and its requeueing are replaced by the function.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.slurm_queue import client_environment

_SUBMIT_SECONDS = 180
# sbatch takes an option from these where its name says another word than the option's.
_ENVIRONMENT_OF = {
    "time": ("TIMELIMIT",),
    "requeue": ("NO_REQUEUE", "REQUEUE"),
    "no-requeue": ("NO_REQUEUE", "REQUEUE"),
    "mem": ("MEM_PER_CPU", "MEM_PER_GPU", "MEM_PER_NODE", "MEM"),
    # What a batch job of ours never is.
    "output": ("OUTPUT", "ERROR", "ARRAY_INX", "WAIT", "WAIT_ALL_NODES", "IGNORE_PBS"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchJob:
    """What SLURM is to run.

    folder       where the job's files lie, in which it starts: what its batch file says is relative
                 to it, so that no path has to be quoted there
    code         a folder of Python packages that come before all others, relative to `folder`
    log          of all that the batch script prints, relative to `folder`; %j is the job's number
    parameters   long options of sbatch without their dashes; True: without a value
    function     called with `argument`; its SystemExit is the job's exit code
    """

    name: str
    folder: Path
    code: str
    log: str
    num_nodes: int
    lead_seconds: int
    requeue: bool
    function: Callable[[str], None]
    argument: str
    parameters: Mapping[str, str | bool] = field(default_factory=dict)


def batch_file(job: BatchJob) -> str:
    """The very text that `submit` hands to sbatch."""
    executor = _executor(job)
    return str(executor._make_submission_file_text(executor._submitit_command_str, ""))


def submit(job: BatchJob) -> str:
    """The number of the job that SLURM has taken. UserError with SLURM's own words if it refuses."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch is not on this machine's PATH, so SLURM cannot be reached from here. Submit from "
            "a login node of the cluster."
        )
    from submitit.core.utils import FailedSubmissionError, UncompletedJobError

    said = io.StringIO()
    try:
        with _as_a_client(job), _limit(_SUBMIT_SECONDS), contextlib.redirect_stderr(said):
            submitted = _executor(job).submit(job.function, job.argument)
    except (UncompletedJobError, FailedSubmissionError, _TooLate) as error:
        raise UserError(_in_words(str(error) or said.getvalue())) from None
    return str(submitted.job_id)


def _executor(job: BatchJob) -> Any:
    with _imported_quietly():
        from submitit.slurm.slurm import SlurmExecutor

        executor = SlurmExecutor(job.folder, max_num_timeout=0, python=_interpreter(job))
    parameters: dict[str, Any] = {
        "ntasks-per-node": "1",
        # Relative: any folder's name would have to survive the parser of sbatch.
        "output": job.log,
        # The shell has become our interpreter by then: it alone is told.
        "signal": f"B:USR1@{job.lead_seconds}",
        ("requeue" if job.requeue else "no-requeue"): True,
        **{key: _escaped(value) for key, value in job.parameters.items()},
    }
    name = parameters.pop("job-name", job.name)
    executor.update_parameters(
        job_name=name,
        nodes=job.num_nodes,
        use_srun=False,
        stderr_to_stdout=True,
        # A default of submitit's that a site may refuse.
        wckey=None,
        # submitit's own of 5 minutes would be asked for where nothing was.
        time=None,
        additional_parameters=parameters,
    )
    return executor


def _escaped(value: str | bool) -> str | bool:
    """sbatch takes a backslash for an escape even within the quotes that submitit puts around a value."""
    return value.replace("\\", "\\\\") if isinstance(value, str) else value


def _interpreter(job: BatchJob) -> str:
    """The shell's words before `-u -m submitit.core._submit FOLDER`.

    exec: signals go to the batch shell, and its exit code is the job's, so our interpreter takes its
    place. The folder that `-m` puts first on the path is `job.folder`, in which nobody else writes.
    """
    code = shlex.quote(str(job.folder / job.code))
    path = f'PYTHONPATH={code}"${{PYTHONPATH:+:$PYTHONPATH}}"'
    # Variables of submitit's that would change what it does; of its own it would log five lines.
    unset = "-u SUBMITIT_PREEMPT_SIGNAL -u _TEST_CLUSTER_"
    return f"exec env {unset} SUBMITIT_LOG_LEVEL=ERROR {path} {shlex.quote(sys.executable)}"


@contextlib.contextmanager
def _as_a_client(job: BatchJob) -> Iterator[None]:
    """In the job's folder, and without what a surrounding job or a variable would add to it."""
    kept = client_environment(os.environ)
    given = {"output", "requeue", "signal", "open-mode", "job-name", *job.parameters}
    for name in given:
        for word in _ENVIRONMENT_OF.get(name, (name.upper().replace("-", "_"),)):
            kept.pop(f"SBATCH_{word}", None)
    before, folder = dict(os.environ), Path.cwd()
    os.environ.clear()
    os.environ.update(kept)
    try:
        os.chdir(job.folder)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        os.chdir(folder)


class _TooLate(Exception):
    """sbatch has not answered."""


@contextlib.contextmanager
def _limit(seconds: int) -> Iterator[None]:
    """submitit waits for sbatch without end: an exception makes it kill sbatch."""

    def give_up(number: int, frame: FrameType | None) -> None:
        raise _TooLate(f"sbatch gave no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _imported_quietly() -> Iterator[None]:
    """submitit configures logging when it is imported, unless told not to."""
    before = os.environ.get("SUBMITIT_LOG_LEVEL")
    os.environ["SUBMITIT_LOG_LEVEL"] = "NOCONFIG"
    try:
        yield
    finally:
        del os.environ["SUBMITIT_LOG_LEVEL"]
        if before is not None:
            os.environ["SUBMITIT_LOG_LEVEL"] = before


def _in_words(said: str) -> str:
    lines = [line for line in (line.strip() for line in said.splitlines()) if line]
    words = "\n".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", "", line) for line in lines[-5:])
    return (
        f"{words or 'sbatch failed without a word'}\nSLURM has not taken the job: it says why above. "
        "Correct what it names (partition, account, qos, time, ...) and submit again."
    )
