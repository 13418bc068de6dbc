"""An agent's end of the connection to the fork server of its machine, which it starts if there is none."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence

from ftlaunch.cluster.errors import JobError
from ftlaunch.cluster.events import (
    Command,
    Event,
    Prepare,
    decode_server_event,
    encode_command,
)
from ftlaunch.cluster.fork_server import MAX_MESSAGE_BYTES, uid_of
from ftlaunch.cluster.transport import python_command
from ftlaunch.cluster.verdict import exit_in_words

# In the environment of everything that belongs to one job.
JOB_VARIABLE = "FTLAUNCH_JOB"
_CONNECT_SECONDS = 10.0
# A message to the fork server is one packet, which has to fit into the socket's buffer.
MAX_SPAWN_BYTES = 160_000


class ForkLink:
    """A connection. `process` is the server where this agent has started it, else None."""

    def __init__(
        self, connection: socket.socket, process: subprocess.Popen[bytes] | None, prepare: Prepare
    ) -> None:
        self._socket = connection
        self._process = process
        # A server that imports reads nothing, and its socket takes little.
        self._unsent: deque[tuple[bytes, list[int]]] = deque()
        self._is_gone = False
        self.prepare = prepare
        self.server_pid: int | None = process.pid if process is not None else None

    @classmethod
    def open(cls, prepare: Prepare) -> ForkLink:
        """Connect to the machine's server for this job and preparation, or become its parent.

        The name in the abstract namespace is the lock: it is taken by binding, and free again when
        the last process that holds the socket has ended, however it did.
        """
        name = _socket_name(prepare)
        deadline = time.monotonic() + _CONNECT_SECONDS
        process = None
        while time.monotonic() < deadline:
            connection = _connect(name)
            if connection is not None:
                return cls(connection, process, prepare)
            listener = _listen(name)
            if listener is not None:
                with listener:
                    process = _start_server(listener, prepare)
            else:
                time.sleep(0.01)  # bound by another agent that is about to listen
        raise JobError(f"no connection to the fork server within {_CONNECT_SECONDS:.0f} s")

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, command: Command, descriptors: Sequence[int] = ()) -> bool:
        """Never waits: what the socket does not take now is for `flush`. False: the server is gone."""
        message = encode_command(command)
        if not self.flush():
            return False
        if self._unsent or not self._takes(message, descriptors):
            self._unsent.append((message, _duplicates(descriptors)))
        return not self._is_gone

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    def flush(self) -> bool:
        """Hand over what there is room for; False when the server is gone."""
        while self._unsent and self._takes(*self._unsent[0]):
            _close_all(self._unsent.popleft()[1])
        return not self._is_gone

    def _takes(self, message: bytes, descriptors: Sequence[int]) -> bool:
        """False: there is no room now. What a server that is gone does not get is done with."""
        self._socket.setblocking(False)
        try:
            socket.send_fds(self._socket, [message], list(descriptors))
        except BlockingIOError:
            return False
        except ConnectionError:
            self._is_gone = True
        return True

    def receive(self, timeout_seconds: float | None = None) -> Event | None:
        """The next event; None when the server is gone. TimeoutError when it says nothing."""
        self._socket.settimeout(timeout_seconds)
        try:
            message = self._socket.recv(MAX_MESSAGE_BYTES)
        except ConnectionError:
            return None
        return decode_server_event(message) if message else None

    def how_it_ended(self) -> str:
        """Of a server that is gone, in words; only its parent knows."""
        if self._process is None:
            return "gone"
        try:
            return exit_in_words(self._process.wait(timeout=2.0))
        except subprocess.TimeoutExpired:
            return "out of reach"

    def wait(self, seconds: float) -> None:
        """Where this agent is its parent: until it has ended."""
        if self._process is not None:
            try:
                self._process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                pass

    def close(self) -> None:
        for _, descriptors in self._unsent:
            _close_all(descriptors)
        self._unsent.clear()
        self._socket.close()


def _duplicates(descriptors: Sequence[int]) -> list[int]:
    copies: list[int] = []
    try:
        for descriptor in descriptors:
            copies.append(os.dup(descriptor))
    except OSError as error:
        _close_all(copies)
        raise JobError(f"a rank's files could not be kept open: {error.strerror}") from None
    return copies


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _socket_name(prepare: Prepare) -> str:
    # Everything that could make an import come out differently is in the name.
    content = encode_command(prepare) + json.dumps(sorted(os.environ.items())).encode()
    key = hashlib.sha256(content).hexdigest()[:32]
    return f"\0ftlaunch-{os.environ.get(JOB_VARIABLE, os.getpid())}-{key}"


def _connect(name: str) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(_CONNECT_SECONDS)
    try:
        connection.connect(name)
    except (ConnectionRefusedError, BlockingIOError, TimeoutError):
        connection.close()
        return None
    if uid_of(connection) != os.getuid():
        # The name is no secret: anyone on the machine may have taken it.
        connection.close()
        raise JobError("another user of this machine holds the socket of the fork server")
    connection.settimeout(None)
    return connection


def _listen(name: str) -> socket.socket | None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(name)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        if error.errno != errno.EADDRINUSE:
            raise
        return None
    return listener


def _start_server(listener: socket.socket, prepare: Prepare) -> subprocess.Popen[bytes]:
    request = {
        "listener": listener.fileno(),
        "start_method": prepare.start_method,
        "preload": prepare.preload,
        "grace_seconds": prepare.grace_seconds,
    }
    return subprocess.Popen(
        python_command("ftlaunch.cluster.fork_server", json.dumps(request)),
        stdin=subprocess.DEVNULL,
        # Not our own stdout: that carries events.
        stdout=sys.stderr,
        env={**os.environ, **prepare.env},
        pass_fds=[listener.fileno()],
        start_new_session=True,
    )
