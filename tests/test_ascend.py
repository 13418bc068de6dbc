"""Ascend NPUs, from recorded output of npu-smi."""

from pathlib import Path

import pytest

from ftlaunch.cluster.machine import detect_machine
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
