"""What a rank holds for each parameter, whatever the batch: weights, masters, gradients, optimizer state.

Sources: `strategies/torch/ddp.py`, `strategies/torch/zero.py`, `strategies/mindspore/data_parallel.py`, and
DeepSpeed 0.19's `runtime/zero`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ftlaunch.strategies.memory.architecture import Architecture

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "mindspore")
_FP32 = 4
_MOMENTS = 2 * _FP32
# DeepSpeed's default of `sub_group_size`: elements of a rank's part that its stage 3 steps at a time.
_SUB_GROUP = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """Bytes of one rank.

    host      what offload keeps in the host's memory instead
    stepping  more that exists while the optimizer steps: its gradients in one piece, and those in fp32
    """

    weights: int
    masters: int
    gradients: int
    optimizer: int
    host: int
    stepping: int = 0
    gradient_width: int = _FP32

    @property
    def on_device(self) -> int:
        return self.weights + self.masters + self.gradients + self.optimizer


def count_trainable(
    architecture: Architecture, trainable: Callable[[str], bool] | None
) -> tuple[int, int]:
    """(parameters that are trained, all)."""
    total = architecture.num_parameters
    if trainable is None:
        return total, total
    trained = sum(t.num_elements for t in architecture.tensors if trainable(t.name))
    return trained, total


def part(num_elements: int, world_size: int) -> int:
    """Of a vector that is padded and cut into equal parts."""
    return -(-num_elements // world_size)


def states(
    *,
    strategy: str,
    offload_optimizer: bool,
    offload_parameters: bool,
    precision: str,
    world_size: int,
    num_parameters: int,
    num_trainable: int,
) -> States:
    """In a step, once the optimizer has stepped for the first time.

    ddp, mindspore   everything whole, fp32: 16 bytes a trained parameter; bf16 and fp16 are autocast
    zero1, zero2     weights whole and gradients in the dtype that computes, the rest of it in fp32 and W
                     parts; gradients of zero1 are whole until they have been averaged
    zero3            the weights, too. Its optimizer steps some of the parameters at a time, zero2's all

    offload_optimizer    masters, moments and averaged gradients are the host's
    offload_parameters   the weights are, which only zero3 can
    """
    width = _FP32 if precision == "fp32" else 2
    if strategy in ("ddp", "mindspore"):
        return States(
            weights=_FP32 * num_parameters,
            masters=0,
            gradients=_FP32 * num_trainable,
            optimizer=_MOMENTS * num_trainable,
            host=0,
        )
    mine = part(num_trainable, world_size)
    weights = width * (part(num_parameters, world_size) if strategy == "zero3" else num_parameters)
    masters = _FP32 * mine
    optimizer = _MOMENTS * mine
    gradients = width * (num_trainable if strategy == "zero1" else mine)
    host = 0
    if offload_parameters and strategy == "zero3":
        host += weights
        weights = 0
    if not offload_optimizer:
        at_once = min(mine, _SUB_GROUP) if strategy == "zero3" else mine
        return States(
            weights=weights,
            masters=masters,
            gradients=gradients,
            optimizer=optimizer,
            host=host,
            stepping=(width + _FP32) * at_once,
            gradient_width=width,
        )
    return States(
        weights=weights,
        masters=0,
        gradients=width * num_trainable if strategy == "zero1" else 0,
        optimizer=0,
        host=host + masters + optimizer + _FP32 * mine,
        gradient_width=width,
    )
