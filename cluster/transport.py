"""How an agent is started on a node and talked to: one process of its own for each node.

Only the local transport exists: the node is this machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ftlaunch.cluster.events import Command, LineBuffer, encode_command


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
    """One node of a job: the transport's process and the pipes to its agent."""

    name: str
    process: subprocess.Popen[bytes]
    lines: LineBuffer
    log_path: Path

    @property
    def events(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    def send(self, command: Command) -> bool:
        """False when the agent is gone; its end of file tells the rest."""
        assert self.process.stdin is not None
        try:
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


def start_local(name: str, env: Mapping[str, str], log_path: Path) -> Node:
    """Start an agent on this machine, in a session of its own: a Ctrl-C reaches us alone."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with open(log_path, "ab") as log:
        process = subprocess.Popen(
            python_command("ftlaunch.cluster.agent"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, **env},
            start_new_session=True,
        )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    return Node(name=name, process=process, lines=LineBuffer(), log_path=log_path)
