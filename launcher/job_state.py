"""Where the job of an output folder is, from its own files and from SLURM. Changes nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ftlaunch.cluster.errors import EXIT_STOPPED, UserError
from ftlaunch.cluster.slurm_queue import QueuedJob, SlurmSilent, find_job, place_in_queue
from ftlaunch.launcher import submission
from ftlaunch.launcher.earlier import interrupted
from ftlaunch.launcher.line_log import read_lines
from ftlaunch.launcher.output_folder import OWN_NAMES, Owner, owner_of

_TAIL_BYTES = 1 << 16
_BY_CODE = {0: "done", EXIT_STOPPED: "stopped", 130: "interrupted"}

Kind = Literal["pending", "running", "ended"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far the training is. None: not known, or of a script."""

    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    samples_per_second: float | None = None
    seconds_left: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """What `ftlaunch status` tells.

    status       in one word: pending, running, done, stopped, failed, interrupted, cancelled, …
    exit_code    None while it goes on, and where nobody could write it down
    job          of SLURM; None for a job that was started here
    queued       what SLURM says of that job; None when it says nothing
    owner        the process that has the folder
    stop_signal  by which the job was asked to stop: "SIGUSR1"
    requeues     times that the job went back into the queue
    notes        what else a user should know
    """

    folder: Path
    kind: Kind
    status: str
    exit_code: int | None
    job: submission.SubmittedJob | None
    queued: QueuedJob | None
    place: tuple[int, int] | None
    owner: Owner | None
    progress: Progress
    requeues: int
    restarts: int
    stop_signal: str | None
    notes: tuple[str, ...]


def job_state(folder: Path) -> JobState:
    """UserError where there is no job."""
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder. Name the output folder of a job, as it was given to -o."
        )
    if not any((folder / name).exists() for name in (*OWN_NAMES, ".ftlaunch")):
        raise UserError(
            f"{folder} holds no job of ftlaunch. Name the output folder of a job, as it was given "
            "to -o."
        )
    notes: list[str] = []
    job = submission.submitted_job(folder)
    queued = _queued(job, folder, notes)
    owner = owner_of(folder)
    aside = interrupted(folder) if owner is None else None
    if aside is not None:
        notes.append(
            f"an ftlaunch submit was killed before SLURM had its job: what was here before is in {aside}, "
            "and whatever uses this folder next puts it back"
        )
    runs = (
        [] if job is None else submission.runs_of(submission.submission_folder(folder), job.job_id)
    )
    summary = _summary(folder)
    last = runs[-1] if runs else {}
    kind, status, code = _judge(job, queued, owner, last, summary, notes)
    stopped_by = last.get("stop_signal") if runs else summary.get("stop_signal")
    return JobState(
        folder=folder,
        kind=kind,
        status=status,
        exit_code=code,
        job=job,
        queued=queued,
        place=place_in_queue(queued) if queued is not None and queued.is_waiting else None,
        owner=owner,
        progress=_progress(folder, still_runs=kind == "running"),
        requeues=max(0, sum(line.get("kind") == "started" for line in runs) - 1)
        + (kind == "pending" and bool(runs)),
        restarts=_number(summary.get("restarts")) if kind == "ended" else _restarts(folder),
        stop_signal=stopped_by if isinstance(stopped_by, str) else None,
        notes=tuple(notes),
    )


def is_of(working_dir: str, folder: Path) -> bool:
    """Whether a job that SLURM has under the number of ours is ours: numbers are given anew."""
    return os.path.realpath(working_dir) == os.path.realpath(submission.submission_folder(folder))


def _queued(
    job: submission.SubmittedJob | None, folder: Path, notes: list[str]
) -> QueuedJob | None:
    if job is None:
        return None
    try:
        found = find_job(job.job_id)
    except SlurmSilent as error:
        notes.append(f"{error}; this is what the job's own files say")
        return None
    return found if found is not None and is_of(found.working_dir, folder) else None


def _judge(
    job: submission.SubmittedJob | None,
    queued: QueuedJob | None,
    owner: Owner | None,
    last: Mapping[str, Any],
    summary: Mapping[str, Any],
    notes: list[str],
) -> tuple[Kind, str, int | None]:
    if queued is not None and queued.is_waiting:
        return "pending", "pending", None
    if queued is not None and queued.is_active:
        return "running", "ending" if queued.state == "COMPLETING" else "running", None
    if owner is not None:
        return "running", "running", None
    if job is None:
        if not summary:
            notes.append("it left no summary: it was killed, or its machine was")
            return "ended", "lost", None
        return "ended", str(summary.get("status", "unknown")), _code(summary)
    state = queued.state.lower() if queued is not None else None
    if last.get("kind") in ("ended", "not_requeued"):
        code = _code(last if last["kind"] == "ended" else summary)
        status = str(summary.get("status")) if summary and _code(summary) == code else None
        if state == "cancelled":
            status = "cancelled"
        return "ended", status or _BY_CODE.get(code if code is not None else 1, "failed"), code
    if not last:
        notes.append("it never started" + ("" if state else ", and SLURM has forgotten it"))
        return "ended", state or "unknown", None
    notes.append("it could not write down how it ended: it was killed, or its node was")
    return "ended", state or "lost", None


def _progress(folder: Path, *, still_runs: bool) -> Progress:
    line = _last_line(folder / "metrics.jsonl")
    totals = _last_line(folder / "totals.jsonl")
    ready = [e for e in read_lines(folder / "events.jsonl") if e.get("kind") == "data_ready"]
    total = ready[-1].get("total_steps") if ready else None
    step, seconds = line.get("step"), totals.get("seconds")
    left = None
    if still_runs and isinstance(step, int) and isinstance(total, int) and step > 0:
        left = (total - step) * seconds / step if isinstance(seconds, int | float) else None
    return Progress(
        step=step if isinstance(step, int) else None,
        total_steps=total if isinstance(total, int) else None,
        loss=_float(line.get("loss")),
        samples_per_second=_float(line.get("samples_per_second")),
        seconds_left=left,
    )


def _restarts(folder: Path) -> int:
    return sum(e.get("kind") == "restarted" for e in read_lines(folder / "events.jsonl"))


def _summary(folder: Path) -> dict[str, Any]:
    try:
        raw = json.loads((folder / "summary.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return raw if isinstance(raw, dict) else {}


def _last_line(path: Path) -> dict[str, Any]:
    """Of a file of JSON lines that may be growing; {} for none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return found
    return {}


def _code(record: Mapping[str, Any]) -> int | None:
    code = record.get("exit_code")
    return code if isinstance(code, int) else None


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _float(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None
