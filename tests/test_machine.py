import dataclasses
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.machine import Accelerator, Machine, check_framework, detect_machine

RECORDED = Path(__file__).parent / "data" / "npu_smi"
MIB = 1024 * 1024
GIB = 1024 * MIB
Detect = Callable[..., Machine]
# On a host that has NVIDIA GPUs they must not win over the played NPUs.
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}

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
)


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
    check_framework(
        dataclasses.replace(MACHINE, accelerator="ascend", versions={"mindspore": "2.7.1"})
    )


@pytest.mark.parametrize(
    ("accelerator", "versions", "message"),
    [
        ("cuda", {"torch": "2.13.0+cpu"}, "node-1 has 2 x NVIDIA H100 but .* 2.13.0.cpu is a CPU"),
        ("cuda", {}, "torch is not installed.*ftlaunch.cuda.*CUDA_VISIBLE_DEVICES= "),
        ("ascend", {"torch": "2.13.0"}, "mindspore is not installed.*none found"),
        ("ascend", {"cann": "8.1.RC1"}, "8.1.RC1.*ASCEND_RT_VISIBLE_DEVICES= "),
    ],
)
def test_framework_that_cannot_use_the_devices(
    accelerator: Accelerator, versions: dict[str, str], message: str
) -> None:
    machine = dataclasses.replace(MACHINE, accelerator=accelerator, versions=versions)
    with pytest.raises(UserError, match=message):
        check_framework(machine)


# --- Ascend, from recorded output ---------------------------------------------------------------


def install_npu_smi(folder: Path, script: str) -> dict[str, str]:
    program = folder / "bin" / "npu-smi"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return {**NO_GPU, "PATH": f"{program.parent}:{os.environ['PATH']}"}


def play(folder: Path, recording: str) -> dict[str, str]:
    return install_npu_smi(folder, f"[ \"$*\" = info ] && cat '{RECORDED / recording}'")


def add_nodes(root: Path, *names: str) -> None:
    (root / "dev").mkdir(exist_ok=True)
    for name in names:
        (root / "dev" / name).touch()


@pytest.mark.parametrize(
    ("recording", "name", "num_devices", "memory_mib", "fast_bf16", "driver"),
    [
        ("910A.txt", "Ascend 910A", 4, 32768, False, "21.0.rc1"),
        ("910B3.txt", "Ascend 910B3", 8, 65536, True, "23.0.0"),
        # Eight cards of two chips each.
        ("910C.txt", "Ascend 910", 16, 65536, True, "24.1.rc3.5"),
        # No HBM column, one card of two chips; the chips differ and the smaller one counts.
        ("310P3.txt", "Ascend 310P3", 2, 43693, False, "25.2.0"),
    ],
)
def test_recorded_hosts(
    tmp_path: Path,
    recording: str,
    name: str,
    num_devices: int,
    memory_mib: int,
    fast_bf16: bool,
    driver: str,
) -> None:
    machine = detect_machine(play(tmp_path, recording), tmp_path)

    assert machine.accelerator == "ascend"
    assert machine.device_name == name
    assert machine.num_devices == num_devices
    assert machine.device_memory_bytes == memory_mib * MIB
    assert machine.fast_bf16 is fast_bf16
    assert machine.versions["driver"] == driver


@pytest.mark.parametrize(
    ("chip", "fast_bf16"),
    [
        ("910ProA", False),
        ("910PremiumA", False),
        ("910B", False),
        ("910ProB", False),
        ("910B4-1", True),
        ("910B2C", True),
        ("910_9392", True),
        ("950PR", True),
    ],
)
def test_bf16_by_generation(tmp_path: Path, chip: str, fast_bf16: bool) -> None:
    text = (RECORDED / "910B3.txt").read_text().replace("910B3   ", chip.ljust(8))
    (tmp_path / "info.txt").write_text(text)
    environ = install_npu_smi(tmp_path, f"cat '{tmp_path}/info.txt'")

    machine = detect_machine(environ, tmp_path)

    assert machine.device_name == f"Ascend {chip}"
    assert machine.fast_bf16 is fast_bf16


@pytest.mark.parametrize(
    ("value", "num_devices", "note"),
    [
        ("0,1", 2, "6 Ascend NPUs are hidden"),
        ("7,3,9,1", 2, "ends at '9'"),
        ("3,3", 0, "twice"),
        ("", 0, "8 Ascend NPUs are hidden by ASCEND_RT_VISIBLE_DEVICES=''"),
    ],
)
def test_ascend_visible_devices(tmp_path: Path, value: str, num_devices: int, note: str) -> None:
    environ = {**play(tmp_path, "910B3.txt"), "ASCEND_RT_VISIBLE_DEVICES": value}

    machine = detect_machine(environ, tmp_path)

    assert machine.accelerator == ("ascend" if num_devices else "cpu")
    assert machine.num_devices == max(1, num_devices)
    assert note in " ".join(machine.notes)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'dcmi module initialize failed. ret is -8005'; exit 1", "exit code 1"),
        ("echo 'dcmi module initialize failed. ret is -8005'", "cannot be read"),
        ("printf '\\377\\376|||\\n| 0 910B3 | OK | x |\\n| 0 | 0000:C1:00.0 | none |'", "cannot"),
        ("exit 0", "cannot be read"),
    ],
)
def test_npus_are_counted_in_dev_when_npu_smi_fails(
    tmp_path: Path, script: str, reason: str
) -> None:
    add_nodes(tmp_path, "davinci0", "davinci1", "davinci10", "davinci_manager")

    machine = detect_machine(install_npu_smi(tmp_path, script), tmp_path)

    assert (machine.accelerator, machine.num_devices) == ("ascend", 3)
    assert machine.device_memory_bytes == 0
    assert not machine.fast_bf16
    assert reason in machine.notes[0]


def test_npus_without_npu_smi(tmp_path: Path) -> None:
    add_nodes(tmp_path, "davinci0")
    machine = detect_machine({**NO_GPU, "PATH": str(tmp_path)}, tmp_path)
    assert (machine.accelerator, machine.num_devices) == ("ascend", 1)
    assert "npu-smi is not on PATH" in machine.notes[-1]


def test_npu_smi_without_npus(tmp_path: Path) -> None:
    machine = detect_machine(install_npu_smi(tmp_path, "exit 1"), tmp_path)
    assert (machine.accelerator, machine.num_devices) == ("cpu", 1)


def test_sick_npu_is_reported(tmp_path: Path) -> None:
    text = (RECORDED / "910A.txt").read_text().replace("| OK   ", "| Alarm", 1)
    (tmp_path / "info.txt").write_text(text)
    environ = install_npu_smi(tmp_path, f"cat '{tmp_path}/info.txt'")
    notes = detect_machine(environ, tmp_path).notes
    assert "NPU 4 (Ascend 910A) reports health 'Alarm'." in notes


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (
            "aarch64-linux/ascend_toolkit_install.info",
            "package_name=Ascend-cann-toolkit\nversion=8.1.RC1\ninnerversion=V100R001C21\n",
        ),
        (
            "version.cfg",
            "# version: 1.0\nruntime_installed_version=[7.7.T20.0.B210:8.1.RC1]\n"
            "toolkit_installed_version=[7.7.T9.0.B057:8.1.T6][7.7.T20.0.B210:8.1.RC1]\n",
        ),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_cann_version(tmp_path: Path, file: str, text: str, named: bool) -> None:
    home = tmp_path / "usr/local/Ascend/ascend-toolkit/latest"
    (home / file).parent.mkdir(parents=True)
    (home / file).write_text(text)
    environ = {**NO_GPU, "PATH": "", **({"ASCEND_HOME_PATH": str(home)} if named else {})}
    root = tmp_path / "elsewhere" if named else tmp_path
    assert detect_machine(environ, root).versions["cann"] == "8.1.RC1"


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


# --- CUDA, by a played NVML ---------------------------------------------------------------------

FAKE_NVML = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A handle is 1 + GPU, or 100 * (1 + GPU) + slice for a MIG device. */
#define GPU(h) ((long)(h) < 100 ? (long)(h) - 1 : (long)(h) / 100 - 1)
#define SLICE(h) ((long)(h) < 100 ? -1 : (long)(h) % 100)

typedef struct { unsigned long long total, free, used; } memory_t;

static int setting(const char *name, int fallback) {
    const char *text = getenv(name);
    return text ? atoi(text) : fallback;
}

int nvmlInitWithFlags(unsigned flags) { return setting("FAKE_NVML_INIT", 0); }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return "played error"; }
int nvmlSystemGetDriverVersion(char *out, unsigned size) { strcpy(out, "580.105.06"); return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = setting("FAKE_NVML_GPUS", 2); return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **out) {
    if ((int)index == setting("FAKE_NVML_LOST", -1)) return 15;
    *out = (void *)(long)(1 + index);
    return 0;
}
int nvmlDeviceGetName(void *h, char *out, unsigned size) {
    snprintf(out, size, SLICE(h) < 0 ? "NVIDIA H100" : "NVIDIA H100 MIG 1g.10gb");
    return 0;
}
int nvmlDeviceGetUUID(void *h, char *out, unsigned size) {
    if (SLICE(h) < 0) snprintf(out, size, "GPU-%ldaaa-0000", GPU(h));
    else snprintf(out, size, "MIG-%ld%ldbb-0000", GPU(h), SLICE(h));
    return 0;
}
int nvmlDeviceGetMemoryInfo(void *h, memory_t *out) {
    if (getenv("FAKE_NVML_UNIFIED")) return 3;
    out->total = (SLICE(h) < 0 ? 80ull - GPU(h) : 10ull) << 30;
    return 0;
}
int nvmlDeviceGetCudaComputeCapability(void *h, int *major, int *minor) {
    int version = setting("FAKE_NVML_CAPABILITY", 90);
    *major = version / 10;
    *minor = version % 10;
    return 0;
}
int nvmlDeviceGetMigMode(void *h, unsigned *current, unsigned *pending) {
    if (!getenv("FAKE_NVML_SLICES")) return 3;
    /* Only the first GPU is sliced. */
    *current = *pending = GPU(h) == 0;
    return 0;
}
int nvmlDeviceGetMaxMigDeviceCount(void *h, unsigned *count) { *count = 7; return 0; }
int nvmlDeviceGetMigDeviceHandleByIndex(void *h, unsigned index, void **out) {
    if ((int)index >= setting("FAKE_NVML_SLICES", 0)) return 6;
    *out = (void *)(100 * (1 + GPU(h)) + (long)index);
    return 0;
}
"""


@pytest.fixture(scope="session")
def nvml_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("g++") or shutil.which("cc")
    if compiler is None:
        assert os.environ.get("CI") != "true", "the continuous integration needs a C compiler"
        pytest.skip("no C compiler to build the played NVML with")
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.c").write_text(FAKE_NVML)
    library = folder / "libnvidia-ml.so.1"
    subprocess.run(
        [compiler, "-x", "c", "-shared", "-fPIC", "-o", library, folder / "nvml.c"], check=True
    )
    return folder


@pytest.fixture
def detect_gpus(nvml_folder: Path, tmp_path: Path) -> Detect:
    """Detects in a process of its own: a loaded NVML stays loaded."""

    def detect(**variables: str) -> Machine:
        environ = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
        environ |= {"LD_LIBRARY_PATH": str(nvml_folder), **variables}
        code = """
import json, os, pathlib, sys
from ftlaunch.cluster.machine import detect_machine
print(json.dumps(detect_machine(os.environ, pathlib.Path(sys.argv[1])).to_dict()))
"""
        command = [sys.executable, "-c", code, str(tmp_path)]
        done = subprocess.run(command, env=environ, check=True, capture_output=True, text=True)
        return Machine.from_dict(json.loads(done.stdout))

    return detect


def test_gpus(detect_gpus: Detect) -> None:
    machine = detect_gpus()
    assert (machine.accelerator, machine.num_devices) == ("cuda", 2)
    assert machine.device_name == "NVIDIA H100"
    # 80 and 79 GiB: the smaller one counts.
    assert machine.device_memory_bytes == 79 * GIB
    assert machine.fast_bf16
    assert machine.versions["driver"] == "580.105.06"
    assert machine.notes == ()


def test_old_gpus_have_no_fast_bf16(detect_gpus: Detect) -> None:
    assert not detect_gpus(FAKE_NVML_CAPABILITY="75").fast_bf16


@pytest.mark.parametrize(
    ("value", "memories_gib", "note"),
    [
        ("1", [79], "1 NVIDIA GPU is hidden"),
        ("1, 0", [79, 80], None),
        ("GPU-1a", [79], "hidden"),
        ("GPU-", [], "no such NVIDIA GPU"),
        ("0,GPU-1", [79, 80], None),
        ("0,7,1", [80], "ends at '7'"),
        ("0,-1,1", [80], "hidden"),
        ("0,,1", [80], "hidden"),
        ("0x,1", [79, 80], None),
        ("0,0", [], "twice"),
        ("cuda:0", [], "ends at 'cuda:0'"),
        ("-1", [], "2 NVIDIA GPUs are hidden by CUDA_VISIBLE_DEVICES='-1'"),
        ("", [], "2 NVIDIA GPUs are hidden by CUDA_VISIBLE_DEVICES=''"),
    ],
)
def test_cuda_visible_devices(
    detect_gpus: Detect, value: str, memories_gib: list[int], note: str | None
) -> None:
    machine = detect_gpus(CUDA_VISIBLE_DEVICES=value)
    assert machine.accelerator == ("cuda" if memories_gib else "cpu")
    assert machine.num_devices == max(1, len(memories_gib))
    if memories_gib:
        assert machine.device_memory_bytes == min(memories_gib) * GIB
    assert (note in " ".join(machine.notes)) if note else (machine.notes == ())


@pytest.mark.parametrize(
    ("value", "num_devices", "memory_gib"),
    [
        # The first GPU is its first slice, the second is whole.
        (None, 2, 10),
        ("0", 1, 10),
        ("1", 1, 79),
        ("MIG-01", 1, 10),
        ("MIG-00bb-0000,MIG-01bb-0000,MIG-02bb-0000", 3, 10),
        ("MIG-03", 1, None),
    ],
)
def test_mig_devices(
    detect_gpus: Detect, value: str | None, num_devices: int, memory_gib: int | None
) -> None:
    variables = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    machine = detect_gpus(FAKE_NVML_SLICES="3", **variables)
    assert machine.accelerator == ("cpu" if memory_gib is None else "cuda")
    assert machine.num_devices == num_devices
    if memory_gib is not None:
        assert machine.device_memory_bytes == memory_gib * GIB


def test_gpu_in_mig_mode_without_slices(detect_gpus: Detect) -> None:
    machine = detect_gpus(FAKE_NVML_SLICES="0")
    assert (machine.num_devices, machine.device_memory_bytes) == (1, 79 * GIB)
    assert machine.notes == ("GPU 0 is in MIG mode but holds no MIG device.",)


def test_lost_gpu_is_left_out(detect_gpus: Detect) -> None:
    machine = detect_gpus(FAKE_NVML_LOST="0")
    assert (machine.num_devices, machine.device_memory_bytes) == (1, 79 * GIB)
    assert "GPU 0 does not answer" in machine.notes[0]


def test_memory_shared_with_the_host(detect_gpus: Detect) -> None:
    machine = detect_gpus(FAKE_NVML_UNIFIED="1")
    assert machine.device_memory_bytes == machine.memory_bytes


@pytest.mark.parametrize(("code", "num_notes"), [("9", 0), ("18", 1), ("999", 1)])
def test_nvml_that_fails(detect_gpus: Detect, code: str, num_notes: int) -> None:
    # 9 is "driver not loaded", no reason to speak; 18 is a driver that was updated under way.
    machine = detect_gpus(FAKE_NVML_INIT=code)
    assert machine.accelerator == "cpu"
    assert len(machine.notes) == num_notes


def test_gpus_are_preferred_to_npus(detect_gpus: Detect, tmp_path: Path) -> None:
    environ = play(tmp_path, "910B3.txt")
    machine = detect_gpus(PATH=environ["PATH"])
    assert machine.accelerator == "cuda"
    assert "8 x Ascend 910B3 are left idle" in machine.notes[0]

    machine = detect_gpus(PATH=environ["PATH"], CUDA_VISIBLE_DEVICES="")
    assert machine.accelerator == "ascend"
