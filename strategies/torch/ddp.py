"""Data-parallel training with torch: every rank holds the whole model, gradients are averaged.

Weights, gradients and moments are fp32 whatever the precision; bf16 and fp16 are autocast.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.nn.parallel import DistributedDataParallel

from ftlaunch.strategies.base import (
    Batch,
    StateReader,
    StepOutcome,
    StrategyRequest,
    TensorSlice,
    TokenScores,
)
from ftlaunch.strategies.loss_scale import LossScaler
from ftlaunch.strategies.torch.forward import Forward
from ftlaunch.strategies.torch.group import (
    join_process_group,
    leave_process_group,
    peak_memory_bytes,
    sum_across_ranks,
    use_device,
)
from ftlaunch.strategies.torch.lora import has_adapter
from ftlaunch.strategies.torch.losses import LOSSES
from ftlaunch.strategies.torch.model import aliases_of, load_model, model_files
from ftlaunch.strategies.torch.output_head import OutputHead
from ftlaunch.strategies.torch.proof import taken, without_trace
from ftlaunch.strategies.torch.slices import copy_whole, own_share

_MOMENTS = ("exp_avg", "exp_avg_sq")


def create(request: StrategyRequest) -> TorchDataParallel:
    """Collective: join the process group and load the model. UserError when it cannot be had."""
    device = use_device(request)
    # The model first: a mistake in it is told before anyone waits for the others.
    model = load_model(request)
    if request.world.size > 1:
        request.stages.begin("process group")
        join_process_group(request, device)
    request.stages.begin("strategy")
    return TorchDataParallel(request, model.to(device), device)


class TorchDataParallel:
    """Implements `base.Strategy` with DistributedDataParallel."""

    def __init__(self, request: StrategyRequest, model: Any, device: torch.device) -> None:
        train = request.options.train
        self.world = request.world
        self.model = model
        self.device = device
        self._wrapped: Any = None
        # Whether some parameter has no gradient; None: not looked for yet.
        self._has_unused: bool | None = None
        self._forward = Forward(
            device=device,
            autocast=request.precision,
            loss=LOSSES[request.loss],
            head=None if request.num_outputs else OutputHead(model),
        )
        self._max_grad_norm = train.max_grad_norm
        self._scaler = LossScaler(
            initial=train.initial_loss_scale,
            window=train.loss_scale_window,
            enabled=request.precision == "fp16",
        )
        self._named: list[tuple[str, torch.nn.Parameter]] = [
            (n, p) for n, p in model.named_parameters() if p.requires_grad
        ]
        # Biases and norm weights are vectors; everything that decays is a matrix or more.
        decayed = [p for _, p in self._named if p.dim() >= 2]
        undecayed = [p for _, p in self._named if p.dim() < 2]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": train.weight_decay},
                {"params": undecayed, "weight_decay": 0.0},
            ],
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_epsilon,
            fused=True,
        )
        self._window_loss = torch.zeros((), dtype=torch.float64, device=device)
        if request.packs_samples:
            self._forward.check_borders(model)

    @property
    def exchanges_in_backward(self) -> bool:
        """The last backward pass of a step waits until all gradients have been exchanged."""
        return isinstance(self._wrapped, DistributedDataParallel)

    # -- the step ---------------------------------------------------------------------------

    def prove(self, batch: Batch, *, accumulates: bool) -> None:
        assert self._wrapped is None, "the reducer has seen gradients"
        parameters = [p for _, p in self._named]
        alone = self.world.size == 1
        used: set[torch.Tensor] = set()
        with without_trace(self.model, self.device), contextlib.ExitStack() as stack:
            stack.callback(self._optimizer.zero_grad, set_to_none=True)
            for parameter in parameters:
                hook = cast(Any, parameter).register_post_accumulate_grad_hook(used.add)
                stack.callback(hook.remove)
            fresh = [p for p in parameters if p not in self._optimizer.state]
            held = taken(fresh, times=len(_MOMENTS))
            if accumulates or not alone:
                # DDP's buckets, or what a micro-batch before this one has left.
                for parameter in parameters:
                    parameter.grad = torch.zeros_like(parameter)
            if accumulates and not alone:
                # Until the first exchange gradients are not yet those in the buckets.
                held += taken(parameters)
            self._forward.set_training(self.model, True)
            loss_sum = self._forward.loss_sum(self.model, batch)
            torch.autograd.backward(loss_sum * self._scaler.scale)
        self._has_unused = len(used) < len(parameters)

    def accumulate(self, batch: Batch, total_items: float, *, last: bool) -> None:
        if self._wrapped is None:
            self._wrapped = self._wrap(batch)
        self._forward.set_training(self.model, True)
        alone = not isinstance(self._wrapped, DistributedDataParallel)
        quiet = contextlib.nullcontext() if last or alone else self._wrapped.no_sync()
        with quiet:
            loss_sum = self._forward.loss_sum(self._wrapped, batch)
            # DDP averages over ranks, so each contributes W times its share of the global mean.
            factor = self.world.size * self._scaler.scale / total_items
            torch.autograd.backward(loss_sum * factor)
        self._window_loss += loss_sum.detach() / total_items

    def apply(self, learning_rate: float, *, stop: bool, saving: float) -> StepOutcome:
        gradients = [p.grad for _, p in self._named if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).to(torch.float64)
        found = torch.stack([self._window_loss, (~torch.isfinite(norm)).to(torch.float64)])
        said = torch.tensor([float(stop), saving], dtype=torch.float64)
        shared = torch.cat([found, said.to(self.device, non_blocking=True)])
        if self.world.size > 1:
            dist.all_reduce(shared)
        loss, overflows, stops, saving = shared.tolist()
        overflow = overflows > 0
        scale = self._scaler.scale
        grad_norm = float(norm) / scale
        culprit = None
        if overflow:
            culprit = self._first_not_finite()
        else:
            self._step(gradients, grad_norm, scale, learning_rate)
        self._scaler.update(overflow=overflow)
        # DDP's gradients are views of its buckets and stay; others are cheaper dropped than filled.
        self._optimizer.zero_grad(set_to_none=self._wrapped is self.model)
        self._window_loss.zero_()
        return StepOutcome(
            applied=not overflow,
            loss=loss,
            grad_norm=grad_norm,
            loss_scale=scale,
            culprit=culprit,
            stop=stops > 0,
            saving=saving,
        )

    def _step(
        self, gradients: list[torch.Tensor], grad_norm: float, scale: float, learning_rate: float
    ) -> None:
        """Unscale and clip in one multiplication, then AdamW."""
        clip = self._max_grad_norm
        shrink = min(1.0, clip / (grad_norm + 1e-6)) if clip > 0 else 1.0
        if shrink / scale != 1.0:
            torch._foreach_mul_(gradients, shrink / scale)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()

    def _first_not_finite(self) -> str | None:
        for name, parameter in self._named:
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                return name
        return None

    def _wrap(self, batch: Batch) -> Any:
        """DDP around the model. One backward pass beforehand, the proof's or one of a single row here,
        shows whether a parameter is unused, which DDP has to be told: looking for them in every step
        would cost, not looking would hang.
        """
        if self.world.size == 1:
            return self.model
        if self._has_unused is None:
            self._forward.set_training(self.model, True)
            torch.autograd.backward(self._forward.loss_sum(self.model, batch.one_row()))
            self._has_unused = any(p.grad is None for _, p in self._named)
            self._optimizer.zero_grad(set_to_none=True)
        # What a rank has computed must not decide alone: one that looks for them exchanges more.
        found = sum_across_ranks(self.world, np.array([float(self._has_unused)]))
        self._has_unused = bool(found[0] > 0)
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        arguments: dict[str, Any] = {
            "device_ids": device_ids,
            "gradient_as_bucket_view": True,
            "find_unused_parameters": self._has_unused,
            **_without_buffer_sync(),
        }
        return DistributedDataParallel(self.model, **arguments)

    # -- forward and ranks ------------------------------------------------------------------

    def predict(self, batch: Batch) -> NDArray[np.float32]:
        return self._forward.predict(self.model, batch)

    def score(self, batch: Batch) -> TokenScores:
        return self._forward.score(self.model, batch)

    def sum_across_ranks(self, values: NDArray[Any]) -> NDArray[Any]:
        return sum_across_ranks(self.world, values)

    def peak_memory_bytes(self) -> int:
        return peak_memory_bytes(self.device)

    def close(self) -> None:
        leave_process_group(self._wrapped)

    # -- state ------------------------------------------------------------------------------

    def _tensors(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """(kind, name, tensor) of everything a checkpoint holds, in the same order on every rank."""
        persistent = self.model.state_dict(keep_vars=True).keys()
        alone = has_adapter(self.model)
        for name, parameter in self.model.named_parameters():
            if alone and not parameter.requires_grad:
                continue  # the base's own, which is in its files
            yield "weight", name, parameter.detach()
            for moment in _MOMENTS:
                if moment in self._optimizer.state.get(parameter, {}):
                    yield moment, name, self._optimizer.state[parameter][moment]
        for name, buffer in self.model.named_buffers():
            if name in persistent and not alone:
                yield "weight", name, buffer

    def state_slices(self) -> Iterable[TensorSlice]:
        return own_share(list(self._tensors()), self.world)

    def load_state(
        self, reader: StateReader, *, optimizer_steps: int, loss_scale: Mapping[str, float]
    ) -> None:
        # A damaged checkpoint may have been read halfway before this one.
        self._optimizer.state.clear()
        with torch.no_grad():
            for name, tensor in self._weights():
                copy_whole(reader, "weight", name, tensor)
            if optimizer_steps > 0:
                for name, parameter in self._named:
                    self._load_moments(reader, name, parameter, optimizer_steps)
        self._scaler.load(loss_scale)

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, tensor) for kind, name, tensor in self._tensors() if kind == "weight")

    def _load_moments(
        self, reader: StateReader, name: str, parameter: Any, optimizer_steps: int
    ) -> None:
        if name not in reader.names("exp_avg"):
            return  # it had no gradient so far
        # What AdamW itself would hold after that many steps; the fused one keeps `step` on the device.
        state: dict[str, torch.Tensor] = {
            "step": torch.tensor(float(optimizer_steps), dtype=torch.float32, device=self.device)
        }
        for moment in _MOMENTS:
            state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            copy_whole(reader, moment, name, state[moment])
        self._optimizer.state[parameter] = state

    def loss_scale_state(self) -> Mapping[str, float]:
        return self._scaler.state()

    def aliases(self) -> Mapping[str, str]:
        return aliases_of(self.model)

    def model_files(self) -> Mapping[str, bytes]:
        return model_files(self.model)


def _without_buffer_sync() -> dict[str, bool]:
    """Buffers are equal everywhere from the start; torch 2.13 renamed the switch."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return {name: False}
