"""Ascend NPUs, from recorded output of npu-smi."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ftlaunch.cluster.machine import Machine, detect_machine
from tests.hosts import MIB, NO_GPU, RECORDED, install_npu_smi, play


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
        ("910B3-busy.txt", "Ascend 910B3", 2, 65536, True, "24.1.rc1"),
        # The number has a cell of its own.
        ("950PR.txt", "Ascend 950PR", 3, 114688, True, "25.7.rc1"),
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
    ("recording", "numbers"),
    [
        # A card of one chip: the number of the card. Two chips: Phy-ID, or "Device" on the 310P3.
        ("910A.txt", (4, 5, 6, 7)),
        ("910B3.txt", tuple(range(8))),
        ("910C.txt", tuple(range(16))),
        ("310P3.txt", (0, 1)),
        ("950PR.txt", (0, 1, 2)),
    ],
)
def test_physical_numbers(tmp_path: Path, recording: str, numbers: tuple[int, ...]) -> None:
    assert detect_machine(play(tmp_path, recording), tmp_path).device_numbers == numbers


@pytest.mark.parametrize(
    ("recording", "busy"),
    [
        # The process of another container has no name.
        ("910B3-busy.txt", {"1@0000:42:00.0": "process 1904 (python3), process 2044"}),
        ("950PR.txt", {"1@0000:71:00.0": "process 107304 (python)"}),
        ("910B3.txt", {}),
        # No table of processes.
        ("910A.txt", {}),
    ],
)
def test_who_uses_a_device(tmp_path: Path, recording: str, busy: dict[str, str]) -> None:
    assert detect_machine(play(tmp_path, recording), tmp_path).busy == busy


def test_who_uses_a_chip_of_a_card(tmp_path: Path) -> None:
    """Card 1 has the chips 2 and 3. Newer drivers add a fifth column."""
    users = "".join(
        f"| 1       1                 | {pid}       | python3.1          | 197      | NA     |\n"
        for pid in range(11, 16)
    )
    text = (RECORDED / "910C.txt").read_text()
    text = text.replace("| No running processes found in NPU 1 ", f"{users}| ", 1)
    (tmp_path / "info.txt").write_text(text)
    environ = install_npu_smi(tmp_path, f"cat '{tmp_path}/info.txt'")

    machine = detect_machine(environ, tmp_path)

    said = ", ".join(f"process {pid} (python3.1)" for pid in (11, 12, 13)) + " and 2 more"
    assert machine.busy == {"3@0000:9B:00.0": said}
    assert Machine.from_dict(json.loads(json.dumps(machine.to_dict()))) == machine


def test_a_hidden_device_may_be_in_use(tmp_path: Path) -> None:
    environ = {**play(tmp_path, "910B3-busy.txt"), "ASCEND_RT_VISIBLE_DEVICES": "0"}
    machine = detect_machine(environ, tmp_path)
    assert (machine.device_numbers, machine.busy) == ((6,), {})


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
    assert machine.device_numbers == (0, 1, 10)
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
        ("compiler/version.info", "Version=8.1.RC1\nversion_dir=8.1.RC1\n"),
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


@pytest.mark.parametrize("sourced", [True, False])
def test_whether_set_env_was_sourced(tmp_path: Path, sourced: bool) -> None:
    home = tmp_path / "usr/local/Ascend/cann"
    (home / "compiler").mkdir(parents=True)
    (home / "compiler/version.info").write_text("Version=8.2.RC1\n")
    environ = {**play(tmp_path, "910B3.txt"), "ASCEND_HOME_PATH": str(home) if sourced else ""}
    machine = detect_machine(environ, tmp_path)
    assert machine.versions["cann"] == "8.2.RC1"
    assert ("set_env.sh" in " ".join(machine.notes)) is not sourced


def test_cann_that_does_not_say_its_version(tmp_path: Path) -> None:
    """MindSpore would load it: it is not missing."""
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64/libascendcl.so").touch()
    environ = {**NO_GPU, "PATH": "", "ASCEND_HOME_PATH": str(tmp_path)}
    assert detect_machine(environ, tmp_path).versions["cann"] == "unknown"


def install_package(folder: Path, name: str, *files: str) -> None:
    for file in (f"{name}-2.10.0.dist-info/METADATA", f"{name}/__init__.py", *files):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(
            f"Name: {name}\nVersion: 2.10.0\n" if "METADATA" in file else "raise SystemExit(9)\n"
        )


@pytest.mark.parametrize(
    ("plugins", "found"),
    [
        ((), None),
        (("libmindspore_ascend.so.1", "libmindspore_ascend.so.2"), "2"),
        (("libmindspore_ascend.so",), "1"),
        (("libmindspore_gpu.so.11.6",), None),
    ],
)
def test_whether_mindspore_can_use_npus(
    tmp_path: Path, plugins: tuple[str, ...], found: str | None
) -> None:
    """By the files of its package, which is not imported: it would end this interpreter."""
    install_package(tmp_path, "mindspore", *(f"mindspore/lib/plugin/{each}" for each in plugins))
    install_package(tmp_path, "mindone")
    code = (
        "import json, os; from ftlaunch.cluster.machine import detect_machine;"
        "print(json.dumps(dict(detect_machine(os.environ).versions)))"
    )
    environ = {
        **os.environ,
        **NO_GPU,
        "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, check=True, capture_output=True, text=True
    )
    versions = json.loads(done.stdout)
    assert (versions["mindspore"], versions["mindone"]) == ("2.10.0", "2.10.0")
    assert versions.get("mindspore_ascend") == found
