"""The finished model: a folder that `from_pretrained` loads, put in place whole or not at all.

It is merged from a checkpoint: no rank has to hold the model for it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from ftlaunch.strategies.base import Strategy
from ftlaunch.strategies.checkpoint.agreement import long_all_or_none
from ftlaunch.strategies.checkpoint.conversion import SaveDtype
from ftlaunch.strategies.checkpoint.manifest import read_manifest
from ftlaunch.strategies.checkpoint.merge import write_weights
from ftlaunch.strategies.checkpoint.model_files import fit_config
from ftlaunch.strategies.checkpoint.store import checkpoint_weights
from ftlaunch.strategies.files import replace_file, sync_folder


def write_model_folder(
    strategy: Strategy,
    checkpoint: Path,
    target: Path,
    *,
    model_files: Mapping[str, bytes],
    dtype: SaveDtype,
    alive: Callable[[], None],
) -> tuple[Path, str | None]:
    """Collective: rank 0 merges the checkpoint and puts the folder in the place of `target`.

    model_files   what it has beside the weights, on rank 0
    alive         called every few seconds
    Returns the folder and, on rank 0, the first tensor with numbers too large for `dtype`, if there
    is one. CheckpointDamaged, on rank 0 alone, when the bytes are not those that were written.
    """
    temporary = target.with_name(f"{target.name}.unfinished")
    overflowed: str | None = None

    def write() -> None:
        nonlocal overflowed
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, content in model_files.items():
            with replace_file(temporary / name) as file:
                file.write(content)
        fit_config(temporary, dtype)
        weights = checkpoint_weights(checkpoint, read_manifest(checkpoint))
        overflowed = write_weights(weights, temporary, dtype=dtype).overflowed
        sync_folder(temporary)
        _replace(target, temporary)

    is_main = strategy.world.is_main
    try:
        long_all_or_none(
            strategy, write if is_main else lambda: None, f"the model {target}", alive=alive
        )
    finally:
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
    return target, overflowed


def _replace(target: Path, new: Path) -> None:
    """A folder cannot be renamed over another: the old one steps aside first."""
    old = target.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    sync_folder(target.parent)
