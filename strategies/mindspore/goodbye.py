"""In which order the ranks of a CPU job end: rank 0 before the others. Knows sockets only.

The last exchange is over for rank 0 when each of the others has answered, and a thread of MindSpore's
writes that answer: a rank that ended as soon as it had the sum would now and then take the answer
along, and rank 0 would wait for it until it fails. So the others stay until rank 0 is done. MindSpore
has no exchange of which rank 0 would be the one that is not waited for, hence connections of our own,
on which a rank shows that it is one, and then nothing more is sent: that rank 0 closes them is the
whole message.
"""

from __future__ import annotations

import logging
import secrets
import socket
import time
from collections.abc import Callable

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.ports import hold_port
from ftlaunch.cluster.world import World

_MEETING_SECONDS = 3.0
_MARK_BYTES = 4
# Longer than MindSpore waits for a lost answer before rank 0 fails.
_STAYING_SECONDS = 60.0
# Without a connection: long enough for nearly every answer.
_ANSWER_SECONDS = 0.3
# What a firewall has forgotten is not told to either side.
_SILENT_SECONDS = 60
_LOG = logging.getLogger(__name__)


class Goodbye:
    """Connections between rank 0 and each of the others, which hold until rank 0 closes them."""

    def __init__(self, world: World, connections: list[socket.socket]) -> None:
        self._world = world
        self._connections = connections

    def say(self) -> None:
        """Return at once on rank 0, and on the others when rank 0 has called this or is gone."""
        if self._world.is_main:
            for connection in self._connections:
                # Not by closing alone: a child of this process may hold it, too.
                _shut(connection)
            return
        if not self._connections:
            time.sleep(_ANSWER_SECONDS)
            return
        (connection,) = self._connections
        connection.settimeout(_STAYING_SECONDS)
        try:
            connection.recv(1)
        except OSError as error:
            # Rank 0 has not taken this connection, or its host is gone.
            _LOG.info("rank 0 was not seen to leave: %s", error)
            time.sleep(_ANSWER_SECONDS)
        _shut(connection)


def open_goodbye(world: World, share: Callable[[int], int]) -> Goodbye:
    """Collective: connect every rank with rank 0.

    share   collective: rank 0's number, below 2^53, on every rank
    """
    if world.is_main:
        return Goodbye(world, _accept(world, share))
    port, mark = divmod(share(0), 1 << 8 * _MARK_BYTES)
    if not port:
        return Goodbye(world, [])
    try:
        address = (world.master_address, port)
        connection = socket.create_connection(address, timeout=_MEETING_SECONDS)
        connection.sendall(mark.to_bytes(_MARK_BYTES, "big"))
    except OSError as error:
        _LOG.warning("rank 0 cannot be reached at %s:%d: %s", world.master_address, port, error)
        return Goodbye(world, [])
    return Goodbye(world, [_kept_alive(connection)])


def _accept(world: World, share: Callable[[int], int]) -> list[socket.socket]:
    connections: list[socket.socket] = []
    try:
        server = hold_port(world.master_address, 0)
    except (OSError, UserError) as error:
        _LOG.warning("nobody can be met at %s: %s", world.master_address, error)
        share(0)
        return connections
    mark = secrets.randbelow(1 << 8 * _MARK_BYTES)
    with server:
        share((server.getsockname()[1] << 8 * _MARK_BYTES) + mark)
        until = time.monotonic() + _MEETING_SECONDS
        while len(connections) < world.size - 1 and time.monotonic() < until:
            server.settimeout(max(0.01, until - time.monotonic()))
            try:
                connection = server.accept()[0]
            except OSError as error:
                missing = world.size - 1 - len(connections)
                _LOG.warning("%d of %d ranks did not come: %s", missing, world.size - 1, error)
                break
            if _shows(connection, mark.to_bytes(_MARK_BYTES, "big")):
                connections.append(_kept_alive(connection))
            else:
                connection.close()
    return connections


def _shows(connection: socket.socket, mark: bytes) -> bool:
    """It is one of this job's ranks; what else connects is none of ours."""
    connection.settimeout(1.0)
    try:
        return connection.recv(_MARK_BYTES, socket.MSG_WAITALL) == mark
    except OSError:
        return False


def _kept_alive(connection: socket.socket) -> socket.socket:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _SILENT_SECONDS)
    return connection


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    connection.close()
