"""The finished model: a folder that `from_pretrained` loads, put in place whole or not at all.

It is merged from a checkpoint: no rank has to hold the model for it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ftlaunch.strategies.base import Strategy
from ftlaunch.strategies.checkpoint.agreement import all_or_none
from ftlaunch.strategies.checkpoint.conversion import SaveDtype
from ftlaunch.strategies.checkpoint.manifest import MODEL_FOLDER, read_manifest
from ftlaunch.strategies.checkpoint.merge import write_weights
from ftlaunch.strategies.checkpoint.model_files import copy_model_files
from ftlaunch.strategies.checkpoint.store import checkpoint_weights
from ftlaunch.strategies.files import sync_folder


def write_model_folder(
    strategy: Strategy, checkpoint: Path, target: Path, *, dtype: SaveDtype
) -> Path:
    """Collective: rank 0 merges the checkpoint and puts the folder in the place of `target`.

    CheckpointDamaged, on rank 0 alone, when its bytes are not those that were written.
    """
    temporary = target.with_name(f"{target.name}.unfinished")

    def write() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        manifest = read_manifest(checkpoint)
        write_weights(checkpoint_weights(checkpoint, manifest), temporary, dtype=dtype)
        copy_model_files(
            checkpoint / MODEL_FOLDER, list(manifest.model_files), temporary, dtype=dtype
        )
        sync_folder(temporary)
        _replace(target, temporary)

    is_main = strategy.world.is_main
    try:
        all_or_none(strategy, write if is_main else lambda: None, f"the model {target}")
    finally:
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _replace(target: Path, new: Path) -> None:
    """A folder cannot be renamed over another: the old one steps aside first."""
    old = target.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    sync_folder(target.parent)
