"""Whether the nodes of a job fit together, from what their agents have said. Pure.

Every job on more than one machine is checked so before its ranks start; `ftlaunch doctor` shows all
of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.gathering import Inspection
from ftlaunch.cluster.machine import Machine, check_framework
from ftlaunch.launcher.config import ClusterOptions
from ftlaunch.launcher.layout import mixed_accelerators, table, too_few_devices
from ftlaunch.launcher.site import Site
from ftlaunch.strategies.registry import STRATEGIES

# Ranks that differ in one of these compute something else, or do not understand each other.
_MUST_AGREE = ("torch", "torch_cuda", "mindspore", "deepspeed", "transformers", "mindone")
_SHOULD_AGREE = ("driver", "cann", "datasets")
_NONE = "none"
_MAX_SECONDS_APART = 2.0
_LITTLE_BYTES = 1 << 30
# By CUDA's major version, of which any minor one runs then:
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
_LEAST_DRIVER = {"11": 450, "12": 525, "13": 580}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that is not as it should be; `fatal`: a job would fail, or come out wrong."""

    fatal: bool
    text: str


def refuse(findings: Sequence[Finding]) -> list[str]:
    """UserError with all that is fatal; else the rest, as notes."""
    fatal = [finding.text for finding in findings if finding.fatal]
    if fatal:
        raise UserError("\n".join(fatal))
    return [finding.text for finding in findings]


def compare_machines(site: Site, machines: Sequence[Machine]) -> list[Finding]:
    """What differs between the nodes. That one lacks what the job does not need is no difference."""
    findings = []
    pythons = [".".join(machine.versions.get("python", "?").split(".")[:2]) for machine in machines]
    for name, values, fatal in [
        ("python", pythons, True),
        ("ftlaunch (its code)", [machine.code_fingerprint for machine in machines], True),
        *((n, [m.versions.get(n, _NONE) for m in machines], True) for n in _MUST_AGREE),
        *((n, [m.versions.get(n, _NONE) for m in machines], False) for n in _SHOULD_AGREE),
    ]:
        if len({*values} - {_NONE}) > 1:
            rows = [(host.name, value) for host, value in zip(site.hosts, values, strict=True)]
            remedy = (
                "Ranks that differ in it compute something else, or do not understand each other. "
                "Install the same on all of them, best in a folder that they share."
                if fatal
                else "Nothing forbids that, and nobody has tried it either: make them the same if "
                "something odd happens."
            )
            findings.append(
                Finding(
                    fatal=fatal,
                    text=f"the nodes have different versions of {name}:\n{table(rows)}\n{remedy}",
                )
            )
    return findings


def judge_machines(
    site: Site, machines: Sequence[Machine], cluster: ClusterOptions, strategy: str
) -> list[Finding]:
    """Where ranks cannot be: devices of different kinds, too few of them, nothing to use them with.

    strategy   a name, or "auto"
    """
    findings = []
    if len({machine.accelerator for machine in machines}) > 1:
        findings.append(Finding(fatal=True, text=mixed_accelerators(site, machines)))
    for host, machine in zip(site.hosts, machines, strict=True):
        try:
            check_framework(machine)
        except UserError as error:
            findings.append(Finding(fatal=True, text=f"{host.name}: {error}"))
        wanted = cluster.devices or host.slots
        if wanted is not None and machine.accelerator != "cpu" and wanted > machine.num_devices:
            findings.append(Finding(fatal=True, text=too_few_devices(cluster, host, machine)))
        if too_old := _old_driver(machine):
            findings.append(Finding(fatal=False, text=f"{host.name}: {too_old}"))
    return findings + _lacking(site, machines, strategy)


def _lacking(site: Site, machines: Sequence[Machine], strategy: str) -> list[Finding]:
    """The packages of the strategy, or of the one that most of the nodes could run."""
    named = STRATEGIES.get(strategy)
    kinds = {machine.accelerator for machine in machines}
    fitting = [
        each
        for each in ([named] if named else STRATEGIES.values())
        if kinds & {*each.accelerators} and (named or each.zero_stage is None)
    ]
    if not fitting:
        return []
    chosen = max(fitting, key=lambda each: sum(each.package in m.versions for m in machines))
    findings = []
    for package in (chosen.package, *chosen.also):
        without = [
            host.name
            for host, machine in zip(site.hosts, machines, strict=True)
            if package not in machine.versions
        ]
        if without:
            text = (
                f"{package} is not installed for the Python on {', '.join(without)}: every node "
                f"needs it. Install a build that fits the machine there (pip install {package}), "
                "or name an interpreter that has it with cluster.python."
            )
            findings.append(Finding(fatal=True, text=text))
    return findings


def _old_driver(machine: Machine) -> str:
    """Empty where the driver runs the CUDA of torch, as far as the numbers tell."""
    cuda = machine.versions.get("torch_cuda", "").partition(".")[0]
    driver = machine.versions.get("driver", "").partition(".")[0]
    least = _LEAST_DRIVER.get(cuda)
    if machine.accelerator != "cuda" or least is None or not driver.isdecimal():
        return ""
    if int(driver) >= least:
        return ""
    return (
        f"the driver {machine.versions['driver']} is older than CUDA {cuda}, with which its torch was "
        f"built, asks for ({least} or newer). Update the driver, or install a torch that was built "
        "with an older CUDA, unless NVIDIA's compatibility package is installed."
    )


def judge_inspections(site: Site, folder: str, inspections: Sequence[Inspection]) -> list[Finding]:
    """What is missing on a node, and whether all of them and we share the output folder."""
    findings = []
    for host, each in zip(site.hosts, inspections, strict=True):
        found = each.found
        if found.free_bytes is None or not found.sees_token:
            findings.append(_unshared(host.name, folder, "does not see what this machine wrote"))
        elif found.unwritable:
            text = (
                f"{host.name} cannot write to the output folder {folder}: {found.unwritable}. Every "
                "rank writes its log and its part of a checkpoint there: correct its permissions, or "
                "choose another with --output-dir."
            )
            findings.append(Finding(fatal=True, text=text))
        elif not each.is_seen:
            findings.append(_unshared(host.name, folder, "writes what this machine does not see"))
        elif found.free_bytes < _LITTLE_BYTES:
            text = (
                f"{host.name}: {found.free_bytes / 1e6:,.0f} MB are free in {folder}. A checkpoint of "
                "training takes 12 bytes for each of the model's parameters: make room there."
            )
            findings.append(Finding(fatal=False, text=text))
        for path, why in found.missing.items():
            text = (
                f"{path} cannot be read on {host.name}: {why}. Every node needs it under the same "
                "path: put it into a folder that they share."
            )
            findings.append(Finding(fatal=True, text=text))
        if abs(each.seconds_ahead) > _MAX_SECONDS_APART:
            text = (
                f"the clock of {host.name} is {each.seconds_ahead:+.0f} s off this machine's: times "
                "in logs will not agree. Have both set their clocks by NTP."
            )
            findings.append(Finding(fatal=False, text=text))
    return findings


def _unshared(host: str, folder: str, what: str) -> Finding:
    text = (
        f"the output folder {folder} is not shared: {host} {what} there. Checkpoints are written by "
        "all nodes into one folder: choose one on a file system that they share, with --output-dir."
    )
    return Finding(fatal=True, text=text)
