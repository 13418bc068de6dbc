"""`ftlaunch submit`: from its arguments to a job in SLURM's queue, or to what would be handed to it."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ftlaunch.cluster.errors import EXIT_DONE, UserError
from ftlaunch.cluster.machine import code_fingerprint
from ftlaunch.cluster.slurm_queue import SlurmSilent, find_job
from ftlaunch.cluster.submit import BatchJob, batch_file, submit
from ftlaunch.launcher import earlier, submission
from ftlaunch.launcher.batch import run_sealed
from ftlaunch.launcher.commands import config_of, script_config, script_of
from ftlaunch.launcher.config import RunConfig
from ftlaunch.launcher.console import Console
from ftlaunch.launcher.job_input import check_input, keep_input
from ftlaunch.launcher.job_state import is_of
from ftlaunch.launcher.line_log import read_lines
from ftlaunch.launcher.output_folder import (
    MARK,
    OWN_NAMES,
    OutputFolder,
    default_output_dir,
    put_back_earlier,
)
from ftlaunch.launcher.script_plan import Script, check_script
from ftlaunch.launcher.slurm_options import signal_lead
from ftlaunch.launcher.submission import Sealed, SubmittedJob
from ftlaunch.strategies.data.task_names import check_task
from ftlaunch.strategies.hub import Fetched, fetch_data, fetch_model
from ftlaunch.strategies.registry import entry

# Of totals.jsonl, from its end: enough to know how long a step takes.
_STEPS = 200
LOG_PATTERN = "slurm-%j.log"


def submit_job(arguments: argparse.Namespace, flags: Mapping[str, Any]) -> int:
    """UserError for what the user can mend; then nothing is left that stands in the way."""
    script = script_of(arguments)
    config = script_config(arguments, flags) if script else config_of(arguments, flags)
    # One node is asked for where nothing is said: SLURM takes a number.
    cluster = replace(config.cluster, nodes=config.cluster.nodes or 1)
    config = replace(config, cluster=cluster, output_dir=str(default_output_dir(config)))
    folder = Path(str(config.output_dir))
    _check(config, script, folder)
    if not arguments.dry_run:
        put_back_earlier(folder)
    lead, why_lead = signal_lead(config.slurm, *_measured(folder))
    batch = _batch_job(config, folder, lead)
    with Console(sys.stdout) as console:
        console.plan(_plan(config, script, folder, lead, why_lead))
        if arguments.dry_run:
            console.plan(["", "the batch file:", ""])
            console.plan([f"    {line}".rstrip() for line in batch_file(batch).splitlines()])
            console.say("dry run: nothing was fetched, written or submitted")
            return EXIT_DONE
        _refuse_second(folder)
        if arguments.overwrite:
            keep_input(config, folder)
        fetched: list[Fetched] = []
        if script is None and not config.is_demo:
            config, fetched = _fetch(config, folder, console, keeps=not arguments.overwrite)
        # There, the nodes are those of the allocation.
        config = replace(config, cluster=replace(config.cluster, kind="auto"))
        sealed = Sealed(
            config=config,
            script=script,
            working_dir=str(Path.cwd()),
            code_fingerprint=code_fingerprint(),
            lead_seconds=lead,
        )
        job = _submit(batch, sealed, fetched, folder, overwrite=arguments.overwrite)
        for each in fetched:
            console.say(f"sealed: {each.what} {each.name}, revision {each.revision}")
        console.plan(_what_next(job, folder))
        # Last: it may take long, and whatever becomes of it, the job is in the queue.
        earlier.remove_settled(submission.submission_folder(folder))
    return EXIT_DONE


def _check(config: RunConfig, script: Script | None, folder: Path) -> None:
    """What can be seen to be wrong before SLURM is asked."""
    cluster = config.cluster
    named = f"--cluster {cluster.kind}" if cluster.kind in ("local", "ssh") else ""
    named = "cluster.hostfile" if cluster.hostfile is not None else named
    named = "cluster.hosts" if cluster.hosts is not None else named
    if named:
        raise UserError(
            f"{named} is set, and ftlaunch submit takes its nodes from SLURM. Take it out, or run "
            "the command without submit."
        )
    submission.check_folder_name(folder)
    if script is not None:
        check_script(script)
        return
    check_task(config.task)
    if config.strategy != "auto":
        entry(config.strategy)
    if config.train.global_batch_size < (cluster.nodes or 1):
        raise UserError(
            f"a global batch of {config.train.global_batch_size} cannot be spread over "
            f"{cluster.nodes} nodes: each rank needs at least one sample. Set "
            "train.global_batch_size higher, or use fewer nodes."
        )
    check_input(config)


def _measured(folder: Path) -> tuple[list[float], float]:
    """(seconds of the saves on record, of the longest of the last steps)."""
    saves = [
        float(line["seconds"])
        for line in read_lines(folder / "events.jsonl")
        if line.get("kind") == "saved" and isinstance(line.get("seconds"), int | float)
    ]
    sums = (line.get("seconds") for line in list(read_lines(folder / "totals.jsonl"))[-_STEPS:])
    seconds = [value for value in sums if isinstance(value, int | float)]
    steps = [after - before for before, after in itertools.pairwise(seconds)]
    return saves, max(steps, default=0.0)


def _batch_job(config: RunConfig, folder: Path, lead: int) -> BatchJob:
    inside = submission.submission_folder(folder)
    return BatchJob(
        name=_job_name(folder),
        folder=inside,
        code=submission.CODE,
        log=f"../logs/{LOG_PATTERN}",
        num_nodes=config.cluster.nodes or 1,
        lead_seconds=lead,
        requeue=config.slurm.requeue,
        function=run_sealed,
        argument=str(inside),
        parameters=config.slurm.parameters(),
    )


def _job_name(folder: Path) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.name).strip("-.")[:40]
    return f"ftlaunch-{name}" if name else "ftlaunch"


def _plan(
    config: RunConfig, script: Script | None, folder: Path, lead: int, why_lead: str
) -> list[str]:
    slurm = config.slurm
    asked = ", ".join(
        key if value is True else f"{key}={value}" for key, value in slurm.parameters().items()
    )
    if script is not None:
        what = f"-m {script.target}" if script.kind == "module" else script.target
        sealed = "the script's own file" if script.kind == "path" else "no file of the module"
    else:
        what = (
            "the demo"
            if config.is_demo
            else f"{config.model.name_or_path} on {config.data.name_or_path}"
        )
        sealed = "the revisions of what the hub has"
    nodes = f"{config.cluster.nodes}"
    requeue = "after the time limit or a preemption" if slurm.requeue else "never (slurm.requeue)"
    rows = [
        ("job", what, ""),
        ("output", str(folder), ""),
        (
            "nodes",
            nodes,
            "" if (config.cluster.nodes or 1) > 1 else "one, unless --nodes says more",
        ),
        ("asked for", asked or "nothing more", "the site's defaults for all else"),
        ("told", f"{lead} s", f"before the time limit: {why_lead}"),
        ("requeued", requeue, ""),
        ("sealed", "configuration, code", f"and {sealed}"),
        ("devices", "", "and precision are chosen when the nodes have said what they have"),
    ]
    return [f"{name:<9}  {value}{'  ' if value and why else ''}{why}" for name, value, why in rows]


def _refuse_second(folder: Path) -> None:
    """UserError while a job for this folder is in the queue, or runs."""
    job = submission.submitted_job(folder)
    if job is None:
        return
    try:
        found = find_job(job.job_id)
    except SlurmSilent as error:
        raise UserError(
            f"whether job {job.job_id}, which was submitted for {folder}, is still there cannot be "
            f"seen: {error}. Try again, or choose another folder with --output-dir."
        ) from None
    if found is not None and found.is_active and is_of(found.working_dir, folder):
        what = "is pending" if found.is_waiting else "runs"
        raise UserError(
            f"job {job.job_id} {what} for {folder}. Wait for it (ftlaunch status), end it (ftlaunch "
            "cancel), or choose another folder with --output-dir."
        )


def _fetch(
    config: RunConfig, folder: Path, console: Console, *, keeps: bool
) -> tuple[RunConfig, list[Fetched]]:
    if keeps:
        config = _with_sealed_revisions(config, folder)
    model, of_model = fetch_model(config.model, console.say)
    data, of_data = fetch_data(config.data, console.say)
    return replace(config, model=model, data=data), [*of_model, *of_data]


def _with_sealed_revisions(config: RunConfig, folder: Path) -> RunConfig:
    """A job that goes on does so with the revisions that it began with."""
    try:
        before = submission.read_sealed(submission.submission_folder(folder)).config
    except UserError:
        return config
    model, data = config.model, config.data
    if model.revision is None and model.name_or_path == before.model.name_or_path:
        model = replace(model, revision=before.model.revision)
    if data.revision is None and data.name_or_path == before.data.name_or_path:
        data = replace(data, revision=before.data.revision)
    return replace(config, model=model, data=data)


def _submit(
    batch: BatchJob,
    sealed: Sealed,
    fetched: Sequence[Fetched],
    folder: Path,
    *,
    overwrite: bool,
) -> SubmittedJob:
    was_there = (folder / MARK).exists()
    try:
        # Nobody else begins in it before SLURM has answered; the job itself waits for its owner to go.
        with OutputFolder(folder, overwrite=False), submission.only_submission(folder) as inside:
            return _ask(batch, sealed, fetched, inside, overwrite=overwrite, was_there=was_there)
    except BaseException:
        if not was_there:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _ask(
    batch: BatchJob,
    sealed: Sealed,
    fetched: Sequence[Fetched],
    inside: Path,
    *,
    overwrite: bool,
    was_there: bool,
) -> SubmittedJob:
    try:
        submission.seal(inside, sealed)
        if overwrite:
            earlier.set_output_aside(inside, OWN_NAMES)
        earlier.make_logs(inside)
        job_id = submit(batch)
    except BaseException:
        submission.withdraw(inside, was_there=was_there)
        raise
    job = SubmittedJob(
        job_id=job_id,
        name=batch.name,
        submitted=submission.now(),
        host=socket.gethostname(),
        num_nodes=batch.num_nodes,
        lead_seconds=batch.lead_seconds,
        parameters=dict(batch.parameters),
        fetched=[asdict(each) for each in fetched],
    )
    try:
        submission.settle(inside, job)
    except BaseException:
        print(
            f"SLURM has taken job {job_id}, which could not be noted down: end it with scancel {job_id}",
            file=sys.stderr,
            flush=True,
        )
        raise
    return job


def _what_next(job: SubmittedJob, folder: Path) -> list[str]:
    import shlex

    name = shlex.quote(str(folder))
    return [
        f"submitted as job {job.job_id}",
        f"  ftlaunch status {name}",
        f"  ftlaunch logs {name} --follow",
        f"  ftlaunch cancel {name}",
    ]
