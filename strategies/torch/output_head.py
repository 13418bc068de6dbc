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
        self._given: torch.Tensor | None = None
        # Unknown until the first pass.
        self._fits: bool | None = None if type(self._layer) is torch.nn.Linear else False
        if self._fits is None:
            self._plain = self._layer.forward
            self._layer.forward = self._forward

    def loss_sum(
        self, run: Callable[[], torch.Tensor], chosen: ChosenTokens, weights: torch.Tensor
    ) -> torch.Tensor | None:
        """The sum over tokens of weight times loss, fp32; None for a model that has to give logits.

        run       a pass of the model, which gives what it calls its logits
        weights   (chosen,)
        """
        if self._fits is False:
            return None

        def instead(hidden: torch.Tensor) -> torch.Tensor:
            weight, bias = self._layer.weight, self._layer.bias
            loss: torch.Tensor = HeadLoss.apply(  # type: ignore[no-untyped-call]
                hidden, weight, bias, chosen.labels, weights, _dtype(weight)
            )
            return loss

        return self._run(run, instead, chosen, lambda probe: probe - 1)

    def scores(self, run: Callable[[], torch.Tensor], chosen: ChosenTokens) -> torch.Tensor | None:
        """(2, chosen) loss and winner of each; None for a model that has to give logits."""
        if self._fits is False:
            return None

        def instead(hidden: torch.Tensor) -> torch.Tensor:
            return score_head(hidden, self._layer.weight, self._layer.bias, chosen.labels)

        return self._run(run, instead, chosen, lambda probe: probe.new_empty((2, 0)))

    def _run(
        self,
        run: Callable[[], torch.Tensor],
        instead: _Instead,
        chosen: ChosenTokens,
        of_nothing: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor | None:
        """of_nothing   what a probe is turned into: no token was chosen (`_forward`)"""
        with self._replaced(instead, chosen):
            try:
                result = run()
            except IndexError:
                if self._fits is not None:
                    raise
                # The model takes apart what it calls its logits.
                self._fits = False
                return None
            given = self._given
        if self._fits is not None:
            return result
        if given is not None and not bool(torch.isfinite(given).all()):
            # It equals nothing, itself included: another batch will tell.
            return result
        # The same on every rank: it follows from the model's code.
        self._fits = given is not None and torch.equal(result.detach(), given)
        if not self._fits:
            return None
        return result if len(chosen.labels) else of_nothing(result)

    @contextlib.contextmanager
    def _replaced(self, instead: _Instead, chosen: ChosenTokens) -> Iterator[None]:
        self._instead, self._chosen = instead, chosen
        try:
            yield
        finally:
            self._instead = self._chosen = self._given = None

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        chosen = self._chosen
        if self._instead is None or chosen is None or len(flat) != chosen.num_tokens:
            logits: torch.Tensor = self._plain(hidden)
            return logits
        result = self._instead(flat[chosen.positions])
        if self._fits is None:
            if not len(chosen.labels):
                # The loss of nothing is 0, which stays 0 whatever a model does to it.
                result = result.sum() + 1
            self._given = result.detach().clone()
        return result


def _dtype(weight: torch.Tensor) -> torch.dtype:
    """Of products with that weight, here and now."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
