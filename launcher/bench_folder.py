"""The folder of a benchmark: empty before it, and as it was where nothing could be measured."""

from __future__ import annotations

import contextlib
import datetime
import shutil
from collections.abc import Sequence
from pathlib import Path

from ftlaunch.cluster.errors import UserError


def folder_of(output_dir: str | None) -> Path:
    """An empty one, or none yet. UserError when there is something in it."""
    if output_dir is None:
        folder = Path.cwd() / "ftlaunch-bench" / f"{datetime.datetime.now():%Y-%m-%d-%H%M%S}"
    else:
        folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"the output folder {folder} is a file. Choose another with -o.")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(
            f"the output folder {folder} is not empty. A benchmark overwrites nothing: choose another with "
            "-o, or remove it first."
        )
    return folder


def make_folder(folder: Path) -> list[Path]:
    """The folders that were made for it, the innermost first. UserError."""
    try:
        made = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the output folder {folder} cannot be made: {error.strerror}. Choose another with -o."
        ) from None
    return made


def remove_folder(folder: Path, made: Sequence[Path]) -> None:
    """What a benchmark without a result has written, and the folders that were made for it.

    What somebody else has put there meanwhile stays.
    """
    shutil.rmtree(folder / "cells", ignore_errors=True)
    with contextlib.suppress(OSError):
        (folder / "bench.json").unlink(missing_ok=True)
        for each in made:
            each.rmdir()
