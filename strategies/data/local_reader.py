"""Reads one local split with the datasets library; explains, with the line, what it cannot read."""

from __future__ import annotations

import csv
import errno
import glob
import gzip
import json
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.data.cache_folder import cache_error, writing_to_cache
from ftlaunch.strategies.data.local_files import (
    LocalData,
    builder_of,
    hash_files,
    list_names,
    suffix_of,
)

if TYPE_CHECKING:
    from datasets import Dataset

_CACHE_PROBLEMS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
_MAX_REASON_CHARACTERS = 300


def read_split(local: LocalData, split: str, cache: Path) -> Dataset:
    """The rows of a split, memory-mapped. `cache` receives the Arrow copy of text formats.

    Safe to call from several processes at once: the library locks its conversion.
    """
    dataset = (
        _read_saved(local.folders[split])
        if local.kind == "saved"
        else _read_files(local.splits[split], cache, hash_files(local, split))
    )
    if dataset is None or len(dataset) == 0:
        where = local.folders[split] if local.kind == "saved" else _name(local.splits[split])
        raise UserError(
            f"The data in {where} has no rows: a split must hold at least one. "
            "Fill the file or choose another split."
        )
    return dataset


def _read_saved(folder: Path) -> Dataset:
    import datasets

    try:
        return datasets.load_from_disk(str(folder.absolute()))
    except Exception as error:
        _reraise_if_not_ours(error)
        raise UserError(
            f"The saved data set {folder} cannot be read: {_reason(error)}. It must be whole, as "
            "Dataset.save_to_disk wrote it. Save it again."
        ) from error


def _read_files(files: tuple[Path, ...], cache: Path, content: str) -> Dataset | None:
    """None when there are no rows."""
    import datasets

    builder, separator = builder_of(files)
    for file in files:
        if separator:
            _check_csv_header(file, separator)
    # A folder per content: the library's own key knows a file by path and time only, and would
    # serve old rows for a file replaced within the same time stamp.
    folder = cache / "arrow" / content
    try:
        with writing_to_cache(cache):
            return datasets.load_dataset(
                builder,
                data_files={"train": _link(files, folder / "source")},
                split="train",
                cache_dir=str(folder),
                **_builder_options(builder, separator),
            )
    except UserError:
        raise
    except Exception as error:
        _reraise_if_not_ours(error)
        for cause in _chain(error):
            if isinstance(cause, OSError) and cause.errno in _CACHE_PROBLEMS:
                raise cache_error(cache, cause) from error
        if "corresponds to no data" in str(error):
            return None
        raise _explain(files, builder, separator, error) from error


def _builder_options(builder: str, separator: str | None) -> dict[str, Any]:
    if builder == "text":
        # Without a mark of the byte order in the first line.
        return {"encoding": "utf-8-sig"}
    if separator is None:
        return {}
    # pandas would take the words "None", "NA" and "null" for missing text.
    return {"sep": separator, "keep_default_na": False, "na_values": [""]}


def _link(files: tuple[Path, ...], folder: Path) -> list[str]:
    """Links with plain names: the library takes '[1]', '*' and '::' in a path for instructions."""
    folder.mkdir(parents=True, exist_ok=True)
    links = []
    for number, file in enumerate(files):
        link, target = folder / f"{number:05d}{suffix_of(file)}", file.resolve()
        if not link.is_symlink() or link.readlink() != target:
            temporary = folder / f"{link.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
            temporary.symlink_to(target)
            temporary.replace(link)
        links.append(glob.escape(str(link)))
    return links


def _check_csv_header(file: Path, separator: str) -> None:
    """pandas silently takes the first column for an index when every row has one field too many."""
    try:
        with _open_text(file) as stream:
            rows = (row for row in csv.reader(stream, delimiter=separator) if row)
            header, first = next(rows, []), next(rows, [])
    except (OSError, EOFError, ValueError, csv.Error):
        return  # the reader below fails on the same bytes and explains it
    if len(first) > len(header):
        raise UserError(
            f"The first row of {file} has {len(first)} fields, its header {len(header)}: every row "
            "must have as many fields as the header has names. Quote fields that contain "
            f"{separator!r}, or complete the header."
        )


def _explain(
    files: tuple[Path, ...], builder: str, separator: str | None, error: Exception
) -> UserError:
    for file in files:
        reason = _diagnose(file, builder, separator)
        if reason:
            return UserError(
                f"The data file {file} cannot be read as {builder}: {reason}. Every row must be "
                "complete and of the same kind. Correct that place, or give the file the suffix "
                "of its real format."
            )
    return UserError(
        f"The data in {_name(files)} cannot be read as {builder}: {_reason(error)}. All files of "
        "a split must have the same columns with the same types. Correct the files."
    )


def _diagnose(file: Path, builder: str, separator: str | None) -> str | None:
    """What is wrong with one file, None if nothing is found."""
    try:
        if builder == "json":
            return _diagnose_json(file)
        if builder == "csv":
            return _diagnose_csv(file, separator)
        if builder == "text":
            return _diagnose_text(file)
        return _diagnose_binary(file, builder)
    except UnicodeDecodeError:
        return _diagnose_encoding(file)
    except (OSError, EOFError, ValueError, RecursionError) as error:
        return _reason(error)


def _diagnose_json(file: Path) -> str | None:
    with _open_text(file) as stream:
        first = next((line for line in stream if line.strip()), "")
        stream.seek(0)
        may_be_whole = file.name.lower().endswith((".json", ".json.gz")) and not _is_json(first)
        if may_be_whole or first.lstrip().startswith("["):
            return _diagnose_whole_json(stream)
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                if not isinstance(json.loads(line), dict):
                    return f"line {number} is not a JSON object: {_shorten(line)}"
            except json.JSONDecodeError as error:
                return f"line {number} is not JSON ({error.msg}): {_shorten(line)}"
    return None


def _diagnose_whole_json(stream: IO[str]) -> str | None:
    try:
        value = json.load(stream)
    except json.JSONDecodeError as error:
        return f"line {error.lineno} is not JSON ({error.msg})"
    rows = value if isinstance(value, list) else [value]
    odd = next((i for i, row in enumerate(rows, 1) if not isinstance(row, dict)), None)
    return f"row {odd} is not a JSON object" if odd else None


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _diagnose_csv(file: Path, separator: str | None) -> str | None:
    import pandas  # type: ignore[import-untyped, unused-ignore]

    try:
        with pandas.read_csv(file, sep=separator, chunksize=10_000) as chunks:
            for _ in chunks:
                pass
    except pandas.errors.ParserError as error:
        text = str(error)
        if match := re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", text):
            expected, line, saw = match.groups()
            return f"line {line} has {saw} fields instead of {expected}"
        if match := re.search(r"EOF inside string starting at row (\d+)", text):
            # pandas counts records from 0, the header included.
            return f"the quote opened in line {int(match[1]) + 1} is never closed"
        return _reason(error)
    return None


def _diagnose_text(file: Path) -> str | None:
    """Reads it: all that can be wrong is raised."""
    with _open_text(file) as stream:
        for _ in stream:
            pass
    return None


def _diagnose_binary(file: Path, builder: str) -> str | None:
    import pyarrow
    import pyarrow.parquet

    try:
        if builder == "parquet":
            pyarrow.parquet.ParquetFile(file).read()
        else:
            _read_arrow(file)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        return _reason(error)
    return None


def _read_arrow(file: Path) -> None:
    import pyarrow

    with pyarrow.memory_map(str(file)) as stream:
        try:
            reader = pyarrow.ipc.open_stream(stream)
        except pyarrow.ArrowInvalid:
            reader = pyarrow.ipc.open_file(stream)
        reader.read_all()


def _diagnose_encoding(file: Path) -> str:
    for number, line in enumerate(_lines(file), start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            return f"line {number} is not UTF-8 (byte {line[error.start]:#04x})"
    return "it is not UTF-8"


def _lines(file: Path) -> Iterator[bytes]:
    opener = gzip.open if file.name.lower().endswith(".gz") else open
    with opener(file, "rb") as stream:
        yield from stream


def _open_text(file: Path) -> IO[str]:
    if file.name.lower().endswith(".gz"):
        return gzip.open(file, "rt", encoding="utf-8-sig", newline="")
    return open(file, encoding="utf-8-sig", newline="")


def _chain(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def _reraise_if_not_ours(error: Exception) -> None:
    for cause in _chain(error):
        if isinstance(cause, MemoryError):
            raise cause


def _reason(error: BaseException) -> str:
    """The first line of the innermost exception that the library wrapped."""
    wrapped = [e for e in _chain(error) if not type(e).__name__.startswith("DatasetGeneration")]
    cause = wrapped[0] if wrapped else error
    return _shorten(str(cause) or type(cause).__name__)


def _shorten(text: str) -> str:
    line = text.strip().splitlines()[0] if text.strip() else ""
    return line[:_MAX_REASON_CHARACTERS].rstrip(". ")


def _name(files: tuple[Path, ...]) -> str:
    return str(files[0]) if len(files) == 1 else list_names(files)
