"""How an agent is started on a node and talked to: one process of its own for each node.

Only the local transport exists: the node is this machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

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


@dataclass(slots=True)
class Node:
    """One node of a job: the transport's process and the pipes to its agent.

    greeted    its agent has said hello
    lost       how its agent was lost, in words; None while it is there
    heard_at   when something was heard last
    """

    name: str
    process: subprocess.Popen[bytes]
    log_path: Path
    lines: LineBuffer = field(default_factory=LineBuffer)
    clock: Clock = field(default_factory=Clock)
    greeted: bool = False
    lost: str | None = None
    heard_at: float = 0.0
    _sending: threading.Lock = field(default_factory=threading.Lock)

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
        assert self.process.stdin is not None
        try:
            with self._sending:
                self.process.stdin.write(encode_command(command))
                self.process.stdin.flush()
        except (BrokenPipeError, ValueError):
            return False
        return True

    def hang_up(self) -> None:
        """Close the command pipe: the agent ends its ranks and leaves."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass

    def discard_events(self) -> None:
        """Make room in the pipe, so that an agent that is leaving can say what it has to."""
        try:
            while os.read(self.events.fileno(), 1 << 16):
                pass
        except BlockingIOError:
            pass

    def how_it_ended(self) -> str:
        """Of an agent whose pipe was closed, in words."""
        try:
            return exit_in_words(self.process.wait(timeout=1.0))
        except subprocess.TimeoutExpired:
            return "its pipe was closed"


def start_local(
    name: str, env: Mapping[str, str], log_path: Path, *, heartbeat_seconds: float
) -> Node:
    """Start an agent on this machine, in a session of its own: a Ctrl-C reaches us alone."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with open(log_path, "ab") as log:
        process = subprocess.Popen(
            python_command("ftlaunch.cluster.agent", str(heartbeat_seconds)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, **env},
            start_new_session=True,
        )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    return Node(name=name, process=process, log_path=log_path)
