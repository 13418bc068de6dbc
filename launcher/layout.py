"""Where the ranks of a job are: nodes, devices, threads, and how they are started. Pure.

Shared by the plan of a training job and that of a user's own script.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.events import StartMethod
from ftlaunch.cluster.hosts import Host
from ftlaunch.cluster.machine import Machine
from ftlaunch.launcher.config import ClusterOptions
from ftlaunch.launcher.npus import npu_places, rank_table_path, refuse_busy
from ftlaunch.launcher.site import Site

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
    """One node's part. `assumed`: nobody asked that host; it is taken to be like this one, or, if it is
    the first, like what was named.

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
    """The ranks of a job."""

    accelerator: str
    threads_per_rank: int
    start_method: StartMethod
    hosts: tuple[HostPlan, ...]

    @property
    def world_size(self) -> int:
        return sum(host.num_devices for host in self.hosts)


def make_layout(
    cluster: ClusterOptions,
    machines: Sequence[Machine],
    site: Site,
    reasons: list[Reason],
    *,
    assumed: bool = False,
    default_start: StartMethod,
) -> Layout:
    """Decide where the ranks are, and add the reasons. UserError when they do not fit.

    machines   one for each host of the site
    """
    accelerator = _one_accelerator(site, machines)
    if accelerator == "ascend":
        # Forking after CANN has been loaded was never tried on hardware.
        default_start = "exec"
    reasons.append(Reason(choice="cluster", value=site.kind, why=site.why))
    devices = _devices(cluster, machines, site, accelerator, reasons)
    threads = _threads(machines, devices, site, reasons)
    together = site.is_one_machine
    shared = together and accelerator == "cuda" and len(machines) > 1
    npus = npu_places(cluster, machines, devices, accelerator, is_one_machine=together)
    refuse_busy(cluster, machines, npus)
    if path := rank_table_path(cluster):
        reasons.append(
            Reason(choice="rank table", value=f"{sum(devices)} ranks", why=f"as in {path}")
        )
    return Layout(
        accelerator=accelerator,
        threads_per_rank=threads,
        start_method=_start_method(cluster, default_start, reasons),
        hosts=tuple(
            HostPlan(
                name=host.name,
                accelerator=machine.accelerator,
                device_name=machine.device_name,
                num_devices=count,
                assumed=site.kind == "assumed" or (assumed and number > 0),
                devices=(
                    machine.device_ids[number * count : (number + 1) * count] if shared else None
                ),
                npus=npus[number],
            )
            for number, (host, machine, count) in enumerate(
                zip(site.hosts, machines, devices, strict=True)
            )
        ),
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lines of aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = ["  ".join([*map(str.ljust, row[:-1], widths), row[-1]]) for row in rows]
    return "\n".join(f"  {line}" for line in lines)


def describe(hosts: Sequence[HostPlan], reasons: Sequence[Reason]) -> list[str]:
    """A plan as lines for the terminal."""
    if hosts[0].assumed:
        kinds = Counter((host.num_devices, host.device_name) for host in hosts)
        lines = [
            f"{number} node(s) of {devices} × {name}  (assumed)"
            for (devices, name), number in kinds.items()
        ]
    else:
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


def _one_accelerator(site: Site, machines: Sequence[Machine]) -> str:
    kinds = {machine.accelerator for machine in machines}
    if len(kinds) > 1:
        raise UserError(mixed_accelerators(site, machines))
    return kinds.pop()


def mixed_accelerators(site: Site, machines: Sequence[Machine]) -> str:
    """What to say of nodes that have different kinds."""
    rows = [("node", "host", "accelerator", "devices")]
    for host, machine in zip(site.hosts, machines, strict=True):
        has = f"{machine.num_devices} × {machine.device_name}"
        rows.append((host.name, machine.hostname, machine.accelerator, has))
    hint = ""
    if any(machine.accelerator == "cpu" for machine in machines):
        hint = (
            " Hosts that are listed with cpu show no device: look at the driver there, and at "
            "CUDA_VISIBLE_DEVICES and ASCEND_RT_VISIBLE_DEVICES."
        )
    return (
        f"the nodes have different accelerators:\n{table(rows)}\nOne job runs on one kind: choose "
        f"hosts that are alike.{hint}"
    )


def too_few_devices(cluster: ClusterOptions, host: Host, machine: Machine) -> str:
    """What to say of a node of which more ranks are asked than it has devices."""
    available = machine.num_devices
    asked = f"--devices {cluster.devices}" if cluster.devices else f"slots={host.slots}"
    return (
        f"{asked} on {host.name}, which has {available} × {machine.device_name}: every rank "
        f"needs one of its own. Use {available} or fewer."
    )


def _devices(
    cluster: ClusterOptions,
    machines: Sequence[Machine],
    site: Site,
    accelerator: str,
    reasons: list[Reason],
) -> list[int]:
    """Ranks on each node."""
    if site.is_one_machine and accelerator != "cpu":
        return [_shared_devices(cluster, machines, accelerator, reasons)] * len(machines)
    counts = []
    for host, machine in zip(site.hosts, machines, strict=True):
        wanted = cluster.devices or host.slots
        available = machine.num_devices
        if accelerator != "cpu" and wanted is not None and wanted > available:
            raise UserError(too_few_devices(cluster, host, machine))
        counts.append(wanted or (available if accelerator != "cpu" else 1))
    if cluster.devices is not None:
        why = "as asked for"
    elif any(host.slots for host in site.hosts):
        why = "as many as each host has slots"
    elif accelerator == "cpu":
        why = "one rank a node on CPUs"
    elif site.kind == "assumed":
        why = "as many as such machines mostly have"
    else:
        why = "every one that a node has"
    cores = machines[0].cpu_cores
    ranks = sum(counts) if site.is_one_machine else max(counts)
    if accelerator == "cpu" and ranks > cores:
        why += f"; {ranks} ranks share {cores} cores"
    value = str(counts[0]) if len(set(counts)) == 1 else ", ".join(map(str, counts))
    reasons.append(Reason(choice="devices", value=value, why=why))
    return counts


def _shared_devices(
    cluster: ClusterOptions, machines: Sequence[Machine], accelerator: str, reasons: list[Reason]
) -> int:
    """Nodes that are played on one machine share its accelerators: one rank for each."""
    nodes = len(machines)
    available = machines[0].num_devices
    share = available // nodes
    name = machines[0].device_name
    if share == 0:
        raise UserError(
            f"{nodes} nodes on this machine would share {available} × {name}: every rank "
            f"needs one of its own. Use --nodes {available} or fewer, or set "
            f"{_HIDING[accelerator]}= to run on the CPU."
        )
    if cluster.devices is not None and cluster.devices > share:
        raise UserError(
            f"--devices {cluster.devices} on each of {nodes} nodes needs "
            f"{cluster.devices * nodes} accelerators; this machine has {available} × {name}. "
            f"Use --devices {share} or fewer."
        )
    devices = cluster.devices or share
    why = "as asked for" if cluster.devices else f"{available} × {name} among {nodes} node(s)"
    reasons.append(Reason(choice="devices", value=str(devices), why=why))
    return devices


def _threads(
    machines: Sequence[Machine], devices: Sequence[int], site: Site, reasons: list[Reason]
) -> int:
    if site.is_one_machine:
        cores, ranks, where = machines[0].cpu_cores, sum(devices), "on this machine"
        threads = cores // ranks
    else:
        # The node with the fewest cores a rank: the others would wait for it.
        threads, cores, ranks = min(
            (machine.cpu_cores // count, machine.cpu_cores, count)
            for machine, count in zip(machines, devices, strict=True)
        )
        where = "on a node"
    threads = max(1, threads)
    if site.kind != "assumed":
        why = f"{cores} cores among {ranks} rank(s) {where}"
        reasons.append(Reason(choice="threads", value=str(threads), why=why))
    return threads
