"""The key-value store of a user's script that uses torch: it outlives every rank, rank 0 included."""

from __future__ import annotations

import os
import signal
import socket
import sys

from torch._C._distributed_c10d import TCPStore

from ftlaunch.cluster.rank_pipe import LISTEN_FD_VARIABLE


def main() -> int:
    """Argument: the number of ranks. Serves on the inherited socket until it is ended."""
    descriptor = int(os.environ[LISTEN_FD_VARIABLE])
    with socket.socket(fileno=os.dup(descriptor)) as listener:
        address, port = listener.getsockname()[:2]
    store = TCPStore(
        address,
        port,
        int(sys.argv[1]),
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=descriptor,
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while store is not None:
        signal.pause()
    return 0
