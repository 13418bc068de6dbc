"""`ftlaunch doctor`: what it finds, what it says of it, and that it goes on past what is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import venv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ftlaunch.cluster.events import Inspected
from ftlaunch.cluster.gathering import Inspection, Network
from ftlaunch.cluster.hosts import Host
from ftlaunch.cluster.machine import Machine
from ftlaunch.cluster.mesh import Unreached
from ftlaunch.launcher.checks import (
    Finding,
    compare_machines,
    judge_inspections,
    judge_machines,
)
from ftlaunch.launcher.checkup import Checkup, Exchanged, NodeReport, Speed
from ftlaunch.launcher.config import ClusterOptions
from ftlaunch.launcher.site import Site
from ftlaunch.strategies.exchange import behind, bus_bandwidth
from tests.jobs import (
    MODULE,
    assert_mistake,
    assert_no_process_left,
    finish,
    ftlaunch,
    process_name,
    processes_of,
    said,
    start,
    wait_until,
    write_data,
    write_model,
)
from tests.played_hosts import covered
from tests.ssh_bed import SshBed, SshHost

_GIB = 1 << 30
GPUS = Machine(
    hostname="gpu1",
    accelerator="cuda",
    device_name="NVIDIA H100",
    num_devices=8,
    device_memory_bytes=80 * _GIB,
    fast_bf16=True,
    cpu_cores=64,
    memory_bytes=512 * _GIB,
    versions={
        "python": "3.11.7",
        "ftlaunch": "0.1.0",
        "torch": "2.9.0",
        "torch_cuda": "12.8",
        "driver": "570.86",
    },
    code_fingerprint="abc",
    notes=(),
)
CPU = replace(
    GPUS,
    hostname="login",
    accelerator="cpu",
    device_name="AMD EPYC",
    num_devices=1,
    versions={"python": "3.11.7", "ftlaunch": "0.1.0", "torch": "2.9.0+cpu"},
)
CLUSTER = ClusterOptions()


def site_of(*names: str, slots: int | None = None) -> Site:
    hosts = tuple(Host(name=name, slots=slots) for name in names)
    return Site(kind="ssh", hosts=hosts, why=f"all {len(hosts)} hosts of h, over ssh")


def with_versions(machine: Machine, **versions: str | None) -> Machine:
    """With these versions instead; None: not installed."""
    merged = {**machine.versions, **versions}
    return replace(machine, versions={k: v for k, v in merged.items() if v is not None})


def inspection(**found: Any) -> Inspection:
    """Of a node where all is well, but for what is given."""
    own = {k: found.pop(k) for k in ("seconds_ahead", "is_seen") if k in found}
    values: dict[str, Any] = {
        "time": 0.0,
        "missing": {},
        "sees_token": True,
        "unwritable": "",
        "free_bytes": 100 * _GIB,
        **found,
    }
    return Inspection(found=Inspected(**values), **{"seconds_ahead": 0.01, "is_seen": True, **own})


def texts(findings: list[Finding], *, fatal: bool) -> list[str]:
    return [finding.text for finding in findings if finding.fatal == fatal]


# -- what is wrong ------------------------------------------------------------------------------


def test_machines_that_are_alike_have_no_findings():
    site, machines = site_of("a", "b"), [GPUS, replace(GPUS, hostname="gpu2")]
    assert compare_machines(site, machines) == []
    assert judge_machines(site, machines, CLUSTER, "auto") == []


@pytest.mark.parametrize(
    ("name", "value", "fatal"),
    [("torch", "2.8.0", True), ("python", "3.12.1", True), ("driver", "560.1", False)],
)
def test_different_versions_are_shown_by_node(name, value, fatal):
    other = with_versions(GPUS, **{name: value})
    [finding] = compare_machines(site_of("a", "b"), [GPUS, other])
    assert finding.fatal == fatal
    assert f"versions of {name}" in finding.text
    assert ["b", value.rpartition(".")[0] if name == "python" else value] in [
        line.split() for line in finding.text.splitlines()
    ]


def test_a_package_that_only_some_nodes_have_is_no_difference():
    """Only where the job needs it is its absence a problem."""
    with_deepspeed = with_versions(GPUS, deepspeed="0.19.8")
    site, machines = site_of("a", "b"), [with_deepspeed, GPUS]
    assert compare_machines(site, machines) == []
    assert judge_machines(site, machines, CLUSTER, "ddp") == []
    [text] = texts(judge_machines(site, machines, CLUSTER, "zero2"), fatal=True)
    assert text.startswith("deepspeed is not installed for the Python on b")


def test_different_code_is_a_problem():
    other = replace(GPUS, code_fingerprint="def")
    [text] = texts(compare_machines(site_of("a", "b"), [GPUS, other]), fatal=True)
    assert "abc" in text
    assert "def" in text


def test_every_obstacle_is_told_not_only_the_first():
    machines = [
        GPUS,
        with_versions(GPUS, torch="2.9.0+cpu", torch_cuda=None),
        CPU,
        with_versions(GPUS, driver="470.1"),
    ]
    site = site_of("a", "b", "c", "d", slots=9)
    findings = judge_machines(site, machines, CLUSTER, "auto")
    problems, notes = texts(findings, fatal=True), texts(findings, fatal=False)
    assert any("different accelerators" in text and "c     login  cpu" in text for text in problems)
    assert any(text.startswith("b: ") and "CPU build" in text for text in problems)
    # A CPU has as many ranks as are asked for.
    assert [t.split(",")[0] for t in problems if t.startswith("slots")] == [
        f"slots=9 on {name}" for name in "abd"
    ]
    assert [text.partition(",")[0] for text in notes] == [
        "d: the driver 470.1 is older than CUDA 12"
    ]


def test_a_missing_framework_is_told_with_what_to_install():
    machines = [CPU, with_versions(CPU, torch=None)]
    [finding] = judge_machines(site_of("a", "b"), machines, CLUSTER, "auto")
    assert finding.fatal
    assert "torch is not installed for the Python on b" in finding.text
    assert "pip install torch" in finding.text


def test_what_nodes_see_is_judged():
    findings = judge_inspections(
        site_of("a", "b", "c", "d", "e"),
        "/out",
        [
            inspection(seconds_ahead=-7.0),
            inspection(sees_token=False),
            inspection(unwritable="Permission denied"),
            inspection(free_bytes=1000),
            inspection(missing={"/data": "No such file or directory"}),
        ],
    )
    problems, notes = texts(findings, fatal=True), texts(findings, fatal=False)
    assert [text.partition(":")[0] for text in problems] == [
        "the output folder /out is not shared",
        "c cannot write to the output folder /out",
        "/data cannot be read on e",
    ]
    assert any("clock of a is -7 s" in text for text in notes)
    assert any(text.startswith("d: 0 MB are free") for text in notes)
    assert len(notes) == 2


# -- how it is shown ----------------------------------------------------------------------------


def checkup(**changes: Any) -> Checkup:
    values: dict[str, Any] = {
        "why_site": "all 3 hosts of h, over ssh",
        "folder": "/out",
        "nodes": (
            NodeReport(name="node-1", machine=GPUS, inspection=inspection()),
            NodeReport(name="n2", machine=None, reason="exit code 255:\x1b[31m no\nroute"),
            NodeReport(name="n3", machine=replace(GPUS, hostname="gpu3"), inspection=None),
        ),
        "network": Network(address="10.0.0.1", interfaces=("eth0", "ib0")),
        "unreached": (),
        "exchanged": Exchanged(
            backend="nccl",
            num_nodes=2,
            world_size=16,
            speeds=(Speed(num_bytes=1 << 20, seconds=0.001, bus_bytes_per_second=1.5e9),),
            skipped="",
            works=True,
        ),
        "findings": (),
        "seconds": {},
        **changes,
    }
    return Checkup(**values)


def test_the_table_has_a_row_for_every_node_in_order():
    lines = checkup().lines()
    header = next(line for line in lines if line.startswith("  node "))
    at = lines.index(header)
    assert "driver" in header
    assert "CANN" not in header
    rows = lines[at + 1 : at + 4]
    assert [row.split()[0] for row in rows] == ["node-1", "n2", "n3"]
    assert rows[1].split() == ["n2", "cannot", "be", "used:", "exit", "code", "255:", "no", "route"]
    assert rows[0].index("gpu1") == header.index("host") == rows[2].index("gpu3")
    assert "8 × NVIDIA H100" in rows[0]
    assert "80 GiB" in rows[0]
    assert "1 MiB  1,000 µs  1.5 GB/s" in "\n".join(lines)
    assert lines[-1] == "a job would run here"


def test_a_table_without_any_node():
    lines = checkup(nodes=(NodeReport(name="n2", machine=None, reason="gone"),)).lines()
    assert "  n2    cannot be used: gone" in lines


def test_problems_come_before_notes_and_decide():
    found = checkup(
        findings=(Finding(fatal=False, text="odd"), Finding(fatal=True, text="wrong\n  rows")),
        unreached=(Unreached(node="n1", other="n3", addresses=("10.0.0.3",), why="refused"),),
    )
    lines = found.lines()
    assert lines.index("problem: wrong") < lines.index("note: odd")
    assert lines[lines.index("problem: wrong") + 1] == "      rows"
    assert lines[-1].startswith("a job would fail here: 1 problem to mend")
    assert any(line.split() == ["n1", "n3", "10.0.0.3", "refused"] for line in lines)
    assert not found.would_run


def test_the_json_holds_all_of_it():
    raw = json.loads(json.dumps(checkup().to_json()))
    assert raw["would_run"] is True
    assert [node["reached"] for node in raw["nodes"]] == [True, False, True]
    assert raw["nodes"][0]["machine"]["versions"]["driver"] == "570.86"
    assert raw["nodes"][0]["free_bytes"] == 100 * _GIB
    assert raw["all_reduce"]["sizes"] == [
        {"num_bytes": 1 << 20, "latency_us": 1000.0, "bus_bandwidth_gb_per_s": 1.5}
    ]


# -- the exchange -------------------------------------------------------------------------------


def test_the_bus_bandwidth_is_that_of_nccl_tests():
    # 4 ranks, 1 GB in 1 s: each link carries 2 * 3 / 4 of it.
    assert bus_bandwidth(10**9, 1.0, 4) == 1.5e9
    assert bus_bandwidth(10**9, 0.5, 2) == 2e9


def test_the_ranks_that_are_behind_are_named():
    assert behind({0: "joined", 1: "begun", 2: "joined"}, 3) == ([1], "begun")
    assert behind({0: "added"}, 3) == ([1, 2], "")
    assert behind({0: "begun", 1: "begun"}, 2) == ([0, 1], "begun")


# -- this machine -------------------------------------------------------------------------------


def left_in_tmp() -> set[str]:
    return {path.name for path in Path("/tmp").glob("*ftlaunch-doctor*")}


def test_nodes_of_this_machine(tmp_path):
    before = left_in_tmp()
    result = ftlaunch("doctor", "--nodes", 2, "--json", cwd=tmp_path)
    assert result.returncode == 0, said(result)
    found = json.loads(result.stdout)
    assert found["would_run"] is True
    assert found["findings"] == []
    assert [node["shares_folder"] for node in found["nodes"]] == [True, True]
    assert found["all_reduce"]["works"] is True
    assert found["all_reduce"]["world_size"] == 2
    assert [size["num_bytes"] for size in found["all_reduce"]["sizes"]] == [
        1 << 10,
        1 << 20,
        16 << 20,
    ]
    for size in found["all_reduce"]["sizes"]:
        assert size["latency_us"] > 0
        assert size["bus_bandwidth_gb_per_s"] > 0
    assert list(tmp_path.iterdir()) == []
    assert left_in_tmp() <= before


def test_one_rank_has_nobody_to_talk_to(tmp_path):
    result = ftlaunch("doctor", "-o", tmp_path / "a" / "out", cwd=tmp_path)
    assert result.returncode == 0, said(result)
    assert "all-reduce  skipped: one rank" in result.stdout
    assert result.stdout.endswith("\na job would run here\n")
    # Neither the folder nor those above it are made.
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--nods", "2"], "--nods"),
        (["--hostfile", "hosts"], "line 1"),
        (["cluster.nodez=2"], "cluster.nodez"),
        (["--strategy", "dpp"], "no strategy 'dpp'"),
    ],
)
def test_a_mistake_in_the_command_is_no_finding(tmp_path, words, reason):
    (tmp_path / "hosts").write_text("n1 slots=many\n")
    result = ftlaunch("doctor", "--json", *words, cwd=tmp_path, timeout=60)
    assert_mistake(result, reason)
    assert result.stdout == ""


def test_what_a_job_would_say_of_its_input(tmp_path):
    model, data = write_model(tmp_path / "model"), write_data(tmp_path / "data", num_train=8)
    words = ["--dataset", data, "--json", "model.random_weights=true"]
    result = ftlaunch("doctor", *words, "--model", tmp_path / "nothing", cwd=tmp_path)
    assert result.returncode == 1, said(result)
    texts = [each["text"] for each in json.loads(result.stdout)["findings"]]
    assert any("nothing" in text for text in texts)
    # More ranks than samples of a global batch.
    more = ["--nodes", 2, "--model", model, "train.global_batch_size=1"]
    result = ftlaunch("doctor", *words, *more, cwd=tmp_path)
    assert result.returncode == 1, said(result)
    found = json.loads(result.stdout)
    [finding] = found["findings"]
    assert "a global batch of 1 cannot be spread over 2 ranks" in finding["text"]
    assert found["all_reduce"]["works"] is True


def test_a_rank_that_hangs_is_named(tmp_path):
    words = ["--nodes", 3, "-o", tmp_path, "cluster.collective_timeout_seconds=4"]
    with start("doctor", "--json", *words) as process:

        def hangs() -> bool:
            for pid in processes_of(tmp_path):
                if process_name_of(pid) == "rank-1":
                    # Time to say that it has begun; the whole test takes several times as long.
                    time.sleep(0.05)
                    os.kill(pid, signal.SIGSTOP)
                    return True
            return False

        wait_until(hangs, 60, "rank 1 begins", every=0.002)
        result = finish(process, 60)
    assert result.returncode == 1, said(result)
    found = json.loads(result.stdout)
    [finding] = found["findings"]
    assert finding["text"].startswith("the all-reduce over 3 ranks on 3 nodes failed")
    assert "rank 1 on node1 does not answer: its process is stopped" in finding["text"]
    assert found["all_reduce"]["works"] is False
    assert_no_process_left(tmp_path)


def process_name_of(pid: int) -> str:
    try:
        return process_name(pid)
    except OSError:
        return ""


def test_ctrl_c_ends_it(tmp_path):
    with start("doctor", "--nodes", 2, "-o", tmp_path) as process:
        wait_until(lambda: len(processes_of(tmp_path)) > 2, 30, "agents are there")
        process.send_signal(signal.SIGINT)
        result = finish(process, 30)
    assert result.returncode == 130, said(result)
    assert "Traceback" not in said(result)
    assert_no_process_left(tmp_path)


# -- hosts over ssh -----------------------------------------------------------------------------


def over_ssh(
    bed: SshBed, *words: object, code: int, cwd: Path, **env: str
) -> tuple[dict[str, Any], float]:
    """What the doctor prints on the login host as JSON."""
    command = [*bed.at(folder=cwd), *MODULE, "doctor", "--json", *map(str, words)]
    done = subprocess.run(
        command,
        env={**bed.environment(), **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["would_run"] == (code == 0)
    return found, sum(found["seconds"].values())


ALL = "cluster.hosts=n[1-4]"


def problems_of(found: dict[str, Any]) -> list[str]:
    return [each["text"] for each in found["findings"] if each["fatal"]]


def test_four_hosts(ssh_hosts, tmp_path):
    found, _ = over_ssh(ssh_hosts, ALL, code=0, cwd=tmp_path)
    assert [node["machine"]["hostname"] for node in found["nodes"]] == ["n1", "n2", "n3", "n4"]
    assert [node["shares_folder"] for node in found["nodes"]] == [True] * 4
    assert found["network"]["interfaces"] == ["eth0"] * 4
    assert found["all_reduce"]["world_size"] == 4
    assert all(size["bus_bandwidth_gb_per_s"] > 0 for size in found["all_reduce"]["sizes"])
    print(f"seconds: {found['seconds']}")
    # What every job on several machines waits for, once its agents have said hello.
    assert found["seconds"]["quick"] < 2.0
    assert list(tmp_path.iterdir()) == []
    assert all(ssh_hosts.processes(name) == [] for name in ("n1", "n2", "n3", "n4"))


def test_hosts_that_cannot_be_reached_do_not_hide_the_others(ssh_hosts, tmp_path):
    with (
        ssh_hosts.host(SshHost(name="n2", reach="down")),
        ssh_hosts.host(SshHost(name="n3", login="refused")),
    ):
        found, seconds = over_ssh(ssh_hosts, ALL, code=1, cwd=tmp_path)
    print(f"{seconds:.1f} s: {found['seconds']}")
    assert [node["reached"] for node in found["nodes"]] == [True, False, False, True]
    assert "No route to host" in found["nodes"][1]["reason"]
    assert "Permission denied" in found["nodes"][2]["reason"]
    assert found["nodes"][3]["machine"]["hostname"] == "n4"
    [problem] = problems_of(found)
    assert problem.startswith("2 of 4 nodes cannot be used: n2, n3.")
    # The others were tried all the same.
    assert found["all_reduce"]["works"] is True
    assert found["all_reduce"]["world_size"] == 2


def test_no_host_at_all(ssh_hosts, tmp_path):
    with ssh_hosts.host(SshHost(name="n2", reach="refused")):
        found, _ = over_ssh(ssh_hosts, "cluster.hosts=n2", code=1, cwd=tmp_path)
    assert found["nodes"][0]["reached"] is False
    assert "Connection refused" in found["nodes"][0]["reason"]


def test_an_output_folder_that_is_not_shared(ssh_hosts, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with covered(ssh_hosts.played("n3"), out):
        found, _ = over_ssh(ssh_hosts, ALL, "-o", out, code=1, cwd=tmp_path)
        # Nothing is left where nobody else would find it.
        assert ssh_hosts.run("ls", "-A", out, host="n3").stdout == ""
    [problem] = problems_of(found)
    assert problem.startswith(f"the output folder {out} is not shared: n3")
    assert [node["shares_folder"] for node in found["nodes"]] == [True, True, False, True]
    assert found["all_reduce"]["works"] is True
    assert list(out.iterdir()) == []


def test_data_that_one_host_lacks(ssh_hosts, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    model, data = write_model(tmp_path / "model"), write_data(here / "data", num_train=8)
    words = ["--model", model, "--dataset", data, "model.random_weights=true"]
    with covered(ssh_hosts.played("n4"), here):
        found, _ = over_ssh(ssh_hosts, ALL, *words, code=1, cwd=tmp_path)
    [problem] = problems_of(found)
    assert problem.startswith(f"{data} cannot be read on n4: No such file or directory.")
    assert found["nodes"][3]["missing"] == {str(data): "No such file or directory"}


def test_hosts_that_do_not_reach_each_other(ssh_hosts, tmp_path):
    way = ["ip", "route", "add", "blackhole", f"{ssh_hosts.address('n4')}/32"]
    with ssh_hosts.host(SshHost(name="n2")):
        ssh_hosts.run(*way, host="n2").check_returncode()
        found, _ = over_ssh(ssh_hosts, ALL, code=1, cwd=tmp_path)
    [problem] = problems_of(found)
    assert problem.startswith("nodes do not reach each other: n2 to n4; n4 to n2.")
    assert {(each["node"], each["other"]) for each in found["unreached"]} == {
        ("n2", "n4"),
        ("n4", "n2"),
    }
    assert found["all_reduce"]["skipped"] == "the nodes do not reach each other"


def test_a_first_host_that_another_does_not_reach(ssh_hosts, tmp_path):
    way = ["ip", "route", "add", "blackhole", f"{ssh_hosts.address('n1')}/32"]
    with ssh_hosts.host(SshHost(name="n2")):
        ssh_hosts.run(*way, host="n2").check_returncode()
        found, _ = over_ssh(ssh_hosts, ALL, code=1, cwd=tmp_path)
    first, second = problems_of(found)
    assert first.startswith("the first node has no address that every other node reaches")
    assert second.startswith("nodes do not reach each other: n1 to n2; n2 to n1.")
    assert found["network"] is None


def test_an_interface_that_leads_nowhere(ssh_hosts, tmp_path):
    words = ["cluster.collective_timeout_seconds=5", ALL]
    found, _ = over_ssh(ssh_hosts, *words, code=1, cwd=tmp_path, GLOO_SOCKET_IFNAME="lo")
    [problem] = problems_of(found)
    assert problem.startswith("the all-reduce over 4 ranks on 4 nodes failed")
    assert "GLOO_SOCKET_IFNAME=lo is set" in problem


@pytest.fixture(scope="module")
def pythons(tmp_path_factory):
    """An interpreter that is on n3 one with another torch, or none: {"old": …, "none": …}."""
    folder = tmp_path_factory.mktemp("pythons")
    return {kind: _python(folder / kind, kind) for kind in ("old", "none")}


def _python(folder: Path, kind: str) -> Path:
    """A script that runs this interpreter, but on n3 one whose packages are ours but for torch."""
    import torch

    venv.create(folder / "venv", symlinks=True, with_pip=False)
    [packages] = (folder / "venv" / "lib").glob("python*/site-packages")
    for path in Path(torch.__file__).parent.parent.iterdir():
        if not path.name.startswith("torch") or (path.name == "torch" and kind == "old"):
            (packages / path.name).symlink_to(path)
    if kind == "old":
        (packages / "torch-2.0.1.dist-info").mkdir()
        metadata = "Metadata-Version: 2.1\nName: torch\nVersion: 2.0.1\n"
        (packages / "torch-2.0.1.dist-info" / "METADATA").write_text(metadata)
    script = folder / "python"
    script.write_text(
        f'#!/bin/sh\n[ "$(hostname)" = n3 ] && exec {folder}/venv/bin/python "$@"\n'
        f'exec {sys.executable} "$@"\n'
    )
    script.chmod(0o755)
    return script


def test_a_host_without_torch(ssh_hosts, tmp_path, pythons):
    words = [ALL, f"cluster.python={pythons['none']}"]
    found, _ = over_ssh(ssh_hosts, *words, code=1, cwd=tmp_path)
    [problem] = problems_of(found)
    assert problem.startswith("torch is not installed for the Python on n3:")
    assert "torch" not in found["nodes"][2]["machine"]["versions"]
    assert found["all_reduce"]["skipped"]
    # The rest was looked at.
    assert found["nodes"][2]["shares_folder"] is True
    assert found["network"]["interfaces"] == ["eth0"] * 4


def test_a_host_with_another_torch(ssh_hosts, tmp_path, pythons):
    words = [ALL, f"cluster.python={pythons['old']}"]
    found, _ = over_ssh(ssh_hosts, *words, code=1, cwd=tmp_path)
    [problem] = problems_of(found)
    assert problem.startswith("the nodes have different versions of torch:")
    assert ["n3", "2.0.1"] in [line.split() for line in problem.splitlines()]


# -- SLURM --------------------------------------------------------------------------------------


def test_an_allocation(slurm, tmp_path):
    done = slurm.run("salloc", "-N4", "--", *MODULE, "doctor", "--json", timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert [node["machine"]["hostname"] for node in found["nodes"]] == ["n1", "n2", "n3", "n4"]
    assert found["all_reduce"]["world_size"] == 4
    assert all(size["latency_us"] > 0 for size in found["all_reduce"]["sizes"])
    assert list(tmp_path.iterdir()) == []
    slurm.wait_idle()
