"""The finished model: merged from a checkpoint, put in place whole, by rank 0 alone."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ftlaunch.cluster.world import World
from ftlaunch.strategies import model_folder
from ftlaunch.strategies.base import TensorSlice
from ftlaunch.strategies.checkpoint import agreement, merge
from ftlaunch.strategies.checkpoint.manifest import (
    CheckpointDamaged,
    folder_name,
    write_manifest,
)
from ftlaunch.strategies.checkpoint.saver import Saving
from ftlaunch.strategies.checkpoint.store import shard_name, write_shard
from ftlaunch.strategies.model_folder import write_model_folder
from ftlaunch.strategies.options import CheckpointOptions
from ftlaunch.strategies.training import TrainingRun
from tests import tiny

CONFIG = {"config.json": b'{"dtype": "float32", "vocab_size": 9}', "tokenizer.json": b"{}"}


class OneRank:
    """All that agreeing takes, where there is nobody to agree with."""

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

    def sum_across_ranks(self, values):
        return values


ONE_RANK: Any = OneRank()


def _checkpoint(root, step=1, values=(1.0, 70000.0, -2.0)):
    folder = root / folder_name(step)
    folder.mkdir(parents=True)
    array = np.array(values, dtype=np.float32)
    piece = TensorSlice(name="w", kind="weight", shape=array.shape, start=0, values=array)
    name = shard_name(0, 1)
    write_shard(folder / name, [piece])
    files = {name: (folder / name).stat().st_size}
    write_manifest(folder, replace(tiny.manifest(step), files=files))
    return folder


def _write(checkpoint, target, *, dtype="fp32", alive=lambda: None):
    return write_model_folder(
        ONE_RANK, checkpoint, target, model_files=CONFIG, dtype=dtype, alive=alive
    )


@pytest.mark.parametrize(("dtype", "named"), [("fp32", None), ("bf16", None), ("fp16", "w")])
def test_the_folder_and_what_became_infinite_in_it(tmp_path, dtype, named):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()
    assert _write(_checkpoint(tmp_path), target, dtype=dtype) == (target, named)
    assert {path.name for path in target.iterdir()} == {*CONFIG, "model.safetensors"}
    config = json.loads((target / "config.json").read_text())
    names = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    assert config == {"dtype": names[dtype], "vocab_size": 9}
    if dtype == "fp32":
        assert load_file(target / "model.safetensors")["w"].tolist() == [1.0, 70000.0, -2.0]


def test_damage_leaves_the_model_that_was_there(tmp_path):
    checkpoint, target = _checkpoint(tmp_path), tmp_path / "model"
    _write(checkpoint, target)
    shard = checkpoint / shard_name(0, 1)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    before = (target / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointDamaged):
        _write(checkpoint, target)
    assert (target / "model.safetensors").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"model", checkpoint.name}


def test_folders_of_the_user_stay(tmp_path):
    """Also what a merge into `model` by hand would be called."""
    checkpoint, target = _checkpoint(tmp_path), tmp_path / "model"
    for name in ("model.old", "model.unfinished"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").touch()
    for _ in range(2):
        _write(checkpoint, target)
    for name in ("model.old", "model.unfinished"):
        assert (tmp_path / name / "precious").exists()
    names = {"model", "model.old", "model.unfinished", checkpoint.name}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize("kind", ["link", "dangling link"])
def test_a_link_gives_way_and_what_it_leads_to_stays(tmp_path, kind):
    checkpoint, target = _checkpoint(tmp_path / "checkpoints"), tmp_path / "out" / "model"
    elsewhere = tmp_path / "elsewhere"
    target.parent.mkdir()
    if kind == "link":
        elsewhere.mkdir()
        (elsewhere / "precious").touch()
    target.symlink_to(elsewhere)
    for _ in range(3):
        _write(checkpoint, target)
        assert not target.is_symlink() and (target / "model.safetensors").is_file()
        assert [path.name for path in target.parent.iterdir()] == ["model"]
        target.rename(tmp_path / "real")
        shutil.rmtree(tmp_path / "real")
        target.symlink_to(elsewhere)
    assert elsewhere.exists() == (kind == "link")
    assert kind == "dangling link" or (elsewhere / "precious").exists()


@pytest.mark.parametrize("lost_at", [1, 2])
def test_without_the_other_ranks_the_old_model_stays(tmp_path, monkeypatch, lost_at):
    """While it is merged, and when it is whole: what the thread does then disturbs nobody."""

    class Losing(OneRank):
        rounds = 0

        def sum_across_ranks(self, values):
            self.rounds += 1
            if self.rounds == lost_at:
                raise RuntimeError("connection closed by peer")
            return values

    def slowly(*args, **kwargs):
        time.sleep(0.3 if lost_at == 1 else 0)
        result = write_weights(*args, **kwargs)
        done.set()
        return result

    checkpoint, target = _checkpoint(tmp_path, values=(1.0,)), tmp_path / "model"
    _write(checkpoint, target)
    before = (target / "model.safetensors").read_bytes()
    newer = _checkpoint(tmp_path, step=2, values=(2.0,))
    done, write_weights, losing = threading.Event(), merge.write_weights, Losing()
    monkeypatch.setattr(model_folder, "write_weights", slowly)
    monkeypatch.setattr(sys.modules[__name__], "ONE_RANK", losing)
    with pytest.raises(RuntimeError, match="closed by peer"):
        _write(newer, target)
    assert done.wait(5), "the thread was disturbed"
    time.sleep(0.2)
    assert (target / "model.safetensors").read_bytes() == before
    monkeypatch.undo()
    _write(newer, target)
    assert {path.name for path in tmp_path.iterdir()} == {"model", checkpoint.name, newer.name}


def test_a_long_merge_shows_that_it_lives(tmp_path, monkeypatch):
    def slowly(*args, **kwargs):
        time.sleep(0.5)
        return write_weights(*args, **kwargs)

    write_weights = merge.write_weights
    monkeypatch.setattr(model_folder, "write_weights", slowly)
    monkeypatch.setattr(agreement, "_ROUND_SECONDS", 0.05)
    signs = []
    _write(_checkpoint(tmp_path), tmp_path / "model", alive=lambda: signs.append(1))
    assert len(signs) >= 3


def test_the_best_is_kept_until_a_better_one_is_whole(tmp_path):
    """At step 20 a better one was found, and is not saved yet when step 15 has become whole."""
    root = tmp_path / "checkpoints"
    for step in (5, 10, 15):
        _checkpoint(root, step)

    def best(step):
        return {"step": step, "metric": "loss", "value": 0.1, "metrics": {}}

    run = SimpleNamespace(
        _strategy=ONE_RANK,
        _settings=SimpleNamespace(
            options=SimpleNamespace(checkpoint=CheckpointOptions(save_total_limit=1))
        ),
        _best=SimpleNamespace(best=best(20)),
        _best_is_kept=lambda: True,
        _root=root,
        _emit=lambda message: None,
    )
    saving = Saving(
        manifest=tiny.manifest(15, best=best(10)),
        folder=root / folder_name(15),
        seconds=1.0,
        blocked=0.0,
    )
    TrainingRun._on_saved(run, saving)  # type: ignore[arg-type]
    assert {path.name for path in root.iterdir()} == {folder_name(10), folder_name(15)}
