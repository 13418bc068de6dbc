"""What one host has to train with. Imports no framework and chooses nothing.

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
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from ftlaunch.cluster.errors import UserError

Accelerator = Literal["cuda", "ascend", "cpu"]

_DISTRIBUTIONS = ("ftlaunch", "torch", "transformers", "datasets", "mindspore")
_PACKAGES = ("cluster", "launcher", "strategies")
_NPU_SMI_TIMEOUT_SECONDS = 10
_MIB = 1024 * 1024


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
    # What is installed: python, ftlaunch, torch, torch_cuda (absent in a CPU build), driver, ...
    versions: Mapping[str, str]
    # Differs as soon as two hosts run different code of ours.
    code_fingerprint: str
    # Sentences for the user.
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        return {**dataclasses.asdict(self), "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, data: object) -> Machine:
        """ValueError when a field is missing or of the wrong type.

        Unknown fields are ignored: a host with newer code is better told by its fingerprint.
        """
        if not isinstance(data, dict):
            raise ValueError(f"a machine is an object, not {type(data).__name__}")
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if field.name not in data:
                raise ValueError(f"machine without {field.name}")
            value = data[field.name]
            if not _FIELD_CHECKS[str(field.type)](value):
                raise ValueError(f"machine with {field.name} of {value!r:.80}: not {field.type}")
            values[field.name] = value
        return cls(**{**values, "versions": dict(values["versions"]), "notes": (*values["notes"],)})


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
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Device:
    # UUID of a GPU or of a slice of one, bus address of an NPU.
    identifier: str
    name: str
    memory_bytes: int
    fast_bf16: bool


def detect_machine(environ: Mapping[str, str], root: Path = Path("/")) -> Machine:
    """What this host has, as far as `environ` lets this process see it.

    `root` is where /dev, /proc, /sys and /usr/local are looked up.
    """
    notes: list[str] = []
    versions = _find_versions()
    memory_bytes = _memory_bytes(root)
    gpus, nvidia_driver = _find_gpus(environ, memory_bytes, notes)
    npus, ascend_driver = _find_npus(environ, root, notes)
    if cann := _cann_version(environ, root):
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
    else:
        accelerator, devices, driver = "cpu", [_find_cpu(root, memory_bytes)], None
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
        code_fingerprint=_code_fingerprint(),
        notes=tuple(notes),
    )


def check_framework(machine: Machine) -> None:
    """UserError when the installed framework cannot use the accelerator of `machine`."""
    versions = machine.versions
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
    if machine.accelerator == "ascend" and "mindspore" not in versions:
        raise UserError(
            f"{devices} but mindspore is not installed. Only MindSpore trains on Ascend NPUs. "
            "Install the MindSpore release that fits the installed CANN "
            f"({versions.get('cann', 'none found')}), or set ASCEND_RT_VISIBLE_DEVICES= to train "
            "on the CPU on purpose."
        )


def _find_gpus(
    environ: Mapping[str, str], host_memory_bytes: int, notes: list[str]
) -> tuple[list[_Device], str | None]:
    """The GPUs that CUDA would show to this process, and the version of the driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return [], None
    except pynvml.NVMLError as error:
        notes.append(f"The NVIDIA driver does not answer ({error}): its GPUs cannot be used.")
        return [], None

    def describe(handle: Any, gpu: Any) -> _Device:
        try:
            memory_bytes = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
        except pynvml.NVMLError_NotSupported:
            # Chips that share the memory of the host have none to report.
            memory_bytes = host_memory_bytes
        return _Device(
            identifier=pynvml.nvmlDeviceGetUUID(handle),
            name=pynvml.nvmlDeviceGetName(handle),
            memory_bytes=memory_bytes,
            fast_bf16=pynvml.nvmlDeviceGetCudaComputeCapability(gpu) >= (8, 0),
        )

    devices: list[_Device] = []
    by_name: dict[str, _Device] = {}
    driver: str | None = None
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        for index in range(pynvml.nvmlDeviceGetCount()):
            try:
                gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
                slices = _mig_handles(gpu)
                if slices == []:
                    notes.append(f"GPU {index} is in MIG mode but holds no MIG device.")
                    continue
                parts = [describe(handle, gpu) for handle in slices or (gpu,)]
                by_name.update({part.identifier: part for part in parts})
                # A GPU in MIG mode, when named as a whole, is its first slice to CUDA.
                by_name[pynvml.nvmlDeviceGetUUID(gpu)] = parts[0]
                devices.append(parts[0])
            except pynvml.NVMLError as error:
                notes.append(f"GPU {index} does not answer ({error}) and is left out.")
    except pynvml.NVMLError as error:
        notes.append(f"The NVIDIA driver does not answer ({error}): its GPUs cannot be used.")
    finally:
        pynvml.nvmlShutdown()
    visible = _visible(environ, "CUDA_VISIBLE_DEVICES", devices, by_name, "NVIDIA GPU", notes)
    return visible, driver


def _mig_handles(gpu: Any) -> list[Any] | None:
    """The slices of a GPU in MIG mode; None when it is not sliced."""
    import pynvml

    try:
        current, _ = pynvml.nvmlDeviceGetMigMode(gpu)
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_FunctionNotFound):
        return None
    if current != pynvml.NVML_DEVICE_MIG_ENABLE:
        return None
    handles = []
    for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(gpu)):
        try:
            handles.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, index))
        except pynvml.NVMLError_NotFound:
            continue
    return handles


def _visible(
    environ: Mapping[str, str],
    variable: str,
    devices: Sequence[_Device],
    by_name: Mapping[str, _Device],
    kind: str,
    notes: list[str],
) -> list[_Device]:
    """The devices that `variable` leaves, in its order, by the rules of the CUDA driver.

    Entries are indices or unambiguous beginnings of an identifier; the list ends at the first
    entry that is neither; an entry that occurs twice leaves no device at all.
    """
    value = environ.get(variable)
    if value is None or not devices:
        return list(devices)
    chosen: list[_Device] = []
    for entry in value.split(","):
        device = _look_up(entry.strip(), devices, by_name)
        if device is None:
            if entry.strip() not in ("", "-1"):
                notes.append(f"{variable}={value!r} ends at {entry.strip()!r}: no such {kind}.")
            break
        if device in chosen:
            notes.append(f"{variable}={value!r} names one {kind} twice, which hides all of them.")
            chosen = []
            break
        chosen.append(device)
    if (hidden := len(devices) - len(chosen)) > 0:
        are = f"{kind} is" if hidden == 1 else f"{kind}s are"
        notes.append(f"{hidden} {are} hidden by {variable}={value!r}.")
    return chosen


def _look_up(
    entry: str, devices: Sequence[_Device], by_name: Mapping[str, _Device]
) -> _Device | None:
    # The driver reads numbers like strtoul: "1x" is 1.
    if number := re.match(r"\+?(\d{1,6})", entry):
        index = int(number[1])
        return devices[index] if index < len(devices) else None
    if not entry.startswith(("GPU-", "MIG-")):
        return None
    matches = [device for name, device in by_name.items() if name.startswith(entry)]
    return matches[0] if len(matches) == 1 else None


def _find_npus(
    environ: Mapping[str, str], root: Path, notes: list[str]
) -> tuple[list[_Device], str | None]:
    """The Ascend NPUs that are visible to this process, and the version of the driver."""
    nodes = sorted(
        (path.name for path in (root / "dev").glob("davinci*")),
        key=lambda name: (len(name), name),
    )
    nodes = [name for name in nodes if re.fullmatch(r"davinci\d+", name)]
    output, complaint = _run_npu_smi(environ)
    devices = _parse_npu_smi(output, notes)
    if not devices and nodes:
        notes.append(
            f"{len(nodes)} NPUs were counted in /dev, since {complaint}: "
            "their model and memory are unknown."
        )
        devices = [
            _Device(identifier=name, name="Ascend NPU", memory_bytes=0, fast_bf16=False)
            for name in nodes
        ]
    driver = re.search(r"\bVersion:\s*([\w.]{1,40})", output)
    visible = _visible(environ, "ASCEND_RT_VISIBLE_DEVICES", devices, {}, "Ascend NPU", notes)
    return visible, driver[1] if driver else None


def _run_npu_smi(environ: Mapping[str, str]) -> tuple[str, str]:
    """What `npu-smi info` prints, empty when it fails, and what to say when no NPU is in it."""
    program = shutil.which("npu-smi", path=environ.get("PATH", os.defpath))
    if program is None:
        return "", "npu-smi is not on PATH"
    try:
        done = subprocess.run(
            [program, "info"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=dict(environ),
            timeout=_NPU_SMI_TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return "", f"npu-smi did not answer within {_NPU_SMI_TIMEOUT_SECONDS} s"
    except OSError as error:
        return "", f"npu-smi cannot be run ({error.strerror})"
    if done.returncode != 0:
        return "", f"npu-smi failed with exit code {done.returncode}"
    return done.stdout.decode(errors="replace"), "the output of npu-smi cannot be read"


def _parse_npu_smi(output: str, notes: list[str]) -> list[_Device]:
    """One device per chip. A chip takes two rows, of three cells each:

        | NPU  Name        | Health  | Power(W)  Temp(C)  Hugepages-Usage(page)    |
        | Chip [Phy-ID]    | Bus-Id  | AICore(%)  Memory-Usage(MB) [HBM-Usage(MB)] |

    Where there is HBM its usage comes last; the other memory is then that of the control CPU.
    """
    devices: list[_Device] = []
    npu: re.Match[str] | None = None
    health = ""
    for line in output.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) != 3:
            continue
        if re.fullmatch(r"[0-9A-Fa-f]{4}:[0-9A-Za-z]{2}:[0-9A-Za-z]{2}\.\d", cells[1]):
            usages = re.findall(r"\d+\s*/\s*(\d{1,9})\b", cells[2])
            if npu is None or not usages:
                continue
            chip = re.sub(r"^Ascend[ _-]?", "", npu[2])
            if health != "OK":
                notes.append(f"NPU {npu[1]} (Ascend {chip}) reports health {health!r}.")
            devices.append(
                _Device(
                    # Bus addresses repeat where chips share one or an administrator masks them.
                    identifier=f"{len(devices)}@{cells[1]}",
                    name=f"Ascend {chip}",
                    memory_bytes=int(usages[-1]) * _MIB,
                    fast_bf16=_chip_has_bf16(chip),
                )
            )
            npu = None
        else:
            npu = re.fullmatch(r"(\d{1,4})\s+([\w.-]{1,40})", cells[0])
            health = cells[1][:40]
    return devices


def _chip_has_bf16(chip: str) -> bool:
    """The first generation has none, and its names end in a letter: 910A, 910B, 910ProA.

    The second adds a digit (910B3); the third is printed as a bare 910, or as 910_93xx.
    """
    return re.match(r"910(B\d|_?93|C|$)|9[5-9]\d", chip) is not None


def _cann_version(environ: Mapping[str, str], root: Path) -> str | None:
    homes = [root / "usr/local/Ascend" / name for name in ("ascend-toolkit/latest", "cann")]
    if given := environ.get("ASCEND_HOME_PATH"):
        homes = [Path(given)]
    for home in homes:
        for info in sorted(home.glob("*-linux/ascend_toolkit_install.info")):
            if found := re.search(r"^version=([\w.-]{1,40})$", _read(info), re.MULTILINE):
                return found[1]
        # Every installation appends its own [package version:CANN version].
        if found := re.search(
            r"^toolkit_installed_version=.*:([\w.-]{1,40})\]$",
            _read(home / "version.cfg"),
            re.MULTILINE,
        ):
            return found[1]
    return None


def _find_cpu(root: Path, memory_bytes: int) -> _Device:
    fields: dict[str, str] = {}
    for line in _read(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = {*fields.get("flags", "").split(), *fields.get("Features", "").split()}
    return _Device(
        identifier="",
        # Arm writes no model name.
        name=fields.get("model name") or f"{platform.machine()} CPU",
        memory_bytes=memory_bytes,
        fast_bf16=not flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"}),
    )


def _cpu_cores(root: Path) -> int:
    cores = float(len(os.sched_getaffinity(0)))
    for folder in _control_groups(root, "cpu"):
        # v2 keeps quota and period in one file, v1 in two; "max" and -1 are no limit.
        words = _read(folder / "cpu.max").split() or [
            _read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
        ]
        if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]) > 0:
            cores = min(cores, int(words[0]) / int(words[1]))
    return max(1, int(cores))


def _memory_bytes(root: Path) -> int:
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder in _control_groups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            if (limit := _read(folder / name).strip()).isdecimal():
                size = min(size, int(limit))
    return size


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups this process is in: a limit may stand on any of them."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        # Version 2 has one line without controllers, version 1 a tree for each.
        if controllers and controller not in controllers.split(","):
            continue
        tree = root / "sys/fs/cgroup" / (controller if controllers else "")
        inner = PurePosixPath(group.lstrip("/"))
        # In a container the path may be the host's: only the root of the tree is then there.
        yield from (tree / path for path in (inner, *inner.parents))


def _find_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        text = _read(Path(spec.origin).with_name("version.py"))
        if found := re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE):
            versions["torch_cuda"] = found[1]
    return versions


def _code_fingerprint() -> str:
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


def _read(path: Path) -> str:
    """The text of a small file, empty when it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
