"""Jobs on hosts that are not this one: the same results, and what is said when hosts do not fit.

SLURM and ssh are real ones (tests/slurm_bed.py, tests/ssh_bed.py).
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.jobs import (
    SCRIPT,
    assert_mistake,
    assert_no_process_left,
    finish,
    ftlaunch,
    metrics_of,
    rank_process,
    said,
    start,
    wait_until,
)
from tests.ssh_bed import SshHost
from tests.training_jobs import Inputs, wait_for_step

STEPS = 6
# The demo in the precision in which topologies can be compared, without dropout's noise.
DEMO = (
    "--precision",
    "fp32",
    "model.dropout=0",
    f"train.max_steps={STEPS}",
    "train.eval_strategy=no",
)


def over_ssh(bed, *args, timeout=180.0, folder=None):
    """A command on the login host."""
    return ftlaunch(
        *args, command=[*bed.at(folder=folder), *SCRIPT], env=bed.environment(), timeout=timeout
    )


def in_allocation(bed, *args, nodes=4, timeout=180.0, folder=None):
    return ftlaunch(
        *args,
        command=["salloc", "--quiet", f"--nodes={nodes}", *SCRIPT],
        env=bed.environment(),
        timeout=timeout,
        cwd=folder,
    )


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in metrics_of(out) if "samples_digest" in line]


def digests(out: Path) -> list[str]:
    """What samples each step was made of."""
    return [line["samples_digest"] for line in metrics_of(out) if "samples_digest" in line]


@pytest.fixture(scope="module")
def local_losses(tmp_path_factory):
    out = tmp_path_factory.mktemp("local") / "out"
    done = ftlaunch("--nodes", 4, "-o", out, *DEMO)
    assert done.returncode == 0, said(done)
    return losses(out)


@pytest.fixture
def script(tmp_path):
    """A script that leaves a mark on each rank, and needs no framework."""
    path = tmp_path / "script" / "mark.py"
    path.parent.mkdir()
    path.write_text(
        "import os, pathlib, socket\n"
        "rank, size = os.environ['RANK'], os.environ['WORLD_SIZE']\n"
        "mark = f'{rank} of {size} on {socket.gethostname()}'\n"
        "pathlib.Path(__file__).with_name(f'{rank}.mark').write_text(mark)\n"
    )
    return path


def marks_of(script: Path) -> list[str]:
    return [path.read_text() for path in script.parent.glob("*.mark")]


# -- the same job elsewhere ---------------------------------------------------------------------


def test_four_hosts_over_ssh_compute_the_same(ssh_hosts, local_losses, tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# the four of them\nn[1-2] slots=1\nn3\nn4 slots=1\n")
    out = tmp_path / "out"
    done = over_ssh(ssh_hosts, "--hostfile", hostfile, "--nodes", 4, "-o", out, *DEMO)
    assert done.returncode == 0, said(done)
    assert losses(out) == pytest.approx(local_losses, abs=2e-6)
    assert len(losses(out)) == STEPS
    assert_no_process_left(out)


def test_an_allocation_is_used_without_a_flag(slurm, local_losses, tmp_path):
    out = tmp_path / "out"
    done = in_allocation(slurm, "-o", out, *DEMO)
    assert done.returncode == 0, said(done)
    assert "all 4 hosts of SLURM's job" in done.stdout
    assert losses(out) == pytest.approx(local_losses, abs=2e-6)
    assert len(losses(out)) == STEPS
    assert_no_process_left(out)
    slurm.wait_idle()
    assert not slurm.drained()


def test_a_submitted_job_computes_the_same(slurm, local_losses, tmp_path):
    out = tmp_path / "out"
    done = ftlaunch(
        *("submit", "--nodes", 4, "--time", "10", "-o", out, *DEMO), env=slurm.environment()
    )
    assert done.returncode == 0, said(done)
    [job] = re.findall(r"submitted as job (\d+)", done.stdout)
    assert slurm.wait_state(job, "COMPLETED", "FAILED", seconds=120) == "COMPLETED"
    assert losses(out) == pytest.approx(local_losses, abs=2e-6)
    assert len(losses(out)) == STEPS
    assert "all 4 hosts of SLURM's job" in (out / "logs" / f"slurm-{job}.log").read_text()
    slurm.wait_idle()


def test_a_part_of_an_allocation(slurm, tmp_path, script):
    done = in_allocation(slurm, "--nodes", 2, "-o", tmp_path / "out", script)
    assert done.returncode == 0, said(done)
    assert "2 of 4 hosts" in done.stdout
    assert sorted(marks_of(script)) == ["0 of 2 on n1", "1 of 2 on n2"]


def test_more_nodes_than_were_allocated(slurm, tmp_path):
    done = in_allocation(slurm, "--nodes", 5, "-o", tmp_path / "out", *DEMO)
    assert_mistake(done, "--nodes 5", "4 hosts of SLURM's job")
    assert not (tmp_path / "out").exists()


def test_how_the_allocation_is_cut_into_tasks_does_not_matter(slurm, tmp_path, script):
    command = ["salloc", "--quiet", "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1"]
    done = ftlaunch(
        *("-o", tmp_path / "out", script),
        command=[*command, *SCRIPT],
        env=slurm.environment(),
    )
    assert done.returncode == 0, said(done)
    assert "all 2 hosts" in done.stdout
    assert sorted(marks_of(script)) == ["0 of 2 on n1", "1 of 2 on n2"]


def test_uneven_slots(ssh_hosts, local_losses, tmp_path):
    """3 + 1 ranks on two hosts train what four nodes train."""
    (tmp_path / "hosts").write_text("n1 slots=3\nn2\n")
    out = tmp_path / "out"
    done = over_ssh(
        ssh_hosts, "--hostfile", tmp_path / "hosts", "-o", out, "cluster.show_output=all", *DEMO
    )
    assert done.returncode == 0, said(done)
    assert losses(out) == pytest.approx(local_losses, abs=2e-6)


def test_strange_paths_and_a_prologue(ssh_hosts, tmp_path):
    folder = tmp_path / 'it\'s a "größe" folder; $HOME'
    folder.mkdir()
    mark = folder / "mark"
    prologue = f"cat\necho 'it is \\ said' > {str(tmp_path / 'mark')!r}\nexport FROM_SITE=1"
    (folder / "script.py").write_text(
        "import os\nassert os.environ['FROM_SITE'] == '1' and os.environ['MINE'] == \"a'b\"\n"
        f"open({str(mark)!r} + os.environ['RANK'], 'w').write(os.getcwd())\n"
    )
    done = ftlaunch(
        *("cluster.hosts=n[1-2]", f"cluster.prologue={prologue}", "cluster.export=MI*"),
        *("-o", folder / "out", "script.py"),
        command=[*ssh_hosts.at(folder=folder), *SCRIPT],
        env={**ssh_hosts.environment(), "MINE": "a'b"},
    )
    assert done.returncode == 0, said(done)
    assert [Path(f"{mark}{rank}").read_text() for rank in (0, 1)] == [str(folder)] * 2
    assert (tmp_path / "mark").read_text() == "it is \\ said\n"


def test_no_secret_is_on_a_command_line_or_on_disk(ssh_hosts, tmp_path):
    secret = "hf_verysecretvalue"
    out = tmp_path / "out"
    (tmp_path / "script.py").write_text(
        "import os, time, pathlib\n"
        f"assert os.environ['HF_TOKEN'] == {secret[:5]!r} + {secret[5:]!r}\n"
        "lines = [p.read_bytes() for p in pathlib.Path('/proc').glob('[0-9]*/cmdline')]\n"
        f"assert not any(({secret[:5]!r} + {secret[5:]!r}).encode() in line for line in lines)\n"
    )
    done = ftlaunch(
        *("cluster.hosts=n[1-2]", "-o", out, tmp_path / "script.py"),
        command=[*ssh_hosts.at(), *SCRIPT],
        env={**ssh_hosts.environment(), "HF_TOKEN": secret},
    )
    assert done.returncode == 0, said(done)
    files = [path for path in out.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if secret.encode() in path.read_bytes()]


# -- hosts that cannot be used ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "words"),
    [
        (SshHost(name="bad", key="unknown"), ["not known", "ssh bad true"]),
        (SshHost(name="bad", key="changed"), ["erification failed"]),
        (SshHost(name="bad", login="refused"), ["Permission denied", "ssh-copy-id bad"]),
        (SshHost(name="bad", login="password"), ["Permission denied", "no password prompt"]),
        (SshHost(name="bad", reach="refused"), ["refused", "sshd"]),
        (SshHost(name="bad", reach="down"), ["down"]),
        (SshHost(name="bad", reach="silent"), ["down"]),
        (SshHost(name="bad", bashrc="exit 3\n"), ["exit code 3", "start-up files"]),
    ],
    ids=["unknown", "changed", "key", "password", "no sshd", "down", "silent", "shell"],
)
def test_a_host_that_cannot_be_reached_is_named(ssh_hosts, tmp_path, host, words):
    with ssh_hosts.host(host):
        began = time.monotonic()
        done = over_ssh(ssh_hosts, "cluster.hosts=n1,bad,n2", "-o", tmp_path / "out", *DEMO)
        seconds = time.monotonic() - began
    assert_mistake(done, "1 of 3 nodes", "bad: ", *words)
    assert "n1: " not in said(done)
    # Ten from the start of ssh; the rest is our own start and the machine's.
    assert seconds < 15, seconds
    assert_no_process_left(tmp_path / "out")


def test_all_hosts_that_cannot_be_reached_are_named(ssh_hosts, tmp_path):
    with (
        ssh_hosts.host(SshHost(name="bad1", login="refused")),
        ssh_hosts.host(SshHost(name="bad2", reach="down")),
    ):
        done = over_ssh(ssh_hosts, "cluster.hosts=n1,bad[1-2],nowhere", "-o", tmp_path / "out")
    assert_mistake(done, "3 of 4 nodes", "bad1: ", "bad2: ", "nowhere: ", "no such host")


@pytest.mark.parametrize("ending", ["\n", ""])
def test_a_shell_that_prints_changes_nothing(ssh_hosts, tmp_path, script, ending):
    bashrc = f"printf 'welcome to {{\"kind\": 1}}{ending}'\nprintf 'and more' >&2\n"
    with ssh_hosts.host(SshHost(name="chatty", bashrc=bashrc)):
        done = over_ssh(ssh_hosts, "cluster.hosts=n1,chatty", "-o", tmp_path / "out", script)
    assert done.returncode == 0, said(done)
    assert sorted(marks_of(script)) == ["0 of 2 on n1", "1 of 2 on chatty"]


def test_an_output_folder_that_is_not_shared(ssh_hosts, tmp_path):
    out = tmp_path / "mine" / "out"
    out.parent.mkdir()
    with ssh_hosts.host(SshHost(name="apart", own_folders=[out.parent])):
        done = over_ssh(ssh_hosts, "cluster.hosts=n1,apart", "-o", out, *DEMO)
    assert_mistake(done, "not shared", "apart", str(out), "--output-dir")
    assert not list(out.glob("logs/rank-*"))


def test_a_python_that_is_not_there(ssh_hosts, tmp_path):
    done = over_ssh(
        ssh_hosts, "cluster.hosts=n1", "cluster.python=/no/python", "-o", tmp_path / "out", *DEMO
    )
    assert_mistake(done, "n1: ", "no such Python", "cluster.python")


def test_data_that_only_we_have(ssh_hosts, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "script.py").write_text("")
    with ssh_hosts.host(SshHost(name="apart", own_folders=[mine])):
        done = over_ssh(
            ssh_hosts, "cluster.hosts=n1,apart", "-o", tmp_path / "out", mine / "script.py"
        )
    assert_mistake(done, "script.py", "apart", "same path")


def test_an_allocation_that_has_ended(slurm, tmp_path):
    job = slurm.submit("--nodes=1", "--output=/dev/null", "--wrap=true")
    slurm.wait_state(job, "COMPLETED")
    env = {**slurm.environment(), "SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "n1"}
    began = time.monotonic()
    done = ftlaunch("-o", tmp_path / "out", *DEMO, env=env, timeout=60)
    assert_mistake(done, "n1: ", "the allocation has ended")
    assert time.monotonic() - began < 15


def test_hosts_that_stand_twice(ssh_hosts, tmp_path):
    (tmp_path / "hosts").write_text("n1\n\nn2\nn1 slots=2\n")
    done = over_ssh(ssh_hosts, "--hostfile", tmp_path / "hosts", "-o", tmp_path / "out")
    assert_mistake(done, "line 1", "line 4", "n1")


# -- nodes that go and come ---------------------------------------------------------------------


@pytest.mark.faults
def test_a_job_goes_on_with_the_nodes_that_are_left(ssh_hosts, tmp_path):
    """A host that is cut off is found by its silence; it takes part again once it is back."""
    inputs, out = Inputs(tmp_path), tmp_path / "out"
    args = inputs.command(out, "cluster.hosts=n[1-3]", "checkpoint.save_steps=2", nodes=3)
    args += ["cluster.min_nodes=2", "cluster.heartbeat_timeout_seconds=3", "train.max_steps=60"]
    command = [*ssh_hosts.at(), *SCRIPT]
    with start(*args, command=command, env=ssh_hosts.environment()) as process:
        wait_for_step(process, out, 6)
        ssh_hosts.cut("n3")
        try:
            wait_for_nodes(process, out, 2)
            wait_for_step(process, out, last_step(out) + 4)
        finally:
            ssh_hosts.mend("n3")
        os.kill(rank_process(out, 1), signal.SIGKILL)
        wait_for_nodes(process, out, 3)
        done = finish(process, 180)
    assert done.returncode == 0, said(done)
    assert "the agent on n3: silent for 3 s" in said(done)
    assert "going on with 2 nodes" in said(done)
    assert "going on with 3 nodes" in said(done)
    steps = [line["step"] for line in metrics_of(out) if "samples_digest" in line]
    assert steps == list(range(1, 61))
    assert_no_process_left(out, 20)


@pytest.mark.faults
@pytest.mark.parametrize("stops", [False, True])
def test_a_job_that_cannot_go_on_says_so_in_its_summary(ssh_hosts, tmp_path, stops):
    """A host is gone for good; or the user asks to stop while it is called anew."""
    out, script = tmp_path / "out", tmp_path / "script.py"
    script.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(120)\n")
    logs = [out / "logs" / f"rank-{rank:05}.log" for rank in range(2)]
    args = ["cluster.hosts=n[1-2]", "cluster.heartbeat_timeout_seconds=3", "-o", out, script]
    command = [*ssh_hosts.at(), *SCRIPT]
    with start(*args, command=command, env=ssh_hosts.environment()) as process:
        wait_until(lambda: all(p.exists() and p.stat().st_size for p in logs), 60, "both ranks")
        rank = int(logs[0].read_text())
        ssh_hosts.cut("n2")
        try:
            wait_until(lambda: not Path(f"/proc/{rank}").exists(), 30, "the end of rank 0")
            if stops:
                # By then it has been judged, and ssh is half through its time to connect.
                time.sleep(4.0)
                process.send_signal(signal.SIGTERM)
            done = finish(process, 60)
        finally:
            ssh_hosts.mend("n2")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["exit_code"] == done.returncode == (143 if stops else 1), said(done)
    assert summary["status"] == ("stopped" if stops else "failed")
    if not stops:
        assert "the agent on n2 failed: silent for 3 s" in said(done)
        assert "it cannot be restarted: 1 of 2 nodes cannot be used" in said(done)
        assert "so the job does not go on" in said(done)
        assert summary["failure"]["node"] == "n2"
    assert_no_process_left(out, 20)


def last_step(out: Path) -> int:
    return int(metrics_of(out)[-1]["step"])


def wait_for_nodes(process, out, number):
    """Until the ranks have been started on so many nodes."""

    def started() -> bool:
        assert process.poll() is None, said(finish(process, 30))
        plan = json.loads((out / "logs" / "plan-of-ranks.json").read_text())
        return bool(plan["num_nodes"] == number)

    wait_until(started, 90, f"{number} nodes")
