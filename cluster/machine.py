"""What one host has to train with. Imports no framework, chooses nothing, asks no driver itself.

Whatever a program, a file or another host says is taken as a claim: what cannot be read becomes a
note for the user, never an exception.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ftlaunch.cluster.ascend import cann_version, find_npus
from ftlaunch.cluster.control_groups import control_groups, memory_limit, read_text
from ftlaunch.cluster.device import Device
from ftlaunch.cluster.errors import UserError

Accelerator = Literal["cuda", "ascend", "cpu"]

_DISTRIBUTIONS = (
    "ftlaunch",
    "torch",
    "deepspeed",
    "transformers",
    "datasets",
    "mindspore",
    "mindone",
    "peft",
)
_PACKAGES = ("cluster", "launcher", "strategies")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One host as one process sees it. Where devices differ, the smallest memory counts."""

    hostname: str
    accelerator: Accelerator
    # As the vendor writes it: "NVIDIA H100 80GB HBM3", "Ascend 910B3", the model of the CPU.
    device_name: str
    # 1 for cpu.
    num_devices: int
    # Of one device; 0 where the driver does not tell; for cpu that of the host.
    device_memory_bytes: int
    # bf16 in hardware, not emulated.
    fast_bf16: bool
    cpu_cores: int
    memory_bytes: int
    # What is installed: python, ftlaunch, torch, torch_cuda and mindspore_ascend (absent in a CPU
    # build), driver, cann, ...
    versions: Mapping[str, str]
    # Differs as soon as two hosts run different code of ours.
    code_fingerprint: str
    # Sentences for the user.
    notes: tuple[str, ...]
    # The names under which the driver knows the devices, in their order; none for cpu.
    device_ids: tuple[str, ...] = ()
    # Why GPUs that are there cannot be used; empty when they can or there are none.
    unusable: str = ""
    # Physical numbers of the devices, in their order; none where the vendor has no such.
    device_numbers: tuple[int, ...] = ()
    # By the names in device_ids: whose processes use a device already.
    busy: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        return {
            **dataclasses.asdict(self),
            "notes": list(self.notes),
            "device_ids": list(self.device_ids),
            "device_numbers": list(self.device_numbers),
        }

    @classmethod
    def from_dict(cls, data: object) -> Machine:
        """ValueError when a field is missing or of the wrong type.

        Unknown fields are ignored: a host with newer code is better told by its fingerprint.
        """
        if not isinstance(data, dict):
            raise ValueError(f"a machine is an object, not {type(data).__name__}")
        values: dict[str, Any] = {}
        for each in dataclasses.fields(cls):
            if each.name not in data:
                raise ValueError(f"machine without {each.name}")
            value = data[each.name]
            if not _FIELD_CHECKS[str(each.type)](value):
                raise ValueError(f"machine with {each.name} of {value!r:.80}: not {each.type}")
            values[each.name] = dict(value) if isinstance(value, dict) else value
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**fields)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_text_map(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(x, str) for kv in value.items() for x in kv)


# By annotation, so that a new field of a known type needs nothing here.
_FIELD_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "int": _is_count,
    "bool": lambda value: isinstance(value, bool),
    "Accelerator": lambda value: isinstance(value, str) and value in get_args(Accelerator),
    "Mapping[str, str]": _is_text_map,
    "tuple[str, ...]": lambda value: (
        isinstance(value, (list, tuple)) and all(isinstance(line, str) for line in value)
    ),
    "tuple[int, ...]": lambda value: (
        isinstance(value, (list, tuple)) and all(_is_count(number) for number in value)
    ),
}


def detect_machine(environ: Mapping[str, str], root: Path = Path("/")) -> Machine:
    """What this host has, as far as `environ` lets this process see it.

    `root` is where /dev, /proc, /sys and /usr/local are looked up.
    """
    # It loads pynvml, which a process that only handles the record does not need.
    from ftlaunch.cluster.nvidia import find_gpus, wants_gpus

    notes: list[str] = []
    versions = _find_versions()
    memory_bytes = memory_limit(root)
    gpus, nvidia_driver = find_gpus(environ, memory_bytes, notes)
    npus, ascend_driver = find_npus(environ, root, notes)
    if cann := cann_version(environ, root):
        versions["cann"] = cann

    accelerator: Accelerator
    if gpus:
        accelerator, devices, driver = "cuda", gpus, nvidia_driver
        if npus:
            notes.append(
                f"{len(npus)} x {npus[0].name} are left idle: this host has NVIDIA GPUs too, and "
                "these are preferred. Set CUDA_VISIBLE_DEVICES= to use the NPUs."
            )
    elif npus:
        accelerator, devices, driver = "ascend", npus, ascend_driver
        if cann and not environ.get("ASCEND_HOME_PATH"):
            notes.append(
                f"CANN {cann} is installed, but ASCEND_HOME_PATH is not set: MindSpore finds its "
                "libraries only where CANN's set_env.sh was sourced."
            )
    else:
        accelerator, devices, driver = "cpu", [_find_cpu(root, memory_bytes)], None
    unusable = ""
    if not gpus and wants_gpus(environ) and any((root / "dev").glob("nvidia[0-9]*")):
        unusable = "it has NVIDIA GPUs (/dev/nvidia0, ...), but the driver shows none of them"
    if driver:
        versions["driver"] = driver
    if len(names := {device.name for device in devices}) > 1:
        notes.append(f"The devices differ: {', '.join(sorted(names))}.")

    return Machine(
        hostname=platform.node(),
        accelerator=accelerator,
        device_name=devices[0].name,
        num_devices=len(devices),
        device_memory_bytes=min(device.memory_bytes for device in devices),
        fast_bf16=all(device.fast_bf16 for device in devices),
        cpu_cores=_cpu_cores(root),
        memory_bytes=memory_bytes,
        versions=versions,
        code_fingerprint=code_fingerprint(),
        notes=tuple(notes),
        device_ids=tuple(device.identifier for device in devices if device.identifier),
        unusable=unusable,
        device_numbers=tuple(device.number for device in devices if device.number is not None),
        busy={device.identifier: device.occupant for device in devices if device.occupant},
    )


def check_framework(machine: Machine) -> None:
    """UserError when the installed framework cannot use the accelerator of `machine`."""
    versions = machine.versions
    if machine.unusable:
        said = f" ({' '.join(machine.notes)})" if machine.notes else ""
        raise UserError(
            f"{machine.hostname} cannot use its accelerators: {machine.unusable}{said}. Training "
            "would run on the CPU without a word. Repair the driver (does nvidia-smi work?), or "
            "set CUDA_VISIBLE_DEVICES= to train on the CPU on purpose."
        )
    devices = f"{machine.hostname} has {machine.num_devices} x {machine.device_name}"
    if machine.accelerator == "cuda" and "torch_cuda" not in versions:
        torch = (
            f"the installed torch {versions['torch']} is a CPU build"
            if "torch" in versions
            else "torch is not installed"
        )
        raise UserError(
            f"{devices} but {torch}. Training would run on the CPU without a word. "
            "Install a CUDA build (pip install 'ftlaunch[cuda]'), or set CUDA_VISIBLE_DEVICES= "
            "to train on the CPU on purpose."
        )
    if machine.accelerator == "ascend" and (missing := _missing_for_ascend(versions)):
        raise UserError(
            f"{devices} but {missing}, or set ASCEND_RT_VISIBLE_DEVICES= to train on the CPU on "
            "purpose."
        )


def _missing_for_ascend(versions: Mapping[str, str]) -> str:
    """What keeps MindSpore from using the NPUs, the rule, and what to do; empty: nothing."""
    cann = versions.get("cann")
    if "mindspore" not in versions:
        return (
            "mindspore is not installed. Only MindSpore trains on Ascend NPUs. Install the "
            f"MindSpore release that fits the installed CANN ({cann or 'none found'})"
        )
    if "mindspore_ascend" not in versions:
        return (
            f"the installed mindspore {versions['mindspore']} is a CPU build: it has no "
            "lib/plugin/libmindspore_ascend.so. Training would run on the CPU without a word. "
            f"Install a build for Ascend that fits the installed CANN ({cann or 'none found'})"
        )
    if cann is None:
        return (
            "CANN was not found, neither in ASCEND_HOME_PATH nor in "
            "/usr/local/Ascend/ascend-toolkit/latest nor in /usr/local/Ascend/cann. MindSpore "
            "loads it to use the NPUs. Install the toolkit and the kernels that mindspore "
            f"{versions['mindspore']} asks for and source their set_env.sh, which sets "
            "ASCEND_HOME_PATH"
        )
    if "mindone" not in versions:
        return (
            "mindone is not installed. MindSpore's models come from it. Install it: pip install "
            "'ftlaunch[ascend]'"
        )
    return ""


def _find_cpu(root: Path, memory_bytes: int) -> Device:
    fields: dict[str, str] = {}
    for line in read_text(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = {*fields.get("flags", "").split(), *fields.get("Features", "").split()}
    return Device(
        identifier="",
        # Arm writes no model name.
        name=fields.get("model name") or f"{platform.machine()} CPU",
        memory_bytes=memory_bytes,
        fast_bf16=not flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"}),
    )


def _cpu_cores(root: Path) -> int:
    cores = float(len(os.sched_getaffinity(0)))
    for folder in control_groups(root, "cpu"):
        # v2 keeps quota and period in one file, v1 in two; "max" and -1 are no limit.
        words = read_text(folder / "cpu.max").split() or [
            read_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
        ]
        if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]) > 0:
            cores = min(cores, int(words[0]) / int(words[1]))
    return max(1, int(cores))


def _find_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        text = read_text(Path(spec.origin).with_name("version.py"))
        if found := re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE):
            versions["torch_cuda"] = found[1]
    spec = importlib.util.find_spec("mindspore")
    if spec is not None and spec.origin is not None:
        # A wheel for Linux holds a plugin for each kind of device; the number is the plugin's own.
        plugins = (Path(spec.origin).parent / "lib/plugin").glob("libmindspore_ascend.so*")
        for plugin in sorted(plugins):
            versions["mindspore_ascend"] = plugin.name.partition(".so.")[2] or "1"
    return versions


def code_fingerprint() -> str:
    """Of our own source, as this interpreter finds it."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        spec = importlib.util.find_spec(f"ftlaunch.{package}")
        assert spec is not None and spec.submodule_search_locations is not None, package
        folder = Path(next(iter(spec.submodule_search_locations)))
        for path in sorted(folder.rglob("*.py")):
            name = f"{package}/{path.relative_to(folder).as_posix()}"
            content = path.read_bytes()
            digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]
