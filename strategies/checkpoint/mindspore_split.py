"""Which parameters mindone's ZeRO has split over the ranks, by its files params_split_info_N.json.

Each is a table, name of a parameter → `{"split": bool, "group_size": int, "rank_id": int}`, and lies
in a folder `params_info` of the job's working folder. A split parameter is cut along axis 0 into equal
parts, one a rank: under ZeRO-3 the model's own, under ZeRO-1 and 2 the optimizer's copy only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.checkpoint.mindspore_folder import read_json

FOLDER = "params_info"
_FILE = re.compile(r"params_split_info_(\d{1,6})\.json")
_MAX_BYTES = 1 << 28
# ckpt/, rank_0/ckpt/ and what they lie in.
_LEVELS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitInfo:
    """What all files say: where they are, how many ranks there were, which parameters are split."""

    folder: Path
    num_ranks: int
    split: Mapping[str, bool]


def read_split_info(folder: Path) -> SplitInfo | None:
    """Of a checkpoint's folder: from it, its `params_info`, or the one beside it or beside a folder
    that it is in, three further up at most. None without any.

    UserError for files that are damaged, missing, or contradict one another.
    """
    above = [each / FOLDER for each in (folder, *folder.absolute().parents)[1:_LEVELS]]
    for place in (folder, folder / FOLDER, *above):
        found = _files(place)
        if found:
            return _together(place, found)
    return None


def _files(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    named = ((_FILE.fullmatch(path.name), path) for path in sorted(folder.iterdir()))
    return {int(name[1]): path for name, path in named if name}


def _together(folder: Path, files: Mapping[int, Path]) -> SplitInfo:
    split: dict[str, bool] | None = None
    size = 0
    for rank, path in files.items():
        own_split, own_size = _read(path, rank)
        if split is None:
            split, size, first = own_split, own_size, path
        elif (own_split, own_size) != (split, size):
            raise UserError(
                f"{first} and {path.name} are not of one job: they differ in "
                f"{_difference(split, own_split)}. Copy the files of one job."
            )
    if set(files) != set(range(size)):
        missing = [rank for rank in range(size) if rank not in files]
        what = f"that of rank {missing[0]} is missing" if missing else "there are files of more"
        raise UserError(
            f"{folder}: its files say that {size} ranks took part, but {what}. Copy it anew."
        )
    return SplitInfo(folder=folder, num_ranks=size, split=split or {})


def _difference(one: Mapping[str, bool], other: Mapping[str, bool]) -> str:
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return f"what they say of {names[0]!r}" if names else "the number of ranks"


def _read(path: Path, rank: int) -> tuple[dict[str, bool], int]:
    """(whether each parameter is split, number of ranks)."""
    split: dict[str, bool] = {}
    sizes = set()
    for name, entry in read_json(path, _MAX_BYTES).items():
        if not _is_entry(entry):
            raise UserError(
                f"{path} is damaged: what it says of {name!r} is not split, group_size and rank_id. "
                "Copy it anew."
            )
        if entry["rank_id"] != rank:
            raise UserError(
                f"{path} is of rank {entry['rank_id']}, by what it says of {name!r}, not of rank "
                f"{rank}, by its name. Copy it anew."
            )
        split[name] = entry["split"]
        sizes.add(entry["group_size"])
    if len(sizes) != 1:
        raise UserError(
            f"{path} is damaged: it says {len(sizes)} different numbers of ranks and should say one. "
            "Copy it anew."
        )
    return split, sizes.pop()


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or type(entry.get("split")) is not bool:
        return False
    rank, size = entry.get("rank_id"), entry.get("group_size")
    return type(rank) is int and type(size) is int and 0 <= rank < size <= 1_000_000
