"""One host: the record of it, its CPU and memory, and whether the framework fits."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.machine import Accelerator, Machine, check_framework, detect_machine
from tests.hosts import GIB, NO_GPU

MACHINE = Machine(
    hostname="node-1",
    accelerator="cuda",
    device_name="NVIDIA H100",
    num_devices=2,
    device_memory_bytes=80 * GIB,
    fast_bf16=True,
    cpu_cores=16,
    memory_bytes=256 * GIB,
    versions={"python": "3.11.7", "torch": "2.13.0", "torch_cuda": "13.0"},
    code_fingerprint="0123456789ab",
    notes=("a note",),
    device_numbers=(4, 6),
    busy={"GPU-1": "process 7 (python)"},
)
ASCEND_VERSIONS = {
    "mindspore": "2.10.0",
    "mindspore_ascend": "2",
    "cann": "8.2.RC1",
    "mindone": "0.5.0",
}


# --- the record ---------------------------------------------------------------------------------


def test_machine_survives_json() -> None:
    assert Machine.from_dict(json.loads(json.dumps(MACHINE.to_dict()))) == MACHINE


def test_unknown_fields_are_ignored() -> None:
    assert Machine.from_dict({**MACHINE.to_dict(), "from_the_future": 1}) == MACHINE


@pytest.mark.parametrize(
    "change",
    [
        {"accelerator": "tpu"},
        {"accelerator": ["cuda"]},
        {"num_devices": "2"},
        {"num_devices": True},
        {"num_devices": -1},
        {"num_devices": 1.5},
        {"fast_bf16": 1},
        {"hostname": None},
        {"versions": ["torch"]},
        {"versions": {"torch": 2}},
        {"notes": "a note"},
        {"notes": [1]},
        {"device_numbers": [0, -1]},
        {"device_numbers": "01"},
        {"busy": {"GPU-1": 7}},
    ],
)
def test_malformed_field_is_named(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        Machine.from_dict({**MACHINE.to_dict(), **change})


@pytest.mark.parametrize("data", [None, [], "x", {}, {"hostname": "a"}])
def test_malformed_machine(data: object) -> None:
    with pytest.raises(ValueError, match="machine"):
        Machine.from_dict(data)


# --- the framework ------------------------------------------------------------------------------


def test_framework_that_fits() -> None:
    check_framework(MACHINE)
    check_framework(dataclasses.replace(MACHINE, accelerator="cpu", versions={}))
    check_framework(dataclasses.replace(MACHINE, accelerator="ascend", versions=ASCEND_VERSIONS))


@pytest.mark.parametrize(
    ("accelerator", "versions", "message"),
    [
        ("cuda", {"torch": "2.13.0+cpu"}, "node-1 has 2 x NVIDIA H100 but .* 2.13.0.cpu is a CPU"),
        ("cuda", {}, "torch is not installed.*ftlaunch.cuda.*CUDA_VISIBLE_DEVICES= "),
        ("ascend", {"torch": "2.13.0"}, "mindspore is not installed.*none found"),
        ("ascend", {"cann": "8.1.RC1"}, "8.1.RC1.*ASCEND_RT_VISIBLE_DEVICES= "),
        (
            "ascend",
            {name: v for name, v in ASCEND_VERSIONS.items() if name != "mindspore_ascend"},
            r"mindspore 2.10.0 is a CPU build.*fits the installed CANN \(8.2.RC1\)",
        ),
        (
            "ascend",
            {name: v for name, v in ASCEND_VERSIONS.items() if name != "cann"},
            "CANN was not found.*ASCEND_HOME_PATH.*mindspore 2.10.0 asks for.*set_env.sh",
        ),
        (
            "ascend",
            {name: v for name, v in ASCEND_VERSIONS.items() if name != "mindone"},
            "mindone is not installed.*pip install 'ftlaunch.ascend.'",
        ),
    ],
)
def test_framework_that_cannot_use_the_devices(
    accelerator: Accelerator, versions: dict[str, str], message: str
) -> None:
    machine = dataclasses.replace(MACHINE, accelerator=accelerator, versions=versions)
    with pytest.raises(UserError, match=message):
        check_framework(machine)


# --- the host -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpuinfo", "fast_bf16", "name"),
    [
        ("model name\t: AMD EPYC 9654\nflags\t\t: fpu avx512_bf16 sse\n", True, "AMD EPYC 9654"),
        ("model name\t: Xeon 8480\nflags\t\t: fpu amx_bf16\n", True, "Xeon 8480"),
        ("model name\t: Xeon 6148\nflags\t\t: fpu avx512f\n", False, "Xeon 6148"),
        ("processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n", True, f"{os.uname().machine} CPU"),
        ("", False, f"{os.uname().machine} CPU"),
    ],
)
def test_cpu(tmp_path: Path, cpuinfo: str, fast_bf16: bool, name: str) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(cpuinfo)
    machine = detect_machine({**NO_GPU, "PATH": ""}, tmp_path)
    assert (machine.accelerator, machine.num_devices) == ("cpu", 1)
    assert (machine.device_name, machine.fast_bf16) == (name, fast_bf16)


def write_all(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    "files",
    [
        # Version 2; the tighter limit stands on the parent.
        {
            "proc/self/cgroup": "0::/slurm/job_1/step_0\n",
            "sys/fs/cgroup/slurm/job_1/memory.max": f"{GIB}\n",
            "sys/fs/cgroup/slurm/job_1/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/slurm/job_1/step_0/memory.max": "max\n",
            "sys/fs/cgroup/slurm/job_1/step_0/cpu.max": "max 100000\n",
        },
        # Version 2 in a container that sees the path of the host.
        {
            "proc/self/cgroup": "0::/docker/0123\n",
            "sys/fs/cgroup/memory.max": f"{GIB}\n",
            "sys/fs/cgroup/cpu.max": "150000 100000\n",
        },
        # Version 1.
        {
            "proc/self/cgroup": "4:memory:/job\n3:cpu,cpuacct:/job\n1:name=systemd:/\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "150000\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    ],
)
def test_control_groups(tmp_path: Path, files: dict[str, str]) -> None:
    write_all(tmp_path, files)
    machine = detect_machine({**NO_GPU, "PATH": ""}, tmp_path)
    assert machine.memory_bytes == machine.device_memory_bytes == GIB
    # 1.5 cores are 1 whole one.
    assert machine.cpu_cores == 1


def test_less_than_one_core_is_one(tmp_path: Path) -> None:
    write_all(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"})
    assert detect_machine({**NO_GPU, "PATH": ""}, tmp_path).cpu_cores == 1


def test_this_host(tmp_path: Path) -> None:
    machine = detect_machine(os.environ)
    assert machine.hostname == os.uname().nodename
    assert 1 <= machine.cpu_cores <= len(os.sched_getaffinity(0))
    assert machine.memory_bytes > 0
    assert machine.versions["ftlaunch"]
    assert re.fullmatch(r"[0-9a-f]{12}", machine.code_fingerprint)
    assert Machine.from_dict(json.loads(json.dumps(machine.to_dict()))) == machine


def test_detection_is_light() -> None:
    code = """
import json, os, resource, sys
from ftlaunch.cluster.machine import detect_machine
detect_machine(os.environ)
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([used.ru_utime + used.ru_stime, sorted(sys.modules)]))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    seconds, modules = json.loads(done.stdout)
    assert {"torch", "mindspore", "numpy", "transformers", "datasets"}.isdisjoint(modules)
    # The interpreter's own start is in it.
    assert seconds < 0.5
