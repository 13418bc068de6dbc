"""The last layer of a model over a large vocabulary, which gives losses instead of logits when asked to.

Only where the model's logits are exactly what a linear layer gives: that is looked at in the first
pass, and a model for which it is not so (it scales or caps its logits, or its head is another layer) is
asked for its logits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ftlaunch.strategies.torch.chunked_loss import HeadLoss, score_head

# Stands for the logits in the pass that looks. So large that every cap is below it, and a number of
# every precision.
_MARK = 1000.0
# Gets the hidden states of the chosen tokens, (tokens, width), and gives what stands for the logits.
_Instead = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenTokens:
    """The tokens of a batch that have a label.

    positions   (chosen,) in the flat batch of `num_tokens`
    labels      (chosen,)
    """

    positions: torch.Tensor
    labels: torch.Tensor
    num_tokens: int


class OutputHead:
    """Stands in the place of the head's `forward`. None of its weights change their name or place."""

    def __init__(self, model: Any) -> None:
        self._layer: Any = model.get_output_embeddings()
        self._instead: _Instead | None = None
        self._chosen: ChosenTokens | None = None
        # Unknown until the first pass.
        self._fits: bool | None = None if type(self._layer) is torch.nn.Linear else False
        if self._fits is None:
            self._plain = self._layer.forward
            self._layer.forward = self._forward

    @property
    def is_unknown(self) -> bool:
        """The next `fits` makes a pass."""
        return self._fits is None

    def fits(self, run: Callable[[], torch.Tensor], chosen: ChosenTokens) -> bool:
        """Whether the model's logits are the layer's. The first time a pass of the model tells.

        run   that pass, which gives what the model calls its logits. Whatever the tokens are, it gives
              the same on every rank: what a rank computes in it must not decide how many it makes.
        """
        if self._fits is None:
            with torch.no_grad(), self._replaced(_marked, chosen):
                try:
                    found = run()
                except IndexError:
                    # The model takes apart what it calls its logits.
                    self._fits = False
                else:
                    self._fits = found.dim() == 0 and float(found) == _MARK
        return self._fits

    def loss_sum(
        self, run: Callable[[], torch.Tensor], chosen: ChosenTokens, weights: torch.Tensor | None
    ) -> torch.Tensor:
        """The sum over tokens of weight times loss, fp32, of a model that `fits`.

        weights   (chosen,); None: all are 1
        """

        def instead(hidden: torch.Tensor) -> torch.Tensor:
            weight, bias = self._layer.weight, self._layer.bias
            loss: torch.Tensor = HeadLoss.apply(  # type: ignore[no-untyped-call]
                hidden, weight, bias, chosen.labels, weights, _dtype(weight)
            )
            return loss

        with self._replaced(instead, chosen):
            return run()

    def scores(self, run: Callable[[], torch.Tensor], chosen: ChosenTokens) -> torch.Tensor:
        """(2, chosen) loss and winner of each, of a model that `fits`."""

        def instead(hidden: torch.Tensor) -> torch.Tensor:
            return score_head(hidden, self._layer.weight, self._layer.bias, chosen.labels)

        with self._replaced(instead, chosen):
            return run()

    @contextlib.contextmanager
    def _replaced(self, instead: _Instead, chosen: ChosenTokens) -> Iterator[None]:
        self._instead, self._chosen = instead, chosen
        try:
            yield
        finally:
            self._instead = self._chosen = None

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        chosen = self._chosen
        if self._instead is None or chosen is None or len(flat) != chosen.num_tokens:
            logits: torch.Tensor = self._plain(hidden)
            return logits
        return self._instead(flat[chosen.positions])


def _marked(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.new_full((), _MARK)


def _dtype(weight: torch.Tensor) -> torch.dtype:
    """Of products with that weight, here and now."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
