"""The folder that a merge makes: beside its final name until it is whole, and one merge at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.files import sync_folder

# Marks the folder as ours: another of that name is not touched.
_MARK = ".ftlaunch-merge"
_BUSY = (errno.EWOULDBLOCK, errno.EACCES)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder that becomes `target`, durably and all at once, when the block ends without an error.

    With an error it is removed. UserError when the target exists or another merge is writing it;
    what a killed merge has left is replaced.
    """
    _check_free(target)
    temporary = target.with_name(f"{target.name}.unfinished")
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _lock(temporary, target)
    try:
        _clear(temporary, target)
        try:
            _check_free(target)
            yield temporary
            sync_folder(temporary)
            _check_free(target)
            # Another folder is never replaced: rename refuses one that is not empty.
            temporary.rename(target)
        except BaseException:
            with suppress(OSError):
                _remove(temporary)
            raise
        (target / _MARK).unlink(missing_ok=True)
        sync_folder(target)
        sync_folder(target.parent)
    finally:
        os.close(descriptor)


def _check_free(target: Path) -> None:
    if os.path.lexists(target):
        raise UserError(
            f"the target {target} exists. A merge replaces nothing: choose another name, or remove it."
        )


def _lock(temporary: Path, target: Path) -> int:
    """A locked descriptor of the folder; the kernel unlocks it when we end, however that is."""
    while True:
        temporary.mkdir(exist_ok=True)
        try:
            descriptor = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # the merge that had it has just come to its end
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(temporary, descriptor):
                return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _BUSY:
                raise
            raise UserError(
                f"another merge into {target} is running. Wait for it, or choose another target."
            ) from None
        # Renamed or removed by its owner between our open and our lock.
        os.close(descriptor)
        _check_free(target)


def _is_still(path: Path, descriptor: int) -> bool:
    own = os.fstat(descriptor)
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino)


def _clear(temporary: Path, target: Path) -> None:
    """Empty but for our mark. UserError for a folder with contents and without it."""
    if any(temporary.iterdir()) and not (temporary / _MARK).exists():
        raise UserError(
            f"{temporary} exists and is not what a merge has left, but its place is needed. Move it "
            f"away, or choose another target than {target}."
        )
    (temporary / _MARK).touch()
    _empty(temporary)


def _empty(folder: Path) -> None:
    """But for our mark: whatever interrupts this, the next merge knows the folder."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _MARK:
            path.unlink()


def _remove(folder: Path) -> None:
    _empty(folder)
    (folder / _MARK).unlink(missing_ok=True)
    folder.rmdir()
