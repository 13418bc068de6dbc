"""Where a job runs: on this machine, on hosts over ssh, or in a SLURM allocation. Starts nothing."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.hosts import Host, allocated_hosts, parse_hosts, read_hostfile
from ftlaunch.cluster.slurm import srun_way
from ftlaunch.cluster.ssh import exported, ssh_way
from ftlaunch.cluster.transport import Kind, Orders, Way
from ftlaunch.launcher.config import ClusterOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """The nodes of a job, in the order of their ranks. `why` in words for the plan.

    kind   "assumed": there need not be such nodes, and no job can run on them
    """

    kind: Kind | Literal["assumed"]
    hosts: tuple[Host, ...]
    why: str

    @property
    def is_one_machine(self) -> bool:
        """The nodes are played by processes of this machine."""
        return self.kind == "local"

    def only(self, numbers: Sequence[int]) -> Site:
        """What is left of it when some nodes are lost."""
        hosts = tuple(self.hosts[number] for number in numbers)
        lost = len(self.hosts) - len(hosts)
        why = f"{self.why}; {lost} of them lost" if lost else self.why
        return Site(kind=self.kind, hosts=hosts, why=why)


def find_site(cluster: ClusterOptions, environ: Mapping[str, str]) -> Site:
    """UserError when what was asked for and what is there do not fit."""
    kind = cluster.kind
    named = cluster.hostfile is not None or cluster.hosts is not None
    if named and kind in ("local", "slurm"):
        raise UserError(
            f"--cluster {kind} and a list of hosts contradict each other: hosts are reached over "
            "ssh. Leave out one of the two."
        )
    if kind == "ssh" or named:
        hosts = _named_hosts(cluster)
        source = f"of {cluster.hostfile}" if cluster.hostfile is not None else "of cluster.hosts"
        return _site("ssh", cluster.nodes, hosts, source, "over ssh")
    allocated = allocated_hosts(environ) if kind != "local" else None
    if kind == "slurm" and allocated is None:
        raise UserError(
            "--cluster slurm: this shell is not inside an allocation (SLURM_JOB_NODELIST is not "
            "set). Ask for one with salloc and run the command in it, submit the job with ftlaunch "
            "submit, or run on this machine with --cluster local."
        )
    if allocated is not None:
        job = environ.get("SLURM_JOB_ID", "?")
        return _site("slurm", cluster.nodes, allocated, f"of SLURM's job {job}", "by srun")
    nodes = cluster.nodes or 1
    why = "one node" if nodes == 1 else f"{nodes} nodes, played by processes of this machine"
    names = [Host(name=f"node{number}", slots=None) for number in range(nodes)]
    return Site(kind="local", hosts=tuple(names), why=why)


def _named_hosts(cluster: ClusterOptions) -> tuple[Host, ...]:
    if cluster.hostfile is not None and cluster.hosts is not None:
        raise UserError(
            "both --hostfile and cluster.hosts name hosts. They might not agree: leave out one."
        )
    if cluster.hostfile is not None:
        return read_hostfile(Path(cluster.hostfile))
    if cluster.hosts is not None:
        return parse_hosts(cluster.hosts)
    raise UserError(
        "--cluster ssh: no hosts are named. Give --hostfile FILE (a line for each, `host slots=8`) "
        "or cluster.hosts=n[1-4]."
    )


def _site(kind: Kind, nodes: int | None, hosts: tuple[Host, ...], source: str, how: str) -> Site:
    if nodes is not None and nodes > len(hosts):
        raise UserError(
            f"--nodes {nodes}, but there are {len(hosts)} hosts {source}. Use --nodes {len(hosts)} "
            "or fewer, or leave it out to use all."
        )
    used = hosts[:nodes]
    what = (
        f"all {len(hosts)} hosts" if len(used) == len(hosts) else f"{nodes} of {len(hosts)} hosts"
    )
    return Site(kind=kind, hosts=used, why=f"{what} {source}, {how}")


def ways_to(site: Site, environ: Mapping[str, str]) -> list[Way]:
    """How each node is reached. UserError where the program for it is missing."""
    if site.kind == "ssh":
        return [ssh_way(host.name) for host in site.hosts]
    if site.kind == "slurm":
        return [srun_way(host.name, environ) for host in site.hosts]
    return [Way(name=host.name) for host in site.hosts]


def orders_for(site: Site, cluster: ClusterOptions, environ: Mapping[str, str]) -> Orders:
    """What the agents are started with."""
    # SLURM hands the environment on by itself, as its user has configured it.
    env = exported(environ, cluster.export) if site.kind == "ssh" else {}
    return Orders(
        heartbeat_seconds=cluster.heartbeat_timeout_seconds,
        python=cluster.python or sys.executable,
        env=env,
        prologue=cluster.prologue or "",
    )
