"""A port for the rendezvous, held from the moment it is chosen until the rank that serves it."""

from __future__ import annotations

import errno
import os
import random
import socket

from ftlaunch.cluster.errors import UserError

# Below the ephemeral range (32768 to 60999), where a client socket may take any port at any time,
# and clear of HCCL's own 60000 to 60031; hccl.py keeps clear of these.
LOWEST, HIGHEST = 20000, 32000
_ATTEMPTS = 50


def hold_port(address: str, port: int, *, listens: bool = True) -> socket.socket:
    """A socket bound on `address`, listening if it `listens`. Port 0: a free one.

    UserError if the given port is taken.
    """
    if port:
        try:
            return _hold(address, port, listens)
        except OSError as error:
            raise UserError(
                f"port {port} on {address} cannot be used: {os.strerror(error.errno or 0)}. "
                "Choose another with cluster.port, or leave it out."
            ) from None
    for _ in range(_ATTEMPTS):
        # Not seeded: two jobs that start together must not try the same ports.
        candidate = random.SystemRandom().randrange(LOWEST, HIGHEST)
        try:
            return _hold(address, candidate, listens)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
    raise UserError(
        f"no free port was found on {address} among {_ATTEMPTS} tried from {LOWEST} to {HIGHEST}. "
        "Set cluster.port to one that is free."
    )


def _hold(address: str, port: int, listens: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Connections of an attempt that has ended linger; a listener that lives is refused all the same.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        if listens:
            listener.listen(1024)
    except OSError:
        listener.close()
        raise
    return listener
