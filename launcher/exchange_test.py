"""The exchange test of `ftlaunch doctor`: an all-reduce of real ranks, started as those of a job are."""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ftlaunch.cluster.attempt import Outcome
from ftlaunch.cluster.coordinator import Coordinator
from ftlaunch.cluster.events import Prepare, RankStart
from ftlaunch.cluster.gathering import Network
from ftlaunch.cluster.machine import Machine
from ftlaunch.launcher.checks import Finding
from ftlaunch.launcher.checkup import Exchanged, Speed
from ftlaunch.launcher.npus import hccl_variables
from ftlaunch.launcher.plan import LaunchPlan
from ftlaunch.launcher.ranks import rank_environment, rank_starts
from ftlaunch.launcher.site import Site
from ftlaunch.launcher.wording import one_line
from ftlaunch.strategies.exchange import (
    KIND_SPEED,
    KIND_STAGE,
    STAGES,
    behind,
    bus_bandwidth,
    sizes_for,
)
from ftlaunch.strategies.registry import entry

# From the last sign of a rank; the collectives give up by themselves a little earlier.
_EXCHANGE_SECONDS = 60.0
_BEYOND_SECONDS = 10.0
# Until the first sign: importing a framework from a slow file system takes its time.
_IMPORT_SECONDS = 240.0
_NOWHERE = Path(os.devnull)
_WORKER = "ftlaunch.launcher.exchange_worker"
_BACKENDS = {"cpu": "gloo", "cuda": "nccl", "ascend": "hccl"}
_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME")
# What a rank that is at a stage has not done yet.
_MISSED = {
    "": ("come to life", "came to life"),
    "begun": ("meet the others", "met the others"),
    "joined": ("finish the first sum", "finished the first sum"),
    "added": ("finish the sums that are timed", "finished the sums that are timed"),
}


@dataclass(slots=True)
class _Heard:
    """What the ranks have said: how far they are, the seconds by size, what they printed.

    held_up   where they were while they waited, in words; None: they never waited long
    """

    stages: dict[int, str] = field(default_factory=dict)
    seconds: dict[int, dict[int, float]] = field(default_factory=dict)
    heard_at: float = field(default_factory=time.monotonic)
    held_up: str | None = None
    output: dict[int, list[str]] = field(default_factory=dict)

    def take(self, rank: int, payload: Mapping[str, Any]) -> None:
        self.heard_at = time.monotonic()
        kind, stage = payload.get("kind"), payload.get("stage")
        if kind == KIND_STAGE and stage in STAGES:
            self.stages[rank] = str(stage)
        num_bytes, seconds = payload.get("num_bytes"), payload.get("seconds")
        if kind == KIND_SPEED and isinstance(num_bytes, int) and isinstance(seconds, float):
            self.seconds.setdefault(num_bytes, {})[rank] = seconds

    def print(self, rank: int, text: str) -> None:
        lines = self.output.setdefault(rank, [])
        lines += text.splitlines()
        del lines[:-20]


def prepare_exchange(coordinator: Coordinator, plan: LaunchPlan) -> None:
    """Have the nodes import what the test needs, while other things are looked at."""
    preload = [_WORKER, _module(plan)] if plan.start_method == "fork" else []
    coordinator.prepare(
        Prepare(
            start_method=plan.start_method,
            env=rank_environment(plan),
            preload=preload,
            grace_seconds=0.0,
        )
    )


def run_exchange_test(
    coordinator: Coordinator, plan: LaunchPlan, site: Site, network: Network, here: Machine
) -> tuple[Exchanged, list[Finding]] | None:
    """How fast the ranks of the plan exchange numbers; None when a stop was asked for.

    `prepare_exchange` came before it. UserError when the port of the rendezvous is taken.
    """
    scheduled = entry(plan.strategy).scheduler
    port = coordinator.bind(network.address, plan.cluster.port, listens=not scheduled)
    heard = _Heard()
    limit = _limit(plan)

    def take(rank: int, payload: Mapping[str, Any]) -> None:
        heard.take(rank, payload)
        if len(heard.stages) == plan.world_size:
            coordinator.allowance = limit + _BEYOND_SECONDS

    def watch() -> None:
        """Ask before the framework gives up: it says who lost patience, not whom it waited for."""
        waits = time.monotonic() - heard.heard_at > limit / 2
        if waits and heard.held_up is None and len(heard.stages) == plan.world_size:
            heard.held_up = coordinator.who_holds_up(take)

    coordinator.allowance = _IMPORT_SECONDS
    coordinator.on_tick = watch
    with hccl_variables(
        here,
        os.environ,
        timeout_seconds=limit,
        port=port,
        is_here=site.is_one_machine,
    ) as variables:
        outcome = coordinator.run(
            _starts(plan, network, port, variables),
            on_message=take,
            on_output=heard.print,
            on_stop=lambda: None,
            stop_seconds=5.0,
        )
    if outcome.ending in ("stopped", "interrupted") or coordinator.stop_requested:
        return None
    # On CPUs MindSpore brings its own.
    by_mindspore = scheduled and plan.accelerator == "cpu"
    exchanged = Exchanged(
        backend="mindspore" if by_mindspore else _BACKENDS[plan.accelerator],
        num_nodes=plan.num_nodes,
        world_size=plan.world_size,
        speeds=_speeds(heard, plan.world_size),
        skipped="",
        works=outcome.ending == "done",
    )
    findings = [] if exchanged.works else [_failure(outcome, heard, plan, network)]
    return exchanged, findings


def _limit(plan: LaunchPlan) -> float:
    return min(_EXCHANGE_SECONDS, plan.cluster.collective_timeout_seconds)


def _module(plan: LaunchPlan) -> str:
    package = entry(plan.strategy).package
    framework = "mindspore" if package == "mindspore" else "torch"
    return f"ftlaunch.strategies.{framework}.exchange"


def _starts(
    plan: LaunchPlan, network: Network, port: int, hccl: Mapping[str, str]
) -> list[list[RankStart]]:
    """The ranks of a job, but for what they do and where they write."""
    # Not in the output folder, which may be what is wrong; a name that nobody can foresee.
    token = secrets.token_hex(8)
    timed = {"timeout_seconds": _limit(plan), "sizes": sizes_for(plan.accelerator)}

    def changed(start: RankStart, node: int, local_rank: int) -> RankStart:
        if start.rank < 0:
            return replace(start, log_path=os.devnull)
        log_path = f"/tmp/.ftlaunch-doctor-{token}-{start.rank}"
        npus = plan.hosts[node].npus
        told = {
            "module": _module(plan),
            "log_path": log_path,
            "accelerator": plan.accelerator,
            "device": npus[local_rank] if npus else local_rank,
            "num_threads": plan.threads_per_rank,
            **timed,
        }
        return replace(
            start,
            module=_WORKER,
            arguments=[json.dumps(told)],
            log_path=log_path,
            shows_output=True,
        )

    starts = []
    for node, ranks in enumerate(rank_starts(plan, network, port, _NOWHERE, hccl)):
        helpers = sum(start.rank < 0 for start in ranks)
        starts.append([changed(start, node, place - helpers) for place, start in enumerate(ranks)])
    return starts


def _speeds(heard: _Heard, world_size: int) -> tuple[Speed, ...]:
    """Of the sizes that every rank has timed; the slowest rank counts."""
    return tuple(
        Speed(
            num_bytes=num_bytes,
            seconds=max(by_rank.values()),
            bus_bytes_per_second=bus_bandwidth(num_bytes, max(by_rank.values()), world_size),
        )
        for num_bytes, by_rank in sorted(heard.seconds.items())
        if len(by_rank) == world_size
    )


def _failure(outcome: Outcome, heard: _Heard, plan: LaunchPlan, network: Network) -> Finding:
    """Who failed first and why, who is behind, what to look at."""
    lines = [f"the all-reduce over {plan.world_size} ranks on {plan.num_nodes} nodes failed"]
    if outcome.verdict is not None:
        first = outcome.verdict.first
        lines[0] += f": {first.subject}: {one_line(first.title)[:400]}"
        words = [one_line(line) for line in heard.output.get(first.rank, [])]
        if not first.traceback and any(words):
            lines[0] += f" ({' / '.join([word for word in words if word][-3:])[:400]})"
    late, stage = behind(heard.stages, plan.world_size)
    missed, done = _MISSED[stage]
    if len(late) < plan.world_size:
        lines.append(f"{_who(plan, late)} did not {missed}, unlike the others.")
    else:
        lines.append(f"No rank {done}.")
    if heard.held_up:
        lines.append(f"What was seen while they waited: {_with_nodes(plan, heard.held_up)}.")
    if plan.num_nodes > 1 and network.interfaces[0] != "lo":
        lines.append(_where_it_goes(plan, network, os.environ))
    return Finding(fatal=True, text="\n".join(lines))


def _who(plan: LaunchPlan, ranks: Sequence[int]) -> str:
    names = [host.name for host in plan.hosts for _ in range(host.num_devices)]
    return ", ".join(f"rank {rank} on {names[rank]}" for rank in ranks[:8])


def _with_nodes(plan: LaunchPlan, words: str) -> str:
    """Words about ranks, with the node of each."""
    names = [host.name for host in plan.hosts for _ in range(host.num_devices)]
    return re.sub(r"\brank (\d+)", lambda m: f"{m[0]} on {names[int(m[1])]}", words)


def _where_it_goes(plan: LaunchPlan, network: Network, environ: Mapping[str, str]) -> str:
    """Every node reached every other one by TCP: what is left to look at."""
    chosen = [f"{name}={environ[name]}" for name in _INTERFACE_VARIABLES if name in environ]
    if chosen:
        return (
            f"{', '.join(chosen)} is set and goes before the interface that was found to lead to "
            f"the other nodes ({_by_interface(plan, network)}): unset it."
        )
    return (
        f"It goes through {_by_interface(plan, network)}, where every node reached every other one on "
        "a port of ours. Look for firewalls that let only some ports through, and for nodes whose "
        "interfaces have different MTUs; NCCL_DEBUG=INFO has NCCL say what it tries."
    )


def _by_interface(plan: LaunchPlan, network: Network) -> str:
    if len(set(network.interfaces)) == 1:
        return f"{network.interfaces[0]} on every node"
    names = [host.name for host in plan.hosts]
    pairs = list(zip(network.interfaces, names, strict=True))[:16]
    return ", ".join(f"{interface} on {name}" for interface, name in pairs)
