"""Hosts that are played on this machine, each in Linux namespaces of its own. Knows no cluster.

A host has its own name, mounts and, if wanted, network. A process belongs to the host in whose
namespace it was born, whatever it does later (`setsid`, double forks, another environment): that
is how everything of a host is found and ended. The namespaces have no name and go with their last
process.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

_POLL_SECONDS = 0.02
# The kernel needs a moment to tear down what was killed, more on a busy machine.
_END_SECONDS = 20.0


class PlayedHost:
    """One host: a process that holds its namespaces, and whatever is started in them."""

    def __init__(
        self,
        name: str,
        *,
        network: bool,
        setup: Sequence[Sequence[str]] = (),
        number: int | None = None,
    ) -> None:
        """A host of this machine.

        setup    commands that run in the new namespaces before the host is ready (mounts)
        number   of a host that has one core, as hosts have cores of their own; they are taken in
                 turn. Else it has all of them
        """
        self.name = name
        cores = sorted(os.sched_getaffinity(0))
        self._cores = cores if number is None else [cores[number % len(cores)]]
        self.network = network
        self._started: list[subprocess.Popen[Any]] = []
        kinds = ["--uts", "--mount", *(["--net"] if network else [])]
        steps = [["hostname", name], *setup, ["echo", "ready"]]
        script = " && ".join(map(shlex.join, steps)) + " && exec sleep infinity"
        self._holder = subprocess.Popen(
            # Mounts of this machine are seen by the host, its own are not seen here.
            [*_DIES_WITH_US, "unshare", *kinds, "--propagation", "slave", "sh", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PATH": program_path()},
        )
        assert self._holder.stdout is not None
        said = self._holder.stdout.readline()
        if said != "ready\n":
            said += self._holder.stdout.read()
            self._holder.wait()
            self._holder.stdout.close()
            raise OSError(f"host {name}: {said.strip()}")
        self._namespace = _namespace_of(self.pid)

    @property
    def pid(self) -> int:
        """The process that holds the namespaces: `ip link ... netns PID` takes it."""
        return self._holder.pid

    def at(self, *, folder: Path | None = None) -> list[str]:
        """The words before a command that is to run on this host, in `folder`."""
        kinds = ["--uts", "--mount", *(["--net"] if self.network else [])]
        # Its root too: in a chroot, that of the mounts would be another.
        where = ["--root", f"--wdns={folder or Path.cwd()}"]
        return ["nsenter", f"--target={self.pid}", *kinds, *where, "--"]

    def _on_cores(self) -> list[str]:
        return ["taskset", "--cpu-list", ",".join(map(str, self._cores))]

    def run(
        self, *words: object, timeout: float = 30, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this host to its end."""
        options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, **options}
        options.setdefault("env", {**os.environ, "PATH": program_path()})
        command = [*self.at(), *map(str, words)]
        return subprocess.run(command, timeout=timeout, check=False, **options)

    def start_daemon(self, *words: object, log: IO[str]) -> subprocess.Popen[Any]:
        """Start a program that ends with the host at the latest, or when these tests are killed."""
        process = subprocess.Popen(
            [*_DIES_WITH_US, *self._on_cores(), *self.at(folder=Path("/")), *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "PATH": program_path()},
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def processes(self) -> list[int]:
        """Every live process of this host but the one that holds its namespaces."""
        return sorted(pid for pid in _processes_in(self._namespace) if pid != self.pid)

    def kill_processes(self) -> None:
        """End all of them at once, unasked."""
        self._kill(lambda: self.processes())

    def freeze(self) -> None:
        """Stop all of them, until `thaw`: nothing answers, nothing is closed."""
        deadline = time.monotonic() + _END_SECONDS
        # Again and again, as for killing.
        while running := [pid for pid in self.processes() if _state(pid) not in "T"]:
            _signal(running, signal.SIGSTOP)
            if time.monotonic() > deadline:
                raise TimeoutError(f"host {self.name}: processes {running} do not stop")
            time.sleep(_POLL_SECONDS)

    def thaw(self) -> None:
        _signal(self.processes(), signal.SIGCONT)

    def close(self) -> None:
        """End the host: nothing of it is left."""
        self._holder.kill()
        self._holder.wait()
        assert self._holder.stdout is not None
        self._holder.stdout.close()
        self._kill(lambda: _processes_in(self._namespace))

    def _kill(self, find: Callable[[], Sequence[int]]) -> None:
        deadline = time.monotonic() + _END_SECONDS
        # Again and again: one that forks meanwhile leaves a child that was not seen.
        while left := find():
            _signal(left, signal.SIGKILL)
            for process in self._started:
                process.poll()
            if time.monotonic() > deadline:
                raise TimeoutError(f"host {self.name}: processes {left} outlive SIGKILL")
            time.sleep(_POLL_SECONDS)
        for process in self._started:
            process.wait(timeout=_END_SECONDS)
        self._started.clear()


def program_path() -> str:
    """PATH with the folders of daemons and network tools, which not every root's has."""
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/usr/bin:/bin"


@contextlib.contextmanager
def covered(host: PlayedHost, folder: Path) -> Iterator[None]:
    """On this host alone an empty file system lies over `folder`, as if it were not shared."""
    host.run("mount", "-t", "tmpfs", "tmpfs", folder).check_returncode()
    try:
        yield
    finally:
        host.run("umount", "--lazy", folder).check_returncode()


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _state(pid: int) -> str:
    """The letter of proc(5); "" for a process that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return ""


def _processes_in(namespace: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        # Of a process that has ended, reaped or not, there is no namespace to read.
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and _namespace_of(int(entry.name)) == namespace:
                found.append(int(entry.name))
    return found


def _namespace_of(pid: int) -> str:
    return str(Path(f"/proc/{pid}/ns/uts").readlink())


# Tests that are killed run no clean-up.
_DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")
