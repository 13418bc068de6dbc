"""Finding and loading the checkpoint to go on from, agreed on by all ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.base import Strategy
from ftlaunch.strategies.checkpoint.agreement import any_rank, from_main
from ftlaunch.strategies.checkpoint.manifest import (
    MANIFEST_NAME,
    CheckpointDamaged,
    Manifest,
    folder_name,
    read_manifest,
    step_of,
)
from ftlaunch.strategies.checkpoint.retention import checkpoint_folders
from ftlaunch.strategies.checkpoint.store import CheckpointReader


def newest_manifest(root: Path) -> tuple[Path, Manifest] | None:
    """The newest checkpoint whose manifest and file sizes are whole, without reading tensors."""
    for folder in checkpoint_folders(root):
        try:
            return folder, _read_manifest(folder)
        except CheckpointDamaged:
            continue
    return None


def _read_manifest(folder: Path) -> Manifest:
    """As `read_manifest`, of a folder whose name says which of them is the newest."""
    manifest = read_manifest(folder)
    if manifest.step != step_of(folder):
        raise CheckpointDamaged(
            folder, f"it is a copy of step {manifest.step}, by its {MANIFEST_NAME}"
        )
    return manifest


def load_newest(
    strategy: Strategy, root: Path, *, on_damaged: Callable[[str], None]
) -> tuple[Path, Manifest] | None:
    """Collective: load the newest checkpoint that is whole for every rank; None if there is none.

    `on_damaged` is told of each one that is passed over. UserError if all are damaged.
    """
    # Rank 0's view counts: on a shared file system others may see a folder later.
    steps = [step_of(folder) or 0 for folder in checkpoint_folders(root)]
    count = int(from_main(strategy, float(len(steps))))
    for place in range(count):
        step = int(from_main(strategy, float(steps[place]) if strategy.world.is_main else 0.0))
        folder = root / folder_name(step)
        damage = None
        try:
            manifest = _read_manifest(folder)
            reader = CheckpointReader(folder, manifest)
        except CheckpointDamaged as error:
            damage = error
        # Loading is collective: nobody begins with it alone.
        damaged = any_rank(strategy, damage is not None)
        if not damaged:
            try:
                strategy.load_state(
                    reader,
                    optimizer_steps=manifest.applied_steps,
                    loss_scale=manifest.loss_scale,
                )
            except CheckpointDamaged as error:
                damage = error
            damaged = any_rank(strategy, damage is not None)
        if not damaged:
            return folder, manifest
        on_damaged(str(damage or f"checkpoint {folder} is damaged for another rank"))
    if count:
        raise UserError(
            f"every checkpoint in {root} is damaged: there is nothing to go on from. Use "
            "--overwrite to delete them and start anew, or another --output-dir."
        )
    return None
