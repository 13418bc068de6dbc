"""Which checkpoints an output folder holds, which may go, and how they go.

Knows folders and manifests only, nothing of tensors.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from ftlaunch.strategies.checkpoint.manifest import MANIFEST_NAME, step_of


def checkpoint_folders(root: Path) -> list[Path]:
    """Folders named like checkpoints that have a manifest, newest first."""
    return [f for f in _step_folders(root) if (f / MANIFEST_NAME).is_file()]


def remove_unfinished(root: Path) -> None:
    """Remove what saves that never finished have left. Call before the first save of a run."""
    for folder in _step_folders(root):
        if not (folder / MANIFEST_NAME).exists():
            shutil.rmtree(folder, ignore_errors=True)


def set_aside_newer(root: Path, step: int) -> None:
    """Rename what is newer than the checkpoint that a run goes on from: it was damaged."""
    for folder in _step_folders(root):
        if (step_of(folder) or 0) > step:
            aside = folder.with_name(f"{folder.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)


def prune(root: Path, *, keep_newest: int, keep_steps: Collection[int]) -> None:
    """Remove all but the newest `keep_newest` checkpoints and those at `keep_steps`."""
    for folder in checkpoint_folders(root)[keep_newest:]:
        if step_of(folder) not in keep_steps:
            remove(folder)


def remove(folder: Path) -> None:
    """The manifest goes first: whatever interrupts this, no half checkpoint looks whole."""
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _step_folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    folders = [f for f in root.iterdir() if f.is_dir() and step_of(f) is not None]
    return sorted(folders, key=lambda f: step_of(f) or 0, reverse=True)
