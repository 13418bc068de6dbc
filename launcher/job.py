"""One job from its configuration to its exit code: agents, plan, ranks, outputs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ftlaunch.cluster.attempt import Outcome
from ftlaunch.cluster.coordinator import Coordinator
from ftlaunch.cluster.descriptors import need_descriptors
from ftlaunch.cluster.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    EXIT_USER_MISTAKE,
)
from ftlaunch.cluster.machine import Machine, detect_machine
from ftlaunch.cluster.verdict import Failure, Verdict
from ftlaunch.launcher.attempts import Timeline, run_attempts
from ftlaunch.launcher.config import RunConfig
from ftlaunch.launcher.config_fetch import fetch_config
from ftlaunch.launcher.console import Console
from ftlaunch.launcher.ending import show_verdict
from ftlaunch.launcher.job_input import check_input, keep_input, needed_paths, prepare_demo
from ftlaunch.launcher.job_memory import JobMemory, read_job_memory
from ftlaunch.launcher.job_record import JobRecord
from ftlaunch.launcher.micro_batch import (
    SizeLimit,
    can_halve,
    halve_micro_batch,
    keep_within,
    limit_after,
    size_in_words,
    size_to_json,
    without_memory,
)
from ftlaunch.launcher.npus import hccl_variables, with_rank_table
from ftlaunch.launcher.opening import Opened, open_job
from ftlaunch.launcher.output_folder import OutputFolder, default_output_dir
from ftlaunch.launcher.plan import LaunchPlan, make_plan
from ftlaunch.launcher.ranks import PLAN_OF_RANKS, output_label, preparation, rank_starts
from ftlaunch.launcher.recorder import Recorder
from ftlaunch.launcher.rehearsal import Rehearsal, check_faults, check_site
from ftlaunch.launcher.report import write_report
from ftlaunch.launcher.restarts import Restart, RestartPolicy
from ftlaunch.launcher.site import Site, find_site, orders_for, ways_to
from ftlaunch.launcher.startup import StartupClock
from ftlaunch.strategies.adapter import adapter_folder
from ftlaunch.strategies.checkpoint.manifest import write_json
from ftlaunch.strategies.model_config import family_of
from ftlaunch.strategies.progress import (
    Alive,
    DataReady,
    Evaluated,
    Finished,
    Phase,
    Proved,
    Resumed,
    Saved,
    Startup,
    StepDone,
    from_dict,
)
from ftlaunch.strategies.registry import entry

Mode = Literal["train", "eval"]
# What loading, evaluating and saving may take without a word, in stall timeouts.
_PATIENCE = {"data": 6.0, "model": 3.0, "prove": 3.0, "evaluate": 3.0, "save": 3.0, "train": 3.0}


def run_job(
    config: RunConfig,
    console: Console,
    *,
    overwrite: bool,
    mode: Mode = "train",
    rehearsal: Rehearsal | None = None,
) -> int:
    """Run the job to its end; the exit code. UserError for what the user can mend."""
    timeline = Timeline(time.monotonic())
    check_input(config, or_adapter=mode == "eval")
    site = find_site(config.cluster, os.environ)
    folder = default_output_dir(config)
    machine = detect_machine(os.environ)
    memory = None
    if mode == "train":
        memory = read_job_memory(config, why_not=fetch_config(config.model, console.say))
    rehearsal = rehearsal or Rehearsal(())
    check_site(rehearsal.faults, is_one_machine=site.is_one_machine)
    if site.is_one_machine:
        # Its plan is known already: most mistakes are found before anything is made or started.
        table = with_rank_table(config.cluster, machine, os.environ)
        machines = [machine] * len(site.hosts)
        plan = make_plan(
            replace(config, cluster=table),
            machines,
            site,
            output_dir=str(folder),
            mode=mode,
            family=family_of(config.model),
            is_adapter=adapter_folder(config.model) is not None,
            memory=memory,
        )
        check_faults(rehearsal.faults, num_nodes=plan.num_nodes, world_size=plan.world_size)
    need_descriptors(len(site.hosts))
    if overwrite:
        keep_input(config, folder)
    with OutputFolder(folder, overwrite=overwrite):
        config = prepare_demo(config) if config.is_demo else config
        return _Job(config, site, folder, console, timeline, mode, machine, rehearsal, memory).run()


class _Job:
    """The coordinator's side of one job in its own output folder."""

    def __init__(
        self,
        config: RunConfig,
        site: Site,
        folder: Path,
        console: Console,
        timeline: Timeline,
        mode: Mode,
        machine: Machine,
        rehearsal: Rehearsal,
        memory: JobMemory | None,
    ) -> None:
        self._config = config
        self._site = site
        self._folder = folder
        self._console = console
        self._timeline = timeline
        self._mode: Mode = mode
        self._machine = machine
        self._rehearsal = rehearsal
        self._memory = memory
        self._limit = SizeLimit()
        self._record = JobRecord(
            started=timeline.started, startup=StartupClock(opened=timeline.started)
        )
        self._policy = RestartPolicy(max_restarts=config.cluster.max_restarts)

    def run(self) -> int:
        with Coordinator(
            ways_to(self._site, os.environ),
            orders_for(self._site, self._config.cluster, os.environ),
            log_dir=self._folder / "logs",
        ) as coordinator:
            opened = self._open(coordinator)
            if opened is None:
                self._console.say("stopped before anything was started")
                return EXIT_INTERRUPTED if coordinator.hurried else EXIT_STOPPED
            plan, self._network = opened.plan, opened.network
            check_faults(
                self._rehearsal.faults, num_nodes=plan.num_nodes, world_size=plan.world_size
            )
            self._console.plan([*opened.notes, *plan.describe()])
            with Recorder(self._folder) as recorder:
                outcome, plan = self._attempts(plan, coordinator, recorder)
                self._record.stop_signal = coordinator.stop_signal
                return self._finish(plan, outcome, recorder)

    def _open(self, coordinator: Coordinator) -> Opened[LaunchPlan] | None:
        return open_job(
            coordinator,
            self._site,
            self._folder,
            here=self._machine,
            plan_for=self._plan,
            preparation=preparation,
            paths=needed_paths(self._config),
        )

    def _plan(self, site: Site, machines: Sequence[Machine]) -> LaunchPlan:
        table = with_rank_table(self._config.cluster, machines[0], os.environ)
        return make_plan(
            replace(self._config, cluster=table),
            machines,
            site,
            output_dir=str(self._folder),
            mode=self._mode,
            family=family_of(self._config.model),
            is_adapter=adapter_folder(self._config.model) is not None,
            memory=self._memory,
        )

    # -- running ----------------------------------------------------------------------------

    def _attempts(
        self, plan: LaunchPlan, coordinator: Coordinator, recorder: Recorder
    ) -> tuple[Outcome, LaunchPlan]:
        """Run the ranks; start them again from the last checkpoint where that is worth it.

        The outcome, and the plan of the last ranks.
        """

        def decide(failure: Failure) -> Restart | None:
            if self._record.disk_error is not None:
                return None
            step = self._record.saved_step(self._folder)
            return self._policy.decide(
                failure,
                progressed=self._record.progressed,
                can_halve=self._can_halve(plan),
                goes_on=f"the checkpoint of step {step}" if step else "the beginning",
            )

        def on_restart(restart: Restart) -> None:
            nonlocal plan
            why, sizes = restart.why, {}
            if restart.halves_micro_batch:
                phase = self._record.phase
                before, plan = plan, halve_micro_batch(plan, phase) or plan
                self._limit = limit_after(self._limit, plan, phase)
                why += f" ({size_in_words(before, phase)} → {size_in_words(plan, phase)})"
                sizes = {"before": size_to_json(before), "after": size_to_json(plan)}
            self._record.progressed = False
            recorder.restarted(why, **sizes)
            self._console.warn(why)

        def reopen() -> None:
            nonlocal plan
            opened = self._open(coordinator)
            if opened is None:
                return
            self._network = opened.network
            self._console.warn(f"going on with {opened.plan.num_nodes} nodes")
            # What did not fit into memory does not fit now.
            plan = keep_within(opened.plan, self._limit)

        outcome = run_attempts(
            coordinator,
            self._policy,
            self._timeline,
            lambda: self._attempt(plan, coordinator, recorder),
            decide,
            on_restart,
            reopen,
            least=self._config.cluster.min_nodes or len(self._site.hosts),
        )
        return outcome, plan

    def _attempt(self, plan: LaunchPlan, coordinator: Coordinator, recorder: Recorder) -> Outcome:
        # It becomes the folder's plan when the ranks have seen that this is the folder's job.
        write_json(self._folder / "logs" / PLAN_OF_RANKS, plan.to_json())
        port = 0
        if plan.world_size > 1:
            listens = not entry(plan.strategy).scheduler
            port = coordinator.bind(self._network.address, plan.cluster.port, listens=listens)

        def on_message(rank: int, payload: Mapping[str, Any]) -> None:
            try:
                self._take(payload, coordinator, recorder)
            except OSError as error:
                self._record.disk_error = self._record.disk_error or error
                coordinator.give_up(f"the output folder cannot be written: {error.strerror}")

        self._allow(coordinator, "data")
        self._record.phase = "data"
        self._timeline.add(f"{plan.world_size} ranks start")
        coordinator.on_tick = lambda: self._rehearsal.tick(coordinator, self._timeline)
        self._record.startup.ask()
        timeout = plan.cluster.collective_timeout_seconds
        with hccl_variables(
            self._machine,
            os.environ,
            timeout_seconds=timeout,
            port=port,
            is_here=self._site.is_one_machine,
        ) as variables:
            return coordinator.run(
                rank_starts(plan, self._network, port, self._folder, variables),
                on_message=on_message,
                on_output=lambda rank, text: self._console.output(
                    text, output_label(plan.cluster, plan.hosts, rank)
                ),
                on_stop=self._say_stopping,
                stop_seconds=plan.cluster.stop_timeout_seconds,
            )

    def _can_halve(self, plan: LaunchPlan) -> bool:
        record = self._record
        evaluates = record.phase == "evaluate"
        longest = record.longest_eval_sample if evaluates else record.longest_sample
        return can_halve(plan, phase=record.phase, longest_sample=longest)

    def _say_stopping(self) -> None:
        what = "stopping"
        if self._mode == "train" and self._record.progressed:
            what += ": a checkpoint is written at the next step"
        self._console.say(f"{what} (Ctrl-C again ends at once)")

    def _allow(self, coordinator: Coordinator, phase: str) -> None:
        """How long the ranks may now be silent."""
        seconds = self._config.cluster.stall_timeout_seconds
        coordinator.allowance = seconds * _PATIENCE.get(phase, 1.0) if seconds else None

    def _take(
        self, payload: Mapping[str, Any], coordinator: Coordinator, recorder: Recorder
    ) -> None:
        try:
            message = from_dict(payload)
        except ValueError as error:
            self._console.warn(str(error))
            return
        record = self._record
        if isinstance(message, Alive):
            return
        if isinstance(message, Startup):
            record.startup.hear(message)
            return
        if isinstance(message, Phase):
            self._allow(coordinator, message.name)
            record.phase = message.name
            self._rehearsal.phase(message.name)
            return
        if isinstance(message, StepDone):
            self._allow(coordinator, "step")
            self._rehearsal.step(message.step)
            record.phase = "train"
            record.first_step_at = record.first_step_at or time.monotonic()
            if not record.progressed:
                self._timeline.add(f"step {message.step} is done")
            record.progressed = True
        elif isinstance(message, DataReady):
            record.data_seconds = message.seconds
            record.longest_sample = message.longest_sample
            record.longest_eval_sample = message.longest_eval_sample
            plan = json.loads((self._folder / "logs" / PLAN_OF_RANKS).read_bytes())
            write_json(self._folder / "plan.json", plan)
            # An earlier run's: should this one be killed, nothing is to tell of another end.
            (self._folder / "summary.json").unlink(missing_ok=True)
        elif isinstance(message, Proved):
            record.proof = message
        elif isinstance(message, Evaluated):
            # What comes next is another step, unless another phase is named.
            record.phase = "train"
        elif isinstance(message, Saved | Resumed):
            record.last_saved_step = message.step
        elif isinstance(message, Finished):
            record.finished = message
        self._console.handle(message)
        recorder.handle(message)

    # -- the end ----------------------------------------------------------------------------

    def _finish(self, plan: LaunchPlan, outcome: Outcome, recorder: Recorder) -> int:
        verdict, code = self._judge(outcome)
        if verdict is not None and verdict.first.cause == "memory" and not self._can_halve(plan):
            title = f"{verdict.first.title}\n{without_memory(plan, self._record.phase)}"
            verdict = replace(verdict, first=replace(verdict.first, title=title))
        evaluated = self._mode == "eval" and code == EXIT_DONE
        predictions = self._folder / "predictions.jsonl" if evaluated else None
        summary = self._record.summary(plan, outcome, recorder.totals(), verdict, code, predictions)
        # A job that was refused leaves what the folder's own job has written.
        refused = code == EXIT_USER_MISTAKE and self._record.data_seconds is None
        if not (refused and (self._folder / "checkpoints").exists()):
            try:
                write_json(self._folder / "summary.json", summary)
                write_report(self._folder)
            except OSError as error:
                self._console.warn(f"summary and report could not be written: {error.strerror}")
        for remark in outcome.remarks:
            self._console.warn(remark)
        if verdict is not None:
            show_verdict(self._console, verdict)
        elif outcome.ending == "done":
            self._console.done(summary)
        elif outcome.ending == "stopped":
            self._console.say(self._how_to_go_on(recorder.totals().optimizer_steps))
        else:
            self._console.say("ended at once; the last whole checkpoint stays")
        self._timeline.add(f"exit code {code}")
        if self._rehearsal.faults:
            self._console.plan(["", "timeline", *self._timeline.lines()])
        return code

    def _judge(self, outcome: Outcome) -> tuple[Verdict | None, int]:
        if self._record.disk_error is not None:
            error = self._record.disk_error
            title = (
                f"{error.strerror} while writing to {self._folder}. Whole checkpoints, if any, are "
                "untouched: free some space and run the same command again to go on from the last."
            )
            mistake = Failure(
                rank=0,
                node="node0",
                subject="the coordinator",
                cause="user",
                title=title,
                traceback="",
                log_path="",
                time=time.monotonic(),
            )
            return Verdict(first=mistake, consequences=()), EXIT_USER_MISTAKE
        if outcome.verdict is not None:
            by_user = outcome.verdict.first.cause == "user"
            return outcome.verdict, EXIT_USER_MISTAKE if by_user else EXIT_FAILED
        codes = {"done": EXIT_DONE, "stopped": EXIT_STOPPED, "interrupted": EXIT_INTERRUPTED}
        return None, codes[outcome.ending]

    def _how_to_go_on(self, done: int) -> str:
        """The last step is not saved if the stop came while the ranks of a failure were ended."""
        saved = self._record.saved_step(self._folder)
        if not saved:
            if self._record.first_step_at is None:
                return "stopped before the first step of this run; run the same command again"
            return f"stopped after step {done}, before a checkpoint; run the same command to begin again"
        if saved < done:
            return (
                f"stopped after step {done}; step {saved} is saved in {self._folder}; run the same "
                "command to go on from there"
            )
        return f"stopped after step {saved}, saved in {self._folder}; run the same command to go on"
