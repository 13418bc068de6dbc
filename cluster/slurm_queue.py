"""What SLURM says of a job, and what is asked of it: squeue, scancel, scontrol requeue.

Works without sacct. What the programs print is untrusted, and every call has a limit.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ftlaunch.cluster.errors import JobError, UserError

_CALL_SECONDS = 60.0
# The working folder is last: it alone may hold the separator.
_FIELDS = "%i|%T|%r|%S|%V|%L|%M|%P|%N|%Z"
_NEVER = ("", "N/A", "NONE", "(null)", "INVALID", "None")
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "STAGE_OUT", "SIGNALING", "RESIZING")
_ID = re.compile(r"[1-9]\d{0,18}")


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedJob:
    """One line of squeue. Times as SLURM writes them; None where it knows none.

    start    when it began, or is expected to
    left     until the time limit
    """

    job_id: str
    state: str
    reason: str | None
    start: str | None
    submitted: str | None
    left: str | None
    elapsed: str | None
    partition: str | None
    nodes: str | None
    working_dir: str

    @property
    def is_active(self) -> bool:
        return self.state in WAITING or self.state in RUNNING

    @property
    def is_waiting(self) -> bool:
        return self.state in WAITING


class SlurmSilent(JobError):
    """SLURM's programs are not there, or give no answer."""


def find_job(job_id: str) -> QueuedJob | None:
    """None for a job that SLURM does not know, or no more. SlurmSilent when it cannot be asked."""
    done = _call(
        [
            "squeue",
            "--noheader",
            "--states=all",
            f"--jobs={_checked(job_id)}",
            f"--format={_FIELDS}",
        ]
    )
    if done.returncode:
        if "invalid job id" in done.stderr.lower():
            return None
        raise SlurmSilent(f"squeue says: {done.stderr.strip()[:500] or f'exit {done.returncode}'}")
    for line in done.stdout.splitlines():
        parts = line.split("|", _FIELDS.count("|"))
        if len(parts) == _FIELDS.count("|") + 1 and parts[0] == job_id:
            known = [None if part in _NEVER else part for part in parts]
            return QueuedJob(
                job_id=job_id,
                state=parts[1],
                reason=known[2],
                start=known[3],
                submitted=known[4],
                left=known[5],
                elapsed=known[6],
                partition=known[7],
                nodes=known[8],
                working_dir=parts[9],
            )
    return None


def place_in_queue(job: QueuedJob) -> tuple[int, int] | None:
    """(its place, how many wait) in its partition by priority; None when that cannot be said."""
    if job.partition is None:
        return None
    command = ["squeue", "--noheader", "--states=PENDING", f"--partition={job.partition}"]
    try:
        done = _call([*command, "--sort=-p,i", "--format=%i"])
    except SlurmSilent:
        return None
    waiting = done.stdout.split()
    return (waiting.index(job.job_id) + 1, len(waiting)) if job.job_id in waiting else None


def was_preempted(job_id: str) -> bool:
    """Whether SLURM has given its nodes away and waits for it to leave."""
    done = _call(["scontrol", "show", "job", "--oneliner", _checked(job_id)])
    match = re.search(r"(?:^|\s)PreemptTime=(\S+)", done.stdout)
    return match is not None and match[1] not in _NEVER


def cancel_job(job_id: str) -> None:
    """SlurmSilent when SLURM refuses."""
    done = _call(["scancel", _checked(job_id)])
    if done.returncode:
        raise SlurmSilent(f"scancel says: {done.stderr.strip()[:500]}")


def requeue_job(job_id: str) -> str | None:
    """Back into the queue; what SLURM said if it refused. The caller's own processes are ended by it."""
    try:
        done = _call(["scontrol", "requeue", _checked(job_id)])
    except SlurmSilent as error:
        return str(error)
    return (done.stderr.strip()[:500] or f"exit {done.returncode}") if done.returncode else None


def is_job_id(text: object) -> bool:
    return isinstance(text, str) and _ID.fullmatch(text) is not None


def client_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for SLURM's programs, without what a surrounding job has put there."""
    kept = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT")
    return {
        name: value
        for name, value in environ.items()
        if name in kept
        or not name.startswith(("SLURM_", "SLURMD_", "SRUN_", "SQUEUE_", "SCANCEL_"))
    }


def _checked(job_id: str) -> str:
    if not is_job_id(job_id):
        raise UserError(f"{job_id[:40]!a} is not the number of a job of SLURM.")
    return job_id


def _call(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        raise SlurmSilent(f"{command[0]} is not on this machine's PATH: SLURM cannot be asked here")
    # A format of the user's own would change what is read here.
    environ = {**client_environment(os.environ), "LC_ALL": "C", "SLURM_TIME_FORMAT": "standard"}
    try:
        return subprocess.run(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=_CALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SlurmSilent(f"{command[0]} gave no answer within {_CALL_SECONDS:.0f} s") from None
    except OSError as error:
        raise SlurmSilent(f"{command[0]} cannot be run: {error.strerror}") from None
