"""A tokenizer of word pieces whose ids can be counted by hand, and data sets for it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ftlaunch.strategies.data.token_cache import prepare_tokens
from ftlaunch.strategies.data.tokenizer import TokenizerSource
from ftlaunch.strategies.options import DataOptions
from tests.jobs import write_rows

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# 5 anna, 6 ##s, 7 lives, 8 in, 9 new, 10 york, 11 ##shire, 12 ., 13 bob, 14 ##by, 15 ', 16 s
WORDS = ("anna", "##s", "lives", "in", "new", "york", "##shire", ".", "bob", "##by", "'", "s")
PIECES = (*SPECIAL, *WORDS)
CLS, SEP, MASK = 2, 3, 4


def write_tokenizer(folder: Path, **settings: Any) -> TokenizerSource:
    """BERT's: lower case, blanks and punctuation between words, [CLS] and [SEP] around a text."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    folder.mkdir(parents=True, exist_ok=True)
    pieces = {piece: i for i, piece in enumerate(PIECES)}
    tokenizer = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
        "model_input_names": ["input_ids", "attention_mask"],
        **settings,
    }
    kept = {key: value for key, value in values.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    return TokenizerSource(name_or_path=str(folder))


class Data:
    """Data sets of one task in folders below one."""

    def __init__(self, folder: Path, task: str) -> None:
        self.folder, self.task = folder, task

    def prepare(
        self,
        rows: Sequence[Mapping[str, Any]],
        evaluation: Sequence[Mapping[str, Any]] | None = None,
        *,
        tokenizer: TokenizerSource | None = None,
        labels: Any = None,
        **options: Any,
    ) -> Any:
        """The tokens of these rows; without rows to evaluate, of the first of them."""
        folder = self.folder / str(len(list(self.folder.iterdir())))
        (folder / "data").mkdir(parents=True)
        write_rows(folder / "data" / "train.jsonl", rows)
        write_rows(folder / "data" / "test.jsonl", evaluation or rows[:1])
        wanted = {"name_or_path": str(folder / "data"), "cache_dir": str(folder / "cache")}
        return prepare_tokens(
            self.task,
            DataOptions(**{**wanted, **options}),
            tokenizer or write_tokenizer(folder / "tokenizer"),
            seed=1,
            model_max_length=None,
            labels=labels,
        )


def listed(samples: Any) -> list[tuple[list[int], list[int]]]:
    """(input ids, labels) of every sample."""
    found = samples.samples(np.arange(len(samples)))
    return [(each.input_ids.tolist(), each.labels.tolist()) for each in found]
