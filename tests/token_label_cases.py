"""Tags of words and hidden tokens among the tasks that the tests of topology run over.

See `token_cases`. The reference draws what is hidden by itself, from the same uniform numbers.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import seqeval.metrics.sequence_labeling
import torch
from numpy.typing import NDArray
from torch.nn import functional

from ftlaunch.strategies.data.tasks import TaskSpec
from ftlaunch.strategies.metrics import import_evaluate
from tests import tiny
from tests.token_cases import SEED, Case, TokenRows

# Imported here once, instead of by every rank anew.
_PRELOADED = (import_evaluate(), seqeval.metrics.sequence_labeling)

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
MASK, PROBABILITY = 2, 0.3


def _padded(rows: list[NDArray[Any]], fill: int) -> torch.Tensor:
    padded = torch.full((len(rows), max(map(len, rows))), fill, dtype=torch.long)
    for row, values in enumerate(rows):
        padded[row, : len(values)] = torch.from_numpy(values.astype(np.int64))
    return padded


def _mean_loss(model: Any, ids: list[NDArray[Any]], labels: list[NDArray[Any]]) -> torch.Tensor:
    """All rows in one piece, torch's own mean over the labels that are not -100."""
    inputs = _padded(ids, 0)
    mask = _padded([np.ones(len(row)) for row in ids], 0)
    logits = model(input_ids=inputs, attention_mask=mask).logits
    return functional.cross_entropy(logits.flatten(0, 1), _padded(labels, -100).flatten())


# -- token-classification -----------------------------------------------------------------------


def tagged_rows(num_samples: int) -> TokenRows:
    """5 to 40 tokens, about half of them with a tag."""
    generator = np.random.default_rng(1)
    ids, labels = [], []
    for _ in range(num_samples):
        length = int(generator.integers(5, 41))
        tags = generator.integers(0, len(TAGS), length)
        tags[generator.random(length) < 0.5] = -100
        tags[0] = generator.integers(0, len(TAGS))
        ids.append(generator.integers(3, tiny.VOCABULARY, length).astype(np.int32))
        labels.append(tags.astype(np.int32))
    return TokenRows(ids, labels)


def tagged_full_loss(
    model: Any, table: TokenRows, indices: NDArray[np.int64], epoch: int
) -> torch.Tensor:
    return _mean_loss(model, [table.ids[i] for i in indices], [table.labels[i] for i in indices])


TAGGED = TaskSpec(
    task="token-classification",
    text_columns=("tokens",),
    label_column="tags",
    problem="tokens",
    label_names=TAGS,
    num_outputs=len(TAGS),
    loss="token_cross_entropy",
    head="token-classification",
    keeps_winners=True,
    details={"input": "words", "span_labels": [], "long_samples": "truncate"},
)


# -- masked-lm ----------------------------------------------------------------------------------


def text_rows(num_samples: int) -> TokenRows:
    """5 to 40 tokens, of which the first and the last are special; words of two tokens."""
    generator = np.random.default_rng(2)
    ids, words = [], []
    for _ in range(num_samples):
        length = int(generator.integers(5, 41))
        numbers = np.arange(length) // 2
        numbers[[0, -1]] = -100
        ids.append(generator.integers(3, tiny.VOCABULARY, length).astype(np.int32))
        words.append(numbers.astype(np.int32))
    return TokenRows(ids, words)


def plain_masks(
    ids: NDArray[Any], words: NDArray[Any], epoch: int, number: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """(what is seen, what is to be guessed) token by token, without whole words."""
    digest = hashlib.blake2b(f"{SEED}/{epoch}/{number}".encode(), digest_size=16).digest()
    key = np.frombuffer(digest, dtype="<u8")
    uniform = np.random.Generator(np.random.Philox(key=key)).random(3 * len(ids))
    seen, wanted = ids.copy(), np.full(len(ids), -100)
    for place in range(len(ids)):
        chance, treatment, replacement = (uniform[place + k * len(ids)] for k in range(3))
        if words[place] == -100 or chance >= PROBABILITY:
            continue
        wanted[place] = ids[place]
        if treatment < 0.8:
            seen[place] = MASK
        elif treatment < 0.9:
            seen[place] = int(replacement * tiny.VOCABULARY)
    return seen, wanted


def masked_full_loss(
    model: Any, table: TokenRows, indices: NDArray[np.int64], epoch: int
) -> torch.Tensor:
    drawn = [plain_masks(table.ids[i], table.labels[i], epoch, int(i)) for i in indices]
    return _mean_loss(model, [seen for seen, _ in drawn], [wanted for _, wanted in drawn])


MASKED = TaskSpec(
    task="masked-lm",
    text_columns=("text",),
    label_column="",
    problem="tokens",
    label_names=(),
    num_outputs=0,
    loss="token_cross_entropy",
    head="masked-lm",
    drawn=True,
    details={
        "mlm_probability": PROBABILITY,
        "whole_words": False,
        "long_samples": "truncate",
        "mask_token_id": MASK,
        "vocabulary": tiny.VOCABULARY,
        "max_token_id": tiny.VOCABULARY - 1,
    },
)


def _tagged(family: str) -> Case:
    return Case(
        spec=TAGGED, family=family, make_table=tagged_rows, full_loss=tagged_full_loss, model={}
    )


def _masked(family: str) -> Case:
    return Case(
        spec=MASKED, family=family, make_table=text_rows, full_loss=masked_full_loss, model={}
    )


LABEL_CASES: dict[str, Case] = {
    "token-classification-bert": _tagged("bert"),
    "token-classification-modernbert": _tagged("modernbert"),
    "token-classification-qwen2": _tagged("qwen2"),
    "masked-lm-bert": _masked("bert"),
    "masked-lm-modernbert": _masked("modernbert"),
}
