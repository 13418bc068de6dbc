"""Checkpoints that are written beside training."""

from __future__ import annotations

import errno
import os
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest

from ftlaunch.cluster.errors import JobError, UserError
from ftlaunch.cluster.world import World
from ftlaunch.strategies import registry
from ftlaunch.strategies.base import Said, TensorSlice
from ftlaunch.strategies.checkpoint import agreement
from ftlaunch.strategies.checkpoint import saver as saver_module
from ftlaunch.strategies.checkpoint.manifest import read_manifest
from ftlaunch.strategies.checkpoint.retention import checkpoint_folders
from ftlaunch.strategies.checkpoint.saver import Saver
from ftlaunch.strategies.checkpoint.store import CheckpointReader, write_shard
from ftlaunch.strategies.loop import Cursor, train
from ftlaunch.strategies.schedule import Schedule
from tests import tiny
from tests.ranks import run_ranks

# A disk takes so long; a step of the tiny model takes some 20 ms.
SLOW_SECONDS = 1.0
NAMES = ("ddp", "zero3")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny.write_config(tmp_path_factory.mktemp("bert"), "bert")


def _train(world, listen_fd, folder, name, root, *, write, steps=40, beside=True):
    """Saves at steps 1 and 2, the second with `write`; what was seen, and the error if there was one."""
    strategy = registry.load(name)(tiny.request(world, listen_fd, folder))
    cursor, saved, blocked = Cursor(), {}, []
    saver = Saver(
        strategy,
        root,
        model_files={"config.json": b"{}"} if world.is_main else {},
        beside=beside,
        on_saved=lambda saving: saved.update({saving.manifest.step: (cursor.step, saving)}),
    )

    def after_step(report):
        saver.hear(report.outcome.saving)
        if cursor.step in (1, 2):
            if cursor.step == 2:
                vars(saver_module)["write_shard"] = write
            started = time.perf_counter()
            saver.save(tiny.manifest(cursor.step, world_size=world.size), now=cursor.step == 1)
            blocked.append(time.perf_counter() - started)
        return 2 in saved

    error = None
    try:
        train(
            strategy,
            tiny.windows(world, tiny.random_table(40), global_batch=8, micro_batch=4),
            Schedule(name="constant", peak=1e-2, warmup_steps=0, total_steps=100),
            cursor,
            total_steps=steps,
            say=lambda: Said(stop=False, saving=saver.say()),
            after_step=after_step,
        )
        saver.finish()
    except (UserError, JobError) as caught:
        error = f"{type(caught).__name__}: {caught}"
    times = {step: (at, saving.seconds, saving.blocked) for step, (at, saving) in saved.items()}
    return cursor.step, times, blocked, error


def _slowly(path, slices):
    time.sleep(SLOW_SECONDS)
    write_shard(path, slices)


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_while_the_disk_is_slow(bert, tmp_path, name):
    def rank(world, listen_fd):
        return _train(world, listen_fd, bert, name, tmp_path, write=_slowly, steps=400)

    for _, times, (_, blocked), error in run_ranks(2, rank):
        assert error is None
        at, seconds, waited = times[2]
        assert at > 2, "no step was made meanwhile"
        assert seconds > SLOW_SECONDS
        assert blocked < SLOW_SECONDS / 2
        assert waited < SLOW_SECONDS / 2
    newest, _ = checkpoint_folders(tmp_path)
    manifest = read_manifest(newest)
    assert (manifest.step, manifest.model_files) == (2, {"config.json": 2})


def test_what_is_saved_is_what_was_there_when_it_was_asked_for(bert, tmp_path):
    """Weights move on while the file is written: none of that may be in it."""

    def beside(world, listen_fd):
        return _train(world, listen_fd, bert, "ddp", tmp_path / "beside", write=_slowly, steps=400)

    def alone(world, listen_fd):
        return _train(
            *(world, listen_fd, bert, "ddp", tmp_path / "alone"),
            write=write_shard,
            steps=2,
            beside=False,
        )

    run_ranks(2, beside)
    run_ranks(2, alone)
    readers = []
    for name in ("beside", "alone"):
        folder = checkpoint_folders(tmp_path / name)[0]
        readers.append(CheckpointReader(folder, read_manifest(folder)))
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        for name in readers[1].names(kind):
            found, expected = (reader.read_whole(kind, name) for reader in readers)
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "UserError: no space left on the disk while writing checkpoint"),
        (errno.EIO, "JobError: rank 1 could not write checkpoint"),
    ],
)
def test_a_failed_write_is_told_by_all_at_a_next_step(bert, tmp_path, number, said):
    def rank(world, listen_fd):
        def fail(path, slices):
            if world.rank == 1:
                raise OSError(number, os.strerror(number))
            write_shard(path, slices)

        return _train(world, listen_fd, bert, "ddp", tmp_path, write=fail)

    for step, times, _, error in run_ranks(2, rank):
        assert error is not None
        assert error.startswith(said)
        assert 2 < step <= 5, "steps later"
        assert set(times) == {1}
    [folder] = checkpoint_folders(tmp_path)
    assert folder.name == "step-00000001"
    assert not (tmp_path / "step-00000002").exists()


def test_without_memory_for_copies_it_is_written_at_once(bert, tmp_path):
    def rank(world, listen_fd):
        vars(saver_module)["available_memory"] = lambda: 0
        return _train(world, listen_fd, bert, "ddp", tmp_path, write=_slowly)

    for _, times, (_, blocked), error in run_ranks(2, rank):
        assert error is None
        assert blocked > SLOW_SECONDS
        assert times[2][2] > SLOW_SECONDS
    folder = checkpoint_folders(tmp_path)[0]
    reader = CheckpointReader(folder, read_manifest(folder))
    for name in reader.names("weight"):
        reader.read_whole("weight", name)


PIECES, PIECE_BYTES = 40, 1 << 20


class Large:
    """A strategy of one rank whose state comes piece by piece, as from a device."""

    world = World(
        rank=0,
        size=1,
        local_rank=0,
        local_size=1,
        node_rank=0,
        num_nodes=1,
        master_address="",
        master_port=0,
    )

    def aliases(self):
        return {}

    def state_slices(self):
        for number in range(PIECES):
            values = np.full(PIECE_BYTES // 4, number, dtype=np.float32)
            yield TensorSlice(
                name=f"w{number}", kind="weight", shape=values.shape, start=0, values=values
            )

    def sum_across_ranks(self, values):
        return values


@pytest.mark.parametrize("why", ["it is waited for", "no memory for a copy"])
def test_what_is_written_at_once_is_never_in_memory_as_a_whole(tmp_path, monkeypatch, why):
    # Half of it is for copies: ten pieces, of which none may stay when the eleventh has no room.
    monkeypatch.setattr(saver_module, "available_memory", lambda: 20 * PIECE_BYTES)
    large: Any = Large()
    tracemalloc.start()
    try:
        saver = Saver(large, tmp_path, beside=True)
        saver.save(tiny.manifest(1), now=why == "it is waited for")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (4 if why == "it is waited for" else 14) * PIECE_BYTES
    folder = checkpoint_folders(tmp_path)[0]
    reader = CheckpointReader(folder, read_manifest(folder))
    for number in range(PIECES):
        assert (reader.read_whole("weight", f"w{number}") == number).all()


def test_a_checkpoint_is_the_same_file_however_it_is_written(tmp_path):
    large: Any = Large()
    for name, now in (("beside", False), ("at once", True)):
        saver = Saver(large, tmp_path / name, beside=True)
        saver.save(tiny.manifest(1), now=now)
        saver.finish()
    one, other = (
        next((tmp_path / name).glob("*/state-*")).read_bytes() for name in ("beside", "at once")
    )
    assert one == other


@pytest.mark.parametrize("now", [True, False])
def test_a_long_write_shows_that_it_lives(tmp_path, monkeypatch, now):
    def slowly(path, slices):
        time.sleep(0.5)
        write_shard(path, slices)

    monkeypatch.setattr(saver_module, "write_shard", slowly)
    monkeypatch.setattr(agreement, "_ROUND_SECONDS", 0.05)
    large: Any = Large()
    signs: list[int] = []
    saver = Saver(large, tmp_path, beside=True, alive=lambda: signs.append(1))
    saver.save(tiny.manifest(1), now=now)
    saver.finish()
    assert len(signs) >= 3
    assert len(checkpoint_folders(tmp_path)) == 1
