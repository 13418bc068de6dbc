"""The finished model: a folder that `from_pretrained` loads, put in place whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from ftlaunch.strategies.base import Strategy
from ftlaunch.strategies.checkpoint.saving import all_or_none
from ftlaunch.strategies.files import sync_folder


def write_model_folder(
    strategy: Strategy, target: Path, *, tokenizer_files: Sequence[Path], dtype: str
) -> Path:
    """Collective: write config, weights and tokenizer, then put the folder in the place of `target`."""
    temporary = target.with_name(f"{target.name}.unfinished")
    is_main = strategy.world.is_main

    def write() -> None:
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        strategy.save_model(str(temporary), dtype=dtype)
        if is_main:
            for path in tokenizer_files:
                shutil.copyfile(path, temporary / path.name)
            _make_durable(temporary)
            _replace(target, temporary)

    try:
        all_or_none(strategy, write, f"the model {target}")
    finally:
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _make_durable(folder: Path) -> None:
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    sync_folder(folder)


def _replace(target: Path, new: Path) -> None:
    """A folder cannot be renamed over another: the old one steps aside first."""
    old = target.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    sync_folder(target.parent)
