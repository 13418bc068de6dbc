"""The Ascend NPUs of one host, as npu-smi, /dev and CANN's files tell. Knows no other device."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from ftlaunch.cluster.device import Device, device_by_index, visible_devices
from ftlaunch.cluster.npu_smi import read_chips, read_driver_version

_NPU_SMI_TIMEOUT_SECONDS = 10
_MIB = 1024 * 1024


def find_npus(
    environ: Mapping[str, str], root: Path, notes: list[str]
) -> tuple[list[Device], str | None]:
    """The NPUs that are visible to this process, and the version of the driver.

    `root` is where /dev is looked up.
    """
    output, complaint = _run_npu_smi(environ)
    devices = _devices(output, notes)
    if not devices and (devices := _count_nodes(root)):
        notes.append(
            f"{len(devices)} NPUs were counted in /dev, since {complaint}: "
            "their model and memory are unknown."
        )

    def look_up(entry: str) -> Device | None:
        return device_by_index(entry, devices)

    variable, kind = "ASCEND_RT_VISIBLE_DEVICES", "Ascend NPU"
    visible = visible_devices(environ, variable, devices, look_up, kind, notes)
    return visible, read_driver_version(output)


def cann_version(environ: Mapping[str, str], root: Path) -> str | None:
    """The version of the installed CANN toolkit; "unknown" where only its library is found.

    `root` is where /usr/local is looked up. ASCEND_HOME_PATH, which CANN's set_env.sh sets, wins.
    """
    homes = [root / "usr/local/Ascend" / name for name in ("ascend-toolkit/latest", "cann")]
    if given := environ.get("ASCEND_HOME_PATH"):
        homes = [Path(given)]
    for home in homes:
        for info in sorted(home.glob("*-linux/ascend_toolkit_install.info")):
            if found := _search(info, r"^version=([\w.-]{1,40})$"):
                return found
        # Every installation appends its own [package version:CANN version].
        config = home / "version.cfg"
        if found := _search(config, r"^toolkit_installed_version=.*:([\w.-]{1,40})\]$"):
            return found
        # What MindSpore itself looks at: the version of the package, which is close to CANN's.
        if found := _search(home / "compiler/version.info", r"^Version=([\w.-]{1,40})$"):
            return found
    return "unknown" if any((home / "lib64/libascendcl.so").exists() for home in homes) else None


def _search(path: Path, pattern: str) -> str | None:
    """The first group of `pattern` in a small file; None also when the file cannot be read."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return None
    found = re.search(pattern, text, re.MULTILINE)
    return found[1] if found else None


def _count_nodes(root: Path) -> list[Device]:
    """An NPU of unknown model for each of /dev/davinci0, davinci1, ..., by number."""
    names = [path.name for path in (root / "dev").glob("davinci*")]
    return [
        Device(
            identifier=name,
            name="Ascend NPU",
            memory_bytes=0,
            fast_bf16=False,
            number=int(name.removeprefix("davinci")),
        )
        for name in sorted(names, key=lambda name: (len(name), name))
        if re.fullmatch(r"davinci\d+", name)
    ]


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


def _devices(output: str, notes: list[str]) -> list[Device]:
    devices = []
    for place, chip in enumerate(read_chips(output)):
        if chip.health != "OK":
            notes.append(f"NPU {chip.npu} (Ascend {chip.name}) reports health {chip.health!r}.")
        devices.append(
            Device(
                # Bus addresses repeat where chips share one or an administrator masks them.
                identifier=f"{place}@{chip.bus_id}",
                name=f"Ascend {chip.name}",
                memory_bytes=chip.memory_mib * _MIB,
                fast_bf16=_chip_has_bf16(chip.name),
                number=chip.number,
                occupant=chip.occupant,
            )
        )
    return devices


def _chip_has_bf16(chip: str) -> bool:
    """The first generation has none, and its names end in a letter: 910A, 910B, 910ProA.

    The second adds a digit (910B3); the third is printed as a bare 910, or as 910_93xx.
    """
    return re.match(r"910(B\d|_?93|C|$)|9[5-9]\d", chip) is not None
