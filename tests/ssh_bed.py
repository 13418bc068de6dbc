"""Hosts that are reached by a real ssh: each has a network, a name, an sshd and a home of its own.

They are n1 to n4 at first, joined by a switch with `login`, where the user sits. All of them see
this machine's files and processes. Nothing of it touches the network of this machine, its sshd or
anybody's home.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.played_hosts import PlayedHost, program_path

PROGRAMS = ("ip", "ssh", "sshd", "ssh-keygen")
NODES = ("n1", "n2", "n3", "n4")
_NETWORK = "10.77.0"
_LOGIN_ADDRESS = f"{_NETWORK}.200"
_START_SECONDS = 20.0
_POLL_SECONDS = 0.02
_LISTENS_ON_22 = ":0016 00000000:0000 0A"


@dataclass(frozen=True, slots=True, kw_only=True)
class SshHost:
    """A host, and what is wrong with it."""

    name: str
    # "refused": no sshd; "down": nobody has its address; "silent": what is sent to it is lost.
    reach: Literal["up", "refused", "down", "silent"] = "up"
    # What the user's known_hosts says of its key.
    key: Literal["known", "unknown", "changed"] = "known"
    # "refused": the user's key is not among the accepted ones; "password": only that opens.
    login: Literal["key", "refused", "password"] = "key"
    # The start-up file of its user's shell, as it is.
    bashrc: str = ""
    # Folders that lie elsewhere on this host: empty ones cover them.
    own_folders: Sequence[Path] = ()


class SshBed:
    """A context manager: the hosts live inside, and nothing of them is left outside."""

    def __init__(self, names: Sequence[str] = NODES) -> None:
        self._names = tuple(names)
        self._numbers = itertools.count(1)
        self._hosts: dict[str, SshHost] = {}
        self._addresses: dict[str, str] = {}
        self._played: dict[str, PlayedHost] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> SshBed:
        with contextlib.ExitStack() as stack:
            self.folder = Path(tempfile.mkdtemp(prefix="ssh-"))
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self.folder.chmod(0o755)
            self._log = stack.enter_context(open(self.folder / "daemons.log", "w"))
            self._write_client()
            self.switch = PlayedHost("switch", network=True, setup=_SWITCH)
            stack.callback(self.switch.close)
            self.login = PlayedHost("login", network=True, setup=self._setup("login"))
            stack.callback(self.login.close)
            self._join(self.login, _LOGIN_ADDRESS)
            stack.callback(self._remove_all)
            for name in self._names:
                self.add(SshHost(name=name))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # -- for clients ------------------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        """The environment of a command on the login host: `ssh NAME` finds the hosts."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("SSH_")}
        return {**kept, "PATH": f"{self.folder / 'bin'}:{program_path()}"}

    def at(self, host: str = "login", *, folder: Path | None = None) -> list[str]:
        """The words before a command that is to run on a host (not through its sshd)."""
        return self._host(host).at(folder=folder)

    def run(
        self, *words: object, host: str = "login", timeout: float = 60, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host, on the login host unless told, to its end."""
        options.setdefault("env", self.environment())
        return self._host(host).run(*words, timeout=timeout, **options)

    # -- hosts ------------------------------------------------------------------------------------

    def address(self, host: str) -> str:
        return _LOGIN_ADDRESS if host == "login" else self._addresses[host]

    @contextlib.contextmanager
    def host(self, host: SshHost) -> Iterator[SshHost]:
        """One more host, or another in the place of one of that name, for a while."""
        before = self._hosts.get(host.name)
        self.add(host)
        try:
            yield host
        finally:
            self.remove(host.name)
            if before:
                self.add(before)

    def add(self, host: SshHost) -> None:
        if host.name in self._hosts:
            self.remove(host.name)
        self._hosts[host.name] = host
        self._addresses[host.name] = address = f"{_NETWORK}.{next(self._numbers)}"
        self._make_key(host.name)
        self._write_lists()
        if host.reach in ("up", "refused"):
            self._played[host.name] = played = PlayedHost(
                host.name,
                network=True,
                setup=[*self._setup(host.name), *_covers(host)],
                number=len(self._played),
            )
            self._join(played, address)
        if host.reach == "up":
            self._start_sshd(host)
        if host.reach == "silent":
            # As behind a router: nobody says that the address is not there.
            neighbour = ["ip", "neigh", "add", address, "lladdr", "02:00:00:00:00:01"]
            self._ip(self.login, *neighbour, "dev", "eth0", "nud", "permanent")

    def remove(self, name: str) -> None:
        """The host goes with all that runs on it; its connections close, unless it was cut off."""
        del self._hosts[name]
        played = self._played.pop(name, None)
        if played:
            played.close()
            # The network outlives its processes while a connection waits for an answer, or for the
            # kernel to find the time.
            self.switch.run("ip", "link", "delete", name)

    def cut(self, name: str) -> None:
        """What is sent to the host or by it is lost; no connection is closed."""
        self._ip(self.switch, "ip", "link", "set", name, "nomaster")

    def mend(self, name: str) -> None:
        self._ip(self.switch, "ip", "link", "set", name, "master", "switch")

    def kill(self, name: str) -> None:
        """Every process of the host is killed, its sshd too, while the network stands."""
        self._host(name).kill_processes()

    def processes(self, name: str) -> list[int]:
        """Live processes of the host, without its sshd."""
        found = self._host(name).processes()
        return [
            pid for pid in found if not _command_line(pid).startswith(("sshd:", "/usr/sbin/sshd"))
        ]

    def played(self, name: str) -> PlayedHost:
        return self._host(name)

    # -- inside -----------------------------------------------------------------------------------

    def _host(self, name: str) -> PlayedHost:
        return self.login if name == "login" else self._played[name]

    def _remove_all(self) -> None:
        for name in list(self._hosts):
            self.remove(name)

    def _ip(self, host: PlayedHost, *words: str) -> None:
        done = host.run(*words)
        assert done.returncode == 0, f"{shlex.join(words)} on {host.name}: {done.stderr}"

    def _join(self, host: PlayedHost, address: str) -> None:
        """Plug the host into the switch."""
        name = host.name
        pair = ["ip", "link", "add", name, "type", "veth", "peer", "eth0", "netns", str(host.pid)]
        self._ip(self.switch, *pair)
        self._ip(self.switch, "ip", "link", "set", name, "master", "switch", "up")
        self._ip(host, "ip", "address", "add", f"{address}/24", "dev", "eth0")
        self._ip(host, "ip", "link", "set", "eth0", "up")

    def _setup(self, name: str) -> list[list[str]]:
        """What makes the namespaces a host: a loopback, a /run, names of hosts, a home."""
        home, hosts, passwd = (
            self.folder / f"{kind}-{name}" for kind in ("home", "hosts", "passwd")
        )
        home.mkdir(exist_ok=True)
        bashrc = self._hosts[name].bashrc if name in self._hosts else ""
        (home / ".bashrc").write_text(bashrc)
        # As Debian's installer does: a host's own name stands for an address that no other reaches.
        lines = ["127.0.0.1 localhost", f"127.0.1.1 {name}"]
        others = [n for n in ("login", *self._addresses) if n != name]
        lines += [f"{self.address(other)} {other}" for other in others]
        hosts.write_text("".join(f"{line}\n" for line in lines))
        users = Path("/etc/passwd").read_text().splitlines()
        users = [line for line in users if not line.startswith("root:")]
        root = f"root:x:0:0:root:{home}:/bin/bash"
        passwd.write_text("".join(f"{line}\n" for line in (root, *users)))
        shadow = self.folder / "shadow"
        shadow.touch(0o600)
        # sshd lets nobody in whose account is locked, as root's may be here.
        shadow.write_text("root:*:19000:0:99999:7:::\nsshd:*:19000::::::\n")
        return [
            ["ip", "link", "set", "lo", "up"],
            ["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run"],
            ["mkdir", "/run/sshd"],
            ["mount", "--bind", str(hosts), "/etc/hosts"],
            ["mount", "--bind", str(passwd), "/etc/passwd"],
            ["mount", "--bind", str(shadow), "/etc/shadow"],
        ]

    def _make_key(self, name: str) -> None:
        key = self.folder / f"key-{name}"
        if not key.exists():
            words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(key)]
            subprocess.run(words, check=True, timeout=30, stdin=subprocess.DEVNULL)

    def _start_sshd(self, host: SshHost) -> None:
        name = host.name
        played = self._played[name]
        accepted = "key-nobody.pub" if host.login == "refused" else "key-user.pub"
        by_key, by_password = ("no", "yes") if host.login == "password" else ("yes", "no")
        (self.folder / f"sshd-{name}.conf").write_text(
            f"Port 22\nHostKey {self.folder}/key-{name}\nPidFile none\nUsePAM no\nStrictModes no\n"
            f"AuthorizedKeysFile {self.folder}/{accepted}\nPubkeyAuthentication {by_key}\n"
            f"PasswordAuthentication {by_password}\nKbdInteractiveAuthentication no\n"
            "PermitRootLogin yes\nPermitUserEnvironment no\nPrintMotd no\nPrintLastLog no\n"
            "UseDNS no\nMaxStartups 100\n"
        )
        sshd = shutil.which("sshd", path=program_path())
        words = [sshd, "-D", "-e", "-f", self.folder / f"sshd-{name}.conf"]
        daemon = played.start_daemon(*words, log=self._log)
        sockets = Path(f"/proc/{played.pid}/net/tcp")
        self._wait(
            lambda: daemon.poll() is not None or _LISTENS_ON_22 in sockets.read_text(),
            f"{name} has no sshd",
        )
        if daemon.poll() is not None:
            raise OSError(
                f"{name} has no sshd: {(self.folder / 'daemons.log').read_text()[-2000:]}"
            )

    def _write_client(self) -> None:
        self._make_key("user")
        self._make_key("nobody")
        # The user's own configuration; ssh looks for it in the home of /etc/passwd, not in $HOME.
        ssh = shutil.which("ssh")
        wrapper = self.folder / "bin" / "ssh"
        wrapper.parent.mkdir()
        wrapper.write_text(f'#!/bin/sh\nexec {ssh} -F {self.folder}/config "$@"\n')
        wrapper.chmod(0o755)
        self._write_lists()

    def _write_lists(self) -> None:
        """The user's list of hosts, and of their keys."""
        lines, keys = [], []
        for name, host in self._hosts.items():
            address = self._addresses[name]
            lines.append(f"Host {name}\n  HostName {address}\n")
            if host.key != "unknown":
                of = name if host.key == "known" else "nobody"
                kind, key = (self.folder / f"key-{of}.pub").read_text().split()[:2]
                keys.append(f"{address} {kind} {key}\n")
        lines.append(
            f"Host *\n  User root\n  IdentityFile {self.folder}/key-user\n  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {self.folder}/known_hosts\n  GlobalKnownHostsFile /dev/null\n"
        )
        (self.folder / "config").write_text("".join(lines))
        (self.folder / "known_hosts").write_text("".join(keys))

    def _wait(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                said = (self.folder / "daemons.log").read_text()[-2000:]
                raise TimeoutError(f"{what} after {_START_SECONDS:.0f} s\n{said}")
            time.sleep(_POLL_SECONDS)


_SWITCH = (
    ("ip", "link", "add", "switch", "type", "bridge", "forward_delay", "0"),
    ("ip", "link", "set", "switch", "up"),
)


def _covers(host: SshHost) -> list[list[str]]:
    return [["mount", "-t", "tmpfs", "tmpfs", str(folder)] for folder in host.own_folders]


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""
