"""The finished model: a folder that `from_pretrained` loads, put in place whole or not at all.

It is merged from a checkpoint: no rank has to hold the model for it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from ftlaunch.cluster.errors import JobError, UserError
from ftlaunch.strategies.base import Strategy
from ftlaunch.strategies.checkpoint.adapter_weights import with_adapter_keys
from ftlaunch.strategies.checkpoint.agreement import all_or_none, long_all_or_none
from ftlaunch.strategies.checkpoint.conversion import SaveDtype
from ftlaunch.strategies.checkpoint.manifest import CheckpointDamaged, read_manifest
from ftlaunch.strategies.checkpoint.merge import write_adapter, write_weights
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

    Of a checkpoint that holds an adapter the folder is the adapter's, in peft's layout.

    model_files   what it has beside the weights, on rank 0
    alive         called every few seconds
    Returns the folder and, on rank 0, the first tensor with numbers too large for `dtype`, if there
    is one. CheckpointDamaged, on rank 0 alone, when the bytes are not those that were written.
    """
    temporary = _beside(target, "new")
    overflowed: str | None = None

    def write() -> None:
        nonlocal overflowed
        _remove(temporary)
        temporary.mkdir(parents=True)
        for name, content in model_files.items():
            with replace_file(temporary / name) as file:
                file.write(content)
        fit_config(temporary, dtype)
        manifest = read_manifest(checkpoint)
        weights = checkpoint_weights(checkpoint, manifest)
        if manifest.holds_adapter:
            written = write_adapter(with_adapter_keys(weights), temporary, dtype=dtype)
        else:
            written = write_weights(weights, temporary, dtype=dtype)
        overflowed = written.overflowed
        sync_folder(temporary)

    def put_in_place() -> None:
        _replace(target, temporary)

    is_main, what = strategy.world.is_main, f"the model {target}"
    try:
        long_all_or_none(strategy, write if is_main else _nothing, what, alive=alive)
        # Not before all have agreed: whoever lost a rank meanwhile leaves the old one.
        all_or_none(strategy, put_in_place if is_main else _nothing, what)
    except (UserError, JobError, CheckpointDamaged):
        # After other errors the thread may still write into it: the next run removes it.
        if is_main:
            _remove(temporary)
        raise
    return target, overflowed


def _nothing() -> None:
    """What ranks other than 0 write."""


def _beside(target: Path, what: str) -> Path:
    """A name that is nobody else's."""
    return target.with_name(f".ftlaunch-{target.name}-{what}")


def _replace(target: Path, new: Path) -> None:
    """A folder cannot be renamed over another: the old one steps aside first."""
    old = _beside(target, "old")
    _remove(old)
    if os.path.lexists(target):
        target.rename(old)
    new.rename(target)
    _remove(old)
    sync_folder(target.parent)


def _remove(path: Path) -> None:
    """A folder, or a link to one, which stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
