"""Which files a MindSpore checkpoint consists of, by their names. Opens an index and nothing else.

A checkpoint is one file, the shards that an index names, or one of these for each rank: in folders
`rank_0`, `rank_1`, … or in files whose names differ in their `rank_N` alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlaunch.cluster.errors import UserError

SUFFIXES = (".ckpt", ".safetensors")
INDEX_SUFFIX = ".safetensors.index.json"
_RANK_FOLDER = re.compile(r"(?:.*[_-])?rank_?(\d{1,6})")
_RANK_FILE = re.compile(r"(.*?)(?<![a-zA-Z])rank_?(\d{1,6})(?!\d)(.*)")
_SHARD = re.compile(r".*-\d{5}-of-(\d{5})\.safetensors")
_MAX_INDEX_BYTES = 100_000_000
_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class MindsporeFiles:
    """The files of one checkpoint, by rank from 0 on.

    folder      where it lies
    has_ranks   whether names say which file is whose; otherwise there is rank 0 alone
    """

    folder: Path
    ranks: Mapping[int, Sequence[Path]]
    has_ranks: bool


def of_file(path: Path) -> MindsporeFiles:
    """Of a file that the user names. UserError for one of several shards."""
    shard = _SHARD.fullmatch(path.name)
    if shard and int(shard[1]) > 1:
        raise UserError(f"{path} is one of {int(shard[1])} shards; pass the folder that it is in.")
    found = _RANK_FILE.fullmatch(path.stem)
    in_folder = _RANK_FOLDER.fullmatch(path.parent.name)
    has_ranks = found is not None or in_folder is not None
    return MindsporeFiles(folder=path.parent, ranks={0: (path,)}, has_ranks=has_ranks)


def find_files(folder: Path) -> MindsporeFiles | None:
    """Of a folder. None when nothing there looks like one; UserError when it is not clear which."""
    folders = _rank_folders(folder)
    by_folder = {rank: _only_checkpoint(own) for rank, own in folders.items()}
    if any(by_folder.values()):
        for rank, files in by_folder.items():
            if not files:
                raise UserError(
                    f"{folders[rank]} holds no checkpoint, the other ranks' folders do. Copy it "
                    "anew, or pass one rank's file."
                )
        if paths := _checkpoints_in(folder):
            raise _several(folder, [*paths, *(path for own in by_folder.values() for path in own)])
        return _complete(folder, by_folder)
    paths = _checkpoints_in(folder)
    names = [(path, found) for path in paths if (found := _RANK_FILE.fullmatch(path.stem))]
    if not names or len(names) < len(paths):
        files = _only_checkpoint(folder)
        return MindsporeFiles(folder=folder, ranks={0: files}, has_ranks=False) if files else None
    ranks = {int(found[2]): (path,) for path, found in names}
    series = {(found[1], found[3], path.suffix) for path, found in names}
    if len(series) > 1 or len(ranks) < len(paths):
        raise _several(folder, paths)
    return _complete(folder, ranks)


def _checkpoints_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)


def _rank_folders(folder: Path) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        name = _RANK_FOLDER.fullmatch(path.name)
        # A link to the folder itself is no rank's.
        if name and path.is_dir() and not path.samefile(folder):
            if int(name[1]) in found:
                raise UserError(
                    f"{folder} has two folders of rank {int(name[1])}, {found[int(name[1])].name} "
                    f"and {path.name}. Move the one away that is not meant."
                )
            found[int(name[1])] = path
    return found


def _only_checkpoint(folder: Path) -> tuple[Path, ...]:
    """The one file or the shards of one index; nothing when there is none."""
    paths = _checkpoints_in(folder)
    indexes = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if len(indexes) == 1:
        shards = shards_of(indexes[0])
        if set(paths) <= set(shards):
            return shards
    if len(indexes) + len(paths) > 1:
        raise _several(folder, paths)
    return tuple(paths)


def _several(folder: Path, paths: Sequence[Path]) -> UserError:
    names = ", ".join(repr(path.name) for path in paths[:_SHOWN])
    more = f" and {len(paths) - _SHOWN:,} more" if len(paths) > _SHOWN else ""
    return UserError(
        f"{folder} holds {len(paths)} files that may be checkpoints ({names}{more}), and nothing says "
        "which one is meant. Pass that file; of several ranks, move the others away."
    )


def _complete(folder: Path, files: Mapping[int, tuple[Path, ...]]) -> MindsporeFiles:
    missing = [rank for rank in range(max(files) + 1) if rank not in files][:_SHOWN]
    if missing:
        raise UserError(
            f"{folder} has files of the ranks {', '.join(map(str, sorted(files)[:_SHOWN]))} and up to "
            f"{max(files)}, but rank {missing[0]} is missing. Copy it anew from where it was "
            "written. If every rank held the whole model, pass the file of one."
        )
    return MindsporeFiles(folder=folder, ranks=dict(sorted(files.items())), has_ranks=True)


def shards_of(index: Path) -> tuple[Path, ...]:
    """The files that an index names. UserError for one that cannot be read or leads elsewhere."""
    names = set(weight_map(index).values())
    for name in names:
        if Path(name).name != name or Path(name).suffix != ".safetensors":
            raise UserError(f"{index} names the file {name!r}; it has to name those beside it.")
    return tuple(index.parent / name for name in sorted(names))


def weight_map(index: Path) -> dict[str, str]:
    """Name of a tensor → name of its file."""
    found = read_json(index, _MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise UserError(f"{index} is damaged: it has no table weight_map. Copy it anew.")
    return found


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """A JSON object from a small file. UserError for anything else."""
    if not path.is_file():
        raise UserError(f"{path} is no file. Copy the checkpoint anew.")
    with open(path, "rb") as file:
        raw = file.read(limit + 1)
    try:
        if len(raw) > limit:
            raise ValueError(f"it has more than {limit:,} bytes")
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it is no JSON ({error}). Copy it anew.") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object. Copy it anew.")
    return found
