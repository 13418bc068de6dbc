"""Tasks with labels of tokens, on tiny models and random tokens: what the tests of topology run over.

A case of another task is one more entry in `CASES`: a table, the strategy's request, and the loss of a
full batch, written out plainly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from ftlaunch.strategies.base import StrategyRequest
from ftlaunch.strategies.data.sample_order import SampleOrder
from ftlaunch.strategies.data.tasks import TaskSpec, load_task
from ftlaunch.strategies.data.token_batches import TokenCollator
from ftlaunch.strategies.data.token_samples import TokenSample
from ftlaunch.strategies.loop import Windows
from tests import tiny

SEED = 7


@dataclass
class TokenRows:
    """Rows in memory; what `TokenSamples` asks for."""

    ids: list[NDArray[np.int32]]
    labels: list[NDArray[np.int32]]

    def __len__(self) -> int:
        return len(self.ids)

    def lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.array([len(self.ids[i]) for i in indices], dtype=np.int64)

    def items(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.array([(self.labels[i] != -100).sum() for i in indices], dtype=np.int64)

    def samples(self, indices: NDArray[np.int64]) -> list[TokenSample]:
        return [
            TokenSample(input_ids=self.ids[i], token_type_ids=None, labels=self.labels[i])
            for i in indices
        ]

    def origins(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return indices


@dataclass(frozen=True, kw_only=True)
class Case:
    """make_table   of so many samples
    full_loss       (model, table, sample numbers, epoch) → the mean loss of all of them in one batch
    """

    spec: TaskSpec
    family: str
    make_table: Callable[[int], TokenRows]
    full_loss: Callable[[Any, TokenRows, NDArray[np.int64], int], torch.Tensor]
    model: dict[str, Any]

    def request(
        self, world: Any, listen_fd: int | None, folder: Path, **more: Any
    ) -> StrategyRequest:
        model = {**self.model, **more.pop("model", {})}
        made = tiny.request(world, listen_fd, folder, model=model, **more)
        return replace(
            made,
            loss=self.spec.loss,
            head=self.spec.head,
            num_outputs=self.spec.num_outputs,
            label_names=self.spec.label_names,
        )

    def collator(self, table: Any, **more: Any) -> TokenCollator:
        return TokenCollator(
            table=table,
            task=load_task(self.spec.task),  # type: ignore[arg-type]
            spec=self.spec,
            pad_token_id=0,
            seed=SEED,
            **more,
        )

    def windows(self, world: Any, table: Any, *, global_batch: int, micro_batch: int) -> Windows:
        return Windows(
            order=SampleOrder(num_samples=len(table), global_batch_size=global_batch, seed=SEED),
            collator=self.collator(table),
            rank=world.rank,
            world_size=world.size,
            micro_batch=micro_batch,
        )

    def write_model(self, folder: Path) -> Path:
        if self.family == "gpt2":
            return write_gpt2(folder)
        return tiny.write_config(folder, self.family)


def write_gpt2(folder: Path) -> Path:
    """With weights of its own: how it draws its first ones is not among the rules that we know."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=tiny.VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64, n_inner=48
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


# -- causal-lm ----------------------------------------------------------------------------------


def causal_rows(num_samples: int) -> TokenRows:
    """5 to 40 tokens, of which the first few are a prompt that is not to be learned."""
    generator = np.random.default_rng(0)
    ids, labels = [], []
    for _ in range(num_samples):
        row = generator.integers(3, tiny.VOCABULARY, generator.integers(5, 41)).astype(np.int32)
        prompt = int(generator.integers(0, 4))
        wanted = np.append(row[1:], -100).astype(np.int32)
        wanted[: max(0, prompt - 1)] = -100
        ids.append(row)
        labels.append(wanted)
    return TokenRows(ids, labels)


def causal_full_loss(
    model: Any, table: TokenRows, indices: NDArray[np.int64], epoch: int
) -> torch.Tensor:
    """transformers' own way: padded, labels like the inputs, shifted by one, the mean of what is left."""
    longest = max(len(table.ids[i]) for i in indices)
    ids = torch.zeros((len(indices), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, i in enumerate(indices):
        length = len(table.ids[i])
        ids[row, :length] = torch.from_numpy(table.ids[i].astype(np.int64))
        mask[row, :length] = 1
        for place in range(length - 1):
            if table.labels[i][place] != -100:
                labels[row, place + 1] = ids[row, place + 1]
    logits = model(input_ids=ids, attention_mask=mask).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def causal_spec(**details: Any) -> TaskSpec:
    return TaskSpec(
        task="causal-lm",
        text_columns=("text",),
        label_column="",
        problem="tokens",
        label_names=(),
        num_outputs=0,
        loss="token_cross_entropy",
        head="causal-lm",
        details={"input": "text", "packing": "none", "long_samples": "truncate", **details},
    )


def _causal(family: str, **model: Any) -> Case:
    return Case(
        spec=causal_spec(),
        family=family,
        make_table=causal_rows,
        full_loss=causal_full_loss,
        model=model,
    )


CASES: dict[str, Case] = {
    "causal-lm-qwen2": _causal("qwen2"),
    "causal-lm-llama": _causal("llama"),
    "causal-lm-gpt2": _causal("gpt2", random_weights=False),
}
