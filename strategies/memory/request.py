"""What the memory of a job depends on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ftlaunch.strategies.memory.architecture import Architecture, TensorSpec
from ftlaunch.strategies.memory.buckets import ZeroBuffers

FP32_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRequest:
    """A job, as far as its memory depends on it.

    micro_batch   rows, each padded to `length` tokens
    accumulates   a step has more than one micro-batch
    attention     the implementation asked for: "eager", "sdpa", "flash_attention_2"; None: the model's
    trainable     whether a parameter is trained, by its name; None: all are
    zero          the sizes of DeepSpeed's buffers, where a user's configuration sets them
    """

    architecture: Architecture
    strategy: str
    precision: str
    world_size: int
    micro_batch: int
    length: int
    accelerator: str = "cuda"
    offload_optimizer: bool = False
    offload_parameters: bool = False
    accumulates: bool = False
    gradient_checkpointing: bool = False
    attention: str | None = None
    trainable: Callable[[str], bool] | None = None
    zero: ZeroBuffers = field(default_factory=ZeroBuffers)

    def trains(self, tensor: TensorSpec) -> bool:
        return self.trainable is None or self.trainable(tensor.name)
