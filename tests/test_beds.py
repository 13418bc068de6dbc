"""The clusters of the tests are what they promise, and leave nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.jobs import wait_until
from tests.played_hosts import PlayedHost
from tests.slurm_bed import NODES, SlurmBed
from tests.ssh_bed import SshBed, SshHost

_QUICKLY = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=2")


@pytest.fixture
def cluster(slurm):
    yield slurm
    slurm.clear()


# -- SLURM --------------------------------------------------------------------------------------


def test_four_nodes_run_a_step(cluster: SlurmBed) -> None:
    done = cluster.run("srun", "-N4", "hostname")
    assert sorted(done.stdout.split()) == list(NODES), done.stderr


def test_a_step_overlaps_in_an_allocation(cluster: SlurmBed) -> None:
    step = "srun -N1 -n1 -w n3 --overlap"
    script = f"{step} sleep 5 & sleep 1; {step} hostname; kill %1; wait"
    done = cluster.run("salloc", "-N4", "sh", "-c", script)
    assert done.stdout == "n3\n", done.stderr


def test_a_job_is_requeued(cluster: SlurmBed, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    # A step from the batch node has to reach another node.
    script.write_text(
        "#!/bin/sh\necho run ${SLURM_RESTART_COUNT:-0} $(srun -N1 -n1 -w n2 --overlap hostname)\n"
        "[ ${SLURM_RESTART_COUNT:-0} = 1 ] || exec sleep 100\n"
    )
    out = tmp_path / "out"
    job = cluster.submit("-N2", "--open-mode=append", "-o", out, script)
    wait_until(lambda: out.exists() and "run 0 n2" in out.read_text(), 20, "the job runs")
    assert cluster.run("scontrol", "requeue", job).returncode == 0
    cluster.wait_state(job, "COMPLETED", seconds=60)
    assert "run 1 n2\n" in out.read_text()
    assert cluster.drained() == {}


@pytest.mark.parametrize(("batch", "heard"), [(False, "step"), (True, "batch")])
def test_a_warning_reaches_steps_or_the_batch_shell(
    cluster: SlurmBed, tmp_path: Path, batch: bool, heard: str
) -> None:
    out = tmp_path / "out"
    # A step's signal goes to the sleep as well, which dies of it: as the loop's condition it ended
    # the loop, and the shell could be gone before its own signal came.
    listen = "trap 'echo {0} hears' USR1; echo {0} ready; while :; do sleep 0.1; done"
    (tmp_path / "step.sh").write_text(listen.format("step"))
    script = tmp_path / "job.sh"
    script.write_text(
        f"#!/bin/bash\nsrun -n1 --overlap sh {tmp_path}/step.sh &\n{listen.format('batch')}"
    )
    job = cluster.submit("-N1", "-o", out, script)
    wait_until(lambda: out.exists() and out.read_text().count("ready") == 2, 20, "the job runs")
    cluster.warn(job, batch=batch)
    wait_until(lambda: "hears" in out.read_text(), 10, "the signal arrives")
    time.sleep(0.5)
    assert out.read_text().count("hears") == 1
    assert f"{heard} hears" in out.read_text()


def test_a_node_that_vanishes_is_down_and_comes_back(cluster: SlurmBed) -> None:
    job = cluster.submit("-N2", "--no-kill", "-w", "n1,n4", "-o", "/dev/null", "--wrap=sleep 100")
    cluster.wait_state(job, "RUNNING")
    cluster.kill_node("n4")
    assert cluster.hosts["n4"].processes() == []
    cluster.mark_down("n4")
    wait_until(lambda: "down" in cluster.node_states()["n4"], 10, "n4 is down")
    wait_until(lambda: cluster.job(job)["NodeList"] == "n1", 10, "the job goes on without n4")
    cluster.clear()
    assert cluster.run("srun", "-w", "n4", "hostname").stdout == "n4\n"


def test_a_node_falls_silent_and_speaks_again(cluster: SlurmBed) -> None:
    with subprocess.Popen(
        ["srun", "-w", "n2", "sh", "-c", "while echo alive; do sleep 0.2; done"],
        env=cluster.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ) as step:
        assert step.stdout is not None
        assert step.stdout.readline() == "alive\n"
        cluster.freeze_node("n2")
        thaw = threading.Timer(1.5, cluster.thaw_node, ["n2"])
        thaw.start()
        try:
            begin = time.monotonic()
            lines = [step.stdout.readline() for _ in range(10)]
            assert time.monotonic() - begin > 1.5
            assert lines == ["alive\n"] * 10
        finally:
            thaw.join()
            step.terminate()
            step.communicate(timeout=20)


# -- ssh ----------------------------------------------------------------------------------------


def _ssh(bed: SshBed, host: str, *words: str) -> subprocess.CompletedProcess[str]:
    return bed.run("ssh", *_QUICKLY, host, *words)


def test_every_host_is_reached_under_its_name(ssh_hosts: SshBed) -> None:
    assert [_ssh(ssh_hosts, name, "hostname").stdout for name in NODES] == [
        f"{name}\n" for name in NODES
    ]


def test_a_host_reaches_another(ssh_hosts: SshBed) -> None:
    code = f"import socket; socket.create_connection(('{ssh_hosts.address('n3')}', 22), 5)"
    done = ssh_hosts.run(sys.executable, "-c", code, host="n1")
    assert done.returncode == 0, done.stderr


def test_a_cut_host_is_silent_until_it_is_mended(ssh_hosts: SshBed) -> None:
    words = [*ssh_hosts.at(), "ssh", *_QUICKLY, "n2", "echo up; sleep 3; echo still"]
    with subprocess.Popen(
        words, env=ssh_hosts.environment(), stdout=subprocess.PIPE, text=True
    ) as open_before:
        assert open_before.stdout is not None
        assert open_before.stdout.readline() == "up\n"
        ssh_hosts.cut("n2")
        try:
            done = _ssh(ssh_hosts, "n2", "hostname")
            assert done.returncode == 255
            assert "timed out" in done.stderr
            assert open_before.poll() is None
        finally:
            ssh_hosts.mend("n2")
        # What was open goes on as if nothing had been.
        assert open_before.stdout.readline() == "still\n"
        assert open_before.wait(timeout=10) == 0
    assert _ssh(ssh_hosts, "n2", "hostname").stdout == "n2\n"


@pytest.mark.parametrize(
    ("wrong", "code", "said"),
    [
        ({"key": "unknown"}, 255, "Host key verification failed."),
        ({"key": "changed"}, 255, "REMOTE HOST IDENTIFICATION HAS CHANGED"),
        ({"login": "refused"}, 255, "Permission denied (publickey)."),
        ({"login": "password"}, 255, "Permission denied (password)."),
        ({"reach": "refused"}, 255, "Connection refused"),
        ({"reach": "silent"}, 255, "Connection timed out"),
        ({"bashrc": "exit 3"}, 3, ""),
        ({"bashrc": "printf 'no newline'"}, 0, "no newlinebad\n"),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else "",
)
def test_a_host_fails_as_it_is_told(ssh_hosts: SshBed, wrong, code: int, said: str) -> None:
    with ssh_hosts.host(SshHost(name="bad", **wrong)):
        done = _ssh(ssh_hosts, "bad", "hostname")
        assert done.returncode == code
        assert said in done.stdout + done.stderr


def test_a_folder_of_a_host_is_not_shared(ssh_hosts: SshBed, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with ssh_hosts.host(SshHost(name="alone", own_folders=[tmp_path])):
        assert _ssh(ssh_hosts, "alone", f"ls {tmp_path}").stdout == ""
        assert _ssh(ssh_hosts, "n1", f"ls {tmp_path}").stdout == "file\n"


# -- the end ------------------------------------------------------------------------------------


def test_a_host_takes_everything_with_it(slurm) -> None:
    host = PlayedHost("gone", network=True)
    script = "setsid sh -c 'sleep 100 & exec env -i sleep 100' & sleep 0.2"
    host.run("sh", "-c", script, capture_output=False)
    wait_until(lambda: len(host.processes()) == 2, 5, "the host has two processes")
    pids = [host.pid, *host.processes()]
    host.close()
    assert not any(_is_alive(pid) for pid in pids)


def test_nothing_is_left_of_a_slurm(slurm: SlurmBed, tmp_path: Path) -> None:
    with SlurmBed() as bed:
        script = tmp_path / "job.sh"
        script.write_text("#!/bin/sh\nsetsid env -i sleep 100 &\nsrun --overlap sleep 100\n")
        job = bed.submit("-N1", "-o", tmp_path / "out", script)
        bed.wait_state(job, "RUNNING")
        hosts, folder = list(bed.hosts.values()), bed.folder
        wait_until(lambda: len(bed.processes("n1")) >= 4, 20, "the job's processes run")
        pids = [pid for host in hosts for pid in (host.pid, *host.processes())]
        # One daemon a host, munged, and what the job is.
        assert len(pids) > 2 * len(hosts)
        # The other one does not notice.
        slurm.wait_idle()
    assert not any(_is_alive(pid) for pid in pids)
    assert not folder.exists()


def test_nothing_is_left_of_ssh_hosts(ssh_hosts: SshBed) -> None:
    links = _links()
    with SshBed(("n1", "n2")) as bed:
        assert _ssh(bed, "n1", "setsid sleep 100 >/dev/null 2>&1 </dev/null &").returncode == 0
        assert len(bed.processes("n1")) == 1
        hosts = [bed.switch, bed.login, *(bed.played(name) for name in ("n1", "n2"))]
        pids = [pid for host in hosts for pid in (host.pid, *host.processes())]
        networks = [Path(f"/proc/{host.pid}/ns/net").readlink() for host in hosts]
        folder = bed.folder
        bed.cut("n2")
    assert not any(_is_alive(pid) for pid in pids)
    assert not folder.exists()
    assert _links() == links
    listed = subprocess.run(
        ["lsns", "--noheadings", "--output=NS", "--type=net"], capture_output=True, text=True
    ).stdout.split()
    assert listed
    assert not {f"net:[{number}]" for number in listed} & {str(network) for network in networks}


def _links() -> set[str]:
    return {entry.name for entry in Path("/sys/class/net").iterdir()}


def _is_alive(pid: int) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/ns/uts") != ""  # noqa: PTH115 (a zombie has none)
    except OSError:
        return False
