"""How a job of either kind begins: its agents are met, compared and asked, and its plan is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from ftlaunch.cluster.coordinator import Coordinator
from ftlaunch.cluster.events import Prepare
from ftlaunch.cluster.gathering import Network
from ftlaunch.cluster.machine import Machine
from ftlaunch.launcher.checks import compare_machines, judge_inspections, refuse
from ftlaunch.launcher.site import Site

Plan = TypeVar("Plan")


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened(Generic[Plan]):
    """A plan for nodes that fit together, where its ranks can meet, and notes for the user."""

    plan: Plan
    network: Network
    notes: tuple[str, ...]


def open_job(
    coordinator: Coordinator,
    site: Site,
    folder: Path,
    *,
    here: Machine,
    plan_for: Callable[[Site, Sequence[Machine]], Plan],
    preparation: Callable[[Plan], Prepare],
    paths: Sequence[str],
) -> Opened[Plan] | None:
    """UserError for all that the user can mend; None when a stop was asked for meanwhile.

    Called again when a job goes on with other nodes than before.

    here    this machine
    paths   what every node has to have
    """
    if site.is_one_machine:
        # What it needs is known before its agents have answered.
        coordinator.prepare(preparation(plan_for(site, [here] * len(site.hosts))))
    machines = coordinator.machines()
    if coordinator.stop_requested or coordinator.present is None:
        return None
    site = site.only(coordinator.present)
    findings = compare_machines(site, machines)
    # What a plan cannot do says more than a difference of versions.
    plan = plan_for(site, machines)
    refuse(findings)
    coordinator.prepare(preparation(plan))
    network = coordinator.connect()
    if not site.is_one_machine:
        findings += judge_inspections(site, str(folder), coordinator.inspect(folder, paths))
    own_notes = [note for machine in machines for note in machine.notes]
    notes = dict.fromkeys([*own_notes, *refuse(findings)])
    return Opened(plan=plan, network=network, notes=tuple(notes))
