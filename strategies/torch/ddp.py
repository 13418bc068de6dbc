"""Data-parallel training with torch: every rank holds the whole model, gradients are averaged.

Weights, gradients and moments are fp32 whatever the precision; bf16 and fp16 are autocast.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from ftlaunch.cluster.errors import JobError
from ftlaunch.strategies.base import (
    Batch,
    Said,
    Say,
    StateReader,
    StepOutcome,
    StrategyRequest,
    TensorSlice,
    TokenScores,
    say_nothing,
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
from ftlaunch.strategies.torch.ledger import DataParallel
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
        # Gradients are exchanged by it; None: by nobody, or it is not there yet.
        self._exchange: DataParallel | None = None
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
        # What is said in a step, for one rank alone; steps that had an overflow, in this process.
        self._heard: torch.Tensor | None = None
        self._skipped = 0
        if request.packs_samples:
            self._forward.check_borders(model)

    @property
    def exchanges_in_backward(self) -> bool:
        """The last backward pass of a step waits until all gradients have been exchanged."""
        return self._exchange is not None

    # -- the step ---------------------------------------------------------------------------

    def prove(self, batch: Batch, *, accumulates: bool) -> None:
        assert self._exchange is None, "the reducer has seen gradients"
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

    def accumulate(
        self, batch: Batch, total_items: float, *, last: bool, say: Say = say_nothing
    ) -> None:
        if self._exchange is None and self.world.size > 1:
            self._exchange = self._begin_exchange(batch)
        self._forward.set_training(self.model, True)
        exchange = self._exchange
        quiet = contextlib.nullcontext() if last or exchange is None else exchange.no_sync()
        with quiet:
            loss_sum = self._forward.loss_sum(exchange or self.model, batch)
            self._window_loss += loss_sum.detach()
            # DDP averages over ranks, so each contributes W times its share of the global mean.
            loss = loss_sum * (self.world.size * self._scaler.scale / total_items)
            said = self._said(say(), total_items) if last else None
            if exchange is None or said is None:
                torch.autograd.backward(loss)
            else:
                exchange.backward(loss, said)
        if exchange is None:
            self._heard = said

    def _said(self, said: Said, total_items: float) -> torch.Tensor:
        """(4,) fp32: the window's loss, whether to stop, who saves, steps skipped so far."""
        numbers = np.array([0.0, said.stop, said.saving, self._skipped], dtype=np.float32)
        entries = self._forward.moved(numbers)
        entries[0] = self._window_loss / total_items
        return entries

    def apply(self, learning_rate: float) -> StepOutcome:
        gradients = [p.grad for _, p in self._named if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        heard = self._heard if self._exchange is None else self._exchange.heard()
        assert heard is not None, "apply before the last micro-batch"
        # All at once: who asks a device for a number waits for it.
        scaled_norm, loss, stops, saving, skipped = torch.cat([norm[None], heard]).tolist()
        self._check_skipped(skipped)
        # Of equal gradients every rank finds the same.
        overflow = not math.isfinite(scaled_norm)
        scale = self._scaler.scale
        grad_norm = scaled_norm / scale
        culprit = None
        if overflow:
            culprit = self._first_not_finite()
        else:
            self._step(gradients, grad_norm, scale, learning_rate)
        self._scaler.update(overflow=overflow)
        # DDP's gradients are views of its buckets and stay; others are cheaper dropped than filled.
        self._optimizer.zero_grad(set_to_none=self._exchange is None)
        self._window_loss.zero_()
        self._skipped += overflow
        return StepOutcome(
            applied=not overflow,
            loss=loss,
            grad_norm=grad_norm,
            loss_scale=scale,
            culprit=culprit,
            stop=stops > 0,
            # A sum of whole numbers: `DataParallel.heard`.
            saving=float(np.rint(saving)),
        )

    def _check_skipped(self, total: float) -> None:
        """JobError when ranks have not skipped the same steps: nothing that they compute is right then.

        Early, not sure: who has skipped as many as all have in the mean does not see it here. Before
        anything is saved `training` compares exactly.
        """
        if not abs(total - self._skipped * self.world.size) < 0.5:
            raise JobError(
                f"rank {self.world.rank} has skipped {self._skipped} steps because gradients were not "
                f"finite, and all {self.world.size} ranks together {total:g}: they had not the same "
                "gradients. The network, a device or a library gives ranks other numbers."
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

    def _begin_exchange(self, batch: Batch) -> DataParallel:
        """Collective. One backward pass beforehand, the proof's or one of a single row here, shows whether
        a parameter is unused, which DDP has to be told: looking for them in every step would cost, not
        looking would hang.
        """
        if self._has_unused is None:
            self._forward.set_training(self.model, True)
            torch.autograd.backward(self._forward.loss_sum(self.model, batch.one_row()))
            self._has_unused = any(p.grad is None for _, p in self._named)
            self._optimizer.zero_grad(set_to_none=True)
        # What a rank has computed must not decide alone: one that looks for them exchanges more.
        found = sum_across_ranks(self.world, np.array([float(self._has_unused)]))
        return DataParallel(self.model, self.device, num_entries=4, has_unused=bool(found[0] > 0))

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
        leave_process_group(self._exchange)

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
