"""A user's own script on every rank, from its plan to its exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftlaunch.cluster.attempt import Outcome
from ftlaunch.cluster.coordinator import Coordinator
from ftlaunch.cluster.descriptors import need_descriptors
from ftlaunch.cluster.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USER_MISTAKE,
    UserError,
)
from ftlaunch.cluster.machine import Machine, detect_machine
from ftlaunch.cluster.verdict import Failure, ranks_in_words
from ftlaunch.launcher.attempts import Timeline, run_attempts
from ftlaunch.launcher.config import RunConfig
from ftlaunch.launcher.console import Console
from ftlaunch.launcher.ending import show_verdict, verdict_json
from ftlaunch.launcher.npus import with_rank_table
from ftlaunch.launcher.opening import open_job
from ftlaunch.launcher.output_folder import OutputFolder, default_output_dir, put_back_earlier
from ftlaunch.launcher.ranks import output_label
from ftlaunch.launcher.rehearsal import Rehearsal, check_faults, check_site
from ftlaunch.launcher.restarts import Restart, RestartPolicy
from ftlaunch.launcher.script_imports import ScriptImports, read_imports
from ftlaunch.launcher.script_plan import (
    Script,
    ScriptPlan,
    check_script,
    make_script_plan,
    preparation,
    script_starts,
)
from ftlaunch.launcher.site import Site, find_site, orders_for, ways_to
from ftlaunch.strategies.checkpoint.manifest import write_json

# Ranks seldom end at the very same moment: only after so long is it worth a word.
_UNEVEN_SECONDS = 10.0


def show_script_plan(config: RunConfig, script: Script, console: Console) -> int:
    """The dry run: print the plan, start nothing."""
    check_script(script)
    site = find_site(config.cluster, os.environ)
    machine = detect_machine(os.environ)
    plan = _plan(config, site, script, [machine] * len(site.hosts), not site.is_one_machine)
    console.plan([*machine.notes, *plan.describe()])
    console.say("dry run: nothing was started")
    return EXIT_DONE


def run_script(
    config: RunConfig,
    script: Script,
    console: Console,
    *,
    overwrite: bool,
    rehearsal: Rehearsal | None = None,
) -> int:
    """Run the script on every rank; its exit code, or ours. UserError for what the user can mend."""
    timeline = Timeline(time.monotonic())
    check_script(script)
    site = find_site(config.cluster, os.environ)
    machine = detect_machine(os.environ)
    rehearsal = rehearsal or Rehearsal(())
    check_site(rehearsal.faults, is_one_machine=site.is_one_machine)
    if site.is_one_machine:
        _check(_plan(config, site, script, [machine] * len(site.hosts)), rehearsal)
    need_descriptors(len(site.hosts))
    folder = default_output_dir(config)
    if not overwrite:
        put_back_earlier(folder)
    if (folder / "metrics.jsonl").exists() and not overwrite:
        raise UserError(
            f"the output folder {folder} holds a training job, whose plan and summary a script "
            "would replace. Choose another with --output-dir."
        )
    with OutputFolder(folder, overwrite=overwrite):
        return _ScriptJob(config, site, script, folder, console, timeline, rehearsal, machine).run()


def _check(plan: ScriptPlan, rehearsal: Rehearsal) -> None:
    check_faults(
        rehearsal.faults,
        num_nodes=plan.num_nodes,
        world_size=plan.world_size,
        has_steps=False,
    )


def _plan(
    config: RunConfig,
    site: Site,
    script: Script,
    machines: Sequence[Machine],
    assumed: bool = False,
) -> ScriptPlan:
    # Which file a module is, its packages decide as they are imported.
    imports = ScriptImports(anywhere=("torch",))
    if script.kind == "path":
        folder = Path(script.target).resolve().parent
        imports = read_imports(Path(script.text_path), folder, os.environ)
    return make_script_plan(
        with_rank_table(config.cluster, machines[0], os.environ),
        machines,
        site,
        script,
        working_dir=str(Path.cwd()),
        imports=imports,
        assumed=assumed,
    )


class _ScriptJob:
    """The coordinator's side of one script in its output folder."""

    def __init__(
        self,
        config: RunConfig,
        site: Site,
        script: Script,
        folder: Path,
        console: Console,
        timeline: Timeline,
        rehearsal: Rehearsal,
        machine: Machine,
    ) -> None:
        self._config = config
        self._site = site
        self._script = script
        self._folder = folder
        self._console = console
        self._timeline = timeline
        self._rehearsal = rehearsal
        self._machine = machine
        self._policy = RestartPolicy(max_restarts=config.cluster.max_restarts)
        self._restarts = 0
        self._uneven_since: float | None = None
        self._told_uneven = False
        self._log_bytes = -1

    def run(self) -> int:
        cluster = self._config.cluster
        with Coordinator(
            ways_to(self._site, os.environ),
            orders_for(self._site, cluster, os.environ),
            log_dir=self._folder / "logs",
        ) as coordinator:
            if not self._open(coordinator):
                self._console.say("stopped before the script was started")
                return EXIT_INTERRUPTED
            _check(self._plan, self._rehearsal)
            outcome = run_attempts(
                coordinator,
                self._policy,
                self._timeline,
                lambda: self._attempt(coordinator),
                self._decide,
                self._on_restart,
                lambda: self._reopen(coordinator),
                least=cluster.min_nodes or len(self._site.hosts),
            )
            stop_signal = coordinator.stop_signal
        return self._finish(outcome, stop_signal)

    def _open(self, coordinator: Coordinator) -> bool:
        """False when a stop was asked for meanwhile."""
        paths = [str(Path.cwd())]
        if self._script.kind == "path":
            paths.append(str(Path(self._script.target).absolute()))
        opened = open_job(
            coordinator,
            self._site,
            self._folder,
            here=self._machine,
            plan_for=lambda site, machines: _plan(self._config, site, self._script, machines),
            preparation=lambda plan: preparation(plan, os.environ),
            paths=paths,
        )
        if opened is None:
            return False
        self._plan, self._network = opened.plan, opened.network
        write_json(self._folder / "plan.json", self._plan.to_json())
        # An earlier run's: should this one be killed, nothing is to tell of another end.
        (self._folder / "summary.json").unlink(missing_ok=True)
        self._console.plan([*opened.notes, *self._plan.describe()])
        return True

    def _reopen(self, coordinator: Coordinator) -> None:
        if self._open(coordinator):
            self._console.warn(f"going on with {self._plan.num_nodes} nodes")

    def _decide(self, failure: Failure) -> Restart | None:
        # What the script got done is not known: every attempt counts as one that got on.
        return self._policy.decide(
            failure, progressed=True, can_halve=False, goes_on="the beginning of the script"
        )

    def _on_restart(self, restart: Restart) -> None:
        self._restarts += 1
        self._console.warn(restart.why)

    def _attempt(self, coordinator: Coordinator) -> Outcome:
        plan = self._plan
        port = coordinator.bind(self._network.address, plan.cluster.port)
        coordinator.allowance = None
        coordinator.on_tick = lambda: self._tick(coordinator)
        self._uneven_since = None
        self._told_uneven = False
        self._log_bytes = -1
        self._timeline.add(f"{plan.world_size} ranks start")
        return coordinator.run(
            script_starts(plan, self._network, port, self._folder, restart=self._restarts),
            on_message=lambda rank, payload: None,
            on_output=lambda rank, text: self._console.output(
                text, output_label(plan.cluster, plan.hosts, rank)
            ),
            on_stop=lambda: self._console.say("stopping (Ctrl-C again ends at once)"),
            stop_seconds=plan.cluster.stop_timeout_seconds,
            forwards_signal=True,
        )

    def _tick(self, coordinator: Coordinator) -> None:
        self._rehearsal.tick(coordinator, self._timeline)
        running = coordinator.running
        if not running or len(running) == self._plan.world_size:
            return
        # Some have ended with exit code 0. The others may have work left, or wait for them for ever.
        now = time.monotonic()
        self._uneven_since = self._uneven_since or now
        coordinator.allowance = self._plan.cluster.stall_timeout_seconds or None
        size = self._bytes_of_logs()
        if size != self._log_bytes:
            self._log_bytes = size
            coordinator.hear()
        late = now - self._uneven_since > _UNEVEN_SECONDS
        if late and not self._told_uneven and not coordinator.stop_requested:
            self._told_uneven = True
            ended = sorted(set(range(self._plan.world_size)) - running)
            self._console.warn(
                f"{ranks_in_words(ended)} ended with exit code 0 {now - self._uneven_since:.0f} s "
                f"ago; {ranks_in_words(sorted(running))} still going"
            )

    def _bytes_of_logs(self) -> int:
        size = 0
        for path in (self._folder / "logs").glob("rank-*.log"):
            with contextlib.suppress(FileNotFoundError):
                size += path.stat().st_size
        return size

    # -- the end ----------------------------------------------------------------------------

    def _finish(self, outcome: Outcome, stop_signal: str | None) -> int:
        code = self._exit_code(outcome)
        summary: dict[str, Any] = {
            "status": outcome.ending,
            "exit_code": code,
            "stop_signal": stop_signal,
            "num_nodes": self._plan.num_nodes,
            "world_size": self._plan.world_size,
            "restarts": self._restarts,
            "seconds": time.monotonic() - self._timeline.started,
            "failure": verdict_json(outcome.verdict),
            "remarks": list(outcome.remarks),
        }
        try:
            write_json(self._folder / "summary.json", summary)
        except OSError as error:
            self._console.warn(f"summary.json could not be written: {error.strerror}")
        if outcome.left_behind:
            self._console.warn(
                f"{outcome.left_behind} process(es) that the script had started outlived their "
                "rank; they were ended with the job"
            )
        for remark in outcome.remarks:
            self._console.warn(remark)
        if outcome.verdict is not None:
            show_verdict(self._console, outcome.verdict)
        self._timeline.add(f"exit code {code}")
        if self._rehearsal.faults:
            self._console.plan(["", "timeline", *self._timeline.lines()])
        return code

    def _exit_code(self, outcome: Outcome) -> int:
        """The script's own where it has one; 128 + the number of a signal, as a shell has it."""
        if outcome.ending == "interrupted":
            return EXIT_INTERRUPTED
        if outcome.ending == "stopped":
            return 128 + (outcome.stop_signal or signal.SIGTERM)
        if outcome.verdict is None:
            return EXIT_DONE
        first = outcome.verdict.first
        if first.cause == "user":
            return EXIT_USER_MISTAKE
        return first.code or EXIT_FAILED
