"""Writes a folder of the token cache: each rank its share of the slices, and then all wait for all.

Ranks meet in the folder only. Every file comes by rename and its content follows from the key.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ftlaunch.cluster.errors import JobError, UserError
from ftlaunch.strategies.data.cache_folder import writing_to_cache
from ftlaunch.strategies.data.label_scan import row_name
from ftlaunch.strategies.data.tasks import UNSUPERVISED, BadRow, Task, TaskSpec
from ftlaunch.strategies.data.token_table import (
    SliceFacts,
    TableShape,
    check_slice,
    num_slices,
    slice_path,
    slice_rows,
)
from ftlaunch.strategies.files import replace_file
from ftlaunch.strategies.safetensors_file import FileDamaged, write_file

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Raise it when the same text and options come to give other tokens or files.
FORMAT_VERSION = 1
_SPLITS = ("train", "eval")
_ENCODE_ROWS = 1000
_POLL_SECONDS = 0.05
_STALE_SECONDS = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheMeta:
    """The content of meta.json. `splits` gives the number of samples of train and eval."""

    format: int
    key: str
    spec: TaskSpec
    splits: Mapping[str, int]
    pad_token_id: int
    padding_side: Literal["left", "right"]
    uses_token_type_ids: bool
    max_length: int
    notes: tuple[str, ...]

    def to_json(self) -> str:
        values = {name: getattr(self, name) for name in self.__slots__}
        values |= {"spec": self.spec.to_dict(), "notes": list(self.notes)}
        return json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CacheMeta:
        """ValueError, TypeError or KeyError for what `to_json` cannot have given."""
        values = json.loads(text)
        spec, notes = TaskSpec.from_dict(values.pop("spec")), tuple(values.pop("notes"))
        splits = {name: values["splits"][name] for name in _SPLITS if name in values["splits"]}
        meta = cls(**(values | {"spec": spec, "notes": notes, "splits": splits}))
        numbers = (meta.pad_token_id, meta.max_length, *meta.splits.values())
        if not all(type(n) is int and n >= 0 for n in numbers) or min(meta.splits.values()) < 1:
            raise ValueError("a number is out of range")
        if "train" not in splits:
            raise ValueError("there is no training split")
        return meta

    def shape(self, folder: Path, split: str) -> TableShape:
        return TableShape(
            folder=folder,
            key=self.key,
            split=split,
            num_samples=self.splits[split],
            num_outputs=self.spec.num_outputs,
            layout=self.spec.layout,
            uses_token_type_ids=self.uses_token_type_ids,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheWork:
    """All that is needed to write any slice of a cache folder.

    alone   there is no training: the rows to be evaluated are `train`
    """

    root: Path
    folder: Path
    meta: CacheMeta
    task: Task
    tokenizer: PreTrainedTokenizerBase
    rows: Mapping[str, Dataset]
    alone: bool
    alive: Callable[[], None]

    def slices(self) -> list[tuple[str, int]]:
        return [(s, i) for s, n in self.meta.splits.items() for i in range(num_slices(n))]

    def has(self, split: str, number: int) -> bool:
        try:
            check_slice(self.meta.shape(self.folder, split), number)
        except (OSError, FileDamaged):
            return False
        return True


def read_meta(folder: Path, key: str) -> CacheMeta | None:
    try:
        meta = CacheMeta.from_json((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return meta if (meta.format, meta.key) == (FORMAT_VERSION, key) else None


def write_share(work: CacheWork, rank: int, world_size: int) -> None:
    with writing_to_cache(work.root):
        work.folder.mkdir(parents=True, exist_ok=True)
        _remove_stale(work.folder)
        # The same on every rank, whoever's comes last.
        if read_meta(work.folder, work.meta.key) != work.meta:
            with replace_file(work.folder / "meta.json") as file:
                file.write(work.meta.to_json().encode())
    for split, number in work.slices()[rank::world_size]:
        if not work.has(split, number):
            _write_slice(work, split, number)


def _remove_stale(folder: Path) -> None:
    """Temporary files of processes that were killed long ago."""
    for file in folder.glob("*.tmp-*"):
        try:
            if time.time() - file.stat().st_mtime > _STALE_SECONDS:
                file.unlink()
        except FileNotFoundError:
            pass


def await_others(work: CacheWork, rank: int, stall_seconds: float, takeover_seconds: float) -> None:
    """Return when every slice is there."""
    missing = work.slices()
    last_progress = time.monotonic()
    taking_over = False
    while still := [piece for piece in missing if not work.has(*piece)]:
        now = time.monotonic()
        if len(still) < len(missing):
            missing, last_progress = still, now
        if now - last_progress >= stall_seconds:
            names = ", ".join(slice_path(work.folder, *piece).name for piece in still[:5])
            raise JobError(
                f"The token cache {work.folder} lacks {len(still)} slices ({names}): no new one "
                f"has come for {stall_seconds:g} s. Another rank has died, or writes elsewhere. "
                "Look at the other ranks' logs; on several nodes set data.cache_dir to a folder "
                "that all share."
            )
        taking_over = taking_over or now - last_progress >= takeover_seconds
        if taking_over:
            # Ranks start at different slices, so that they share the work here too.
            _write_slice(work, *still[rank % len(still)])
        else:
            time.sleep(_POLL_SECONDS)


def _write_slice(work: CacheWork, split: str, number: int) -> None:
    tensors, facts = _encode_slice(work, split, number)
    with writing_to_cache(work.root):
        path = slice_path(work.folder, split, number)
        write_file(path, tensors, facts.to_metadata(work.meta.key))


def _encode_slice(
    work: CacheWork, split: str, number: int
) -> tuple[dict[str, NDArray[Any]], SliceFacts]:
    meta, shape = work.meta, work.meta.shape(work.folder, split)
    start = number * slice_rows(shape.num_samples)
    stop = start + shape.count(number)
    ids, types, lengths, labels, items = [], [], [0], [], []
    num_truncated = num_too_long = 0
    for begin in range(start, stop, _ENCODE_ROWS):
        work.alive()
        rows = work.rows[split][begin : min(begin + _ENCODE_ROWS, stop)]
        try:
            encoded = work.task.encode(rows, work.tokenizer, meta.spec, meta.max_length)
        except BadRow as bad:
            part = "evaluation" if split == "eval" or work.alone else "training"
            row = row_name(work.rows[split], begin + bad.index)
            raise UserError(f"{row[0].upper()}{row[1:]} of the {part} data {bad.text}") from None
        lengths += [len(row) for row in encoded.input_ids]
        ids.append(_flatten(encoded.input_ids, np.dtype(np.int32)))
        if encoded.token_type_ids is not None:
            types.append(_flatten(encoded.token_type_ids, np.dtype(np.uint8)))
        if shape.layout.per == "token":
            flat = _flatten(encoded.labels, shape.layout.dtype)
            items.append(_count_items(flat, encoded.input_ids))
            labels.append(flat)
        else:
            labels.append(np.asarray(encoded.labels).astype(shape.layout.dtype))
        num_truncated += encoded.num_truncated
        num_too_long += encoded.num_too_long
    tensors: dict[str, NDArray[Any]] = {
        "input_ids": np.concatenate(ids),
        "offsets": np.cumsum(lengths, dtype=np.int64),
        "labels": np.concatenate(labels),
    }
    if shape.uses_token_type_ids:
        tensors["token_type_ids"] = np.concatenate(types)
    if shape.layout.per == "token":
        tensors["items"] = np.concatenate(items)
    facts = SliceFacts(
        num_tokens=len(tensors["input_ids"]),
        num_truncated=num_truncated,
        max_token_id=int(tensors["input_ids"].max(initial=0)),
        num_too_long=num_too_long,
    )
    return tensors, facts


def _flatten(rows: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.fromiter(itertools.chain.from_iterable(rows), dtype=dtype)


def _count_items(labels: NDArray[Any], rows: Any) -> NDArray[np.int32]:
    """Supervised tokens of each row, given the labels of all rows in one run."""
    counts = np.concatenate([[0], np.cumsum(labels != UNSUPERVISED)])
    ends = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
    result: NDArray[np.int32] = np.diff(counts[ends]).astype(np.int32)
    return result
