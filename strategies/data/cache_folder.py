"""Where cached data lies, and what to tell the user when it cannot lie there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.options import DataOptions


def cache_root(options: DataOptions, environ: Mapping[str, str] | None = None) -> Path:
    """data.cache_dir, $FTLAUNCH_CACHE, $XDG_CACHE_HOME/ftlaunch or ~/.cache/ftlaunch."""
    environ = os.environ if environ is None else environ
    chosen = options.cache_dir or environ.get("FTLAUNCH_CACHE")
    if chosen:
        return _expand(chosen).absolute()
    base = environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is invalid and to be ignored.
    folder = Path(base) if base.startswith("/") else _expand("~") / ".cache"
    return folder / "ftlaunch"


@contextmanager
def writing_to_cache(root: Path) -> Iterator[None]:
    """Make `root`, for its owner alone; UserError for an OSError of the block."""
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise cache_error(root, error) from None


def cache_error(root: Path, error: OSError) -> UserError:
    return UserError(
        f"The cache folder {root} cannot be used: {error.strerror or error}. It must be a folder "
        "that every rank can write to, with room for the tokens. Set data.cache_dir (or the "
        "variable FTLAUNCH_CACHE) to another folder, or make room."
    )


def _expand(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"The cache folder {path!r} cannot be found: there is no home folder of that user. "
            "Set data.cache_dir to a folder."
        ) from None
