"""`ftlaunch status`, `logs` and `cancel`: of a job in SLURM's queue as of one that was started here."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ftlaunch.cluster.errors import EXIT_DONE, EXIT_FAILED
from ftlaunch.cluster.linux import kill_exactly
from ftlaunch.cluster.slurm_queue import cancel_job
from ftlaunch.launcher.job_logs import find_logs, follow, lines_of
from ftlaunch.launcher.job_state import JobState, job_state
from ftlaunch.launcher.line_log import strict
from ftlaunch.launcher.wording import duration, one_line, short_number
from ftlaunch.strategies.model_config import absolute_path


def status(arguments: argparse.Namespace, flags: Mapping[str, Any]) -> int:
    """UserError where there is no job; 0 else, however the job is."""
    state = job_state(absolute_path(arguments.target))
    if arguments.json:
        _say(json.dumps(strict(_to_json(state)), indent=2))
    else:
        for line in describe(state):
            _say(one_line(line))
    return EXIT_DONE


def logs(arguments: argparse.Namespace, flags: Mapping[str, Any]) -> int:
    folder = absolute_path(arguments.target)
    state = job_state(folder)
    job_id = state.job.job_id if state.job is not None else None
    try:
        if arguments.follow:
            _follow(folder, arguments.rank, job_id)
            return EXIT_DONE
        found = find_logs(folder, arguments.rank, job_id)
        if not found:
            _say("nothing has been printed yet" if state.kind != "ended" else "there are no logs")
        for label, path in found.items():
            if len(found) > 1:
                _say(f"==> {label}: {path} <==")
            for line in lines_of(path):
                _say(line)
    except BrokenPipeError:
        # Whoever reads has seen enough; what is buffered must not fail again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_DONE


def cancel(arguments: argparse.Namespace, flags: Mapping[str, Any]) -> int:
    """0: it was told to end, or has ended; 1: it cannot be told from here."""
    folder = absolute_path(arguments.target)
    state = job_state(folder)
    if state.kind == "ended":
        _say(f"nothing to cancel: the job has ended ({state.status})")
        return EXIT_DONE
    if state.queued is not None:
        cancel_job(state.queued.job_id)
        _say(f"job {state.queued.job_id} of SLURM is cancelled; it was {state.status}")
        if state.kind == "running":
            _say(
                "It saves a checkpoint if that takes less time than SLURM leaves it (KillWait, "
                "often 30 s). The same submission goes on from the last one."
            )
        return EXIT_DONE
    owner = state.owner
    process = owner.process() if owner is not None else None
    if owner is None or process is None:
        where = "elsewhere" if owner is None else f"as process {owner.pid} on {owner.host}"
        _say(
            f"the job runs {where}, and cannot be ended from here. End it there: kill -TERM "
            f"{owner.pid if owner is not None else 'its process'}"
        )
        return EXIT_FAILED
    kill_exactly(process, signal.SIGTERM)
    _say(
        f"process {process.pid} was told to stop: one that trains saves a checkpoint at the next "
        "step. The same command goes on from there."
    )
    return EXIT_DONE


# -- status -------------------------------------------------------------------------------------


def describe(state: JobState) -> list[str]:
    """The state as lines for people."""
    lines = [_first_line(state)]
    progress = _progress_line(state)
    if progress:
        lines.append(progress)
    if state.requeues or state.restarts:
        counts = [
            f"{number} {word}{'' if number == 1 else 's'}"
            for number, word in ((state.requeues, "requeue"), (state.restarts, "restart"))
            if number
        ]
        lines.append(", ".join(counts))
    lines += state.notes
    return lines


def _first_line(state: JobState) -> str:
    queued, owner = state.queued, state.owner
    job = f"job {state.job.job_id}" if state.job is not None else "job"
    if state.kind == "pending" and queued is not None:
        line = f"{job} is pending"
        line += f": {queued.reason}" if queued.reason else ""
        if state.place is not None:
            line += f"; place {state.place[0]} of {state.place[1]} in partition {queued.partition}"
        return line + (f"; expected to start at {queued.start}" if queued.start else "")
    if state.kind == "running":
        if queued is not None:
            limited = queued.left is not None and queued.left != "UNLIMITED"
            left = f", {queued.left} left of its time" if limited else ""
            where = f" on {queued.nodes}" if queued.nodes else ""
            return f"{job} is {state.status}{where}{left}"
        assert owner is not None
        return f"the job is running: process {owner.pid} on {owner.host}, since {owner.started}"
    line = f"{job} has ended: {state.status}"
    if state.exit_code is not None:
        line += f", exit code {state.exit_code}"
    if state.stop_signal is not None:
        line += f", after {state.stop_signal}"
    return line


def _progress_line(state: JobState) -> str:
    progress = state.progress
    if progress.step is None:
        return ""
    total = f"/{progress.total_steps}" if progress.total_steps is not None else ""
    facts = [f"step {progress.step}{total}"]
    if progress.loss is not None:
        facts.append(f"loss {progress.loss:.4f}")
    if progress.samples_per_second is not None:
        facts.append(f"{short_number(progress.samples_per_second)} samples/s")
    if progress.seconds_left is not None:
        facts.append(f"{duration(progress.seconds_left)} left")
    return ", ".join(facts)


def _to_json(state: JobState) -> dict[str, Any]:
    queued, owner, job = state.queued, state.owner, state.job
    return {
        "folder": str(state.folder),
        "kind": state.kind,
        "status": state.status,
        "exit_code": state.exit_code,
        "stop_signal": state.stop_signal,
        "requeues": state.requeues,
        "restarts": state.restarts,
        **asdict(state.progress),
        "job": None if job is None else asdict(job),
        "slurm": None if queued is None else asdict(queued),
        "place": state.place,
        "owner": None if owner is None else asdict(owner),
        "notes": list(state.notes),
    }


# -- logs ---------------------------------------------------------------------------------------


def _follow(folder: Path, rank: int | None, job_id: str | None) -> None:
    told = ""

    def is_over() -> bool:
        nonlocal told
        state = job_state(folder)
        if state.kind == "pending":
            line = one_line(_first_line(state))
            if line != told:
                _say(line)
            told = line
        return state.kind == "ended"

    def find() -> dict[str, Path]:
        # The log of a rank that is waited for comes when the rank does.
        logs = find_logs(folder, None, job_id)
        return logs if rank is None else {k: v for k, v in logs.items() if k == f"rank {rank}"}

    alone = rank is not None
    follow(find, is_over, lambda label, line: _say(line if alone else f"[{label}] {line}"))
    _say(one_line(_first_line(job_state(folder))))


def _say(line: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "replace").decode(encoding), flush=True)
