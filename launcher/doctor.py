"""`ftlaunch doctor`: looks at every node and has all of them add up numbers. Leaves nothing behind.

It goes on past what is wrong, so that all of it is told at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftlaunch.cluster.coordinator import Coordinator
from ftlaunch.cluster.descriptors import need_descriptors
from ftlaunch.cluster.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    JobError,
    UserError,
)
from ftlaunch.cluster.gathering import Inspection, Network
from ftlaunch.cluster.machine import Machine
from ftlaunch.cluster.mesh import Unreached
from ftlaunch.launcher.checks import (
    Finding,
    compare_machines,
    judge_inspections,
    judge_machines,
)
from ftlaunch.launcher.checkup import Checkup, Exchanged, NodeReport
from ftlaunch.launcher.config import RunConfig, load_config
from ftlaunch.launcher.console import Console
from ftlaunch.launcher.exchange_test import prepare_exchange, run_exchange_test
from ftlaunch.launcher.job_input import check_input, needed_paths
from ftlaunch.launcher.job_memory import read_job_memory
from ftlaunch.launcher.npus import with_rank_table
from ftlaunch.launcher.plan import LaunchPlan, make_plan
from ftlaunch.launcher.site import Site, find_site, orders_for, ways_to
from ftlaunch.strategies.data.task_names import check_task
from ftlaunch.strategies.model_config import family_of
from ftlaunch.strategies.options import TrainOptions
from ftlaunch.strategies.registry import entry

# Enough for any number of ranks: how a batch is spread is not what is tested.
_ANY_BATCH = 1 << 20


def doctor(arguments: argparse.Namespace, flags: Mapping[str, Any]) -> int:
    """0: a job would run; 1: it would fail. UserError for a mistake in what was asked."""
    file = Path(arguments.config) if arguments.config is not None else None
    config = load_config(file=file, flags=flags, overrides=arguments.overrides)
    check_task(config.task)
    if config.strategy != "auto":
        entry(config.strategy)
    site = find_site(config.cluster, os.environ)
    need_descriptors(len(site.hosts))
    checkup = _Doctor(config, site).examine()
    if checkup is None:
        return EXIT_INTERRUPTED
    if arguments.json:
        print(json.dumps(checkup.to_json(), indent=2))
    else:
        with Console(sys.stdout) as console:
            console.plan(checkup.lines())
    return EXIT_DONE if checkup.would_run else EXIT_FAILED


class _Stopped(Exception):
    """The user has asked to stop."""


class _Doctor:
    """One examination. What is found wrong is gathered; what depends on it is left out."""

    def __init__(self, config: RunConfig, site: Site) -> None:
        self._config = config
        self._site = site
        self._started = time.monotonic()
        self._findings: list[Finding] = []
        self._seconds: dict[str, float] = {}
        self._reasons: dict[int, str] = {}
        self._machines: dict[int, Machine] = {}
        self._inspections: dict[int, Inspection] = {}
        self._network: Network | None = None
        self._unreached: list[Unreached] = []
        self._exchanged = Exchanged.none("the nodes were not there to the end")
        # Of the output folder, what is there already: nothing is made.
        self._folder = _existing(Path(config.output_dir or Path.cwd() / "ftlaunch-runs"))

    def examine(self) -> Checkup | None:
        """None when the user has asked to stop."""
        self._judge_input()
        with (
            tempfile.TemporaryDirectory(prefix="ftlaunch-doctor-") as logs,
            Coordinator(
                ways_to(self._site, os.environ),
                orders_for(self._site, self._config.cluster, os.environ),
                log_dir=Path(logs),
            ) as coordinator,
        ):
            try:
                self._meet(coordinator)
                if self._machines:
                    self._look(coordinator)
            except JobError as error:
                # Where its words are is gone when this is read.
                self._fail(str(error).partition("; its last words")[0])
            except _Stopped:
                return None
        return Checkup(
            why_site=self._site.why,
            folder=str(self._folder),
            nodes=tuple(
                NodeReport(
                    name=host.name,
                    machine=self._machines.get(number),
                    reason=self._reasons.get(number, ""),
                    inspection=self._inspections.get(number),
                )
                for number, host in enumerate(self._site.hosts)
            ),
            network=self._network,
            unreached=tuple(self._unreached),
            exchanged=self._exchanged,
            findings=tuple(dict.fromkeys(self._findings)),
            seconds=self._seconds,
        )

    # -- the parts --------------------------------------------------------------------------

    def _judge_input(self) -> None:
        try:
            check_input(self._config)
        except UserError as error:
            self._fail(str(error))

    def _meet(self, coordinator: Coordinator) -> None:
        self._machines, self._reasons = coordinator.meet()
        self._heed_stop(coordinator)
        self._clock("meet")
        if self._reasons:
            names = ", ".join(self._site.hosts[number].name for number in self._reasons)
            self._fail(
                f"{len(self._reasons)} of {len(self._site.hosts)} nodes cannot be used: {names}. A "
                "job is started when every node is there: mend what is said of them, or leave them "
                "out."
            )

    def _look(self, coordinator: Coordinator) -> None:
        """At the nodes that are there."""
        started = time.monotonic()
        numbers = list(self._machines)
        site, machines = self._site.only(numbers), list(self._machines.values())
        differences = compare_machines(site, machines)
        alike = slice(1) if site.is_one_machine else slice(None)
        obstacles = judge_machines(
            site.only(range(len(numbers))[alike]),
            machines[alike],
            self._config.cluster,
            self._config.strategy,
        )
        self._findings += [*differences, *obstacles]
        self._findings += [
            Finding(fatal=False, text=f"{host.name}: {note}")
            for host, machine in zip(site.hosts[alike], machines[alike], strict=True)
            for note in machine.notes
        ]
        plan = None
        if not any(finding.fatal for finding in (*differences, *obstacles)):
            plan = self._plan(site, machines)
        if plan is not None and plan.world_size > 1:
            prepare_exchange(coordinator, plan)
        self._inspect(coordinator, site, numbers)
        self._connect(coordinator)
        # As much is checked before every job on several machines; what follows is the doctor's.
        self._seconds["quick"] = time.monotonic() - started
        self._unreached = coordinator.find_unreached(self._network)
        self._heed_stop(coordinator)
        if self._unreached:
            pairs = "; ".join(f"{each.node} to {each.other}" for each in self._unreached[:8])
            more = len(self._unreached) - 8
            self._fail(
                f"nodes do not reach each other: {pairs}{f' and {more} more' if more > 0 else ''}. "
                "The ranks of a job connect from every node to every other one, on any TCP port: let "
                "them (firewall, routes, VLAN), or leave such a node out."
            )
        self._exchange(coordinator, plan, site)
        self._heed_stop(coordinator)

    def _plan(self, site: Site, machines: Sequence[Machine]) -> LaunchPlan | None:
        """Of ranks as a job would have them; what a job's own plan says against it is a problem."""
        try:
            cluster = with_rank_table(self._config.cluster, machines[0], os.environ)
            bare = RunConfig(
                strategy=self._config.strategy,
                cluster=cluster,
                train=TrainOptions(global_batch_size=_ANY_BATCH),
            )
            plan = make_plan(bare, machines, site, output_dir=str(self._folder))
        except UserError as error:
            self._fail(str(error))
            return None
        if not self._config.is_demo:
            try:
                config = replace(self._config, cluster=cluster)
                family = family_of(config.model)
                make_plan(
                    config,
                    machines,
                    site,
                    output_dir=str(self._folder),
                    family=family,
                    memory=read_job_memory(config),
                )
            except UserError as error:
                self._fail(str(error))
        return plan

    def _inspect(self, coordinator: Coordinator, site: Site, numbers: Sequence[int]) -> None:
        paths = [] if self._config.is_demo else needed_paths(self._config)
        try:
            inspections = coordinator.inspect(self._folder, paths)
        except OSError as error:
            self._fail(
                f"the output folder cannot be written to on this machine: {self._folder}: "
                f"{error.strerror}. A job keeps its records there: correct its permissions, or "
                "choose another with --output-dir."
            )
            return
        self._heed_stop(coordinator)
        self._inspections = dict(zip(numbers, inspections, strict=True))
        self._findings += judge_inspections(site, str(self._folder), inspections)

    def _connect(self, coordinator: Coordinator) -> None:
        try:
            self._network = coordinator.connect()
        except UserError as error:
            self._fail(str(error))
        self._heed_stop(coordinator)

    def _exchange(self, coordinator: Coordinator, plan: LaunchPlan | None, site: Site) -> None:
        if plan is None:
            self._exchanged = Exchanged.none("what is named below is in its way")
        elif self._network is None or self._unreached:
            self._exchanged = Exchanged.none("the nodes do not reach each other")
        elif plan.world_size == 1:
            self._exchanged = Exchanged.none("one rank has nobody to exchange numbers with")
        else:
            started = time.monotonic()
            try:
                result = run_exchange_test(
                    coordinator, plan, site, self._network, next(iter(self._machines.values()))
                )
            except UserError as error:
                self._fail(str(error))
                self._exchanged = Exchanged.none("it could not be started")
                return
            if result is None:
                raise _Stopped
            self._exchanged, findings = result
            self._findings += findings
            self._seconds["all_reduce"] = time.monotonic() - started

    # -- what all of them need --------------------------------------------------------------

    def _fail(self, text: str) -> None:
        self._findings.append(Finding(fatal=True, text=text))

    def _clock(self, part: str) -> None:
        self._seconds[part] = time.monotonic() - self._started

    def _heed_stop(self, coordinator: Coordinator) -> None:
        if coordinator.stop_requested:
            raise _Stopped


def _existing(path: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next((each for each in (path, *path.parents) if each.is_dir()), Path("/"))
