"""Sums of token losses over large vocabularies, some tokens at a time: logits in fp32, and what their
gradients take, never exist as a whole. Knows tensors; no model and no batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

# Logits that exist at a time: 128 MiB in fp32, and 512 MiB on accelerators. Each piece reads the weight
# and the sum of its gradients anew, which on CPUs is little beside what is computed.
CHUNK_ELEMENTS = 1 << 25
ACCELERATOR_CHUNK_ELEMENTS = 1 << 27


def _chunks(num_rows: int, width: int, device: torch.device) -> Iterator[slice]:
    elements = CHUNK_ELEMENTS if device.type == "cpu" else ACCELERATOR_CHUNK_ELEMENTS
    size = max(1, elements // width)
    return (slice(first, first + size) for first in range(0, num_rows, size))


def _loss_and_gradient(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of weight · −log softmax(logits)[label], its gradient), which takes the place of `logits`.

    logits    (rows, classes) fp32
    weights   (rows,); None: all are 1, and a pass over the logits is saved
    """
    normaliser = logits.logsumexp(dim=-1)
    chosen = logits.gather(1, labels[:, None]).squeeze(1)
    losses = normaliser - chosen
    loss = (losses if weights is None else losses * weights).sum()
    gradient = logits.sub_(normaliser[:, None]).exp_()
    gradient.scatter_add_(1, labels[:, None], torch.full_like(chosen, -1.0)[:, None])
    return loss, gradient if weights is None else gradient.mul_(weights[:, None])


def _part(weights: torch.Tensor | None, part: slice) -> torch.Tensor | None:
    return None if weights is None else weights[part]


class LogitsLoss(torch.autograd.Function):
    """The sum over rows of weight · −log softmax(logits)[label].

    apply(logits, labels, weights or None for 1): logits (rows, classes) of any dtype. The gradient is
    computed with the loss, in the dtype of the logits.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        gradients = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for part in _chunks(len(logits), logits.shape[1], logits.device):
            exact = logits[part].to(torch.float32, copy=True)
            loss, gradient = _loss_and_gradient(exact, labels[part], _part(weights, part))
            total += loss
            if gradients is not None:
                gradients[part] = gradient
        ctx.gradients = gradients
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        return None if gradients is None else gradients.mul_(outer[0]), None, None


class HeadLoss(torch.autograd.Function):
    """The same for logits = hidden · weightᵀ + bias, which are never whole in any dtype.

    apply(hidden, weight, bias or None, labels, weights or None, dtype): hidden (rows, width), weight
    (classes, width), `dtype` that of the products. All gradients are computed with the loss: where the
    weight is held in parts it has to be whole once only.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        weights: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            rows, matrix = hidden.to(dtype), weight.to(dtype)
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
            to_hidden = torch.empty_like(hidden) if for_hidden else None
            to_weight = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None
            to_bias = None
            if bias is not None and for_bias:
                to_bias = torch.zeros_like(bias, dtype=torch.float32)
            for part in _chunks(len(rows), len(matrix), rows.device):
                logits = (rows[part] @ matrix.t()).float()
                if bias is not None:
                    logits += bias
                loss, gradient = _loss_and_gradient(logits, labels[part], _part(weights, part))
                total += loss
                if to_bias is not None:
                    to_bias += gradient.sum(dim=0)
                gradient = gradient.to(dtype)
                if to_hidden is not None:
                    to_hidden[part] = gradient @ matrix
                if to_weight is not None and dtype == torch.float32:
                    to_weight.addmm_(gradient.t(), rows[part])
                elif to_weight is not None:
                    to_weight += gradient.t() @ rows[part]
        ctx.gradients = (to_hidden, to_weight, to_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [
            None if each is None else each.mul_(outer[0]).to(dtype)
            for each, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None


def score_rows(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(2, rows) fp32: −log softmax(logits)[label] and the class with the highest logit."""
    found = torch.empty((2, len(logits)), dtype=torch.float32, device=logits.device)
    for part in _chunks(len(logits), logits.shape[1], logits.device):
        exact = logits[part].float()
        chosen = exact.gather(1, labels[part, None]).squeeze(1)
        found[0, part] = exact.logsumexp(dim=-1) - chosen
        found[1, part] = exact.argmax(dim=-1)
    return found


def score_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
) -> torch.Tensor:
    """`score_rows` of logits = hidden · weightᵀ + bias, in the precision around it."""
    parts = [
        score_rows(torch.nn.functional.linear(hidden[part], weight, bias), labels[part])
        for part in _chunks(len(hidden), len(weight), hidden.device)
    ]
    return torch.cat(parts, dim=1) if parts else hidden.new_empty((2, 0), dtype=torch.float32)
