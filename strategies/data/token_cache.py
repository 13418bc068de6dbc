"""The content-addressed token cache: tokenize once, on all ranks, and never again.

`<cache folder>/tokens/<key>/` holds meta.json and the slices of `token_table`. Every file comes by
rename and its content follows from the key, so that ranks and jobs may write the same one at the
same time: there are no locks. The folder is complete when every file is there and whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from ftlaunch.cluster.errors import JobError, UserError
from ftlaunch.strategies.data.cache_folder import cache_root
from ftlaunch.strategies.data.cache_writing import (
    FORMAT_VERSION,
    CacheMeta,
    CacheWork,
    await_others,
    read_meta,
    write_share,
)
from ftlaunch.strategies.data.sources import (
    Splits,
    data_fingerprint,
    load_splits,
    loaded_fingerprint,
)
from ftlaunch.strategies.data.tasks import ModelLabels, Task, TaskSpec, TokenTask, load_task
from ftlaunch.strategies.data.token_samples import TokenSamples
from ftlaunch.strategies.data.token_table import TokenTable
from ftlaunch.strategies.data.tokenizer import (
    LoadedTokenizer,
    TokenizerSource,
    load_tokenizer,
    locate_tokenizer,
    tokenizer_fingerprint,
)
from ftlaunch.strategies.model_config import DEFAULT_MAX_LENGTH, check_max_length
from ftlaunch.strategies.options import DataOptions
from ftlaunch.strategies.safetensors_file import FileDamaged

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The tokens of a job; everything but `hit` is equal on every rank.

    key           equal on two ranks exactly if they found the same data and tokenizer
    train, eval   a TokenTable where a row or an output has a label, TokenSamples where a token has
    max_token_id  the highest in use: a model needs a larger vocabulary than this
    max_length    no row is longer
    notes         lines for the user: source, columns, tokenizer, truncation
    hit           nothing had to be tokenized
    """

    key: str
    folder: Path
    spec: TaskSpec
    train: TokenTable | TokenSamples
    eval: TokenTable | TokenSamples | None
    max_token_id: int
    pad_token_id: int
    padding_side: Literal["left", "right"]
    uses_token_type_ids: bool
    max_length: int
    notes: tuple[str, ...]
    hit: bool


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
    check_max_length(options.max_length, model_max_length)
    root = cache_root(options)
    splits: Splits | None = None
    alone = labels is not None
    data = data_fingerprint(options, seed=seed, only_evaluation=alone)
    if data is None:
        splits = load_splits(options, seed=seed, only_evaluation=alone)
        data = loaded_fingerprint(splits)
    tokenizer_folder = locate_tokenizer(tokenizer)
    tokens = tokenizer_fingerprint(tokenizer_folder, tokenizer)
    task = load_task(task_name)
    key = _make_key(task_name, task, options, model_max_length, labels, data, tokens)
    folder = root / "tokens" / key
    found = _open(folder, key, task, hit=True)
    if found is not None:
        return found
    splits = splits or load_splits(options, seed=seed, only_evaluation=alone)
    if labels is None:
        spec = task.inspect(splits, options)
    else:
        spec = task.inspect_for_model(splits, options, labels)
    loaded = load_tokenizer(tokenizer_folder, tokenizer)
    spec = task.fit_tokenizer(spec, loaded.tokenizer, options)
    rows = {"train": splits.train} | ({"eval": splits.eval} if splits.eval is not None else {})
    work = CacheWork(
        root=root,
        folder=folder,
        meta=_make_meta(key, spec, splits, rows, loaded, options, model_max_length),
        task=task,
        tokenizer=loaded.tokenizer,
        rows=rows,
        alone=alone,
        alive=alive,
    )
    write_share(work, rank, world_size)
    await_others(work, rank, stall_seconds, takeover_seconds)
    written = _open(folder, key, task, hit=False)
    if written is None:
        raise JobError(
            f"The token cache {folder} was complete and is so no longer: nothing may delete it "
            "while a job starts. Run the job again, or set data.cache_dir to another folder."
        )
    return written


def _make_key(
    name: str,
    task: Task,
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
        "task": name,
        "text_columns": options.text_columns,
        "label_column": options.label_column,
        "max_length": options.max_length,
        "labels": None if labels is None else [labels.problem, *labels.label_names],
        # Decides nothing when the user has.
        "model_max_length": model_max_length if options.max_length is None else None,
        **task.cache_key(options),
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())


def _choose_max_length(
    options: DataOptions, loaded: LoadedTokenizer, model_max_length: int | None, pair: bool
) -> int:
    limits = [DEFAULT_MAX_LENGTH, loaded.max_length, model_max_length]
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
) -> CacheMeta:
    pair = len(spec.text_columns) == 2
    return CacheMeta(
        format=FORMAT_VERSION,
        key=key,
        spec=spec,
        splits={name: len(part) for name, part in rows.items()},
        pad_token_id=loaded.pad_token_id,
        padding_side=loaded.padding_side,
        # What reads from left to right has no kinds of tokens, whatever its tokenizer says.
        uses_token_type_ids=spec.head != "causal-lm"
        and "token_type_ids" in loaded.tokenizer.model_input_names,
        max_length=_choose_max_length(options, loaded, model_max_length, pair),
        notes=(*splits.notes, *spec.notes, *loaded.notes),
    )


def _open(folder: Path, key: str, task: Task, *, hit: bool) -> Tokens | None:
    """None unless everything is there and whole. UserError where nothing is left to be learned."""
    meta = read_meta(folder, key)
    if meta is None:
        return None
    try:
        tables = {split: TokenTable(meta.shape(folder, split)) for split in meta.splits}
    except (OSError, FileDamaged):
        return None
    samples, notes = _arrange(tables, cast(TokenTask, task), meta)
    in_use = [meta.pad_token_id, *(table.max_token_id for table in tables.values())]
    return Tokens(
        key=key,
        folder=folder,
        spec=meta.spec,
        train=samples["train"],
        eval=samples.get("eval"),
        max_token_id=max(*in_use, int(meta.spec.details.get("max_token_id", 0))),
        pad_token_id=meta.pad_token_id,
        padding_side=meta.padding_side,
        uses_token_type_ids=meta.uses_token_type_ids,
        max_length=meta.max_length,
        notes=(*meta.notes, *_note_truncation(tables, meta.max_length), *notes),
        hit=hit,
    )


def _arrange(
    tables: Mapping[str, TokenTable], task: TokenTask, meta: CacheMeta
) -> tuple[Mapping[str, TokenTable | TokenSamples], list[str]]:
    """The samples of each split, and what was done to the rows."""
    if meta.spec.layout.per != "token":
        return tables, []
    arranged: dict[str, TokenTable | TokenSamples] = {}
    notes: list[str] = []
    for split, table in tables.items():
        samples, more = task.arrange(table, split, meta.spec, meta.max_length)
        if not len(samples):
            raise UserError(
                f"None of the {len(table)} samples of the {split} data has a token to be learned"
                f"{': ' if more else ''}{'; '.join(more)}. At least one must have. Look at the "
                "columns, raise data.max_length, or choose other data."
            )
        arranged[split] = samples
        notes += more
    return arranged, notes


def _note_truncation(tables: Mapping[str, TokenTable], max_length: int) -> list[str]:
    return [
        f"{split}: {table.num_truncated} of {len(table)} samples were cut to {max_length} tokens "
        "(data.max_length)"
        for split, table in tables.items()
        if table.num_truncated
    ]
