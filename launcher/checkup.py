"""What `ftlaunch doctor` has found: as a table, as JSON, and what follows from it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ftlaunch.cluster.gathering import Inspection, Network
from ftlaunch.cluster.machine import Machine
from ftlaunch.cluster.mesh import Unreached
from ftlaunch.launcher.checks import Finding
from ftlaunch.launcher.layout import table
from ftlaunch.launcher.wording import one_line

_NOTHING = "-"
# The columns, and where a machine has what they show, if it is a version; "": always shown.
_COLUMNS = {
    "node": "",
    "host": "",
    "devices": "",
    "memory": "",
    "driver": "driver",
    "CUDA": "torch_cuda",
    "CANN": "cann",
    "python": "python",
    "torch": "torch",
    "mindspore": "mindspore",
    "deepspeed": "deepspeed",
    "ftlaunch": "",
    "free": "",
    "folder": "",
    "clock": "",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """One node.

    reason       why it cannot be used; empty: its agent was there
    inspection   None where it was not asked, or did not answer
    """

    name: str
    machine: Machine | None
    reason: str = ""
    inspection: Inspection | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """An all-reduce of so many bytes: median of its seconds, on the slowest rank."""

    num_bytes: int
    seconds: float
    bus_bytes_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchanged:
    """The all-reduce over all ranks; `skipped`: why there was none."""

    backend: str
    num_nodes: int
    world_size: int
    speeds: tuple[Speed, ...]
    skipped: str
    works: bool

    @classmethod
    def none(cls, why: str) -> Exchanged:
        return cls(backend="", num_nodes=0, world_size=0, speeds=(), skipped=why, works=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkup:
    """All of it.

    folder    where it was looked whether the nodes share it: the output folder, or what is there of
              its path
    seconds   that the parts took
    """

    why_site: str
    folder: str
    nodes: tuple[NodeReport, ...]
    network: Network | None
    unreached: tuple[Unreached, ...]
    exchanged: Exchanged
    findings: tuple[Finding, ...]
    seconds: dict[str, float]

    @property
    def would_run(self) -> bool:
        return not any(finding.fatal for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        exchanged = self.exchanged
        return {
            "would_run": self.would_run,
            "site": self.why_site,
            "output_folder": self.folder,
            "nodes": [_node_json(node) for node in self.nodes],
            "network": None if self.network is None else asdict(self.network),
            "unreached": [asdict(each) for each in self.unreached],
            "all_reduce": {
                "works": exchanged.works,
                "skipped": exchanged.skipped,
                "backend": exchanged.backend,
                "num_nodes": exchanged.num_nodes,
                "world_size": exchanged.world_size,
                "sizes": [
                    {
                        "num_bytes": speed.num_bytes,
                        "latency_us": speed.seconds * 1e6,
                        "bus_bandwidth_gb_per_s": speed.bus_bytes_per_second / 1e9,
                    }
                    for speed in exchanged.speeds
                ],
            },
            "findings": [asdict(finding) for finding in self.findings],
            "seconds": self.seconds,
        }

    def lines(self) -> list[str]:
        """For the terminal: nodes, network, speed, findings, and the verdict as the last line."""
        return [
            self.why_site,
            "",
            *_node_lines(self.nodes),
            "",
            f"folder      {self.folder}",
            *_network_lines(self.network, self.unreached),
            *_speed_lines(self.exchanged),
            *_finding_lines(self.findings),
            "",
            self.verdict(),
        ]

    def verdict(self) -> str:
        fatal = sum(finding.fatal for finding in self.findings)
        if not fatal:
            return "a job would run here"
        return (
            f"a job would fail here: {fatal} problem{'s' if fatal > 1 else ''} to mend, see above"
        )


def _node_json(node: NodeReport) -> dict[str, Any]:
    each = node.inspection
    return {
        "name": node.name,
        "reached": node.machine is not None,
        "reason": node.reason,
        "machine": None if node.machine is None else node.machine.to_dict(),
        "shares_folder": None if each is None else _shares(each),
        "unwritable": None if each is None else each.found.unwritable,
        "free_bytes": None if each is None else each.found.free_bytes,
        "missing": None if each is None else dict(each.found.missing),
        "clock_seconds_ahead": None if each is None else each.seconds_ahead,
    }


def _shares(inspection: Inspection) -> bool:
    return inspection.found.sees_token and inspection.is_seen


# -- the table ----------------------------------------------------------------------------------


def _node_lines(nodes: Sequence[NodeReport]) -> list[str]:
    """A row for each node; of one that cannot be used the row says why."""
    rows = [_row(node.name, node.machine, node) for node in nodes if node.machine is not None]
    shown = [
        name
        for name, version in _COLUMNS.items()
        if not version or any(row[name] != _NOTHING for row in rows)
    ]
    width = max(len("node"), *(len(node.name) for node in nodes))
    header = ["node".ljust(width), *shown[1:]]
    lines = table([header, *([row[name] for name in shown] for row in rows)]).splitlines()
    rest = iter(lines[1:])
    return [
        lines[0],
        *(
            next(rest)
            if node.machine is not None
            else f"  {node.name:<{width}}  cannot be used: {one_line(node.reason)}"
            for node in nodes
        ),
    ]


def _row(name: str, machine: Machine, node: NodeReport) -> dict[str, str]:
    memory = f"{machine.device_memory_bytes / 2**30:.0f} GiB"
    version = one_line(machine.versions.get("ftlaunch", "?"))
    each = node.inspection
    free = None if each is None else each.found.free_bytes
    return {
        "node": name,
        "host": one_line(machine.hostname),
        "devices": f"{machine.num_devices} × {one_line(machine.device_name)}",
        "memory": memory if machine.device_memory_bytes else _NOTHING,
        **{
            column: one_line(machine.versions.get(key, _NOTHING))
            for column, key in _COLUMNS.items()
            if key
        },
        "ftlaunch": f"{version} ({machine.code_fingerprint})",
        "free": _NOTHING if free is None else f"{free / 1e9:,.1f} GB",
        "folder": _NOTHING if each is None else _folder_in_words(each),
        "clock": _NOTHING if each is None else f"{each.seconds_ahead:+.1f} s",
    }


def _folder_in_words(each: Inspection) -> str:
    if each.found.unwritable:
        return "not writable"
    return "shared" if _shares(each) else "not shared"


def _network_lines(network: Network | None, unreached: Sequence[Unreached]) -> list[str]:
    lines = []
    if network is not None and network.interfaces[0] == "lo":
        lines.append("network     all nodes are on one machine and meet on its loopback")
    elif network is not None:
        names = ", ".join(dict.fromkeys(name or "?" for name in network.interfaces))
        lines.append(f"network     ranks meet at {network.address}, through {names}")
    if unreached:
        rows = [("node", "does not reach", "under", "why")]
        rows += [
            (each.node, each.other, " ".join(each.addresses) or _NOTHING, one_line(each.why))
            for each in unreached[:24]
        ]
        lines += ["", *table(rows).splitlines()]
        if len(unreached) > 24:
            lines.append(f"  and {len(unreached) - 24} more")
        lines.append("")
    return lines


def _speed_lines(exchanged: Exchanged) -> list[str]:
    if exchanged.skipped:
        return [f"all-reduce  skipped: {exchanged.skipped}"]
    what = f"{exchanged.backend}, {exchanged.world_size} ranks on {exchanged.num_nodes} nodes"
    lines = [f"all-reduce  {what}: {'the sums are right' if exchanged.works else 'failed'}"]
    if exchanged.speeds:
        rows = [("size", "time", "bus bandwidth")]
        rows += [
            (
                _size(speed.num_bytes),
                f"{speed.seconds * 1e6:,.0f} µs",
                f"{speed.bus_bytes_per_second / 1e9:.3g} GB/s",
            )
            for speed in exchanged.speeds
        ]
        lines += [f"          {line}" for line in table(rows).splitlines()]
    return lines


def _size(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MiB" if num_bytes >= 1 << 20 else f"{num_bytes >> 10} KiB"


def _finding_lines(findings: Sequence[Finding]) -> list[str]:
    """What is wrong first; a finding's further lines are indented."""
    lines = []
    for finding in sorted(findings, key=lambda each: not each.fatal):
        first, *rest = finding.text.splitlines()
        lines += ["", f"{'problem' if finding.fatal else 'note'}: {first}"]
        lines += [f"    {line}" for line in rest]
    return lines
