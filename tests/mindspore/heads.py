"""Tiny models of every family and head that MindSpore trains with, and batches for them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftlaunch.strategies.data.packing import Blocks
from ftlaunch.strategies.data.sample_order import SampleOrder
from ftlaunch.strategies.data.tasks import TaskSpec
from ftlaunch.strategies.data.token_batches import TokenCollator
from ftlaunch.strategies.data.token_samples import TokenSample
from ftlaunch.strategies.loop import Windows
from ftlaunch.strategies.mindspore_models import FAMILIES
from tests import tiny

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
HEADS = ("token-classification", "causal-lm", "masked-lm")
PAIRS = tuple((head, family) for head in HEADS for family in FAMILIES[head])
CLASSIFIERS = FAMILIES["text-classification"]
# They classify by the last token of a text: in mindone some take it for the one before the first padding.
DECODERS = ("falcon", "gemma", "llama", "phi", "qwen2", "stablelm")
CUT_OFF_AT_PADDING = ("llama", "qwen2")
# 18 samples in global batches of 15: the second window has 3.
WINDOW_PAIRS = (
    ("token-classification", "bert"),
    ("causal-lm", "qwen2"),
    ("causal-lm", "gemma"),
    ("masked-lm", "bert"),
)
SAMPLES, GLOBAL_BATCH = 18, 15
# Whose rows are joined to one stream as well, cut into pieces of so many tokens.
JOINED = ("causal-lm", "qwen2")
PIECE = 16

_SMALL = {**tiny.CONFIGS["bert"], "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2}
_OTHERS: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 16},
    "electra": {"embedding_size": 16},
    "gemma": {"head_dim": 8},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 24},
}
_DISTILBERT = {
    "vocab_size": tiny.VOCABULARY,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def config_of(family: str) -> dict[str, Any]:
    if family == "distilbert":
        return {**_DISTILBERT, "model_type": family}
    config = {**_SMALL, **_OTHERS.get(family, {}), "model_type": family}
    if family in ("camembert", "roberta", "xlm-roberta"):
        config |= {"pad_token_id": 1, "max_position_embeddings": 66}
    if family in ("gemma", "llama", "phi", "qwen2", "stablelm"):
        config["num_key_value_heads"] = 2
    if family == "qwen2":
        config["tie_word_embeddings"] = True
    return config


class Rows:
    """Rows of 5 to 40 tokens in memory, about a third of them without a label; the third is the padding
    token."""

    def __init__(self, head: str, pad_token_id: int) -> None:
        generator = np.random.default_rng(0)
        outputs = len(TAGS) if head == "token-classification" else tiny.VOCABULARY
        self._samples = []
        for _ in range(SAMPLES):
            length = int(generator.integers(5, 41))
            ids = generator.integers(3, tiny.VOCABULARY, length).astype(np.int32)
            ids[2] = pad_token_id
            labels = generator.integers(0, outputs, length).astype(np.int32)
            if head == "causal-lm":
                labels = np.append(ids[1:], -100).astype(np.int32)
            labels[generator.random(length) < 0.3] = -100
            labels[0] = 3
            self._samples.append(TokenSample(input_ids=ids, token_type_ids=None, labels=labels))

    def __len__(self) -> int:
        return SAMPLES

    def lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.array([len(self._samples[i].input_ids) for i in indices], dtype=np.int64)

    def items(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.array([(self._samples[i].labels != -100).sum() for i in indices], dtype=np.int64)

    def samples(self, indices: NDArray[np.int64]) -> list[TokenSample]:
        return [self._samples[i] for i in indices]

    def origins(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return indices


def windows(
    world: Any, head: str, *, pad_token_id: int, micro_batch: int, is_joined: bool = False
) -> Windows:
    spec = TaskSpec(
        task=head,
        text_columns=("text",),
        label_column="",
        problem="tokens",
        label_names=TAGS if head == "token-classification" else (),
        num_outputs=len(TAGS) if head == "token-classification" else 0,
        loss="token_cross_entropy",
        head=head,  # type: ignore[arg-type]
    )
    rows: Rows | Blocks = Rows(head, pad_token_id)
    samples, global_batch = SAMPLES, GLOBAL_BATCH
    if is_joined:
        rows = Blocks(rows, PIECE)
        samples = global_batch = len(rows)
    collator = TokenCollator(table=rows, task=None, spec=spec, pad_token_id=pad_token_id, seed=7)  # type: ignore[arg-type]
    return Windows(
        order=SampleOrder(num_samples=samples, global_batch_size=global_batch, seed=7),
        collator=collator,
        rank=world.rank,
        world_size=world.size,
        micro_batch=micro_batch,
    )


def padded(head: str, indices: NDArray[np.int64], pad_token_id: int) -> dict[str, NDArray[Any]]:
    """ids, mask and labels of these samples, written out plainly."""
    samples = Rows(head, pad_token_id).samples(indices)
    shape = (len(samples), max(len(sample.input_ids) for sample in samples))
    ids, mask = np.full(shape, pad_token_id, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, -100, dtype=np.int64)
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        ids[row, :length], labels[row, :length] = sample.input_ids, sample.labels
        mask[row, :length] = 1
    return {"ids": ids, "mask": mask, "labels": labels}


def joined() -> dict[str, NDArray[Any]]:
    """ids and mask of the pieces of the stream, the last of them shorter, written out plainly."""
    stream = np.concatenate(
        [row.input_ids for row in Rows("causal-lm", 0).samples(np.arange(SAMPLES))]
    )
    missing = -len(stream) % PIECE
    mask = np.pad(np.ones(len(stream), dtype=np.int64), (0, missing))
    ids = np.pad(stream.astype(np.int64), (0, missing))
    return {"ids": ids.reshape(-1, PIECE), "mask": mask.reshape(-1, PIECE)}


def texts(family: str, pad_token_id: int) -> dict[str, NDArray[Any]]:
    """ids, mask and labels of 6 texts of 1 to 35 tokens. Two have the padding token inside, one of them at
    its end, where the family does not refuse that.
    """
    generator = np.random.default_rng(0)
    lengths = np.array([9, 35, 1, 20, 6, 14])
    ids = generator.integers(3, tiny.VOCABULARY, (6, 35))
    if family not in CUT_OFF_AT_PADDING:
        ids[1, 11] = ids[3, 19] = pad_token_id
    mask = (np.arange(35) < lengths[:, None]).astype(np.int64)
    labels = generator.integers(0, len(TAGS), 6)
    return {"ids": np.where(mask, ids, pad_token_id), "mask": mask, "labels": labels}
