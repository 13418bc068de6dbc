"""Which rows a job trains and is evaluated on: a local data set or one of the Hugging Face hub.

Knows splits and subsets; nothing of columns (`tasks`) or tokens (`token_cache`).
"""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.data.cache_folder import cache_root
from ftlaunch.strategies.data.local_files import (
    canonical_split,
    find_local,
    hash_files,
    is_local,
    list_names,
)
from ftlaunch.strategies.data.local_reader import read_split
from ftlaunch.strategies.options import DataOptions

if TYPE_CHECKING:
    from datasets import Dataset

# Part of every fingerprint: raise it when the same options come to mean other rows.
_ROWS_VERSION = 1
_NOISY_LOGGERS = ("datasets", "huggingface_hub", "fsspec", "pyarrow")


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """The rows of a job.

    description  one line with the source and the counts
    notes        choices made for the user; free of absolute paths, since they are cached
    whole_train  the training split before anything was held out or left out of it: a class of its
                 is one of the task's even if no drawn row has it
    """

    train: Dataset
    eval: Dataset | None
    description: str
    notes: tuple[str, ...]
    whole_train: Dataset | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """Names of the splits; `eval` is None when a part of `train` is to be held out."""

    train: str
    eval: str | None


def load_splits(options: DataOptions, *, seed: int, only_evaluation: bool = False) -> Splits:
    """Read the training and evaluation rows. UserError for all that a user can mend.

    only_evaluation  there is no training: the rows to evaluate are given as `train`
    """
    name = _require_name(options)
    choose = _choose_evaluation if only_evaluation else _choose
    with _quiet():
        if is_local(name):
            local, cache = find_local(name), cache_root(options)
            choice = choose(local.splits, name, options)
            train = read_split(local, choice.train, cache)
            evaluation = read_split(local, choice.eval, cache) if choice.eval else None
        else:
            loaded = _load_from_hub(name, options)
            choice = choose(loaded, name, options)
            train = _require_rows(loaded[choice.train], name, choice.train)
            evaluation = (
                _require_rows(loaded[choice.eval], name, choice.eval) if choice.eval else None
            )
        if only_evaluation:
            return _draw_evaluation(train, choice, options, seed)
        return _draw(train, evaluation, choice, options, seed)


def data_fingerprint(
    options: DataOptions, *, seed: int, only_evaluation: bool = False
) -> str | None:
    """Hash of the rows that `load_splits` would give, without reading them as rows.

    None for a data set of the hub: load it, then ask `loaded_fingerprint`.
    """
    name = _require_name(options)
    if not is_local(name):
        return None
    local = find_local(name)
    choose = _choose_evaluation if only_evaluation else _choose
    choice = choose(local.splits, name, options)
    subsets = (options.max_train_samples, options.max_eval_samples)
    drawn = choice.eval is None or any(subsets)
    return _hash(
        {
            "train": (choice.train, hash_files(local, choice.train)),
            "eval": (choice.eval, hash_files(local, choice.eval)) if choice.eval else None,
            "eval_fraction": None if choice.eval else options.eval_fraction,
            "subsets": subsets,
            "seed": seed if drawn else None,
            # Without meaning for local files today; a change must never go unnoticed.
            "config_name": options.config_name,
            "revision": options.revision,
            "only_evaluation": only_evaluation,
        }
    )


def loaded_fingerprint(splits: Splits) -> str:
    """Hash of loaded rows from the library's own fingerprints, which cover revision and subset."""
    parts = [splits.train, splits.eval]
    return _hash(
        [(p._fingerprint, len(p), p.column_names) if p is not None else None for p in parts]
    )


def _hash(content: object) -> str:
    import xxhash

    text = json.dumps([_ROWS_VERSION, content], sort_keys=True)
    return xxhash.xxh3_128_hexdigest(text.encode())


def _require_name(options: DataOptions) -> str:
    if not options.name_or_path:
        raise UserError(
            "No data set was given: data.name_or_path is empty. It must be a file, a folder or "
            "the name of a data set on the Hugging Face hub. Set --dataset or data.name_or_path."
        )
    return options.name_or_path


def _choose(names: Iterable[str], source: str, options: DataOptions) -> _Choice:
    names = list(names)
    for key, wanted in (("train_split", options.train_split), ("eval_split", options.eval_split)):
        if wanted is not None and wanted not in names:
            raise UserError(
                f"The data set {source} has no split {wanted!r}: it has {list_names(names)}. "
                f"Set data.{key} to one of them."
            )
    train = options.train_split or _first(names, "train")
    if train is None:
        raise UserError(
            f"The data set {source} has no training split: found {list_names(names)}. One must be "
            "named train (a file train.jsonl, a folder train/). Rename one or set "
            "data.train_split."
        )
    others = [name for name in names if name != train]
    return _Choice(
        train=train,
        eval=options.eval_split or _first(others, "validation") or _first(others, "test"),
    )


def _choose_evaluation(names: Iterable[str], source: str, options: DataOptions) -> _Choice:
    """The split to evaluate, as the only one: validation, else test, else whatever there is."""
    names = list(names)
    if options.eval_split is not None and options.eval_split not in names:
        raise UserError(
            f"The data set {source} has no split {options.eval_split!r}: it has "
            f"{list_names(names)}. Set data.eval_split to one of them."
        )
    found = options.eval_split or _first(names, "validation") or _first(names, "test")
    return _Choice(train=found or names[0], eval=None)


def _first(names: Iterable[str], kind: str) -> str | None:
    """The split of exactly that name, else the first whose name says so (validation_matched)."""
    names = list(names)
    if kind in names:
        return kind
    return next((name for name in names if canonical_split(name) == kind), None)


def _draw(
    train: Dataset, evaluation: Dataset | None, choice: _Choice, options: DataOptions, seed: int
) -> Splits:
    notes: list[str] = []
    whole = train
    if evaluation is None:
        train, evaluation = _hold_out(train, options, seed)
        notes.append(
            f"evaluation: {len(evaluation)} of the {len(train) + len(evaluation)} training samples "
            f"held out at random (data.eval_fraction = {options.eval_fraction:g})"
        )
    elif options.eval_split is None:
        notes.append(f"evaluation: split '{choice.eval}' (set data.eval_split to choose)")
    train = _subset(train, options.max_train_samples, seed, "train", notes)
    evaluation = _subset(evaluation, options.max_eval_samples, seed, "eval", notes)
    if options.trust_remote_code and not _runs_loading_scripts():
        notes.append(
            "data.trust_remote_code has no effect: the installed datasets runs no loading scripts"
        )
    return Splits(
        train=train,
        eval=evaluation,
        description=f"{options.name_or_path}: {len(train)} training samples ({choice.train}), "
        f"{len(evaluation)} evaluation samples ({choice.eval or 'held out'})",
        notes=tuple(notes),
        whole_train=whole,
    )


def _draw_evaluation(rows: Dataset, choice: _Choice, options: DataOptions, seed: int) -> Splits:
    notes = [f"evaluation: split '{choice.train}' (set data.eval_split to choose)"]
    rows = _subset(rows, options.max_eval_samples, seed, "eval", notes)
    return Splits(
        train=rows,
        eval=None,
        description=f"{options.name_or_path}: {len(rows)} evaluation samples ({choice.train})",
        notes=tuple(notes),
    )


def _hold_out(train: Dataset, options: DataOptions, seed: int) -> tuple[Dataset, Dataset]:
    if len(train) < 2:
        raise UserError(
            "The training split has only 1 sample and there is no evaluation split: one sample "
            "cannot be held out of one. Add rows or set data.eval_split."
        )
    count = min(max(round(len(train) * options.eval_fraction), 1), len(train) - 1)
    order = _random_order(len(train), seed, "held out")
    return train.select(np.sort(order[count:])), train.select(np.sort(order[:count]))


def _subset(dataset: Dataset, limit: int | None, seed: int, role: str, notes: list[str]) -> Dataset:
    if limit is None or limit >= len(dataset):
        return dataset
    notes.append(
        f"{role}: a random subset of {limit} of {len(dataset)} samples (data.max_{role}_samples)"
    )
    return dataset.select(np.sort(_random_order(len(dataset), seed, role)[:limit]))


def _random_order(length: int, seed: int, purpose: str) -> NDArray[np.int64]:
    """A permutation that is the same in every release of numpy (SplitMix64, sorted)."""
    import xxhash

    start = np.uint64(xxhash.xxh3_64_intdigest(f"{seed} {purpose}".encode()))
    z = (np.arange(length, dtype=np.uint64) + start) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable").astype(np.int64)


def _load_from_hub(name: str, options: DataOptions) -> Any:
    import datasets

    extra = {}
    if options.trust_remote_code and _runs_loading_scripts():
        extra["trust_remote_code"] = True
    try:
        loaded = datasets.load_dataset(
            name, options.config_name, revision=options.revision, **extra
        )
    except MemoryError:
        raise
    except Exception as error:
        raise _explain_hub(name, options, error) from error
    return loaded


def _explain_hub(name: str, options: DataOptions, error: Exception) -> UserError:
    import datasets

    wanted = f"{name!r}" + (f", revision {options.revision!r}" if options.revision else "")
    advice = "Give a local file or folder with data.name_or_path"
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return UserError(
            f"The data set {wanted} was not found: no such file or folder, and none on the Hugging "
            "Face hub that you may read. The name must be that of a public data set or one that "
            f"your token (hf auth login) opens. Check the spelling. {advice}."
        )
    if datasets.config.HF_HUB_OFFLINE:
        return UserError(
            f"The data set {wanted} is not in the cache, and HF_HUB_OFFLINE forbids to download "
            "it: offline, a data set must be local or downloaded before. Unset HF_HUB_OFFLINE, or "
            f"download it first. {advice}."
        )
    if isinstance(error, (ConnectionError, TimeoutError)):
        return UserError(
            f"The data set {wanted} cannot be loaded: the Hugging Face hub cannot be reached "
            f"({_first_line(error)}), and it is no local path. Check the name and the network. "
            f"{advice}."
        )
    return UserError(
        f"The data set {wanted} (data.config_name = {options.config_name}) cannot be loaded: "
        f"{_first_line(error)}. It must exist with that configuration and be readable by the "
        f"installed datasets. Set data.config_name, or: {advice}."
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300].rstrip(".")


def _require_rows(dataset: Dataset, source: str, split: str) -> Dataset:
    if len(dataset) == 0:
        raise UserError(
            f"The split {split!r} of the data set {source} has no rows: it must hold at least one. "
            "Choose another with data.train_split or data.eval_split."
        )
    return dataset


def _runs_loading_scripts() -> bool:
    import inspect

    import datasets

    return "trust_remote_code" in inspect.signature(datasets.load_dataset).parameters


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither progress bars nor log lines nor warnings of the libraries within the block."""
    import datasets

    hub = importlib.import_module("huggingface_hub.utils")
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    bars = [
        (library.are_progress_bars_disabled(), library.enable_progress_bars)
        for library in (datasets, hub)
    ]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        datasets.disable_progress_bars()
        hub.disable_progress_bars()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for was_disabled, enable in bars:
            if not was_disabled:
                enable()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
