"""In which order the ranks of a CPU job end: rank 0 before the others. Knows sockets only.

The last exchange is over for rank 0 when each of the others has answered, and a thread of MindSpore's
writes that answer: a rank that ended as soon as it had the sum would now and then take the answer
along, and rank 0 would wait for it until it fails. So the others stay until rank 0 is done. MindSpore
has no exchange of which rank 0 would be the one that is not waited for, hence connections of our own,
on which nothing is ever sent: that rank 0 closes them is the whole message.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable

from ftlaunch.cluster.world import World

_MEETING_SECONDS = 10.0
# Longer than MindSpore waits for a lost answer before rank 0 fails.
_STAYING_SECONDS = 60.0
# Without a connection: long enough for nearly every answer.
_ANSWER_SECONDS = 0.3
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
            _LOG.info("rank 0 was not seen to leave: %s", error)
        _shut(connection)


def open_goodbye(world: World, share: Callable[[int], int]) -> Goodbye:
    """Collective: connect every rank with rank 0.

    share   collective: rank 0's number, on every rank
    """
    if world.is_main:
        return Goodbye(world, _accept(world, share))
    port = share(0)
    connections = []
    if port:
        try:
            address = (world.master_address, port)
            connections.append(socket.create_connection(address, timeout=_MEETING_SECONDS))
        except OSError as error:
            _LOG.info("rank 0 cannot be reached at %s:%d: %s", world.master_address, port, error)
    return Goodbye(world, connections)


def _accept(world: World, share: Callable[[int], int]) -> list[socket.socket]:
    connections: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(world.master_address, 0, type=socket.SOCK_STREAM)[0]
        server = socket.create_server(found[4][:2], family=found[0], backlog=world.size)
    except OSError as error:
        _LOG.info("nobody can be met at %s: %s", world.master_address, error)
        share(0)
        return connections
    with server:
        share(server.getsockname()[1])
        until = time.monotonic() + _MEETING_SECONDS
        try:
            while len(connections) < world.size - 1:
                server.settimeout(max(0.01, until - time.monotonic()))
                connections.append(server.accept()[0])
        except OSError as error:
            _LOG.info("%d of %d ranks came: %s", len(connections), world.size - 1, error)
    return connections


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    connection.close()
