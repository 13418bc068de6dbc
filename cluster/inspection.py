"""What a job needs on a node and whether it is there: paths, and the output folder that all share.

Asked for by the coordinator, answered by agents. It judges nothing: that is `launcher.checks`.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ftlaunch.cluster.events import Inspect, Inspected


@contextmanager
def shared_token(folder: Path) -> Iterator[str]:
    """Put a file into the output folder for the nodes to look for; all of them are removed after."""
    token = f".seen-{secrets.token_hex(8)}"
    (folder / token).touch(mode=0o600)
    try:
        yield token
    finally:
        for path in folder.glob(f"{token}*"):
            path.unlink(missing_ok=True)


def answers(folder: Path, token: str, node: int) -> bool:
    """Whether what a node has put beside the token is seen here."""
    return (folder / _answer(token, node)).exists()


def inspect(command: Inspect) -> Inspected:
    """Look for all of it; puts one small file into the output folder."""
    missing = {path: why for path in command.paths if (why := _why_unreadable(path))}
    folder = Path(command.folder)
    answer = folder / _answer(command.token, command.node)
    unwritable = ""
    try:
        answer.touch(mode=0o600)
    except OSError as error:
        unwritable = error.strerror or str(error)
    sees_token = (folder / command.token).exists()
    if not sees_token and not unwritable:
        # A folder of this node's own: whoever asked would never find it to remove it.
        answer.unlink(missing_ok=True)
    return Inspected(
        time=time.time(),
        missing=missing,
        sees_token=sees_token,
        unwritable=unwritable,
        free_bytes=_free_bytes(folder),
    )


def _answer(token: str, node: int) -> str:
    return f"{token}-{node}"


def _why_unreadable(path: str) -> str:
    try:
        if Path(path).is_dir():
            os.scandir(path).close()
        else:
            with open(path, "rb"):
                pass
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _free_bytes(folder: Path) -> int | None:
    try:
        stats = os.statvfs(folder)
    except OSError:
        return None
    return stats.f_bavail * stats.f_frsize
