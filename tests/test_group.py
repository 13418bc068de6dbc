"""The ranks' meeting, with real ranks."""

from __future__ import annotations

import time
from unittest.mock import patch

import torch
from torch._C._distributed_c10d import Store, TCPStore

from ftlaunch.strategies.torch import group
from tests.ranks import run_ranks


class _SlowToRead(Store):
    """A store that is read half a second late, as by a rank that does not get its turn."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self._store = TCPStore(*args, **kwargs)

    def set(self, key, value):
        self._store.set(key, value)

    def get(self, key):
        time.sleep(0.5)
        return self._store.get(key)

    def wait(self, *args):
        self._store.wait(*args)


def _meet(world, listen_fd):
    store = TCPStore if world.is_main else _SlowToRead
    with patch.object(group, "TCPStore", store):
        group.meet(world, torch.device("cpu"), listen_fd=listen_fd, timeout_seconds=30)
    return world.rank


def test_a_rank_that_ends_at_once_leaves_the_others_time_to_meet():
    """Rank 0 hosts the store in which the others look up each other."""
    assert run_ranks(3, _meet, seconds=60) == [0, 1, 2]
