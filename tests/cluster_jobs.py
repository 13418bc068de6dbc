"""Jobs on this machine, over ssh and under SLURM, started with the same arguments; their processes.

The hosts of the test clusters share this machine's processes and files, so a job's processes are
found here wherever they run: by what its command has put into their environment, and by the host
in whose namespaces they were born, which nothing that they do can change.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ftlaunch.cluster.agent import AGENT_NAME
from ftlaunch.cluster.fork_link import JOB_VARIABLE
from ftlaunch.cluster.linux import process_table
from tests.jobs import MODULE, agent_processes, finish, process_name, processes_of, said, start
from tests.jobs import wait_until as wait_until
from tests.slurm_bed import SlurmBed
from tests.ssh_bed import SshBed

Kind = Literal["local", "slurm", "ssh"]
# So long a job may take to be gone after its fault was noticed.
GONE_SECONDS = 5.0
_END_SECONDS = 90.0
# What it takes to look through the process table once, on a busy machine.
_LOOK_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a job runs. `bed` is the cluster of a test; None: this machine plays the nodes."""

    kind: Kind
    bed: SlurmBed | SshBed | None = None

    @property
    def slurm(self) -> SlurmBed:
        assert isinstance(self.bed, SlurmBed)
        return self.bed

    @property
    def ssh(self) -> SshBed:
        assert isinstance(self.bed, SshBed)
        return self.bed

    def node(self, number: int) -> str:
        """What the job calls one of its nodes."""
        return f"node{number}" if self.bed is None else f"n{number + 1}"

    def arguments(self, nodes: int) -> list[str]:
        """What the command needs here beside `--nodes`."""
        hosts = ",".join(f"n{number}" for number in range(1, nodes + 1))
        return {"local": [], "slurm": [], "ssh": [f"cluster.hosts=[{hosts}]"]}[self.kind]

    def environment(self) -> dict[str, str]:
        return {} if self.bed is None else self.bed.environment()

    @contextlib.contextmanager
    def start(
        self,
        *args: object,
        nodes: int = 2,
        cwd: Path | None = None,
        command: Sequence[str] = MODULE,
        allocation: Sequence[str] = (),
    ) -> Iterator[subprocess.Popen[str]]:
        """Start `ftlaunch ARGS` as a user does at a terminal; what is left of it on leaving is ended.

        args        begin with `--nodes NUMBER` or have it elsewhere before a script
        allocation  more words for salloc
        """
        before = {
            "local": lambda: [],
            "slurm": lambda: ["salloc", "--quiet", f"--nodes={nodes}", *allocation, "--"],
            "ssh": lambda: self.ssh.at(folder=cwd),
        }[self.kind]()
        words = [*self.arguments(nodes), *args]
        with start(*words, cwd=cwd, env=self.environment(), command=[*before, *command]) as process:
            try:
                yield process
            finally:
                self.end(process)

    def run(
        self, *args: object, timeout: float = 300, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run `ftlaunch ARGS` to its end."""
        with self.start(*args, **options) as process:
            return finish(process, timeout)

    def end(self, process: subprocess.Popen[str]) -> None:
        """End what a test has left running."""
        if process.poll() is None:
            for pid in [process.pid, *_children(process.pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def clear(self) -> None:
        """Nothing of a job is left, whatever its test has done to it."""
        if isinstance(self.bed, SlurmBed):
            self.bed.clear()
        for pid in self._on_hosts():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    # -- processes ------------------------------------------------------------------------------

    def left(self, out: Path) -> list[int]:
        """Every live process of the job in `out`, and whatever else runs on the hosts."""
        return sorted({*processes_of(out), *self._on_hosts()})

    def wait_gone(self, out: Path, since: float, seconds: float = GONE_SECONDS) -> float:
        """Wait until nothing is left; seconds after `since` (of time.monotonic) when that was."""
        limit = since + seconds - time.monotonic()

        def left() -> str:
            return "; ".join(f"{pid} {_words(pid)}" for pid in self.left(out))

        try:
            wait_until(lambda: not self.left(out), max(limit, 0.0), "everything is gone")
        except AssertionError as error:
            raise AssertionError(f"{error}; left: {left()}") from None
        took = time.monotonic() - since
        assert took <= seconds + _LOOK_SECONDS, f"everything is gone, but only after {took:.1f} s"
        return took

    def agent(self, out: Path, number: int) -> int:
        """The agent of one node."""
        if self.bed is None:
            return agent_processes(out)[number]
        found = [pid for pid in processes_of(out) if _mark(pid).endswith(f"-{number}")]
        (agent,) = [pid for pid in found if process_name(pid) == AGENT_NAME]
        return agent

    def coordinator(self, process: subprocess.Popen[str]) -> int:
        """The `ftlaunch` process itself."""
        if self.kind != "slurm":
            return process.pid
        (child,) = _children(process.pid)
        return child

    def transport(self, process: subprocess.Popen[str], number: int) -> int:
        """What leads from the command to one node: its `ssh` or `srun`."""
        program = {"ssh": "ssh", "slurm": "srun"}[self.kind]
        (found,) = [
            pid
            for pid in _children(self.coordinator(process))
            if process_name(pid) == program and self.node(number) in _words(pid, 2000)
        ]
        return found

    def processes_on(self, out: Path, number: int) -> list[int]:
        """All of the job that runs on one node; here its agent comes first, then its rank."""
        if self.bed is not None:
            return self.bed.processes(self.node(number))
        rank = f"rank-{number}"
        return [
            self.agent(out, number),
            *(pid for pid in processes_of(out) if process_name(pid) == rank),
        ]

    def _on_hosts(self) -> list[int]:
        if self.bed is None:
            return []
        names = ("n1", "n2", "n3", "n4")
        return [pid for name in names for pid in self.bed.processes(name)]


@contextlib.contextmanager
def submitted(
    bed: SlurmBed, folder: Path, *args: object, nodes: int = 2, options: Sequence[object] = ()
) -> Iterator[str]:
    """A batch job that runs `ftlaunch ARGS`, by its number. Its output is FOLDER/job.log.

    The script becomes the command, so that `--signal=B:...` reaches it.
    """
    script = folder / "job.sh"
    script.write_text(f"#!/bin/bash\nexec {shlex.join([*MODULE, *map(str, args)])}\n")
    env = {**bed.environment(), "FTLAUNCH_TEST_COMMAND": shlex.join(map(str, args))}
    output = ["-o", folder / "job.log", "--open-mode=append"]
    job = bed.submit(f"--nodes={nodes}", *output, *options, script, env=env)
    try:
        yield job
    finally:
        bed.run("scancel", job)


def batch_coordinator(out: Path) -> int:
    """The `ftlaunch` process of a batch job in `out`."""
    (found,) = [
        pid
        for pid in processes_of(out)
        if "ftlaunch.launcher" in _words(pid) and "srun" not in _words(pid)
    ]
    return found


def wait_ended(process: subprocess.Popen[str], seconds: float = _END_SECONDS) -> str:
    """What the command has said until its end."""
    return said(finish(process, seconds))


def signal_all(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def when(condition: Callable[[], Any], seconds: float, what: str) -> float:
    """Wait for something; when it was."""
    wait_until(condition, seconds, what, every=0.01)
    return time.monotonic()


def _children(pid: int) -> list[int]:
    return [process.pid for process in process_table().values() if process.parent == pid]


def _mark(pid: int) -> str:
    return environment_of(pid).get(JOB_VARIABLE, "")


def environment_of(pid: int) -> Mapping[str, str]:
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(word.split("=", 1) for word in content.split("\0") if "=" in word)


def _words(pid: int, most: int = 200) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
        return f"({Path(f'/proc/{pid}/comm').read_text().strip()}) {words[:most]}"
    except OSError:
        return "(gone)"
