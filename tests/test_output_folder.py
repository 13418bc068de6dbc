"""Whose the output folder is: one job's, and not that of whoever only asks."""

from __future__ import annotations

import fcntl
import threading

import pytest

from ftlaunch.cluster.errors import UserError
from ftlaunch.launcher.output_folder import OutputFolder, owner_of


def test_asking_whose_it_is_keeps_no_job_out(tmp_path):
    with open(tmp_path / ".ftlaunch-owner", "w+", encoding="utf-8") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        release = threading.Timer(0.2, lambda: fcntl.flock(asking, fcntl.LOCK_UN))
        release.start()
        try:
            with OutputFolder(tmp_path, overwrite=False):
                assert owner_of(tmp_path) is not None
        finally:
            release.join()
    assert owner_of(tmp_path) is None


def test_a_job_that_stays_keeps_others_out(tmp_path):
    with (
        OutputFolder(tmp_path, overwrite=False),
        pytest.raises(UserError, match="in use by another job"),
        OutputFolder(tmp_path, overwrite=True),
    ):
        pass
