"""The rows that a peer trains on, and the batches that its DataLoader makes of them.

A file of tokens holds the tensors

    offsets          (rows + 1,) int64: row i has the tokens from offsets[i] to offsets[i + 1]
    input_ids        (tokens,) int32
    token_type_ids   (tokens,) int32, where the tokenizer has them
    labels           (rows,) int64 or float32; (rows, outputs) float32; or (tokens,) int64, -100 where
                     there is none, as transformers counts them: the label of a token is its own, of a
                     causal model too
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset

from ftlaunch.peers.work import Work

Row = Mapping[str, Any]
Collate = Callable[[Sequence[Row]], dict[str, torch.Tensor]]
_FILLERS = {"input_ids": 0, "attention_mask": 0, "token_type_ids": 0, "labels": -100}


class TokenRows(Dataset[Row]):
    """Rows of a file of tokens, as `datasets` would give them."""

    def __init__(self, file: str) -> None:
        tensors = load_file(file)
        self._offsets = tensors.pop("offsets").tolist()
        self._columns = {
            name: values.long() for name, values in tensors.items() if name != "labels"
        }
        self.labels = tensors["labels"]
        self.has_token_labels = self.labels.shape == tensors["input_ids"].shape

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> Row:
        part = slice(self._offsets[index], self._offsets[index + 1])
        row = {name: values[part] for name, values in self._columns.items()}
        return {**row, "labels": self.labels[part if self.has_token_labels else index]}


class MicroBatches(Dataset[list[Row]]):
    """Micro-batches that somebody else has made, each an item: a library shuffles and deals them no more.

    All ranks' in turn, since libraries deal item i to rank i modulo W; or those of one rank.
    """

    def __init__(self, rows: Any, work: Work, rank: int | None = None) -> None:
        assert work.order is not None
        self._rows = rows
        self._items = [
            ranks[each][number]
            for ranks in work.order
            for number in range(work.accumulation)
            for each in (range(len(ranks)) if rank is None else [rank])
        ]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> list[Row]:
        return [self._rows[sample] for sample in self._items[index]]


def take_whole(collate: Collate) -> Callable[[Sequence[list[Row]]], dict[str, torch.Tensor]]:
    """Of a DataLoader over `MicroBatches` with batch_size 1."""

    def collate_one(items: Sequence[list[Row]]) -> dict[str, torch.Tensor]:
        [rows] = items
        return collate(rows)

    return collate_one


def load_rows(
    work: Work, file: str | None = None, first: contextlib.AbstractContextManager[Any] | None = None
) -> tuple[Any, Collate]:
    """The rows, and what makes a batch of some of them.

    file    of texts, instead of work.rows
    first   lets rank 0 through before the others, so that texts are made tokens of once
    """
    if work.tokens is not None:
        return TokenRows(work.tokens), _padding_collate(work)
    with first or contextlib.nullcontext():
        return _tokenize(work, file or str(work.rows)), _tokenizers_collate(work)


def _padding_collate(work: Work) -> Collate:
    fillers = {**_FILLERS, "input_ids": work.pad_token_id}

    def collate(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        lengths = [len(row["input_ids"]) for row in rows]
        length = work.max_length if work.padding == "max_length" else max(lengths)
        batch = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if len(values[0].shape) == 0 or values[0].is_floating_point():
                batch[name] = torch.stack(values)
                continue
            batch[name] = torch.full((len(rows), length), fillers[name], dtype=torch.int64)
            for place, row in zip(batch[name], values, strict=True):
                place[: len(row)] = row
        places = torch.arange(length)
        batch["attention_mask"] = (places < torch.tensor(lengths)[:, None]).long()
        return batch

    return collate


def _tokenize(work: Work, file: str) -> Any:
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work.model)
    columns, max_length = work.text_columns, work.max_length
    padding = "max_length" if work.padding == "max_length" else False

    # `datasets` hashes what the function closes over: nothing of it may differ from run to run.
    def tokenize(rows: Mapping[str, list[str]]) -> Any:
        texts = [rows[column] for column in columns]
        return tokenizer(*texts, truncation=True, max_length=max_length, padding=padding)

    raw = load_dataset("json", data_files=file, split="train")
    drop = [name for name in raw.column_names if name != work.label_column]
    tokens = raw.map(tokenize, batched=True, remove_columns=drop)
    if work.label_column != "labels":
        tokens = tokens.rename_column(work.label_column, "labels")
    return tokens


def _tokenizers_collate(work: Work) -> Collate:
    from transformers import AutoTokenizer, DataCollatorWithPadding, default_data_collator

    if work.padding == "max_length":
        return default_data_collator  # type: ignore[no-any-return]
    return DataCollatorWithPadding(AutoTokenizer.from_pretrained(work.model))  # type: ignore[no-any-return]
