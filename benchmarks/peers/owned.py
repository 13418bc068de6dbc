"""Runs a peer's module as a program that does not outlive whoever compares.

    python -m ftlaunch.peers.owned MODULE ARGUMENT…

The kernel ends it with its parent, however that ends. FTLAUNCH_PEER_OWNER is the number of the process
that compares, which may be gone before this begins.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_OWNER = "FTLAUNCH_PEER_OWNER"


def end_with_parent() -> None:
    """SIGKILL: a collective that hangs hears no other."""
    zero = ctypes.c_ulong(0)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), zero, zero, zero)
    if not Path(f"/proc/{os.environ[_OWNER]}").exists():
        raise SystemExit("whoever compares is gone")


if __name__ == "__main__":
    end_with_parent()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
