"""Finds the splits of a local data set and hashes them. Reads names and bytes, never rows."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ftlaunch.cluster.errors import UserError

# Suffix → (builder of the datasets library, separator of columns).
_FORMATS: Mapping[str, tuple[str, str | None]] = {
    ".csv": ("csv", ","),
    ".tsv": ("csv", "\t"),
    ".json": ("json", None),
    ".jsonl": ("json", None),
    ".parquet": ("parquet", None),
    ".arrow": ("arrow", None),
    ".txt": ("text", None),
}
_GZIPPED = (".csv.gz", ".tsv.gz", ".json.gz", ".jsonl.gz", ".txt.gz")
KNOWN_SUFFIXES = (*_FORMATS, *_GZIPPED)

_CANONICAL_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(
        ("validation", "valid", "val", "dev", "development", "eval", "evaluation"), "validation"
    ),
    **dict.fromkeys(("test", "testing"), "test"),
}
# "train-00000-of-00002", "traindata", "val_1", "mrpc.dev", but not "value" or "testimony".
_SPLIT_WORD = re.compile(
    rf"(?:^|[^a-z])({'|'.join(sorted(_CANONICAL_NAMES, key=len, reverse=True))})"
    r"(?:data|set)?(?![a-z])"
)
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalData:
    """A data set on disk.

    kind    "files": each split is a list of files that `builder_of` can name;
            "saved": each split is a folder written by `Dataset.save_to_disk`
    splits  name → its files, in the order of their rows
    folders name → folder, for "saved"
    """

    path: Path
    kind: Literal["files", "saved"]
    splits: Mapping[str, tuple[Path, ...]]
    folders: Mapping[str, Path]


def is_local(name: str) -> bool:
    """Whether a data set's name is a path rather than a name on the Hugging Face hub."""
    looks_local = name.startswith((".", "/", "~")) or name.lower().endswith(KNOWN_SUFFIXES)
    try:
        return looks_local or Path(name).exists()
    except OSError:  # a name too long for a file
        return False


def find_local(name: str) -> LocalData:
    """UserError when there is nothing to read at that path."""
    try:
        path = Path(name).expanduser()
    except RuntimeError:
        raise UserError(
            f"The data set {name!r} cannot be found: there is no home folder of that user. "
            "Set data.name_or_path to an existing file or folder."
        ) from None
    try:
        if not path.exists():
            raise UserError(
                f"There is no data set at {path}: data.name_or_path must be an existing file or "
                "folder, or the name of a data set on the Hugging Face hub. Check the spelling; "
                f"a relative path starts at {Path.cwd()}."
            )
        if path.is_dir():
            return _find_in_folder(path)
        _check_file(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    if _format(path) is None:
        raise UserError(
            f"The data file {path} has the unknown suffix {path.suffix!r}: known are "
            f"{', '.join(KNOWN_SUFFIXES)}. Convert the file or give it the suffix of its format."
        )
    return LocalData(path=path, kind="files", splits={"train": (path,)}, folders={})


def builder_of(files: Sequence[Path]) -> tuple[str, str | None]:
    """Builder and column separator of the files of one split. UserError when they differ."""
    formats = {_format(file) for file in files}
    if len(formats) > 1:
        raise UserError(
            "The files of one split have different formats: "
            f"{list_names(file.name for file in files)} in {files[0].parent}. All shards of a "
            "split must have the same suffix. Move those that do not belong to it elsewhere."
        )
    [only] = formats
    assert only is not None
    return only


def hash_files(local: LocalData, split: str) -> str:
    """xxh3_128 of the contents, in order, and of the names below the data set's path."""
    import xxhash

    digest = xxhash.xxh3_128()
    base = local.path.parent if local.path.is_file() else local.path
    for file in local.splits[split]:
        try:
            _check_file(file)
            digest.update(os.fsencode(file.relative_to(base)) + b"\0%d\0" % file.stat().st_size)
            with open(file, "rb") as stream:
                while chunk := stream.read(_READ_BYTES):
                    digest.update(chunk)
        except OSError as error:
            raise _unreadable(file, error) from None
    return digest.hexdigest()


def canonical_split(name: str) -> str | None:
    """train, validation or test for a name that says so, else None."""
    match = _SPLIT_WORD.search(name.lower())
    return _CANONICAL_NAMES[match[1]] if match else None


def list_names(names: Iterable[object], limit: int = 10) -> str:
    """'a', 'b', 'c' and 7 more."""
    shown = [repr(str(name)) for name in names]
    rest = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return (", ".join(shown[:limit]) + rest) or "nothing"


def _format(path: Path) -> tuple[str, str | None] | None:
    return _FORMATS.get(suffix_of(path).removesuffix(".gz"))


def suffix_of(path: Path) -> str:
    """The known suffix, in lower case; '' for none."""
    name = path.name.lower()
    return next((s for s in sorted(KNOWN_SUFFIXES, key=len, reverse=True) if name.endswith(s)), "")


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(
            f"{path} is neither a file nor a folder: a data set must be one of them. "
            "Set data.name_or_path to a file or folder."
        )
    if path.stat().st_size == 0:
        raise UserError(
            f"The data file {path} is empty: it must hold at least one row. "
            "Write it again or take it out of the folder."
        )


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"The data at {path} cannot be read: {error.strerror or error}. Every node must be able to "
        "read it. Check its permissions and that the disk is mounted."
    )


def _find_in_folder(folder: Path) -> LocalData:
    if (folder / "dataset_dict.json").is_file():
        return _find_saved_splits(folder)
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _saved(folder, {"train": folder})
    splits: dict[str, tuple[Path, ...]] = {}
    # Plain text counts where there is nothing else: beside other data it is a README or a licence.
    for plain_text in (False, True):
        # The second is the layout of repositories on the hub.
        for place in (folder, folder / "data"):
            if not splits and place.is_dir():
                splits = _split_files(place, plain_text=plain_text)
    if not splits:
        found = list_names(sorted(entry.name for entry in folder.iterdir()))
        raise UserError(
            f"The folder {folder} holds no data files: found {found}. Known suffixes are "
            f"{', '.join(KNOWN_SUFFIXES)}. Put train.jsonl (and validation.jsonl) there, or set "
            "data.name_or_path to another folder."
        )
    return LocalData(path=folder, kind="files", splits=splits, folders={})


def _split_files(folder: Path, *, plain_text: bool) -> dict[str, tuple[Path, ...]]:
    """Files by split: from the file's name, for files of a sub-folder from the sub-folder's."""
    splits: dict[str, list[Path]] = {}

    def wanted(file: Path) -> bool:
        found = _format(file)
        return found is not None and (found[0] == "text") is plain_text

    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            name = canonical_split(entry.name)
            files = sorted(f for f in entry.rglob("*") if f.is_file() and wanted(f))
            files = [f for f in files if not f.name.startswith(".")]
        else:
            stem = entry.name[: len(entry.name) - len(suffix_of(entry))]
            name = canonical_split(stem) or stem
            files = [entry] if wanted(entry) else []
        if name and files:
            splits.setdefault(name, []).extend(files)
    return {name: tuple(files) for name, files in splits.items()}


def _find_saved_splits(folder: Path) -> LocalData:
    index = folder / "dataset_dict.json"
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["splits"]
        folders = {str(name): folder / str(name) for name in names}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{index} cannot be read as JSON with a list of splits: it must be as "
            "DatasetDict.save_to_disk wrote it. Save the data set again."
        ) from None
    for name, split_folder in folders.items():
        if Path(name).name != name or not (split_folder / "state.json").is_file():
            raise UserError(
                f"{index} names the split {name!r}, but {split_folder} holds no saved data set: "
                "every split needs its folder. Save the data set again."
            )
    return _saved(folder, folders)


def _saved(path: Path, folders: Mapping[str, Path]) -> LocalData:
    splits = {
        name: tuple(sorted(f for f in folder.iterdir() if f.suffix in {".arrow", ".json"}))
        for name, folder in folders.items()
    }
    return LocalData(path=path, kind="saved", splits=splits, folders=folders)
