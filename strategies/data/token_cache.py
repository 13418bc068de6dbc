"""The content-addressed token cache: tokenize once, on all ranks, and never again.

`<cache folder>/tokens/<key>/` holds meta.json and the slices of `token_table`. Every file comes by
rename and its content follows from the key, so that ranks and jobs may write the same one at the
same time: there are no locks. The folder is complete when every file is there and whole.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ftlaunch.cluster.errors import JobError, UserError
from ftlaunch.strategies.data.cache_folder import cache_root, writing_to_cache
from ftlaunch.strategies.data.sources import (
    Splits,
    data_fingerprint,
    load_splits,
    loaded_fingerprint,
)
from ftlaunch.strategies.data.tasks import ModelLabels, Task, TaskSpec, load_task
from ftlaunch.strategies.data.token_table import (
    SliceFacts,
    TableShape,
    TokenTable,
    check_slice,
    num_slices,
    slice_path,
    slice_rows,
)
from ftlaunch.strategies.data.tokenizer import (
    LoadedTokenizer,
    TokenizerSource,
    load_tokenizer,
    locate_tokenizer,
    tokenizer_fingerprint,
)
from ftlaunch.strategies.files import replace_file
from ftlaunch.strategies.options import DataOptions
from ftlaunch.strategies.safetensors_file import FileDamaged, write_file

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Raise it when the same text and options come to give other tokens or files.
FORMAT_VERSION = 1
_SPLITS = ("train", "eval")
_DEFAULT_MAX_LENGTH = 512
_ENCODE_ROWS = 1000
_POLL_SECONDS = 0.05
_STALE_SECONDS = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The tokens of a job; everything but `hit` is equal on every rank.

    key         equal on two ranks exactly if they found the same data and tokenizer
    max_length  no row is longer
    notes       lines for the user: source, columns, tokenizer, truncation
    hit         nothing had to be tokenized
    """

    key: str
    folder: Path
    spec: TaskSpec
    train: TokenTable
    eval: TokenTable | None
    pad_token_id: int
    padding_side: Literal["left", "right"]
    uses_token_type_ids: bool
    max_length: int
    notes: tuple[str, ...]
    hit: bool

    @property
    def max_token_id(self) -> int:
        """The highest token id in use: a model needs a larger vocabulary than this."""
        highest = max(self.train.max_token_id, self.pad_token_id)
        return highest if self.eval is None else max(highest, self.eval.max_token_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Meta:
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
    def from_json(cls, text: str) -> _Meta:
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
            labels_dtype=np.dtype(
                np.int64 if self.spec.problem == "classification" else np.float32
            ),
            uses_token_type_ids=self.uses_token_type_ids,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """All that is needed to write any slice of a cache folder."""

    root: Path
    folder: Path
    meta: _Meta
    task: Task
    tokenizer: PreTrainedTokenizerBase
    rows: Mapping[str, Dataset]
    alive: Callable[[], None]

    def slices(self) -> list[tuple[str, int]]:
        return [(s, i) for s, n in self.meta.splits.items() for i in range(num_slices(n))]

    def has(self, split: str, number: int) -> bool:
        try:
            check_slice(self.meta.shape(self.folder, split), number)
        except (OSError, FileDamaged):
            return False
        return True


def prepare_tokens(
    task_name: str,
    options: DataOptions,
    tokenizer: TokenizerSource,
    *,
    seed: int,
    model_max_length: int | None,
    labels: ModelLabels | None = None,
    rank: int = 0,
    world_size: int = 1,
    stall_seconds: float = 1800.0,
    takeover_seconds: float = 20.0,
    alive: Callable[[], None] = lambda: None,
) -> Tokens:
    """Tokens from the cache, tokenizing this rank's share of what it lacks.

    Every rank calls it, before there is a process group; ranks meet in the cache folder only.
    A hit imports neither datasets nor transformers.

    model_max_length  the longest row that the model takes, None for any
    labels            of a trained model that is only evaluated: the rows are then `train`, alone
    takeover_seconds  so long after the last new slice a rank writes the missing ones itself: the
                      cache folder is another one on each node, or the rank that owes them is gone
    stall_seconds     so long after the last new slice a rank gives up with a JobError
    alive             called now and then: a sign that work goes on
    """
    _check_max_length(options, model_max_length)
    root = cache_root(options)
    splits: Splits | None = None
    alone = labels is not None
    data = data_fingerprint(options, seed=seed, only_evaluation=alone)
    if data is None:
        splits = load_splits(options, seed=seed, only_evaluation=alone)
        data = loaded_fingerprint(splits)
    tokenizer_folder = locate_tokenizer(tokenizer)
    tokens = tokenizer_fingerprint(tokenizer_folder, tokenizer)
    key = _make_key(task_name, options, model_max_length, labels, data, tokens)
    folder = root / "tokens" / key
    found = _open(folder, key, hit=True)
    if found is not None:
        return found
    task = load_task(task_name)
    splits = splits or load_splits(options, seed=seed, only_evaluation=alone)
    if labels is None:
        spec = task.inspect(splits, options)
    else:
        spec = task.inspect_for_model(splits, options, labels)
    loaded = load_tokenizer(tokenizer_folder, tokenizer)
    rows = {"train": splits.train} | ({"eval": splits.eval} if splits.eval is not None else {})
    work = _Work(
        root=root,
        folder=folder,
        meta=_make_meta(key, spec, splits, rows, loaded, options, model_max_length),
        task=task,
        tokenizer=loaded.tokenizer,
        rows=rows,
        alive=alive,
    )
    _write_share(work, rank, world_size)
    _await_others(work, rank, stall_seconds, takeover_seconds)
    written = _open(folder, key, hit=False)
    if written is None:
        raise JobError(
            f"The token cache {folder} was complete and is so no longer: nothing may delete it "
            "while a job starts. Run the job again, or set data.cache_dir to another folder."
        )
    return written


def _make_key(
    task: str,
    options: DataOptions,
    model_max_length: int | None,
    labels: ModelLabels | None,
    data: str,
    tokenizer: str,
) -> str:
    import xxhash

    parts = {
        "format": FORMAT_VERSION,
        "data": data,
        "tokenizer": tokenizer,
        "task": task,
        "text_columns": options.text_columns,
        "label_column": options.label_column,
        "max_length": options.max_length,
        "labels": None if labels is None else [labels.problem, *labels.label_names],
        # Decides nothing when the user has.
        "model_max_length": model_max_length if options.max_length is None else None,
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())


def _check_max_length(options: DataOptions, model_max_length: int | None) -> None:
    wanted = options.max_length
    if wanted is not None and model_max_length is not None and wanted > model_max_length:
        raise UserError(
            f"Rows of up to {wanted} tokens do not fit the model: it takes {model_max_length} at "
            f"most. data.max_length must not be above that. Set it to {model_max_length} or less."
        )


def _choose_max_length(
    options: DataOptions, loaded: LoadedTokenizer, model_max_length: int | None, pair: bool
) -> int:
    limits = [_DEFAULT_MAX_LENGTH, loaded.max_length, model_max_length]
    length = options.max_length or min(limit for limit in limits if limit is not None)
    num_special = int(loaded.tokenizer.num_special_tokens_to_add(pair))
    if length <= num_special:
        raise UserError(
            f"Rows of {length} tokens leave no room for text: the tokenizer adds {num_special} "
            "tokens of its own to each row. data.max_length must be above that. Set it to "
            f"{num_special + 1} or more."
        )
    return length


def _make_meta(
    key: str,
    spec: TaskSpec,
    splits: Splits,
    rows: Mapping[str, Dataset],
    loaded: LoadedTokenizer,
    options: DataOptions,
    model_max_length: int | None,
) -> _Meta:
    pair = len(spec.text_columns) == 2
    return _Meta(
        format=FORMAT_VERSION,
        key=key,
        spec=spec,
        splits={name: len(part) for name, part in rows.items()},
        pad_token_id=loaded.pad_token_id,
        padding_side=loaded.padding_side,
        uses_token_type_ids="token_type_ids" in loaded.tokenizer.model_input_names,
        max_length=_choose_max_length(options, loaded, model_max_length, pair),
        notes=(*splits.notes, *spec.notes, *loaded.notes),
    )


def _open(folder: Path, key: str, *, hit: bool) -> Tokens | None:
    """None unless everything is there and whole."""
    meta = _read_meta(folder, key)
    if meta is None:
        return None
    try:
        tables = {split: TokenTable(meta.shape(folder, split)) for split in meta.splits}
    except (OSError, FileDamaged):
        return None
    return Tokens(
        key=key,
        folder=folder,
        spec=meta.spec,
        train=tables["train"],
        eval=tables.get("eval"),
        pad_token_id=meta.pad_token_id,
        padding_side=meta.padding_side,
        uses_token_type_ids=meta.uses_token_type_ids,
        max_length=meta.max_length,
        notes=(*meta.notes, *_note_truncation(tables, meta.max_length)),
        hit=hit,
    )


def _read_meta(folder: Path, key: str) -> _Meta | None:
    try:
        meta = _Meta.from_json((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return meta if (meta.format, meta.key) == (FORMAT_VERSION, key) else None


def _note_truncation(tables: Mapping[str, TokenTable], max_length: int) -> list[str]:
    return [
        f"{split}: {table.num_truncated} of {len(table)} samples were cut to {max_length} tokens "
        "(data.max_length)"
        for split, table in tables.items()
        if table.num_truncated
    ]


def _write_share(work: _Work, rank: int, world_size: int) -> None:
    with writing_to_cache(work.root):
        work.folder.mkdir(parents=True, exist_ok=True)
        _remove_stale(work.folder)
        # The same on every rank, whoever's comes last.
        if _read_meta(work.folder, work.meta.key) != work.meta:
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


def _await_others(work: _Work, rank: int, stall_seconds: float, takeover_seconds: float) -> None:
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


def _write_slice(work: _Work, split: str, number: int) -> None:
    tensors, facts = _encode_slice(work, split, number)
    with writing_to_cache(work.root):
        path = slice_path(work.folder, split, number)
        write_file(path, tensors, facts.to_metadata(work.meta.key))


def _encode_slice(
    work: _Work, split: str, number: int
) -> tuple[dict[str, NDArray[Any]], SliceFacts]:
    meta, shape = work.meta, work.meta.shape(work.folder, split)
    start = number * slice_rows(shape.num_samples)
    stop = start + shape.count(number)
    ids, types, lengths, labels, num_truncated = [], [], [0], [], 0
    for begin in range(start, stop, _ENCODE_ROWS):
        work.alive()
        rows = work.rows[split][begin : min(begin + _ENCODE_ROWS, stop)]
        encoded = work.task.encode(rows, work.tokenizer, meta.spec, meta.max_length)
        lengths += [len(row) for row in encoded.input_ids]
        ids.append(_flatten(encoded.input_ids, np.dtype(np.int32)))
        if encoded.token_type_ids is not None:
            types.append(_flatten(encoded.token_type_ids, np.dtype(np.uint8)))
        labels.append(encoded.labels.astype(shape.labels_dtype))
        num_truncated += encoded.num_truncated
    tensors: dict[str, NDArray[Any]] = {
        "input_ids": np.concatenate(ids),
        "offsets": np.cumsum(lengths, dtype=np.int64),
        "labels": np.concatenate(labels),
    }
    if shape.uses_token_type_ids:
        tensors["token_type_ids"] = np.concatenate(types)
    facts = SliceFacts(
        num_tokens=len(tensors["input_ids"]),
        num_truncated=num_truncated,
        max_token_id=int(tensors["input_ids"].max(initial=0)),
    )
    return tensors, facts


def _flatten(rows: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    import itertools

    return np.fromiter(itertools.chain.from_iterable(rows), dtype=dtype)
