"""Where a job runs, from configuration and environment; and how its ranks are dealt to unlike hosts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.gathering import Network
from ftlaunch.launcher.config import ClusterOptions, load_config
from ftlaunch.launcher.layout import make_layout
from ftlaunch.launcher.plan import make_plan
from ftlaunch.launcher.ranks import interface_environment, output_label, rank_starts, worlds
from ftlaunch.launcher.script_imports import ScriptImports
from ftlaunch.launcher.script_plan import Script, make_script_plan
from ftlaunch.launcher.site import find_site, orders_for
from tests.test_plan import CPU, GPU

ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-3]"}


@pytest.mark.parametrize(
    ("options", "environ", "kind", "names"),
    [
        ({}, {}, "local", ["node0"]),
        ({"nodes": 2}, {}, "local", ["node0", "node1"]),
        ({}, ALLOCATION, "slurm", ["n1", "n2", "n3"]),
        ({"nodes": 2}, ALLOCATION, "slurm", ["n1", "n2"]),
        ({"nodes": 2, "kind": "local"}, ALLOCATION, "local", ["node0", "node1"]),
        ({"hosts": ("a", "b[1-2]")}, ALLOCATION, "ssh", ["a", "b1", "b2"]),
        ({}, {"SLURM_JOB_ID": "7"}, "local", ["node0"]),
    ],
)
def test_where_a_job_runs(options, environ, kind, names):
    site = find_site(ClusterOptions(**options), environ)
    assert (site.kind, [host.name for host in site.hosts]) == (kind, names)


@pytest.mark.parametrize(
    ("options", "environ", "words"),
    [
        ({"nodes": 4}, ALLOCATION, "--nodes 4, but there are 3 hosts of SLURM's job 7"),
        ({"nodes": 3, "hosts": ("a", "b")}, {}, "--nodes 3, but there are 2 hosts"),
        ({"kind": "slurm"}, {}, "not inside an allocation"),
        ({"kind": "ssh"}, {}, "no hosts are named"),
        ({"kind": "local", "hosts": ("a",)}, {}, "contradict"),
        ({"hostfile": "x", "hosts": ("a",)}, {}, "both --hostfile and cluster.hosts"),
    ],
)
def test_what_does_not_fit_is_said(options, environ, words):
    with pytest.raises(UserError, match=words):
        find_site(ClusterOptions(**options), environ)


def test_words_of_a_list_of_hosts_keep_their_brackets():
    config = load_config(file=None, flags={}, overrides=["cluster.hosts=n[1,3-4],m"])
    assert config.cluster.hosts == ("n[1,3-4]", "m")


def test_fewer_nodes_must_be_allowed_by_the_number_of_nodes():
    with pytest.raises(UserError, match=r"cluster\.min_nodes is 3: the job has 2 nodes"):
        load_config(file=None, flags={"nodes": 2}, overrides=["cluster.min_nodes=3"])


def test_ranks_of_unlike_hosts_are_numbered_node_by_node(tmp_path):
    """2 + 1 GPUs, by the slots of a hostfile: ranks 0 and 1, then 2."""
    (tmp_path / "hosts").write_text("a slots=2\nb slots=1\n")
    config = load_config(file=None, flags={"hostfile": str(tmp_path / "hosts")}, overrides=[])
    site = find_site(config.cluster, {})
    plan = make_plan(config, [GPU, GPU], site, output_dir="out")
    assert (plan.world_size, plan.num_nodes) == (3, 2)
    places = [
        [(world.rank, world.local_rank, world.local_size, world.node_rank) for world in ranks]
        for ranks in worlds(plan.hosts, "10.0.0.1", 25000)
    ]
    assert places == [[(0, 0, 2, 0), (1, 1, 2, 0)], [(2, 0, 1, 1)]]
    shown = replace(config.cluster, show_output="all")
    assert [output_label(shown, plan.hosts, rank) for rank in range(3)] == [
        "[a:0] ",
        "[a:1] ",
        "[b:2] ",
    ]
    network = Network(address="10.0.0.1", interfaces=("eth0", "ib1"))
    starts = rank_starts(plan, network, 25000, tmp_path, {})
    assert [[rank.env["GLOO_SOCKET_IFNAME"] for rank in ranks] for ranks in starts] == [
        ["eth0", "eth0"],
        ["ib1"],
    ]
    assert {rank.env["MASTER_ADDR"] for ranks in starts for rank in ranks} == {"10.0.0.1"}


@pytest.mark.parametrize(
    ("slots", "devices", "words"),
    [("5", None, "slots=5 on b, which has 4"), ("1", 5, "--devices 5 on a, which has 4")],
)
def test_more_ranks_than_devices(tmp_path, slots, devices, words):
    (tmp_path / "hosts").write_text(f"a slots=1\nb slots={slots}\n")
    options = ClusterOptions(hostfile=str(tmp_path / "hosts"), devices=devices)
    site = find_site(options, {})
    with pytest.raises(UserError, match=words):
        make_layout(options, [GPU, GPU], site, [], default_start="fork")


def test_threads_are_those_of_the_fullest_host(tmp_path):
    """8 cores: 2 ranks on one host, 4 on the other, so 2 threads each."""
    (tmp_path / "hosts").write_text("a slots=2\nb slots=4\n")
    options = ClusterOptions(hostfile=str(tmp_path / "hosts"))
    layout = make_layout(options, [CPU, CPU], find_site(options, {}), [], default_start="fork")
    assert CPU.cpu_cores == 8
    assert layout.threads_per_rank == 2


def test_interfaces_that_the_user_has_chosen_stay():
    chosen = {"NCCL_SOCKET_IFNAME": "ib0"}
    given = interface_environment("eth1", chosen)
    assert given == {"GLOO_SOCKET_IFNAME": "eth1", "HCCL_SOCKET_IFNAME": "=eth1"}
    assert interface_environment("lo", {}) == {"GLOO_SOCKET_IFNAME": "lo"}
    assert interface_environment("", {}) == {}


def test_what_travels_over_ssh():
    """What the libraries read and what the user names; nothing that is this machine's own."""
    environ = {
        "HF_TOKEN": "x",
        "NCCL_DEBUG": "INFO",
        "PATH": "/bin",
        "HOME": "/root",
        "SSH_AUTH_SOCK": "/x",
        "MY_KEY": "1",
        "AWS_SECRET_ACCESS_KEY": "2",
    }
    options = ClusterOptions(hosts=("a",), export=("MY_*",))
    orders = orders_for(find_site(options, {}), options, environ)
    assert orders.env == {"HF_TOKEN": "x", "NCCL_DEBUG": "INFO", "MY_KEY": "1"}


# -- how the ranks of a script are started ------------------------------------------------------

ONE_CORE_EACH = replace(CPU, cpu_cores=2)


@pytest.mark.parametrize(
    ("machine", "options", "leading", "method"),
    [
        (ONE_CORE_EACH, {"nodes": 2}, ("torch",), "fork"),
        (ONE_CORE_EACH, {"nodes": 16}, ("numpy", "torch"), "fork"),
        (ONE_CORE_EACH, {"devices": 4}, ("torch",), "fork"),
        # It was asked for.
        (ONE_CORE_EACH, {"nodes": 16, "start_method": "exec"}, ("torch",), "exec"),
        # Something may have been set before.
        (ONE_CORE_EACH, {"nodes": 16}, (), "exec"),
        (ONE_CORE_EACH, {"nodes": 16}, ("numpy",), "exec"),
        # There is nobody to share with, or a core for each.
        (ONE_CORE_EACH, {"nodes": 1}, ("torch",), "exec"),
        (ONE_CORE_EACH, {"hosts": ("a", "b")}, ("torch",), "exec"),
        (replace(CPU, cpu_cores=64), {"nodes": 16}, ("torch",), "exec"),
        # Forking where there are GPUs was never tried.
        (replace(GPU, cpu_cores=4), {"devices": 4}, ("torch",), "exec"),
    ],
)
def test_how_the_ranks_of_a_script_are_started(machine, options, leading, method):
    options = ClusterOptions(**options)
    site = find_site(options, {})
    plan = make_script_plan(
        options,
        [machine] * len(site.hosts),
        site,
        Script(kind="path", target="train.py", arguments=()),
        working_dir="/",
        imports=ScriptImports(anywhere=("torch", "transformers"), leading=leading),
    )
    (reason,) = (reason for reason in plan.reasons if reason.choice == "start")
    assert plan.start_method == reason.value == method
    # What is not known to come first is not imported before its time.
    assert plan.preload == (leading if method == "fork" else ())
