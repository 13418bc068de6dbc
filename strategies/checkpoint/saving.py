"""Saving and finding checkpoints, agreed on by all ranks."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from ftlaunch.cluster.errors import JobError, UserError
from ftlaunch.strategies.base import Strategy
from ftlaunch.strategies.checkpoint.manifest import (
    CheckpointDamaged,
    Manifest,
    folder_name,
    read_manifest,
    step_of,
    write_manifest,
)
from ftlaunch.strategies.checkpoint.retention import checkpoint_folders, remove
from ftlaunch.strategies.checkpoint.store import CheckpointReader, shard_name, write_shard
from ftlaunch.strategies.files import sync_folder

# What a full disk, or a full share of one, says.
_FULL = (errno.ENOSPC, errno.EDQUOT)


def save_checkpoint(strategy: Strategy, root: Path, manifest: Manifest) -> Path:
    """Collective: write the checkpoint of `manifest.step`, its files field filled in.

    UserError on every rank when the disk is full on any; what was there before stays whole.
    """
    folder = root / folder_name(manifest.step)
    world = strategy.world
    shard = folder / shard_name(world.rank, world.size)

    def write_own() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_shard(shard, strategy.state_slices())

    def write_last() -> None:
        names = [shard_name(rank, world.size) for rank in range(world.size)]
        sizes = {name: (folder / name).stat().st_size for name in names}
        write_manifest(folder, replace(manifest, files=sizes))
        sync_folder(root)

    try:
        all_or_none(strategy, write_own, f"checkpoint {folder}")
        all_or_none(strategy, write_last if world.is_main else lambda: None, f"checkpoint {folder}")
    except (UserError, JobError):
        if world.is_main:
            remove(folder)
        raise
    return folder


def all_or_none(strategy: Strategy, write: Callable[[], None], what: str) -> None:
    """Collective: write, then agree that every rank could; else the same error on every rank."""
    failure: OSError | None = None
    try:
        write()
    except OSError as error:
        failure = error
    # One place for each rank, so that all of them can name the one that failed.
    codes = np.zeros(strategy.world.size, dtype=np.float64)
    codes[strategy.world.rank] = 0 if failure is None else failure.errno or errno.EIO
    codes = strategy.sum_across_ranks(codes)
    if np.isin(codes, _FULL).any():
        raise UserError(
            f"no space left on the disk while writing {what}. Whole checkpoints, if any, are "
            "untouched. Free some space, or lower checkpoint.save_total_limit, and run the same "
            "command again to go on from the last."
        )
    if codes.any():
        rank = int(codes.argmax())
        raise JobError(f"rank {rank} could not write {what}: {os.strerror(int(codes[rank]))}")


def newest_manifest(root: Path) -> tuple[Path, Manifest] | None:
    """The newest checkpoint whose manifest and file sizes are whole, without reading tensors."""
    for folder in checkpoint_folders(root):
        try:
            return folder, read_manifest(folder)
        except CheckpointDamaged:
            continue
    return None


def load_newest(
    strategy: Strategy, root: Path, *, on_damaged: Callable[[str], None]
) -> tuple[Path, Manifest] | None:
    """Collective: load the newest checkpoint that is whole for every rank; None if there is none.

    `on_damaged` is told of each one that is passed over. UserError if all are damaged.
    """
    # Rank 0's view counts: on a shared file system others may see a folder later.
    steps = [step_of(folder) or 0 for folder in checkpoint_folders(root)]
    count = int(_from_main(strategy, float(len(steps))))
    for place in range(count):
        step = int(_from_main(strategy, float(steps[place]) if strategy.world.is_main else 0.0))
        folder = root / folder_name(step)
        damage = None
        try:
            manifest = read_manifest(folder)
            strategy.load_state(
                CheckpointReader(folder, manifest),
                optimizer_steps=manifest.applied_steps,
                loss_scale=manifest.loss_scale,
            )
        except CheckpointDamaged as error:
            damage = error
        if not _agree(strategy, damage is not None):
            return folder, manifest
        on_damaged(str(damage or f"checkpoint {folder} is damaged for another rank"))
    if count:
        raise UserError(
            f"every checkpoint in {root} is damaged: there is nothing to go on from. Use "
            "--overwrite to delete them and start anew, or another --output-dir."
        )
    return None


def _from_main(strategy: Strategy, value: float) -> float:
    """Collective: rank 0's value."""
    own = value if strategy.world.is_main else 0.0
    return float(strategy.sum_across_ranks(np.array([own], dtype=np.float64))[0])


def _agree(strategy: Strategy, flag: bool) -> bool:
    """Collective: whether the flag is set on any rank."""
    return bool(strategy.sum_across_ranks(np.array([float(flag)], dtype=np.float64))[0])
