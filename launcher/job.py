"""One job from its configuration to its exit code: agents, plan, ranks, outputs."""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ftlaunch.cluster.coordinator import Coordinator, Outcome
from ftlaunch.cluster.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    EXIT_USER_MISTAKE,
    UserError,
)
from ftlaunch.cluster.events import Failure
from ftlaunch.cluster.machine import Machine, detect_machine
from ftlaunch.launcher.config import RunConfig
from ftlaunch.launcher.console import Console
from ftlaunch.launcher.output_folder import OWN_NAMES, OutputFolder
from ftlaunch.launcher.plan import LaunchPlan, make_plan
from ftlaunch.launcher.ranks import ADDRESS, PLAN_OF_RANKS, rank_starts
from ftlaunch.launcher.recorder import Recorder
from ftlaunch.launcher.report import write_report
from ftlaunch.strategies.checkpoint.manifest import write_json
from ftlaunch.strategies.data.demo import write_demo
from ftlaunch.strategies.model_config import check_model_folder
from ftlaunch.strategies.progress import (
    DataReady,
    Finished,
    Resumed,
    Saved,
    StepDone,
    from_dict,
)

Mode = Literal["train", "eval"]


@dataclass(slots=True)
class _Record:
    """What the coordinator learns while the ranks work."""

    started: float
    first_step_at: float | None = None
    data_seconds: float | None = None
    finished: Finished | None = None
    restarts: int = 0
    last_saved_step: int = 0
    disk_error: OSError | None = None
    notes: list[str] = field(default_factory=list)


def show_plan(config: RunConfig, console: Console, *, mode: Mode = "train") -> int:
    """The dry run: print the plan, start nothing."""
    check_input(config)
    machine = detect_machine(os.environ)
    output_dir = str(default_output_dir(config))
    plan = make_plan(
        config,
        [machine] * config.cluster.nodes,
        output_dir=output_dir,
        mode=mode,
    )
    console.plan([*machine.notes, *plan.describe()])
    console.say("dry run: nothing was started")
    return EXIT_DONE


def default_output_dir(config: RunConfig) -> Path:
    if config.output_dir is not None:
        return Path(config.output_dir)
    return Path.cwd() / "ftlaunch-runs" / f"{datetime.datetime.now():%Y-%m-%d-%H%M%S}"


def check_input(config: RunConfig) -> None:
    """What can be seen to be missing without reading it. UserError."""
    if not config.is_demo:
        check_model_folder(config.model)


def run_job(config: RunConfig, console: Console, *, overwrite: bool, mode: Mode = "train") -> int:
    """Run the job to its end; the exit code. UserError for what the user can mend."""
    started = time.monotonic()
    check_input(config)
    # A plan for machines like this one: most mistakes are found before anything is made or started.
    machine = detect_machine(os.environ)
    folder = default_output_dir(config)
    make_plan(config, [machine] * config.cluster.nodes, output_dir=str(folder), mode=mode)
    if overwrite:
        _keep_input(config, folder)
    with OutputFolder(folder, overwrite=overwrite):
        config = prepare_demo(config) if config.is_demo else config
        return _Job(config, folder, console, started, mode).run()


def _keep_input(config: RunConfig, folder: Path) -> None:
    """UserError when --overwrite would delete what the job is to be made from."""
    for name in (config.model.name_or_path, config.model.tokenizer, config.data.name_or_path):
        inside = name is not None and any(
            Path(name).is_relative_to(folder / own) for own in OWN_NAMES
        )
        if inside:
            raise UserError(
                f"--overwrite would delete {name}, which this job needs. Choose another "
                "--output-dir, or move it elsewhere first."
            )


def prepare_demo(config: RunConfig) -> RunConfig:
    """The embedded demo: its model and data are made where tokens are cached, once."""
    from ftlaunch.strategies.data.cache_folder import cache_root, writing_to_cache

    root = cache_root(config.data)
    folder = root / "demo-1"
    with writing_to_cache(root):
        write_demo(folder)
    return replace(
        config,
        model=replace(config.model, name_or_path=str(folder / "model"), random_weights=True),
        data=replace(config.data, name_or_path=str(folder / "data")),
    )


class _Job:
    """The coordinator's side of one job in its own output folder."""

    def __init__(
        self, config: RunConfig, folder: Path, console: Console, started: float, mode: Mode
    ) -> None:
        self._config = config
        self._folder = folder
        self._console = console
        self._mode: Mode = mode
        self._record = _Record(started=started)

    def run(self) -> int:
        names = [f"node{number}" for number in range(self._config.cluster.nodes)]
        log_dir = self._folder / "logs"
        with Coordinator(names, env={}, log_dir=log_dir) as coordinator:
            machines = coordinator.machines()
            if coordinator.stop_requested:
                return EXIT_INTERRUPTED if coordinator.hurried else EXIT_STOPPED
            plan = make_plan(self._config, machines, output_dir=str(self._folder), mode=self._mode)
            # It becomes the folder's plan when the ranks have seen that this is the folder's job.
            write_json(self._folder / "logs" / PLAN_OF_RANKS, plan.to_json())
            self._console.plan([*_notes(machines), *plan.describe()])
            with Recorder(self._folder) as recorder:
                outcome = self._attempts(plan, coordinator, recorder)
                return self._finish(plan, outcome, recorder)

    # -- running ----------------------------------------------------------------------------

    def _attempts(self, plan: LaunchPlan, coordinator: Coordinator, recorder: Recorder) -> Outcome:
        """Run the ranks; start them again from the last checkpoint when one of them was killed."""
        progress_before = -1
        while True:
            outcome = self._attempt(plan, coordinator, recorder)
            failure = outcome.failure
            if failure is None or failure.cause != "signal" or self._record.disk_error:
                return outcome
            if coordinator.stop_requested:
                return outcome
            # Two failures with no checkpoint between them would repeat for ever.
            progressed = self._record.last_saved_step > progress_before
            if not progressed or self._record.restarts >= plan.cluster.max_restarts:
                return outcome
            progress_before = self._record.last_saved_step
            self._record.restarts += 1
            reason = f"rank {failure.rank} on {failure.node}: {failure.title}"
            recorder.restarted(reason)
            self._console.warn(
                f"{reason}; restart {self._record.restarts} of {plan.cluster.max_restarts} from "
                + ("the last checkpoint" if progress_before else "the beginning")
            )

    def _attempt(self, plan: LaunchPlan, coordinator: Coordinator, recorder: Recorder) -> Outcome:
        port = coordinator.bind(ADDRESS, plan.cluster.port) if plan.world_size > 1 else 0

        def on_message(rank: int, payload: Mapping[str, Any]) -> None:
            try:
                self._take(payload, recorder)
            except OSError as error:
                self._record.disk_error = self._record.disk_error or error
                coordinator.give_up(f"the output folder cannot be written: {error.strerror}")

        return coordinator.run(
            rank_starts(plan, port, self._folder),
            on_message=on_message,
            on_stop=lambda: self._console.say(
                "stopping: a checkpoint is written at the next step (Ctrl-C again ends at once)"
            ),
            stop_seconds=plan.cluster.stop_timeout_seconds,
        )

    def _take(self, payload: Mapping[str, Any], recorder: Recorder) -> None:
        try:
            message = from_dict(payload)
        except ValueError as error:
            self._console.warn(str(error))
            return
        record = self._record
        if isinstance(message, StepDone) and record.first_step_at is None:
            record.first_step_at = time.monotonic()
        elif isinstance(message, DataReady):
            record.data_seconds = message.seconds
            plan = json.loads((self._folder / "logs" / PLAN_OF_RANKS).read_bytes())
            write_json(self._folder / "plan.json", plan)
        elif isinstance(message, Saved | Resumed):
            record.last_saved_step = message.step
        elif isinstance(message, Finished):
            record.finished = message
        self._console.handle(message)
        recorder.handle(message)

    # -- the end ----------------------------------------------------------------------------

    def _finish(self, plan: LaunchPlan, outcome: Outcome, recorder: Recorder) -> int:
        failure, code = self._judge(outcome)
        summary = self._summary(plan, outcome, recorder, failure, code)
        # A job that was refused leaves what the folder's own job has written.
        refused = code == EXIT_USER_MISTAKE and self._record.data_seconds is None
        if not (refused and (self._folder / "checkpoints").exists()):
            try:
                write_json(self._folder / "summary.json", summary)
                write_report(self._folder)
            except OSError as error:
                self._console.warn(f"summary and report could not be written: {error.strerror}")
        if failure is not None:
            self._show_failure(failure)
        elif outcome.ending == "done":
            self._console.done(summary)
        elif outcome.ending == "stopped":
            self._console.say(self._how_to_go_on())
        else:
            self._console.say("ended at once; the last whole checkpoint stays")
        return code

    def _judge(self, outcome: Outcome) -> tuple[Failure | None, int]:
        if self._record.disk_error is not None:
            error = self._record.disk_error
            title = (
                f"{error.strerror} while writing to {self._folder}. Whole checkpoints, if any, are "
                "untouched: free some space and run the same command again to go on from the last."
            )
            return Failure(
                rank=0, node="node0", cause="user", title=title, traceback="", log_path=""
            ), EXIT_USER_MISTAKE
        if outcome.failure is not None:
            mistake = outcome.failure.cause == "user"
            return outcome.failure, EXIT_USER_MISTAKE if mistake else EXIT_FAILED
        codes = {"done": EXIT_DONE, "stopped": EXIT_STOPPED, "interrupted": EXIT_INTERRUPTED}
        return None, codes[outcome.ending]

    def _how_to_go_on(self) -> str:
        step = self._record.last_saved_step
        if not step:
            return "stopped before the first step; run the same command to begin again"
        return f"stopped after step {step}, saved in {self._folder}; run the same command to go on"

    def _show_failure(self, failure: Failure) -> None:
        if failure.cause == "user":
            self._console.failure(failure.title, "", "")
            return
        title = f"rank {failure.rank} on {failure.node} failed: {failure.title}"
        body = failure.traceback or _tail(failure.log_path)
        self._console.failure(title, body, f"log: {failure.log_path}")

    def _summary(
        self,
        plan: LaunchPlan,
        outcome: Outcome,
        recorder: Recorder,
        failure: Failure | None,
        code: int,
    ) -> dict[str, Any]:
        record, totals = self._record, recorder.totals()
        finished = record.finished
        first = record.first_step_at
        return {
            "status": outcome.ending if record.disk_error is None else "failed",
            "exit_code": code,
            "strategy": plan.strategy,
            "precision": plan.precision,
            "num_nodes": plan.num_nodes,
            "world_size": plan.world_size,
            "optimizer_steps": finished.step if finished else totals.optimizer_steps,
            "epochs": finished.epoch if finished else totals.epochs,
            "samples_seen": totals.samples_seen,
            "tokens_seen": totals.tokens_seen,
            "padding_fraction": totals.padding_fraction,
            "overflow_steps": totals.overflow_steps,
            "restarts": totals.restarts,
            "startup_seconds": None if first is None else first - record.started,
            "data_seconds": record.data_seconds,
            "train_seconds": totals.train_seconds,
            "samples_per_second": totals.samples_per_second,
            "tokens_per_second": totals.tokens_per_second,
            "peak_memory_bytes": finished.peak_memory_bytes if finished else None,
            "eval": dict(finished.metrics if finished else totals.eval),
            "model_dir": finished.model_dir if finished else None,
            "failure": None if failure is None else asdict(failure),
            "predictions": self._predictions(code),
        }

    def _predictions(self, code: int) -> str | None:
        if self._mode == "train" or code != EXIT_DONE:
            return None
        return str(self._folder / "predictions.jsonl")


def _notes(machines: Sequence[Machine]) -> list[str]:
    return list(dict.fromkeys(note for machine in machines for note in machine.notes))


def _tail(path: str, num_lines: int = 20, num_bytes: int = 1 << 14) -> str:
    """The end of a rank's log."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - num_bytes))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-num_lines:])
