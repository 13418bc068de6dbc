"""What a peer is told to do and what it tells of it, as JSON. Knows no library and nothing of ours.

    python -m ftlaunch.peers.NAME WORK.json RESULT.json

NAME is one of `PEERS`; with more than one rank the same command stands behind
`python -m torch.distributed.run --standalone --nproc-per-node W -m`. All ranks read the same work,
and rank 0 writes the result once all steps are done.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

PEERS = ("hf", "accelerate", "torchrun", "deepspeed")
# order[step][rank][micro-batch]: numbers of samples.
Order = Sequence[Sequence[Sequence[Sequence[int]]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The same for every peer. Paths are absolute.

    model             a folder or a name of the hub
    head              what `transformers` calls the task of its Auto class
    num_labels        of the head; None: as many as the rows have classes, or the model's own
    random_weights    from config.json alone
    dropout           every dropout probability of the configuration; None leaves them
    attention         `attn_implementation`; None: the library's choice
    tokens            a safetensors file of rows that are tokens already (`tokens.py`), or
    rows              a JSON lines file of texts that the peer makes tokens of, as its users do
    eval_rows         another one, to be evaluated on at the end (hf only)
    text_columns      of `rows`: one text, or a pair
    pad_token_id      of `tokens`
    max_length        texts are cut to so many tokens
    padding           of a micro-batch: to its longest row, or to max_length
    order             which samples each micro-batch has; None: the peer draws its own
    micro_batch       rows at a time on a rank; with `order` it is told for the record only
    accumulation      micro-batches of a rank in every optimizer step
    steps             optimizer steps, at the end of which the learning rate is 0; None: `epochs`
    warmup_steps      steps at the start that are not measured
    threads           of each rank; None leaves the library's choice
    max_grad_norm     0 switches clipping off
    zero_stage        deepspeed only
    loader_workers    processes that make the batches of a rank; 0: the rank itself
    started_at        Unix time at which the command was given
    """

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    tokens: str | None = None
    rows: str | None = None
    eval_rows: str | None = None
    text_columns: tuple[str, ...] = ("text",)
    label_column: str = "label"
    head: Literal["sequence-classification", "token-classification", "causal-lm", "masked-lm"] = (
        "sequence-classification"
    )
    num_labels: int | None = None
    random_weights: bool = False
    dropout: float | None = None
    attention: str | None = None
    gradient_checkpointing: bool = False
    pad_token_id: int = 0
    max_length: int = 512
    padding: Literal["dynamic", "max_length"] = "dynamic"
    order: Order | None = None
    micro_batch: int
    accumulation: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: Literal["cpu", "cuda"] = "cpu"
    steps: int | None = None
    epochs: float = 3.0
    warmup_steps: int = 0
    threads: int | None = None
    seed: int = 42
    learning_rate: float = 5e-5
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    lr_warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    zero_stage: int = 0
    loader_workers: int = 0
    started_at: float | None = None

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.rows is None):
            raise ValueError("tokens or rows: one of them, and only one")
        if self.order is not None and self.steps != len(self.order):
            raise ValueError(f"order is of {len(self.order)} steps, steps is {self.steps}")
        for step in self.order or ():
            if any(len(share) != self.accumulation for share in step):
                raise ValueError(f"every rank has {self.accumulation} micro-batches in each step")

    def write(self, file: Path) -> None:
        content = {each.name: getattr(self, each.name) for each in fields(self)}
        file.write_text(json.dumps(content) + "\n")

    @classmethod
    def read(cls, file: Path) -> Work:
        """ValueError or TypeError for what is no work."""
        content = json.loads(file.read_text())
        return cls(**{**content, "text_columns": tuple(content.get("text_columns", ("text",)))})

    def total_steps(self, num_rows: int, num_ranks: int) -> int:
        """Optimizer steps of the whole training."""
        if self.steps is not None:
            return self.steps
        per_epoch = -(-num_rows // (self.micro_batch * self.accumulation * num_ranks))
        return max(1, round(self.epochs * per_epoch))


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What all ranks did between the ends of step `warmup_steps` and of the last one.

    tokens           without padding; padded_tokens with it
    step_seconds     of rank 0, a step each; on CUDA work of one may be counted in the next
    cpu_seconds      processor time of all ranks, a sign of what was done beside other processes
    losses           of all steps, with the warm-up, as the library reports them: means over the ranks
    peak_bytes       of memory of rank 0: what CUDA's allocator held, else resident
    first_step_at    Unix time of the end of the first step
    settings         of the library, those that its users know, and which of them are its defaults
    metrics          of the evaluation at the end
    """

    peer: str
    num_ranks: int
    num_threads: int
    precision: str
    steps: int
    warmup_steps: int
    train_seconds: float
    samples: int
    tokens: int
    padded_tokens: int
    samples_per_second: float
    tokens_per_second: float
    padding_share: float
    step_seconds: Sequence[float]
    cpu_seconds: float
    losses: Sequence[float]
    peak_bytes: int
    first_step_at: float
    started_at: float
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    metrics: Mapping[str, float] = field(default_factory=dict)

    def write(self, file: Path) -> None:
        """By rename: whoever sees the file sees all of it."""
        content = {each.name: getattr(self, each.name) for each in fields(self)}
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        temporary.replace(file)
