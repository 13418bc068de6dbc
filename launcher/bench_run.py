"""One run of one cell of a benchmark: agents, plan, ranks, what they have measured. Keeps no results."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftlaunch.cluster.coordinator import Coordinator
from ftlaunch.cluster.machine import Machine
from ftlaunch.launcher.bench_cells import Cell, config_of, plan_cell
from ftlaunch.launcher.config import RunConfig
from ftlaunch.launcher.job_input import needed_paths
from ftlaunch.launcher.npus import hccl_variables, with_rank_table
from ftlaunch.launcher.opening import open_job
from ftlaunch.launcher.plan import LaunchPlan
from ftlaunch.launcher.ranks import PLAN_OF_RANKS, preparation, rank_starts
from ftlaunch.launcher.site import Site, find_site, orders_for, ways_to
from ftlaunch.launcher.wording import one_line
from ftlaunch.strategies.checkpoint.manifest import write_json
from ftlaunch.strategies.progress import Measured, from_dict
from ftlaunch.strategies.registry import entry

# What reading data and loading may take without a word, in stall timeouts.
_PATIENCE = 6.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CellRun:
    """How one run of a cell went. Without `measured` it failed for `why`, or was stopped.

    by_user    the failure is a mistake in what was asked for
    machines   of the nodes, in their order
    """

    plan: LaunchPlan | None = None
    machines: tuple[Machine, ...] = ()
    measured: Measured | None = None
    why: str = ""
    log_path: str = ""
    by_user: bool = False
    stopped: bool = False


class CellRunner:
    """Runs cells of one benchmark; each run has agents and ranks of its own."""

    def __init__(self, config: RunConfig, least_nodes: int, here: Machine) -> None:
        self._config = config
        self._least_nodes = least_nodes
        self._here = here

    def run(self, cell: Cell, folder: Path) -> CellRun:
        """To its end. UserError for what is wrong with this cell; everything in `folder`, which is new."""
        config = config_of(self._config, cell)
        site = find_site(config.cluster, os.environ)
        met: list[Machine] = []

        def plan_for(site: Site, machines: Sequence[Machine]) -> LaunchPlan:
            met[:] = machines
            table = with_rank_table(config.cluster, machines[0], os.environ)
            return plan_cell(
                replace(config, cluster=table),
                cell,
                self._least_nodes,
                site,
                machines,
                output_dir=str(folder),
            )

        folder.mkdir(parents=True)
        with Coordinator(
            ways_to(site, os.environ),
            orders_for(site, config.cluster, os.environ),
            log_dir=folder / "logs",
        ) as coordinator:
            opened = open_job(
                coordinator,
                site,
                folder,
                here=self._here,
                plan_for=plan_for,
                preparation=preparation,
                paths=needed_paths(config),
            )
            if opened is None:
                return CellRun(stopped=True)
            plan = opened.plan
            write_json(folder / "logs" / PLAN_OF_RANKS, plan.to_json())
            return self._attempt(coordinator, plan, opened.network, folder, site, tuple(met))

    def _attempt(
        self,
        coordinator: Coordinator,
        plan: LaunchPlan,
        network: Any,
        folder: Path,
        site: Site,
        machines: tuple[Machine, ...],
    ) -> CellRun:
        port = 0
        if plan.world_size > 1:
            listens = not entry(plan.strategy).scheduler
            port = coordinator.bind(network.address, plan.cluster.port, listens=listens)
        found: list[Measured] = []

        def on_message(rank: int, payload: Mapping[str, Any]) -> None:
            try:
                message = from_dict(payload)
            except ValueError:
                return
            if isinstance(message, Measured):
                found.append(message)

        stall = plan.cluster.stall_timeout_seconds
        coordinator.allowance = stall * _PATIENCE if stall else None
        with hccl_variables(
            self._here,
            os.environ,
            timeout_seconds=plan.cluster.collective_timeout_seconds,
            port=port,
            is_here=site.is_one_machine,
        ) as variables:
            outcome = coordinator.run(
                rank_starts(plan, network, port, folder, variables),
                on_message=on_message,
                on_output=lambda rank, text: None,
                on_stop=lambda: None,
                stop_seconds=plan.cluster.stop_timeout_seconds,
            )
        if coordinator.stop_requested or outcome.ending in ("stopped", "interrupted"):
            return CellRun(plan=plan, machines=machines, stopped=True)
        if outcome.verdict is not None:
            first = outcome.verdict.first
            return CellRun(
                plan=plan,
                machines=machines,
                why=one_line(f"{first.subject}: {first.title}"),
                log_path=first.log_path,
                by_user=first.cause == "user",
            )
        if not found:
            return CellRun(plan=plan, machines=machines, why="its ranks ended without a result")
        return CellRun(plan=plan, machines=machines, measured=found[0])
