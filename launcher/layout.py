"""Where the ranks of a job are: nodes, devices, threads, and how they are started. Pure.

Shared by the plan of a training job and that of a user's own script.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.events import StartMethod
from ftlaunch.cluster.machine import Machine
from ftlaunch.launcher.config import ClusterOptions
from ftlaunch.launcher.npus import npu_places, rank_table_path, refuse_busy

# Set to nothing it leaves a job no device of that kind.
_HIDING = {"cuda": "CUDA_VISIBLE_DEVICES", "ascend": "ASCEND_RT_VISIBLE_DEVICES"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """One decision: what was chosen, and why, in words for the user."""

    choice: str
    value: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPlan:
    """One node's part. `assumed`: nobody asked that host; it is taken to be like this one.

    devices   the driver's names of the accelerators that this node's ranks see; None: all
    npus      of an Ascend host: the place of each rank's NPU among the visible ones (DEVICE_ID)
    """

    name: str
    accelerator: str
    device_name: str
    num_devices: int
    assumed: bool
    devices: tuple[str, ...] | None
    npus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The ranks of a job, `devices` on each node."""

    accelerator: str
    num_nodes: int
    devices: int
    threads_per_rank: int
    start_method: StartMethod
    hosts: tuple[HostPlan, ...]

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.devices


def make_layout(
    cluster: ClusterOptions,
    machines: Sequence[Machine],
    reasons: list[Reason],
    *,
    assumed: bool = False,
    default_start: StartMethod,
) -> Layout:
    """Decide where the ranks are, and add the reasons. UserError when they do not fit."""
    accelerator = _one_accelerator(machines)
    if accelerator == "ascend":
        # Forking after CANN has been loaded was never tried on hardware.
        default_start = "exec"
    kind = _cluster_kind(cluster, reasons)
    devices = _devices(cluster, machines, accelerator, reasons)
    threads = _threads(machines[0], cluster.nodes * devices, reasons)
    shared = kind == "local" and accelerator == "cuda" and cluster.nodes > 1
    together = kind == "local"
    npus = npu_places(cluster, machines, devices, accelerator, is_one_machine=together)
    refuse_busy(cluster, machines, npus)
    if path := rank_table_path(cluster):
        ranks = cluster.nodes * devices
        reasons.append(Reason(choice="rank table", value=f"{ranks} ranks", why=f"as in {path}"))
    return Layout(
        accelerator=accelerator,
        num_nodes=cluster.nodes,
        devices=devices,
        threads_per_rank=threads,
        start_method=_start_method(cluster, default_start, reasons),
        hosts=tuple(
            HostPlan(
                name=f"node{number}",
                accelerator=machine.accelerator,
                device_name=machine.device_name,
                num_devices=devices,
                assumed=assumed and number > 0,
                devices=(
                    machine.device_ids[number * devices : (number + 1) * devices]
                    if shared
                    else None
                ),
                npus=npus[number],
            )
            for number, machine in enumerate(machines)
        ),
    )


def describe(hosts: Sequence[HostPlan], reasons: Sequence[Reason]) -> list[str]:
    """A plan as lines for the terminal."""
    lines = [
        f"{host.name}: {host.num_devices} × {host.device_name}"
        + ("  (assumed to be like this machine)" if host.assumed else "")
        for host in hosts
    ]
    width = max(len(reason.choice) for reason in reasons)
    value_width = min(24, max(len(reason.value) for reason in reasons))
    lines += [
        f"{reason.choice:<{width}}  {reason.value:<{value_width}}  {reason.why}"
        for reason in reasons
    ]
    return lines


def _start_method(
    cluster: ClusterOptions, default: StartMethod, reasons: list[Reason]
) -> StartMethod:
    method = cluster.start_method or default
    why = {
        "fork": "ranks are forked from a process that has imported everything once",
        "exec": "every rank is an interpreter of its own",
    }[method]
    if cluster.start_method is not None:
        why += ", as asked for"
    reasons.append(Reason(choice="start", value=method, why=why))
    return method


def _one_accelerator(machines: Sequence[Machine]) -> str:
    kinds = {machine.accelerator for machine in machines}
    if len(kinds) > 1:
        rows = [("node", "host", "accelerator", "devices")]
        for number, machine in enumerate(machines):
            has = f"{machine.num_devices} × {machine.device_name}"
            rows.append((f"node{number}", machine.hostname, machine.accelerator, has))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        table = "\n".join(
            "  " + "  ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in rows
        )
        hint = ""
        if "cpu" in kinds:
            hint = (
                " Hosts that are listed with cpu show no device: look at the driver there, and at "
                "CUDA_VISIBLE_DEVICES and ASCEND_RT_VISIBLE_DEVICES."
            )
        raise UserError(
            f"the nodes have different accelerators:\n{table}\nOne job runs on one kind: choose "
            f"hosts that are alike.{hint}"
        )
    return kinds.pop()


def _cluster_kind(cluster: ClusterOptions, reasons: list[Reason]) -> str:
    kind = cluster.kind
    if kind in ("ssh", "slurm") or cluster.hostfile is not None:
        wanted = kind if kind != "auto" else "--hostfile"
        raise UserError(
            f"{wanted}: this version of ftlaunch runs jobs on this machine only. Leave out "
            "--hostfile and use --cluster local; --nodes N then plays N nodes as processes here."
        )
    nodes = cluster.nodes
    why = "one node" if nodes == 1 else f"{nodes} nodes, played by processes of this machine"
    reasons.append(Reason(choice="cluster", value="local", why=why))
    return "local"


def _devices(
    cluster: ClusterOptions, machines: Sequence[Machine], accelerator: str, reasons: list[Reason]
) -> int:
    """Ranks on each node."""
    if accelerator == "cpu":
        devices = cluster.devices or 1
        ranks, cores = cluster.nodes * devices, machines[0].cpu_cores
        why = "one rank a node on CPUs" if cluster.devices is None else "as asked for"
        if ranks > cores:
            why += f"; {ranks} ranks share {cores} cores"
        reasons.append(Reason(choice="devices", value=str(devices), why=why))
        return devices
    # Nodes that are played on one machine share its accelerators: NCCL takes one rank for each.
    available = machines[0].num_devices
    share = available // cluster.nodes
    name = machines[0].device_name
    if share == 0:
        raise UserError(
            f"{cluster.nodes} nodes on this machine would share {available} × {name}: every rank "
            f"needs one of its own. Use --nodes {available} or fewer, or set "
            f"{_HIDING[accelerator]}= to run on the CPU."
        )
    if cluster.devices is not None and cluster.devices > share:
        raise UserError(
            f"--devices {cluster.devices} on each of {cluster.nodes} nodes needs "
            f"{cluster.devices * cluster.nodes} accelerators; this machine has {available} × {name}. "
            f"Use --devices {share} or fewer."
        )
    devices = cluster.devices or share
    why = (
        "as asked for" if cluster.devices else f"{available} × {name} among {cluster.nodes} node(s)"
    )
    reasons.append(Reason(choice="devices", value=str(devices), why=why))
    return devices


def _threads(machine: Machine, world_size: int, reasons: list[Reason]) -> int:
    threads = max(1, machine.cpu_cores // world_size)
    why = f"{machine.cpu_cores} cores among {world_size} rank(s) on this machine"
    reasons.append(Reason(choice="threads", value=str(threads), why=why))
    return threads
