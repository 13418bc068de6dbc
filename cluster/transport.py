"""How an agent is started on a node and talked to: one process of its own for each node.

That process runs here: it is the agent itself where the node is this machine, else what leads to
it (`cluster.ssh`, `cluster.slurm`). Its stdin and stdout are the agent's.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from ftlaunch.cluster.clock import Clock
from ftlaunch.cluster.events import Command, Event, Hello, LineBuffer, Pong, encode_command
from ftlaunch.cluster.verdict import exit_in_words


def python_command(module: str, *arguments: str) -> list[str]:
    """Run `module`.main() with this interpreter, blind to what lies in the working folder.

    `python -m` would put the working folder first on the path, where a user's `ftlaunch/` or
    `torch.py` would be imported instead of the real one.
    """
    code = (
        "import sys; sys.path[:] = [p for p in sys.path if p]; "
        f"from {module} import main; sys.exit(main())"
    )
    return [sys.executable, "-c", code, *arguments]


# Read from stdin byte by byte, so that nothing is taken that is meant for the agent: one line of
# JSON with the agent's environment, working folder and command. Nothing of it is on a command line,
# which everybody on a machine can read. One line, without "!": it passes through any login shell.
# srun begins in our own working folder, where a user's `json.py` may lie.
_BOOTSTRAP = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; import json, os; "
    "orders = json.loads(b''.join(iter(lambda: os.read(0, 1) or sys.exit(1), b'\\n'))); "
    "os.environ.update(orders['env']); "
    "os.path.isdir(orders['cwd']) and os.chdir(orders['cwd']); "
    "os.execv(sys.executable, [sys.executable, *orders['arguments']])"
)
# The prologue comes first, as one line with its newlines and backslashes escaped. It may not read
# what follows on stdin, and what it prints is no event.
_PROLOGUE_SHELL = (
    'IFS= read -r prologue; eval "$(printf %b "$prologue")" </dev/null 1>&2; exec "$@"'
)

Kind = Literal["local", "ssh", "slurm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How one node is reached.

    name      what the node is called
    words     the command that runs, on the node, what is put behind it; none on this machine
    quoted    what is put behind is read by a shell there
    env       of that command; None: our own
    """

    name: str
    kind: Kind = "local"
    words: tuple[str, ...] = ()
    quoted: bool = False
    env: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What every agent of a job is started with.

    heartbeat_seconds  silence of the coordinator after which it is taken for gone
    python             the interpreter on other nodes, a path or a name
    env                what an agent on another node has beside what it finds there
    prologue           shell lines that run before it there, in a login shell
    """

    heartbeat_seconds: float
    python: str = sys.executable
    env: Mapping[str, str] = field(default_factory=dict)
    prologue: str = ""


@dataclass(slots=True)
class Node:
    """One node of a job: the transport's process and the pipes to its agent.

    greeted    its agent has said hello
    lost       how its agent was lost, in words; None while it is there
    heard_at   when something was heard last
    unsent     what the pipe did not take yet, for `flush`
    """

    name: str
    kind: Kind
    process: subprocess.Popen[bytes]
    log_path: Path
    lines: LineBuffer = field(default_factory=LineBuffer)
    clock: Clock = field(default_factory=Clock)
    greeted: bool = False
    lost: str | None = None
    heard_at: float = 0.0
    _sending: threading.Lock = field(default_factory=threading.Lock)
    unsent: bytearray = field(default_factory=bytearray)

    @property
    def events(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    def hear(self, event: Event) -> None:
        """Note what an event says of the agent itself."""
        self.heard_at = time.monotonic()
        if isinstance(event, Hello):
            self.greeted = True
            self.clock.meet(event.boot_id)
        elif isinstance(event, Pong):
            self.clock.compare(sent=event.echo, theirs=event.time, received=self.heard_at)

    def send(self, command: Command) -> bool:
        """False when the agent is gone; its end of file tells the rest."""
        return self.write(encode_command(command))

    def write(self, data: bytes) -> bool:
        """As `send`, of what is no command. What the pipe does not take yet is kept for `flush`.

        Nobody waits here: what leads to a node may read nothing for as long as it likes.
        """
        with self._sending:
            self.unsent += data
            return self._flush()

    def flush(self) -> bool:
        """Write on; whether there is more to write."""
        with self._sending:
            return self._flush() and bool(self.unsent)

    def _flush(self) -> bool:
        """False when nobody reads any more."""
        assert self.process.stdin is not None
        try:
            while self.unsent:
                del self.unsent[: os.write(self.process.stdin.fileno(), self.unsent)]
        except BlockingIOError:
            pass
        except (BrokenPipeError, ValueError):
            self.unsent.clear()
            return False
        return True

    def keep(self, line: bytes) -> None:
        """What is no event goes where the agent's own words are, as long as there is room."""
        with contextlib.suppress(OSError), open(self.log_path, "ab") as log:
            log.write(line + b"\n")

    def hang_up(self) -> None:
        """Close the command pipe: the agent ends its ranks and leaves."""
        assert self.process.stdin is not None
        # Whoever writes at the same time must not meet another pipe under this one's number.
        with self._sending, contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def discard_events(self) -> None:
        """Make room in the pipe, so that an agent that is leaving can say what it has to."""
        try:
            while os.read(self.events.fileno(), 1 << 16):
                pass
        except BlockingIOError:
            pass

    def how_it_ended(self, seconds: float) -> str:
        """Of an agent whose pipe was closed, in words, for which it is given some time."""
        try:
            return exit_in_words(self.process.wait(timeout=seconds))
        except subprocess.TimeoutExpired:
            return "its pipe was closed"


def start_agent(way: Way, orders: Orders, mark: Mapping[str, str], log_path: Path) -> Node:
    """Start an agent, in a session of its own: a Ctrl-C reaches us alone.

    mark   is in the environment of the agent and of all that it starts
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    agent = python_command("ftlaunch.cluster.agent", str(orders.heartbeat_seconds))
    remote = bool(way.words)
    with open(log_path, "ab") as log:
        process = subprocess.Popen(
            _command(way, orders) if remote else agent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, **mark} if not remote else way.env,
            start_new_session=True,
        )
    assert process.stdin is not None and process.stdout is not None
    os.set_blocking(process.stdin.fileno(), False)
    os.set_blocking(process.stdout.fileno(), False)
    node = Node(name=way.name, kind=way.kind, process=process, log_path=log_path)
    if remote:
        node.write(_preface(orders, mark, agent[1:]))
    return node


def _command(way: Way, orders: Orders) -> list[str]:
    words = [orders.python, "-c", _BOOTSTRAP]
    if orders.prologue:
        words = ["/bin/bash", "-l", "-c", _PROLOGUE_SHELL, "bash", *words]
    return [*way.words, shlex.join(["exec", *words])] if way.quoted else [*way.words, *words]


def _preface(orders: Orders, mark: Mapping[str, str], arguments: list[str]) -> bytes:
    """What stdin begins with."""
    body = {"env": {**orders.env, **mark}, "cwd": str(Path.cwd()), "arguments": arguments}
    lines = json.dumps(body).encode() + b"\n"
    if orders.prologue:
        escaped = orders.prologue.replace("\\", "\\\\").replace("\n", "\\n")
        lines = os.fsencode(escaped) + b"\n" + lines
    return lines
