"""Forward passes of a torch model: the summed loss of a micro-batch, and logits for evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ftlaunch.strategies.base import Batch, TokenScores
from ftlaunch.strategies.data.tasks import UNSUPERVISED
from ftlaunch.strategies.torch.chunked_loss import score_rows
from ftlaunch.strategies.torch.output_head import OutputHead

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LossSum = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """autocast   precision of the computation; "fp32" leaves it to the weights
    head       gives losses of a large vocabulary without its logits; None to ask for logits
    """

    device: torch.device
    autocast: str
    loss: LossSum
    head: OutputHead | None = None

    def loss_sum(self, model: Any, batch: Batch) -> torch.Tensor:
        """The weighted sum over the rows of the micro-batch, fp32."""
        torch.manual_seed(batch.seed)
        labels = torch.from_numpy(batch.labels).to(self.device, non_blocking=True)
        weights = torch.from_numpy(batch.weights).to(self.device, non_blocking=True)
        if self.head is not None:
            found = self.head.loss_sum(lambda: self.logits(model, batch), labels, weights)
            if found is not None:
                return found
            torch.manual_seed(batch.seed)
        return self.loss(self.logits(model, batch), labels, weights)

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        inputs: dict[str, Any] = {
            name: torch.from_numpy(values).to(self.device, non_blocking=True)
            for name, values in batch.inputs.items()
        }
        if "position_ids" in inputs:
            # Borders of samples are looked for only where there is no cache to be filled.
            inputs["use_cache"] = False
        with self._precision():
            logits: torch.Tensor = model(**inputs).logits
        return logits

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        if self.autocast == "fp32":
            yield
            return
        with torch.autocast(self.device.type, dtype=DTYPES[self.autocast]):
            yield

    def predict(self, model: Any, batch: Batch) -> NDArray[np.float32]:
        """Logits of the rows, (rows, outputs)."""
        self.set_training(model, False)
        with torch.no_grad():
            logits = self.logits(model, batch)
        return logits.float().cpu().numpy()

    def score(self, model: Any, batch: Batch) -> TokenScores:
        """Loss and winner of each token that has a label."""
        self.set_training(model, False)
        labels = torch.from_numpy(batch.labels).to(self.device)
        chosen = (labels.flatten() != UNSUPERVISED).nonzero().squeeze(1)
        found: torch.Tensor | None = None
        with torch.no_grad():
            if self.head is not None:
                found = self.head.scores(lambda: self.logits(model, batch), labels, chosen)
            if found is None:
                logits = self.logits(model, batch).flatten(0, 1)
                found = score_rows(logits[chosen], labels.flatten()[chosen])
        scores = torch.zeros((2, labels.numel()), dtype=torch.float32, device=self.device)
        scores[:, chosen] = found
        losses, winners = scores.view(2, *labels.shape).cpu().numpy()
        return TokenScores(losses=losses, winners=winners.astype(np.int64))

    @staticmethod
    def set_training(model: Any, training: bool) -> None:
        if model.training != training:
            model.train(training)
