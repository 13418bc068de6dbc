"""The output folder: whose it is, that one job at a time uses it, and what may be deleted in it."""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
import shutil
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.linux import Process, read_process
from ftlaunch.launcher.config import RunConfig
from ftlaunch.launcher.earlier import FOLDER, interrupted, put_back

# What a run writes, and all that --overwrite deletes.
OWN_NAMES = (
    "plan.json",
    "metrics.jsonl",
    "events.jsonl",
    "totals.jsonl",
    "summary.json",
    "report.html",
    "predictions.jsonl",
    "eval",
    "logs",
    "checkpoints",
    "model",
    "tensorboard",
    "submission",
)
OWNER = ".ftlaunch-owner"
_ASKING_SECONDS = 0.5
# Marks the folder as ours: what carries such a name elsewhere is not touched.
MARK = ".ftlaunch"


def default_output_dir(config: RunConfig) -> Path:
    if config.output_dir is not None:
        return Path(config.output_dir)
    return Path.cwd() / "ftlaunch-runs" / f"{datetime.datetime.now():%Y-%m-%d-%H%M%S}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Who has an output folder: a process, with what tells it from a later one of its number."""

    pid: int
    host: str
    started: str
    process_started: int

    @property
    def is_here(self) -> bool:
        return self.host == socket.gethostname()

    def process(self) -> Process | None:
        """None when it runs elsewhere, or no more."""
        found = read_process(self.pid) if self.is_here else None
        same = found is not None and found.is_alive and found.started == self.process_started
        return found if same else None


def owner_of(folder: Path) -> Owner | None:
    """Whoever has the folder now. None: nobody, or only the file of a process that has died is left."""
    try:
        with open(folder / OWNER, "rb") as file:
            raw = json.loads(file.read(4096))
            owner = Owner(
                pid=int(raw["pid"]),
                host=str(raw["host"]),
                started=str(raw["started"]),
                process_started=int(raw["process_started"]),
            )
            if owner.process() is not None:
                return owner
            # Elsewhere, or gone: the lock tells, and is not kept from anybody but for this moment.
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return owner
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class OutputFolder:
    """A context manager that owns the folder while a job runs in it."""

    def __init__(self, path: Path, *, overwrite: bool) -> None:
        self.path = path
        self._overwrite = overwrite
        self._owner: IO[str] | None = None

    def __enter__(self) -> OutputFolder:
        """UserError when it cannot be used; nothing is deleted before it is ours."""
        try:
            self._prepare()
            self._own()
            try:
                if self._overwrite:
                    self._clear()
                elif interrupted(self.path):
                    # A submission has this folder while it is at work: that one was killed.
                    put_back(self.path / FOLDER)
                (self.path / MARK).touch()
            except BaseException:
                self._release()
                raise
        except OSError as error:
            raise UserError(
                f"the output folder {self.path} cannot be used: {error.strerror or error}. Choose "
                "another with --output-dir."
            ) from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._release()

    def _release(self) -> None:
        if self._owner is not None:
            # Unlink before unlocking: whoever waits for the lock sees that the file is gone.
            (self.path / OWNER).unlink(missing_ok=True)
            self._owner.close()

    def _prepare(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(
                f"the output folder {self.path} is a file. Choose another with --output-dir."
            )
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        foreign = [name for name in OWN_NAMES if (self.path / name).exists()]
        if foreign and not (self.path / MARK).exists():
            raise UserError(
                f"the output folder {self.path} holds {', '.join(foreign)}, which ftlaunch did not "
                "write there. Nothing is overwritten: choose another folder with --output-dir."
            )

    def _own(self) -> None:
        """Take the owner file: a lock that dies with us, and text that says who has it."""
        path = self.path / OWNER
        owner = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+")
        try:
            _lock(owner)
        except OSError as error:
            who = _describe(owner.read(4096))
            owner.close()
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise UserError(
                f"the output folder {self.path} is in use by another job ({who}). Wait for it, "
                "stop it, or choose another folder with --output-dir."
            ) from None
        if not path.exists() or path.stat().st_ino != os.fstat(owner.fileno()).st_ino:
            owner.close()
            self._own()  # its last owner removed it between our open and our lock
            return
        owner.truncate(0)
        started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        process = read_process(os.getpid())
        me = Owner(
            pid=os.getpid(),
            host=socket.gethostname(),
            started=started,
            process_started=process.started if process is not None else 0,
        )
        json.dump(asdict(me), owner)
        owner.flush()
        self._owner = owner

    def _clear(self) -> None:
        for name in OWN_NAMES:
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def put_back_earlier(path: Path) -> None:
    """For whoever looks into a folder before, or without, owning it.

    UserError while a submission is at work there, or when its earlier results cannot be put back.
    """
    if interrupted(path):
        with OutputFolder(path, overwrite=False):
            pass


def _lock(file: IO[str]) -> None:
    """OSError when another job has it; whoever only asks whose it is has it for a moment."""
    deadline = time.monotonic() + _ASKING_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES) or time.monotonic() > deadline:
                raise
        time.sleep(_ASKING_SECONDS / 10)


def _describe(text: str) -> str:
    try:
        raw = json.loads(text)
        return f"process {raw['pid']} on {raw['host']}, since {raw['started']}"
    except (ValueError, KeyError, TypeError):
        return "its owner file cannot be read"
