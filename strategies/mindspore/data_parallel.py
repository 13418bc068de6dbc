"""Data-parallel training with MindSpore: every rank holds the whole model, gradients are summed once
an optimizer step.

Weights, gradients and moments are fp32 whatever the precision; bf16 and fp16 are MindSpore's own
mixed precision. The order of a step: gradients of the window → sum over the ranks → agree on
overflow → unscale and clip → AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import mindspore as ms
import numpy as np
from mindspore import ops
from numpy.typing import NDArray

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
from ftlaunch.strategies.loss_scale import LossScaler
from ftlaunch.strategies.mindspore.adamw import MOMENTS, AdamW
from ftlaunch.strategies.mindspore.dropout import (
    make_dropout_stateless,
    seed_dropout,
    without_trace,
)
from ftlaunch.strategies.mindspore.forward import (
    CUT_AT_PADDING,
    bucket,
    check_padding_inside,
    logits_of,
    pad_to_buckets,
)
from ftlaunch.strategies.mindspore.goodbye import Goodbye
from ftlaunch.strategies.mindspore.group import (
    all_reduce,
    gather,
    join_group,
    leave_group,
    peak_memory_bytes,
    sum_across_ranks,
    use_device,
)
from ftlaunch.strategies.mindspore.losses import LOSSES, token_scores
from ftlaunch.strategies.mindspore.model import NamedModel, load_model, model_files, set_values
from ftlaunch.strategies.model_config import max_length_of
from ftlaunch.strategies.shares import own_runs

_DTYPES = {"bf16": ms.bfloat16, "fp16": ms.float16}
# Gradients travel in flat buckets of about so many elements: 64 MiB.
_BUCKET_ELEMENTS = 1 << 24


def create(request: StrategyRequest) -> MindSporeDataParallel:
    """Collective: join the group and load the model. UserError when it cannot be had."""
    use_device(request)
    make_dropout_stateless()
    if request.accelerator == "cpu":
        from ftlaunch.strategies.mindspore.cpu_kernels import replace_missing_kernels

        replace_missing_kernels()
    if request.accelerator == "ascend":
        # There it has to come before the first parameter.
        request.stages.begin("process group")
        goodbye = join_group(request.world)
        request.stages.begin("model")
        model = load_model(request)
        request.stages.begin("strategy")
        return MindSporeDataParallel(request, model, goodbye)
    # The model first: a mistake in it is told before anyone waits for the others.
    named = load_model(request)
    request.stages.begin("process group")
    goodbye = join_group(request.world)
    request.stages.begin("strategy")
    return MindSporeDataParallel(request, named, goodbye)


class MindSporeDataParallel:
    """Implements `base.Strategy`."""

    def __init__(self, request: StrategyRequest, named: NamedModel, goodbye: Goodbye) -> None:
        train = request.options.train
        self.world = request.world
        self._goodbye = goodbye
        self.model = named.model
        self._named = named
        self._accelerator = request.accelerator
        self._pad_token_id = request.pad_token_id
        looks_for_last = request.head == "sequence-classification"
        self._checks_padding = looks_for_last and named.model.config.model_type in CUT_AT_PADDING
        self._max_length = max_length_of(named.model.config.to_dict())
        self._loss = LOSSES[request.loss]
        self._max_grad_norm = train.max_grad_norm
        self._scaler = LossScaler(
            initial=train.initial_loss_scale,
            window=train.loss_scale_window,
            enabled=request.precision == "fp16",
        )
        self._trained = named.trained()
        self._optimizer = AdamW(
            self._trained,
            beta1=train.adam_beta1,
            beta2=train.adam_beta2,
            epsilon=train.adam_epsilon,
            weight_decay=train.weight_decay,
        )
        self._forward = self.model
        if request.precision in _DTYPES:
            self._forward = ms.amp.auto_mixed_precision(
                self.model, "auto", _DTYPES[request.precision]
            )
        self._differentiate = ms.value_and_grad(
            self._scaled_loss, None, [p for _, p in self._trained], has_aux=True
        )
        self._gradients: list[Any] | None = None
        # (sum of losses, divisor) of each micro-batch of the window. Who reads one waits for the NPU.
        self._losses: list[tuple[Any, float]] = []
        self._say: Say = say_nothing
        # The most rows of a micro-batch so far, in training and in evaluation, by padded length.
        self._most_rows: dict[str, dict[int, int]] = {"train": {}, "eval": {}}

    # -- the step ---------------------------------------------------------------------------

    def prove(self, batch: Batch, *, accumulates: bool) -> None:
        self.model.set_train(True)
        # What a step has beside the gradients of a micro-batch: moments, and sums of gradients.
        copies = (0 if self._optimizer.moments else len(MOMENTS)) + accumulates
        held = [ops.zeros_like(p) for _, p in self._trained for _ in range(copies)]
        rows_before = dict(self._most_rows["train"])
        with without_trace():
            seed_dropout(batch.seed)
            (_, loss_sum), gradients = self._differentiate(
                self._in_known_shape(batch, "train"), self._scaler.scale
            )
            # On NPUs the calls return before anything is computed.
            loss_sum.asnumpy()
            gradients[0].asnumpy()
        del held
        # Its rows are no reason for filler in a later micro-batch: dropout would draw in another shape.
        self._most_rows["train"] = rows_before

    def accumulate(
        self, batch: Batch, total_items: float, *, last: bool, say: Say = say_nothing
    ) -> None:
        self._say = say
        self.model.set_train(True)
        seed_dropout(batch.seed)
        factor = self._scaler.scale / total_items
        (_, loss_sum), gradients = self._differentiate(self._in_known_shape(batch, "train"), factor)
        if self._gradients is None:
            self._gradients = [gradient.astype(ms.float32) for gradient in gradients]
        else:
            # One by one: the sums take the place of what they were made of.
            for number, gradient in enumerate(gradients):
                self._gradients[number] = self._gradients[number] + gradient.astype(ms.float32)
        self._losses.append((loss_sum, total_items))

    def _scaled_loss(self, batch: Batch, factor: float) -> tuple[Any, Any]:
        loss_sum = self._loss(logits_of(self._forward, batch), batch.labels, batch.weights)
        return loss_sum * factor, loss_sum

    def _in_known_shape(self, batch: Batch, mode: Literal["train", "eval"]) -> Batch:
        if self._checks_padding:
            check_padding_inside(batch, self._pad_token_id)
        if self._accelerator == "cpu":
            return batch
        length = bucket(batch.inputs["input_ids"].shape[1])
        seen = self._most_rows[mode]
        # Of few shapes: as many rows as longer ones had. Shorter ones may have had more than fit.
        rows = max([len(batch.labels), *(n for longer, n in seen.items() if longer >= length)])
        seen[length] = rows
        return pad_to_buckets(
            batch, rows=rows, pad_token_id=self._pad_token_id, max_length=self._max_length
        )

    def apply(self, learning_rate: float) -> StepOutcome:
        assert self._gradients is not None, "apply before any accumulate"
        mine, self._gradients = self._gradients, None
        buckets = self._flatten(mine)
        culprit_here = 0 if math.isfinite(_sum_of_squares(buckets)) else self._first_bad(mine)
        del mine
        if self.world.size > 1:
            for number, bucket in enumerate(buckets):
                buckets[number] = all_reduce(bucket)
        norm = math.sqrt(_sum_of_squares(buckets))
        if not culprit_here and not math.isfinite(norm):
            culprit_here = self._first_bad(self._unflatten(buckets))
        # An explicit flag: where an NPU saturates, an infinite gradient arrives as a finite one.
        said = np.array([self._window_loss(), culprit_here, *self._say()], dtype=np.float64)
        heard = gather(self.world, said)
        loss, _, stops, saving = heard.sum(axis=0).tolist()
        culprits = [int(number) for number in heard[:, 1] if number]
        scale = self._scaler.scale
        grad_norm = norm / scale
        if culprits:
            # A norm that saturation has made finite would be no norm.
            grad_norm = grad_norm if not math.isfinite(grad_norm) else math.inf
        else:
            self._step(buckets, grad_norm, scale, learning_rate)
        self._scaler.update(overflow=bool(culprits))
        return StepOutcome(
            applied=not culprits,
            loss=loss,
            grad_norm=grad_norm,
            loss_scale=scale,
            culprit=self._trained[min(culprits) - 1][0] if culprits else None,
            stop=stops > 0,
            saving=saving,
        )

    def _window_loss(self) -> float:
        """The window's loss so far, added up in float64, which not every NPU has; none is left."""
        losses, self._losses = self._losses, []
        return sum(float(loss_sum.asnumpy()) / divisor for loss_sum, divisor in losses)

    def _step(
        self, buckets: list[Any], grad_norm: float, scale: float, learning_rate: float
    ) -> None:
        """Unscale and clip in one multiplication, then AdamW."""
        clip = self._max_grad_norm
        shrink = min(1.0, clip / (grad_norm + 1e-6)) if clip > 0 else 1.0
        if shrink / scale != 1.0:
            factor = ms.Tensor(shrink / scale, ms.float32)
            for number, bucket in enumerate(buckets):
                buckets[number] = bucket * factor
        self._optimizer.step(self._unflatten(buckets), learning_rate)

    def _first_bad(self, gradients: Sequence[Any]) -> int:
        """The number, from 1, of the first parameter whose gradient is not finite; 1 if only the sum
        of all squares is not.
        """
        for number, gradient in enumerate(gradients, start=1):
            if not bool(ops.isfinite(gradient).all().asnumpy()):
                return number
        return 1

    # -- buckets ----------------------------------------------------------------------------

    def _bucket_ends(self) -> Iterator[tuple[int, int]]:
        """[first, end) of the parameters of each bucket."""
        first, elements = 0, 0
        for number, (_, parameter) in enumerate(self._trained):
            if elements and elements + parameter.size > _BUCKET_ELEMENTS:
                yield first, number
                first, elements = number, 0
            elements += parameter.size
        yield first, len(self._trained)

    def _flatten(self, gradients: Sequence[Any]) -> list[Any]:
        return [
            ops.concat([gradient.reshape(-1) for gradient in gradients[first:end]])
            for first, end in self._bucket_ends()
        ]

    def _unflatten(self, buckets: Sequence[Any]) -> list[Any]:
        gradients = []
        for flat_bucket, (first, end) in zip(buckets, self._bucket_ends(), strict=True):
            position = 0
            for _, parameter in self._trained[first:end]:
                flat = flat_bucket[position : position + parameter.size]
                gradients.append(flat.reshape(tuple(parameter.shape)))
                position += parameter.size
        return gradients

    # -- forward and ranks ------------------------------------------------------------------

    def predict(self, batch: Batch) -> NDArray[np.float32]:
        self.model.set_train(False)
        rows = len(batch.labels)
        logits = logits_of(self._forward, self._in_known_shape(batch, "eval"))
        result: NDArray[np.float32] = logits.astype(ms.float32).asnumpy()[:rows].copy()
        return result

    def score(self, batch: Batch) -> TokenScores:
        self.model.set_train(False)
        rows, length = batch.labels.shape
        known = self._in_known_shape(batch, "eval")
        found = token_scores(logits_of(self._forward, known), known.labels)
        return TokenScores(
            losses=found.losses[:rows, :length].copy(), winners=found.winners[:rows, :length].copy()
        )

    def sum_across_ranks(self, values: NDArray[Any]) -> NDArray[Any]:
        return sum_across_ranks(self.world, values)

    def peak_memory_bytes(self) -> int:
        return peak_memory_bytes(self._accelerator)

    def close(self) -> None:
        leave_group(self.world, self._goodbye)

    # -- state ------------------------------------------------------------------------------

    def _tensors(self) -> Iterator[tuple[str, str, Any]]:
        """(kind, name, tensor) of everything a checkpoint holds, in the same order on every rank."""
        for name, parameter in self._named.parameters.items():
            yield "weight", name, parameter
            for moment, tensor in self._optimizer.moments.get(name, {}).items():
                yield moment, name, tensor

    def state_slices(self) -> Iterable[TensorSlice]:
        """The r-th of W equal runs of all elements of all tensors."""
        tensors = list(self._tensors())
        for number, start, end in own_runs([tensor.size for _, _, tensor in tensors], self.world):
            kind, name, tensor = tensors[number]
            yield TensorSlice(
                name=name,
                kind=kind,
                shape=tuple(tensor.shape),
                start=start,
                values=tensor.asnumpy().reshape(-1)[start:end],
            )

    def load_state(
        self, reader: StateReader, *, optimizer_steps: int, loss_scale: Mapping[str, float]
    ) -> None:
        # A damaged checkpoint may have been read halfway before this one.
        self._optimizer.moments.clear()
        self._optimizer.steps = optimizer_steps
        for name, parameter in self._named.parameters.items():
            set_values(parameter, _read(reader, "weight", name, parameter))
        if optimizer_steps > 0:
            for name, parameter in self._trained:
                if name in reader.names("exp_avg"):
                    moments = self._optimizer.moments_of(name, parameter)
                    for moment in MOMENTS:
                        set_values(moments[moment], _read(reader, moment, name, parameter))
        self._scaler.load(loss_scale)

    def loss_scale_state(self) -> Mapping[str, float]:
        return self._scaler.state()

    def aliases(self) -> Mapping[str, str]:
        return self._named.aliases

    def model_files(self) -> Mapping[str, bytes]:
        return model_files(self.model)


def _read(reader: StateReader, kind: str, name: str, like: Any) -> NDArray[Any]:
    """A whole tensor of a checkpoint. CheckpointDamaged when it is not all there."""
    if like.size == 0:
        return np.zeros(tuple(like.shape), dtype=np.float32)  # no slice holds it
    return np.array(reader.read(kind, name, 0, like.size)).reshape(tuple(like.shape))


def _sum_of_squares(tensors: Sequence[Any]) -> float:
    """Partial sums in fp32, their sum in fp64."""
    sums = ops.stack([ops.square(tensor).sum() for tensor in tensors])
    return float(sums.asnumpy().astype(np.float64).sum())
