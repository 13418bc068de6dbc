"""Hosts with NPUs in a plan: which devices the ranks have, who else uses them, hosts that differ."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.gathering import Network
from ftlaunch.cluster.machine import Machine
from ftlaunch.cluster.rank_table import RankTable, TableServer
from ftlaunch.launcher.config import ClusterOptions, load_config
from ftlaunch.launcher.layout import HostPlan, Reason, make_layout
from ftlaunch.launcher.npus import (
    hccl_variables,
    npu_places,
    rank_table_path,
    refuse_busy,
    with_rank_table,
)
from ftlaunch.launcher.plan import LaunchPlan, make_plan
from ftlaunch.launcher.ranks import rank_starts
from ftlaunch.launcher.site import find_site
from tests.hosts import play
from tests.jobs import ftlaunch, said
from tests.test_plan import CPU, GPU

# Four of the eight NPUs of a host, by their numbers in /dev.
NPU = replace(
    CPU,
    hostname="atlas",
    accelerator="ascend",
    device_name="Ascend 910B3",
    num_devices=4,
    device_ids=("0@a", "1@b", "2@c", "3@d"),
    device_numbers=(4, 5, 6, 7),
)
TABLE = RankTable(
    path="table.json",
    version="1.0",
    servers=(TableServer(server_id="s", first_rank=0, devices=(7, 5)),),
)


def _hosts(*machines: Machine, **cluster) -> tuple[HostPlan, ...]:
    options = ClusterOptions(nodes=len(machines), **cluster)
    site = find_site(options, {})
    return make_layout(options, machines, site, [], default_start="fork").hosts


# -- places -------------------------------------------------------------------------------------


def test_nodes_of_one_machine_count_its_npus_through():
    """MindSpore numbers the ranks of a hostname through, so nodes played on it must, too."""
    assert [host.npus for host in _hosts(NPU, NPU)] == [(0, 1), (2, 3)]
    assert [host.devices for host in _hosts(NPU, NPU)] == [None, None]


def test_hosts_of_their_own_begin_at_0():
    assert npu_places(ClusterOptions(), [NPU, NPU], [3, 3], "ascend", is_one_machine=False) == [
        (0, 1, 2),
        (0, 1, 2),
    ]


def test_other_accelerators_have_no_places():
    assert [host.npus for host in (*_hosts(CPU), *_hosts(GPU, GPU))] == [(), (), ()]


def test_a_rank_table_gives_the_places():
    """The devices 7 and 5 are the places 3 and 1 of 4, 5, 6, 7."""
    assert [host.npus for host in _hosts(NPU, devices=2, rank_table=TABLE)] == [(3, 1)]
    assert [host.npus for host in _hosts(NPU, NPU, devices=1, rank_table=TABLE)] == [(3,), (1,)]


def test_a_rank_table_is_among_the_reasons():
    reasons: list[Reason] = []
    options = ClusterOptions(devices=2, rank_table=TABLE)
    make_layout(options, [NPU], find_site(options, {}), reasons, default_start="fork")
    assert Reason(choice="rank table", value="2 ranks", why="as in table.json") in reasons


def test_a_rank_table_is_for_npus():
    with pytest.raises(UserError, match=r"has no Ascend NPU.*runs on cpu"):
        _hosts(CPU, rank_table=TABLE)


# -- devices in use -----------------------------------------------------------------------------


BUSY = replace(NPU, busy={"2@c": "process 1904 (python3)"})


def test_a_device_in_use_is_refused():
    with pytest.raises(UserError) as error:
        _hosts(BUSY)
    assert "  atlas, device 6: process 1904 (python3)\n" in str(error.value)
    assert "ASCEND_RT_VISIBLE_DEVICES" in str(error.value)


def test_a_device_that_no_rank_gets_may_be_in_use():
    assert _hosts(BUSY, devices=2)
    assert _hosts(BUSY, devices=2, rank_table=TABLE)
    with pytest.raises(UserError, match="device 6"):
        _hosts(BUSY, BUSY, devices=2)


def test_devices_may_be_shared_on_request():
    assert _hosts(BUSY, allow_busy_devices=True)


def test_every_host_is_looked_at():
    other = replace(BUSY, hostname="other", busy={"0@a": "process 5", "1@b": "process 6"})
    with pytest.raises(UserError) as error:
        refuse_busy(ClusterOptions(), [BUSY, other], [(2, 3), (0, 1)])
    lines = [line for line in str(error.value).splitlines() if line.startswith("  ")]
    assert lines == [
        "  atlas, device 6: process 1904 (python3)",
        "  other, device 4: process 5",
        "  other, device 5: process 6",
    ]


# -- hosts that differ --------------------------------------------------------------------------


def test_a_mixed_set_of_hosts_is_refused_with_a_table():
    machines = [replace(GPU, hostname="dgx"), NPU, replace(NPU, hostname="atlas2"), CPU]
    with pytest.raises(UserError) as error:
        _hosts(*machines)
    assert str(error.value).splitlines()[:6] == [
        "the nodes have different accelerators:",
        "  node   host    accelerator  devices",
        "  node0  dgx     cuda         4 × Some GPU",
        "  node1  atlas   ascend       4 × Ascend 910B3",
        "  node2  atlas2  ascend       4 × Ascend 910B3",
        "  node3  here    cpu          1 × Some CPU",
    ]
    assert "listed with cpu" in str(error.value)
    with pytest.raises(UserError) as error:
        _hosts(*machines[:3])
    assert "listed with cpu" not in str(error.value)


# -- the table's file ---------------------------------------------------------------------------


def _write_table(path: Path) -> str:
    devices = [{"device_id": str(number), "rank_id": str(i)} for i, number in enumerate((7, 5))]
    server = {"server_id": "s", "device": devices}
    path.write_text(json.dumps({"version": "1.0", "status": "completed", "server_list": [server]}))
    return str(path)


def test_the_key_wins_over_the_variable(tmp_path):
    path = _write_table(tmp_path / "table.json")
    expected = ClusterOptions(rank_table=replace(TABLE, path=path))
    environ = {"RANK_TABLE_FILE": path}
    assert with_rank_table(ClusterOptions(), NPU, environ) == expected
    assert (
        with_rank_table(ClusterOptions(rank_table=path), NPU, {"RANK_TABLE_FILE": "x"}) == expected
    )
    assert with_rank_table(expected, NPU, {}) is expected
    assert (rank_table_path(expected), rank_table_path(ClusterOptions())) == (path, None)
    assert with_rank_table(ClusterOptions(), NPU, {"RANK_TABLE_FILE": ""}) == ClusterOptions()


def test_the_variable_means_nothing_without_npus():
    assert with_rank_table(ClusterOptions(), CPU, {"RANK_TABLE_FILE": "x"}) == ClusterOptions()


def test_a_path_is_from_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(file=None, flags={}, overrides=["cluster.rank_table=table.json"])
    assert config.cluster.rank_table == str(tmp_path / "table.json")


def test_the_content_is_not_written_into_a_configuration():
    mapping = "cluster.rank_table={path: x, version: '1.0', servers: []}"
    with pytest.raises(UserError, match=r"cluster\.rank_table"):
        load_config(file=None, flags={}, overrides=[mapping])


def test_a_plan_with_a_rank_table_survives_json(tmp_path):
    config = load_config(file=None, flags={}, overrides=[])
    plan = make_plan(config, [CPU], find_site(config.cluster, {}), output_dir="out")
    hosts = (replace(plan.hosts[0], npus=(3, 1)),)
    plan = replace(plan, cluster=ClusterOptions(rank_table=TABLE), hosts=hosts)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_json()))
    assert LaunchPlan.read(path) == plan


# -- from outside -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recording", "words", "message"),
    [
        ("910B3-busy.txt", [], "device 7: process 1904 (python3), process 2044"),
        (
            "910A.txt",
            ["cluster.rank_table=absent.json"],
            "absent.json' cannot be read: No such file",
        ),
        ("910A.txt", ["cluster.rank_table=table.json"], "names device 8, 9, which"),
    ],
)
def test_exit_code_2_and_no_traceback(tmp_path, recording, words, message):
    devices = [{"device_id": str(n), "rank_id": str(i)} for i, n in enumerate((8, 9, 4, 5))]
    server = {"server_id": "s", "device": devices}
    table = {"version": "1.0", "status": "completed", "server_list": [server]}
    (tmp_path / "table.json").write_text(json.dumps(table))
    result = ftlaunch("--dry-run", *words, env=play(tmp_path, recording), cwd=tmp_path)
    assert result.returncode == 2, said(result)
    assert message in said(result)
    assert "Traceback" not in said(result)


# -- the plan on NPUs, and what the ranks find --------------------------------------------------


def _plan_on(*machines: Machine, **flags) -> LaunchPlan:
    config = load_config(file=None, flags={"nodes": len(machines), **flags}, overrides=[])
    return make_plan(config, machines, find_site(config.cluster, {}), output_dir="out")


COMPLETE = {
    "mindspore": "2.10.0",
    "mindspore_ascend": "2",
    "mindone": "0.5.0",
    "cann": "8.2.RC1",
}
NEW = replace(NPU, versions=COMPLETE, fast_bf16=True, busy={})
OLD = replace(NEW, device_name="Ascend 910A", fast_bf16=False)


def test_npus_choose_mindspore_by_themselves():
    plan = _plan_on(NEW)
    assert (plan.strategy, plan.precision, plan.start_method) == ("mindspore", "bf16", "exec")
    assert plan.accelerator == "ascend"


def test_the_first_generation_computes_in_fp32_alone():
    assert _plan_on(OLD).precision == "fp32"
    for precision in ("fp16", "bf16"):
        with pytest.raises(UserError, match="an overflow would not be seen"):
            _plan_on(OLD, precision=precision)


@pytest.mark.parametrize(
    ("lacking", "word"),
    [
        ("mindspore", "mindspore is not installed"),
        ("mindspore_ascend", "plugin"),
        ("cann", "CANN"),
        ("mindone", "mindone"),
    ],
)
def test_what_an_ascend_host_lacks_is_told(lacking, word):
    versions = {name: version for name, version in COMPLETE.items() if name != lacking}
    with pytest.raises(UserError, match=word):
        _plan_on(replace(NEW, versions=versions))


def test_ranks_on_npus_find_their_device_and_hccl(tmp_path):
    plan = _plan_on(NEW, NEW)
    devices = plan.hosts[0].num_devices
    here = Network(address="127.0.0.1", interfaces=("lo", "lo"))
    with hccl_variables(NEW, {}, timeout_seconds=300, port=25000, is_here=True) as hccl:
        starts = rank_starts(plan, here, 25000, tmp_path, hccl)
    scheduler, *first = starts[0]
    assert (scheduler.rank, scheduler.env["MS_ROLE"]) == (-1, "MS_SCHED")
    assert scheduler.env["RANK_TABLE_FILE"] == ""
    ranks = [*first, *starts[1]]
    assert [rank.env["DEVICE_ID"] for rank in ranks] == [str(n) for n in range(2 * devices)]
    assert {rank.env["MS_ROLE"] for rank in ranks} == {"MS_WORKER"}
    assert [rank.env["MS_NODE_ID"] for rank in ranks] == [rank.env["RANK"] for rank in ranks]
    assert {rank.env["MS_ASCEND_CHECK_OVERFLOW_MODE"] for rank in ranks} == {"INFNAN_MODE"}
    [base] = {int(rank.env["HCCL_IF_BASE_PORT"]) for rank in ranks}
    assert not set(range(base, base + 32)) & {25000, *range(20000, 32000), *range(32768, 61000)}
    assert not any(rank.inherits_listener for rank in ranks)


def test_saturation_is_not_the_users_to_choose():
    environ = {"MS_ASCEND_CHECK_OVERFLOW_MODE": "SATURATION_MODE"}
    with hccl_variables(NEW, environ, timeout_seconds=300, port=25000, is_here=True) as hccl:
        assert hccl["MS_ASCEND_CHECK_OVERFLOW_MODE"] == "INFNAN_MODE"


def test_on_cpus_there_is_nothing_of_hccl():
    with hccl_variables(CPU, {}, timeout_seconds=300, port=25000, is_here=True) as hccl:
        assert hccl == {}
