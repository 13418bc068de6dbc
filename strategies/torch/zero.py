"""ZeRO stages 1, 2 and 3 through DeepSpeed: optimizer state, gradients and weights in W parts.

DeepSpeed partitions, reduces, clips and steps; the loss, its normalisation, the schedule and the
checkpoints are ours. Under bf16 and fp16 the weights that compute are of that dtype, with fp32
masters in the optimizer. Where DeepSpeed keeps what is in `strategies.torch.zero_state`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.base import (
    Batch,
    Say,
    StateReader,
    StepOutcome,
    StrategyRequest,
    TensorSlice,
    TokenScores,
    say_nothing,
)
from ftlaunch.strategies.deepspeed_config import make_deepspeed_config
from ftlaunch.strategies.torch.forward import DTYPES, Forward
from ftlaunch.strategies.torch.group import (
    join_process_group,
    leave_process_group,
    peak_memory_bytes,
    sum_across_ranks,
    use_device,
)
from ftlaunch.strategies.torch.losses import LOSSES
from ftlaunch.strategies.torch.model import aliases_of, load_model, model_files
from ftlaunch.strategies.torch.output_head import OutputHead
from ftlaunch.strategies.torch.proof import taken, without_trace
from ftlaunch.strategies.torch.zero_state import ZeroState


def create_zero1(request: StrategyRequest) -> TorchZero:
    """Collective. UserError when the model cannot be had."""
    return _create(request, 1)


def create_zero2(request: StrategyRequest) -> TorchZero:
    """Collective. UserError when the model cannot be had."""
    return _create(request, 2)


def create_zero3(request: StrategyRequest) -> TorchZero:
    """Collective. UserError when the model cannot be had."""
    return _create(request, 3)


def _create(request: StrategyRequest, stage: int) -> TorchZero:
    device = use_device(request)
    # It looks for an accelerator at its import, and takes what it is told.
    os.environ["DS_ACCELERATOR"] = request.accelerator
    os.environ["LOCAL_RANK"] = str(request.world.local_rank)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # Its own all-reduce over shared memory is for inference. A rank would compile it, for a minute,
    # and one that is killed meanwhile leaves a lock on which every later rank waits for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = load_model(request, keep_file_dtype=stage == 3)
    request.stages.begin("process group")
    # One rank has a group, too: DeepSpeed knows no other way.
    join_process_group(request, device)
    deepspeed.init_distributed(
        dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False
    )
    request.stages.begin("strategy")
    config = make_deepspeed_config(
        request.options.deepspeed,
        request.options.train,
        stage=stage,
        precision=request.precision,
        accelerator=request.accelerator,
        world_size=request.world.size,
    )
    dtype = DTYPES[request.precision]
    # Mapped files, as long as nothing else holds them: they cost no memory.
    exact = {name: p.data for name, p in model.named_parameters() if _loses(p.dtype, dtype)}
    try:
        if stage == 3:
            _partition(model, dtype, device, deepspeed, config)
        return TorchZero(request, stage, model, device, deepspeed, config, exact)
    except (ValueError, TypeError, AssertionError, AttributeError, NotImplementedError) as error:
        if request.options.deepspeed.config is None:
            raise
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        raise UserError(
            f"DeepSpeed does not take this deepspeed.config: {reason}. Correct it, or leave it out."
        ) from error


def _loses(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether numbers of one dtype are not all numbers of the other."""
    return torch.promote_types(source, target) != target


def _partition(
    model: Any, dtype: torch.dtype, device: torch.device, deepspeed: Any, config: dict[str, Any]
) -> None:
    """Collective: leave every rank with its part of each parameter, one parameter after the other.

    The model comes as views of the mapped weight files, so that neither the device nor the host ever
    has more than one whole parameter. What DeepSpeed's engine does by itself needs the whole model on
    the device first.
    """
    # DeepSpeed writes rank 0's values into what it is given: in the mapping each page would become
    # memory of our own. One place for all, since the heap would keep the holes of many.
    largest = max(parameter.numel() for parameter in model.parameters())

    class OneByOne(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole = torch.empty(largest, dtype=dtype)

        def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
            for parameter in model.parameters():
                place = self.whole[: parameter.numel()].view(parameter.shape)
                parameter.data = place.copy_(parameter.data)
                yield parameter

    module = OneByOne()
    deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=dtype)
    # The module itself outlives this call.
    del module.whole
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


def _axes(parameter: Any) -> int:
    """Of the whole parameter: a part of one is flat."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


class TorchZero:
    """Implements `base.Strategy` with a DeepSpeed engine."""

    def __init__(
        self,
        request: StrategyRequest,
        stage: int,
        model: Any,
        device: torch.device,
        deepspeed: Any,
        config: dict[str, Any],
        exact: Mapping[str, torch.Tensor],
    ) -> None:
        train = request.options.train
        self.world = request.world
        self.device = device
        self._forward = Forward(
            device=device,
            autocast="fp32",
            loss=LOSSES[request.loss],
            head=None if request.num_outputs else OutputHead(model),
        )
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if _axes(p) >= 2], "weight_decay": train.weight_decay},
            {"params": [p for p in trained if _axes(p) < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_epsilon,
            fused=True,
        )
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config
        )
        self._state = ZeroState(self._engine.module, self._optimizer, stage, request.world, exact)
        if request.packs_samples:
            self._forward.check_borders(self._engine)
        self._enabled_scaler = request.precision == "fp16"
        if self._enabled_scaler:
            # Its configuration knows powers of two only. Too many skips are told by `training`.
            self._optimizer.loss_scaler.cur_scale = train.initial_loss_scale
            self._optimizer.loss_scaler.raise_error_at_min_scale = False
        self._not_finite: tuple[str, ...] = ()
        self._watch_overflow()
        self._applied_in_a_row = 0
        self._window_loss = torch.zeros((), dtype=torch.float64, device=device)
        self._say: Say = say_nothing

    # -- the step ---------------------------------------------------------------------------

    def prove(self, batch: Batch, *, accumulates: bool) -> None:
        held = taken(self._state.without_moments(), times=2)
        with without_trace(self._engine.module, self.device):
            self._forward.set_training(self._engine, True)
            # As of a micro-batch that another one follows: all its memory, and nothing is stepped.
            self._engine.set_gradient_accumulation_boundary(False)
            loss_sum = self._forward.loss_sum(self._engine, batch)
            self._engine.backward(loss_sum, scale_wrt_gas=False)
            self._state.drop_gradients()
        del held

    def accumulate(
        self, batch: Batch, total_items: float, *, last: bool, say: Say = say_nothing
    ) -> None:
        self._say = say
        self._forward.set_training(self._engine, True)
        self._engine.set_gradient_accumulation_boundary(last)
        loss_sum = self._forward.loss_sum(self._engine, batch)
        # DeepSpeed averages over ranks, so each contributes W times its share of the global mean.
        self._engine.backward(loss_sum * (self.world.size / total_items), scale_wrt_gas=False)
        self._window_loss += loss_sum.detach() / total_items
        if not last:
            # Its own count of micro-batches; the boundary is what was set above.
            self._engine.step()

    def apply(self, learning_rate: float) -> StepOutcome:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        scale = float(self._optimizer.loss_scale) if self._enabled_scaler else 1.0
        self._engine.step()
        overflow = bool(self._optimizer.overflow)
        norm = self._engine.get_global_grad_norm()
        mine = np.array([float(self._window_loss), *self._say()], dtype=np.float64)
        shared = sum_across_ranks(self.world, mine)
        self._window_loss.zero_()
        self._applied_in_a_row = 0 if overflow else self._applied_in_a_row + 1
        return StepOutcome(
            applied=not overflow,
            loss=float(shared[0]),
            grad_norm=float("inf") if overflow or norm is None else float(norm),
            loss_scale=scale,
            culprit=self._culprit() if overflow else None,
            stop=bool(shared[1] > 0),
            saving=float(shared[2]),
        )

    def _watch_overflow(self) -> None:
        """DeepSpeed drops the gradients once it has found an overflow: look before."""
        update = self._optimizer._update_scale

        def update_scale(has_overflow: bool = False) -> None:
            self._not_finite = self._state.not_finite() if has_overflow else ()
            update(has_overflow)

        self._optimizer._update_scale = update_scale

    def _culprit(self) -> str:
        """Collective, after an overflow: the first parameter with a gradient that is not finite."""
        names = self._state.trained_names
        flags = np.array([name in self._not_finite for name in names], dtype=np.float64)
        found = np.flatnonzero(sum_across_ranks(self.world, flags))
        return names[found[0]] if len(found) else "a gradient (DeepSpeed does not say whose)"

    # -- forward and ranks ------------------------------------------------------------------

    def predict(self, batch: Batch) -> NDArray[np.float32]:
        return self._forward.predict(self._engine, batch)

    def score(self, batch: Batch) -> TokenScores:
        return self._forward.score(self._engine, batch)

    def sum_across_ranks(self, values: NDArray[Any]) -> NDArray[Any]:
        return sum_across_ranks(self.world, values)

    def peak_memory_bytes(self) -> int:
        return peak_memory_bytes(self.device)

    def close(self) -> None:
        leave_process_group(self._engine)

    # -- state ------------------------------------------------------------------------------

    def state_slices(self) -> Iterable[TensorSlice]:
        return self._state.slices()

    def load_state(
        self, reader: StateReader, *, optimizer_steps: int, loss_scale: Mapping[str, float]
    ) -> None:
        self._state.load(reader, optimizer_steps=optimizer_steps)
        if self._enabled_scaler and loss_scale.get("enabled"):
            scaler = self._optimizer.loss_scaler
            scaler.cur_scale = loss_scale["scale"]
            scaler.cur_iter = 0
            scaler.last_overflow_iter = -1 - int(loss_scale["applied_in_a_row"])

    def loss_scale_state(self) -> Mapping[str, float]:
        if not self._enabled_scaler:
            return {"scale": 1.0, "applied_in_a_row": 0, "enabled": 0}
        scaler = self._optimizer.loss_scaler
        return {
            "scale": float(scaler.cur_scale),
            "applied_in_a_row": int(scaler.cur_iter - scaler.last_overflow_iter - 1),
            "enabled": 1,
        }

    def aliases(self) -> Mapping[str, str]:
        return aliases_of(self._engine.module)

    def model_files(self) -> Mapping[str, bytes]:
        return model_files(self._engine.module)
