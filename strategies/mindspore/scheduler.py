"""MindSpore's scheduler: the process at which the ranks of a job meet. The agent of node 0 runs it
beside its ranks and ends it when they are done.
"""

from __future__ import annotations

import signal

import mindspore as ms
from mindspore import communication


def main() -> int:
    """Serves until every rank has left; fails when one has left without a word. Its role and address
    are in MindSpore's own variables (`strategies.mindspore_environment`).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ms.set_device("CPU")
    communication.init()
    return 0
