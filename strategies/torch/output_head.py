"""The last layer of a model over a large vocabulary, which gives losses instead of logits when asked to.

Only where the model's logits are exactly what a linear layer gives: that is looked at in the first
pass, and a model for which it is not so (it scales or caps its logits, or its head is another layer) is
asked for its logits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ftlaunch.strategies.torch.chunked_loss import HeadLoss, score_head

# Gets the hidden states of the chosen tokens, (tokens, width), and gives what stands for the logits.
_Instead = Callable[[torch.Tensor], torch.Tensor]


class OutputHead:
    """Stands in the place of the head's `forward`. None of its weights change their name or place."""

    def __init__(self, model: Any) -> None:
        self._layer: Any = model.get_output_embeddings()
        self._instead: _Instead | None = None
        self._positions: torch.Tensor | None = None
        self._num_tokens = 0
        self._given: torch.Tensor | None = None
        # Unknown until the first pass.
        self._fits: bool | None = None if type(self._layer) is torch.nn.Linear else False
        if self._fits is None:
            self._plain = self._layer.forward
            self._layer.forward = self._forward

    def loss_sum(
        self,
        run: Callable[[], torch.Tensor],
        labels: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor | None:
        """The sum over tokens of weight times loss, fp32; None for a model that has to give logits.

        run       a pass of the model, which gives what it calls its logits
        labels    (rows, length), anything where the weight is 0
        weights   (rows, length)
        """
        if self._fits is False:
            return None
        chosen = weights.flatten().nonzero().squeeze(1)
        wanted, of_each = labels.flatten()[chosen], weights.flatten()[chosen]

        def instead(hidden: torch.Tensor) -> torch.Tensor:
            weight, bias = self._layer.weight, self._layer.bias
            loss: torch.Tensor = HeadLoss.apply(  # type: ignore[no-untyped-call]
                hidden, weight, bias, wanted, of_each, _dtype(weight)
            )
            return loss

        return self._run(run, instead, chosen, labels.numel())

    def scores(
        self, run: Callable[[], torch.Tensor], labels: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor | None:
        """(2, chosen) loss and winner of the tokens at the positions `chosen` in the flat batch."""
        if self._fits is False:
            return None
        wanted = labels.flatten()[chosen]

        def instead(hidden: torch.Tensor) -> torch.Tensor:
            return score_head(hidden, self._layer.weight, self._layer.bias, wanted)

        return self._run(run, instead, chosen, labels.numel())

    def _run(
        self,
        run: Callable[[], torch.Tensor],
        instead: _Instead,
        positions: torch.Tensor,
        num_tokens: int,
    ) -> torch.Tensor | None:
        with self._replaced(instead, positions, num_tokens):
            result = run()
            given = self._given
        if self._fits is None:
            # The same on every rank: it follows from the model's code.
            self._fits = given is not None and torch.equal(result.detach(), given)
        return result if self._fits else None

    @contextlib.contextmanager
    def _replaced(
        self, instead: _Instead, positions: torch.Tensor, num_tokens: int
    ) -> Iterator[None]:
        self._instead, self._positions, self._num_tokens = instead, positions, num_tokens
        try:
            yield
        finally:
            self._instead = self._positions = self._given = None

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        if self._instead is None or self._positions is None or len(flat) != self._num_tokens:
            logits: torch.Tensor = self._plain(hidden)
            return logits
        result = self._instead(flat[self._positions])
        if self._fits is None:
            self._given = result.detach().clone()
        return result


def _dtype(weight: torch.Tensor) -> torch.dtype:
    """Of products with that weight, here and now."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
