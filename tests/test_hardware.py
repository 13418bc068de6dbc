"""Accelerators by name, and machines of which nobody has one here."""

from __future__ import annotations

import pytest

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.machine import check_framework
from ftlaunch.launcher.config import ClusterOptions, load_config
from ftlaunch.launcher.hardware import HARDWARE, assume, assumed_machine, find_hardware
from ftlaunch.launcher.plan import make_plan
from ftlaunch.strategies.registry import STRATEGIES


@pytest.mark.parametrize("name", HARDWARE)
def test_a_name_says_about_how_much_memory_there_is(name):
    """The driver reports a little less than what the device is sold with, or exactly that."""
    hardware = HARDWARE[name]
    sold = int(name.rpartition("-")[2].removesuffix("GB")) if name.endswith("GB") else 0
    if sold:
        assert 0.9 * sold <= hardware.memory_bytes / 2**30 <= 1.04 * sold
    assert hardware.memory_bytes % 2**20 == 0
    assert 5e13 < hardware.peak_flops_per_second < 1e16
    assert hardware.source
    assert find_hardware(name) is hardware


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("h100-80gb", "H100-80GB"),
        ("H100 80GB", "H100-80GB"),
        ("Ascend-910B-64GB", "910B-64GB"),
        ("NVIDIA A100-40GB", "A100-40GB"),
        ("rtx4090", "RTX-4090"),
        ("GeForce RTX 3090", "RTX-3090"),
    ],
)
def test_a_name_as_people_write_it(written, name):
    assert find_hardware(written).name == name


@pytest.mark.parametrize(
    ("written", "near"),
    [
        ("H100", "Did you mean H100-80GB or H100-PCIE-80GB"),
        ("H10O-80GB", "Did you mean H100-80GB"),
        ("910B", "Did you mean 910B-64GB or 910B-32GB"),
        ("MI300X", "is not known. Known are"),
        ("", "is not known. Known are"),
    ],
)
def test_an_unknown_name_is_answered_with_the_known_ones(written, near):
    with pytest.raises(UserError, match=near) as error:
        find_hardware(written)
    assert all(name in str(error.value) for name in HARDWARE)


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        (name, strategy)
        for name, hardware in HARDWARE.items()
        for strategy, each in STRATEGIES.items()
        if hardware.accelerator in each.accelerators
    ],
)
def test_everything_that_a_strategy_needs_is_taken_as_installed(name, strategy):
    hardware = HARDWARE[name]
    check_framework(assumed_machine(hardware, 8))
    config = load_config(file=None, flags={"strategy": strategy}, overrides=[])
    site, machines = assume(config.cluster, hardware)
    plan = make_plan(config, machines, site, output_dir="")
    assert plan.strategy == strategy
    assert plan.world_size == hardware.num_devices
    expected = "bf16" if hardware.fast_bf16 else "fp16"
    assert plan.precision == ("fp32" if name == "910A-32GB" else expected)


def test_nodes_and_devices_as_asked_for():
    site, machines = assume(ClusterOptions(nodes=3, devices=2), HARDWARE["L4-24GB"])
    assert [host.name for host in site.hosts] == ["node0", "node1", "node2"]
    assert [machine.num_devices for machine in machines] == [2, 2, 2]
    assert not site.is_one_machine


def test_a_host_file_says_how_many(tmp_path):
    (tmp_path / "hosts").write_text("n1 slots=4\nn2 slots=8\nn3\n")
    cluster = ClusterOptions(hostfile=str(tmp_path / "hosts"))
    site, machines = assume(cluster, HARDWARE["L40S-48GB"])
    assert [host.name for host in site.hosts] == ["n1", "n2", "n3"]
    assert [machine.num_devices for machine in machines] == [4, 8, 8]


def test_a_plan_for_a_million_nodes_is_refused():
    with pytest.raises(UserError, match="--nodes 1000000"):
        assume(ClusterOptions(nodes=10**6), HARDWARE["L4-24GB"])
