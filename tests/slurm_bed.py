"""A real SLURM on this machine: slurmctld, four slurmd and a munged of its own, all on loopback.

Nodes are n1 to n4. Everything lies in one temporary folder; no other SLURM is touched.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.played_hosts import PlayedHost

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "salloc", "scontrol", "scancel")
NODES = ("n1", "n2", "n3", "n4")
_POLL_SECONDS = 0.05
# Below the ephemeral range, so that no connection takes one meanwhile.
_PORTS = range(20_000, 29_990)
_START_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmSettings:
    """What tests may want otherwise. Times in seconds."""

    # More than this machine has: several jobs, and steps beside each other.
    cpus_per_node: int = 16
    # From SIGTERM to SIGKILL.
    kill_wait: int = 8
    # From the last word of a slurmd until its node is down.
    slurmd_timeout: int = 10
    # What outlives SIGKILL for so long drains its node.
    unkillable_step_timeout: int = 20
    # Credentials live for so long, and a requeued job waits until the old ones have ended.
    credential_seconds: int = 10


class SlurmBed:
    """A context manager: the cluster runs inside, and nothing of it is left outside."""

    def __init__(self, settings: SlurmSettings | None = None) -> None:
        self.settings = settings or SlurmSettings()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> SlurmBed:
        with contextlib.ExitStack() as stack:
            # Short: the path of a Unix socket has 107 characters at most.
            self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self.folder.chmod(0o755)
            self._log = stack.enter_context(open(self.folder / "daemons.log", "w"))
            self._write_files()
            self.hosts: dict[str, PlayedHost] = {}
            for number, name in enumerate(("ctl", *NODES)):
                hosts_file = str(self.folder / "hosts")
                setup = [["mount", "--bind", hosts_file, "/etc/hosts"]]
                self.hosts[name] = PlayedHost(
                    name, network=False, setup=setup, number=number if name in NODES else None
                )
                stack.callback(self.hosts[name].close)
            self._start_daemons()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # -- for clients ------------------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        """The environment of a command that is to use this cluster."""
        kept = {k: v for k, v in os.environ.items() if not re.match(r"(SLURM|SBATCH|SALLOC)_", k)}
        return {**kept, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(
        self, *words: object, timeout: float = 60, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run srun, sbatch, scontrol, ... from outside of any allocation."""
        options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, **options}
        options.setdefault("env", self.environment())
        return subprocess.run([str(w) for w in words], timeout=timeout, check=False, **options)

    def submit(self, *words: object, **options: Any) -> str:
        """The job id of `sbatch WORDS`."""
        done = self.run("sbatch", "--parsable", *words, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().split(";")[0]

    # -- jobs -------------------------------------------------------------------------------------

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` tells; empty for a job that it does not know."""
        done = self.run("scontrol", "show", "job", "--oneliner", job)
        return dict(re.findall(r"(\w[\w/:]*)=(\S*)", done.stdout)) if done.returncode == 0 else {}

    def job_state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ...; "" for a job that is not known."""
        return self.job(job).get("JobState", "")

    def wait_state(self, job: str, *states: str, seconds: float = 30) -> str:
        """Wait until the job is in one of `states`, which is returned."""
        self._wait(
            lambda: self.job_state(job) in states,
            seconds,
            lambda: f"job {job} is {self.job_state(job)}, not {' or '.join(states)}",
        )
        return self.job_state(job)

    def warn(self, job: str, signal_name: str = "USR1", *, batch: bool = False) -> None:
        """Send at once what `--signal=[B:]USR1@...` sends before the limit: to steps, or the batch
        shell alone."""
        done = self.run("scancel", f"--signal={signal_name}", *(["--batch"] if batch else []), job)
        assert done.returncode == 0, done.stderr

    def near_limit(self, job: str, *, warned: bool = False) -> None:
        """Let the time limit of a running job come.

        slurmctld looks at limits every 30 s: the job ends within that time, KillWait and its own
        clean-up beside. `warned`: the signal of its `--signal` comes within 30 s, the end 30 s
        later.
        """
        seconds = 31 if warned else 1
        done = self.run("scontrol", "update", f"jobid={job}", f"EndTime=now+{seconds}")
        assert done.returncode == 0, done.stderr

    # -- nodes ------------------------------------------------------------------------------------

    def node_states(self) -> dict[str, str]:
        """As sinfo says them: idle, mixed, allocated, down, drained, with marks such as `*`."""
        done = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T")
        return dict(line.split() for line in done.stdout.splitlines())

    def drained(self) -> dict[str, str]:
        """Nodes that take no more jobs until somebody mends them, with the reason."""
        done = self.run("scontrol", "show", "node", "--oneliner")
        found = {}
        for line in done.stdout.splitlines():
            state = re.search(r" State=(\S*)", line)
            if state and "DRAIN" in state[1]:
                reason = re.search(r" Reason=(.*?)( \w+=|$)", line)
                found[line.split()[0].removeprefix("NodeName=")] = reason[1] if reason else ""
        return found

    def wait_idle(self, seconds: float = 30) -> None:
        """Wait until no job is left and every node is idle, none drained."""
        self._wait(
            lambda: set(self.node_states().values()) == {"idle"} and not self._jobs(),
            seconds,
            lambda: f"nodes {self.node_states()}, drained {self.drained()}, jobs {self._jobs()}",
        )

    def clear(self, seconds: float = 60) -> None:
        """Cancel every job and bring back every node: a test that comes next finds all idle."""
        for job in self._jobs():
            self.run("scancel", job)
        for name in NODES:
            self.thaw_node(name)
            # What has left its step would drain the node.
            for pid in self.processes(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not self._has_slurmd(name):
                self.revive_node(name)
        self._wait(lambda: not self._jobs(), seconds, lambda: f"jobs {self._jobs()} do not end")
        for name, state in self.node_states().items():
            if state != "idle":
                self.run("scontrol", "update", f"nodename={name}", "state=resume")
        self.wait_idle(seconds)

    def kill_node(self, name: str) -> None:
        """The node is gone: its slurmd, its slurmstepd and all that runs below them are killed.

        slurmctld finds it out after some 25 s: two rounds of pings. `mark_down` spares the wait.
        """
        self.hosts[name].kill_processes()

    def mark_down(self, name: str) -> None:
        """Tell slurmctld that the node is lost, as an administrator may."""
        done = self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=lost")
        assert done.returncode == 0, done.stderr

    def revive_node(self, name: str) -> None:
        """Start the slurmd of a killed node, as after a reboot."""
        self.hosts[name].start_daemon(
            "slurmd", "-D", "-N", name, "-f", self.folder / "daemons.conf", log=self._log
        )

    def freeze_node(self, name: str) -> None:
        """The node falls silent and closes no connection: all that runs on it is stopped."""
        self.hosts[name].freeze()

    def thaw_node(self, name: str) -> None:
        self.hosts[name].thaw()

    def processes(self, name: str) -> list[int]:
        """Processes of the jobs on a node: all but slurmd and slurmstepd."""
        return [pid for pid in self.hosts[name].processes() if not _is_slurms(pid)]

    # -- inside -----------------------------------------------------------------------------------

    def _jobs(self) -> list[str]:
        return self.run("squeue", "--noheader", "--format=%A").stdout.split()

    def _has_slurmd(self, name: str) -> bool:
        return any(_comm(pid) == "slurmd" for pid in self.hosts[name].processes())

    def _write_files(self) -> None:
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        # One address for all: srun listens on that of its host, and nodes see it come from this one.
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost ctl {' '.join(NODES)}\n")
        configuration = self._configuration()
        (self.folder / "slurm.conf").write_text(configuration)
        # Daemons listen on the loopback only. For clients that would be wrong: the name of this
        # machine may stand for another address.
        daemons = f"{configuration}CommunicationParameters=NoInAddrAny,NoCtldInAddrAny\n"
        (self.folder / "daemons.conf").write_text(daemons)

    def _configuration(self) -> str:
        s, folder = self.settings, self.folder
        port = _free_ports()
        nodes = "\n".join(
            f"NodeName={name} NodeAddr=127.0.0.1 NodeHostname={name} Port={port + n}"
            f" CPUs={s.cpus_per_node} State=UNKNOWN"
            for n, name in enumerate(NODES, start=1)
        )
        return f"""\
ClusterName=bed
SlurmctldHost=ctl(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={s.credential_seconds}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
SlurmdTimeout={s.slurmd_timeout}
KillWait={s.kill_wait}
UnkillableStepTimeout={s.unkillable_step_timeout}
OverTimeLimit=0
JobRequeue=1
MinJobAge=3600
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
{nodes}
PartitionName=main Nodes={",".join(NODES)} Default=YES MaxTime=INFINITE State=UP
PartitionName=short Nodes={",".join(NODES)} MaxTime=1 State=UP
"""

    def _start_daemons(self) -> None:
        folder, ctl = self.folder, self.hosts["ctl"]
        sock = folder / "munge.socket"
        files = [
            f"--{kind}-file={folder / 'munge'}.{kind}" for kind in ("key", "log", "pid", "seed")
        ]
        ctl.start_daemon("munged", "--foreground", f"--socket={sock}", *files, log=self._log)
        self._wait(sock.exists, _START_SECONDS, lambda: "munged has no socket")
        ctl.start_daemon("slurmctld", "-D", "-f", folder / "daemons.conf", log=self._log)
        for name in NODES:
            self.revive_node(name)
        self.wait_idle(_START_SECONDS)

    def _wait(self, condition: Callable[[], Any], seconds: float, what: Callable[[], str]) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                self._log.flush()
                said = (self.folder / "daemons.log").read_text()[-2000:]
                raise TimeoutError(f"{what()} after {seconds:.0f} s\n{said}")
            time.sleep(_POLL_SECONDS)


def _free_ports() -> int:
    """The first of five free ports in a row."""
    for _ in range(100):
        first = random.choice(_PORTS)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + 1 + len(NODES)):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise OSError("no free ports")


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _is_slurms(pid: int) -> bool:
    return _comm(pid) in ("slurmd", "slurmstepd")
