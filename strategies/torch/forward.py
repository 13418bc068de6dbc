"""Forward passes of a torch model: the summed loss of a micro-batch, and logits for evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ftlaunch.strategies.base import Batch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LossSum = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """autocast   precision of the computation; "fp32" leaves it to the weights"""

    device: torch.device
    autocast: str
    loss: LossSum

    def loss_sum(self, model: Any, batch: Batch) -> torch.Tensor:
        """The weighted sum over the rows of the micro-batch, fp32."""
        torch.manual_seed(batch.seed)
        logits = self.logits(model, batch)
        labels = torch.from_numpy(batch.labels).to(self.device, non_blocking=True)
        weights = torch.from_numpy(batch.weights).to(self.device, non_blocking=True)
        return self.loss(logits, labels, weights)

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        inputs = {
            name: torch.from_numpy(values).to(self.device, non_blocking=True)
            for name, values in batch.inputs.items()
        }
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

    @staticmethod
    def set_training(model: Any, training: bool) -> None:
        """Of every module: what wraps a model need not know what it is set to, as DeepSpeed's engine
        does not, and a pretrained model comes as it is evaluated.
        """
        if any(module.training != training for module in model.modules()):
            model.train(training)
