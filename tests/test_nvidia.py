"""NVIDIA GPUs, by a played NVML."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlaunch.cluster.machine import Machine
from tests.hosts import GIB, play

Detect = Callable[..., Machine]

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
