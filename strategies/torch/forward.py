"""Forward passes of a torch model: the summed loss of a micro-batch, and logits for evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.base import Batch, TokenScores
from ftlaunch.strategies.data.tasks import UNSUPERVISED
from ftlaunch.strategies.torch.chunked_loss import score_rows
from ftlaunch.strategies.torch.losses import LossSum
from ftlaunch.strategies.torch.output_head import ChosenTokens, OutputHead

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """autocast   precision of the computation; "fp32" leaves it to the weights
    head       gives losses of a large vocabulary without its logits; None to ask for logits
    """

    device: torch.device
    autocast: str
    loss: LossSum
    head: OutputHead | None = None
    # By the model's id, which lives as long as its strategy. None gets modules once it is trained.
    _modules: dict[int, tuple[torch.nn.Module, ...]] = field(default_factory=dict)

    def loss_sum(self, model: Any, batch: Batch) -> torch.Tensor:
        """The weighted sum over the rows of the micro-batch, fp32."""
        self._seed(batch.seed)
        if not batch.is_of_tokens:
            logits = self.logits(model, batch)
            return self.loss(logits, self.moved(batch.labels), self._moved_weights(batch.weights))
        chosen, weights = self._choose(batch, batch.weights != 0)
        if self.head is not None:
            if self.head.is_unknown:
                self.set_training(model, False)
                self.head.fits(lambda: self.logits(model, batch), chosen)
                self.set_training(model, True)
                self._seed(batch.seed)
            if self.head.fits(lambda: self.logits(model, batch), chosen):
                return self.head.loss_sum(lambda: self.logits(model, batch), chosen, weights)
        logits = self.logits(model, batch).flatten(0, 1)
        return self.loss(logits[chosen.positions], chosen.labels, weights)

    def _seed(self, seed: int) -> None:
        """The generators that dropout draws from: the same numbers as after `torch.manual_seed`.

        That function seeds every kind of device. For one that was never used it notes a traceback of
        the caller instead, which takes longer than collating the micro-batch.
        """
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _choose(
        self, batch: Batch, which: NDArray[np.bool_]
    ) -> tuple[ChosenTokens, torch.Tensor | None]:
        """The tokens of `which`, (rows, length), and their weights, None where all are 1. Chosen here:
        a device that has to say how many there are makes everyone wait.
        """
        positions = np.flatnonzero(which)
        chosen = ChosenTokens(
            positions=self.moved(positions),
            labels=self.moved(batch.labels.reshape(-1)[positions]),
            num_tokens=batch.labels.size,
        )
        return chosen, self._moved_weights(batch.weights.reshape(-1)[positions])

    def _moved_weights(self, weights: NDArray[np.float32]) -> torch.Tensor | None:
        """None where all are 1: the losses need not be multiplied."""
        return None if (weights == 1).all() else self.moved(weights)

    def moved(self, values: NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        if self.device.type == "cpu":
            return tensor
        # From pinned memory the copy runs beside us; from any other nothing is asynchronous.
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        inputs: dict[str, Any] = {name: self.moved(values) for name, values in batch.inputs.items()}
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

    def check_borders(self, model: Any) -> None:
        """UserError for a model in which samples that share a row see each other. Collective.

        Models that do not look for positions that begin anew attend across them without a word.
        """
        ids = torch.tensor([[1] * 4 + [1, 2] * 2, [2] * 4 + [1, 2] * 2], device=self.device)
        positions = torch.arange(4, device=self.device).repeat(2).expand(2, 8).contiguous()
        self.set_training(model, False)
        with torch.no_grad(), self._precision():
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        one, other = logits[:, 4:].float()
        # The second halves are equal. Nothing but rounding may tell one from the other.
        allowed = 1e-3 if logits.dtype == torch.float32 else 1e-2
        if (one - other).abs().max() > allowed * one.abs().max():
            raise UserError(
                "data.packing is samples, and in this model the samples of a row see each other: it does "
                "not look for positions that begin anew. Set data.packing to none (or concatenate, for "
                "plain texts), or model.attn_implementation to sdpa or eager if it is another one."
            )

    def predict(self, model: Any, batch: Batch) -> NDArray[np.float32]:
        """Logits of the rows, (rows, outputs)."""
        self.set_training(model, False)
        with torch.no_grad():
            logits = self.logits(model, batch)
        return logits.float().cpu().numpy()

    def score(self, model: Any, batch: Batch) -> TokenScores:
        """Loss and winner of each token that has a label."""
        self.set_training(model, False)
        real = batch.labels != UNSUPERVISED
        chosen, _ = self._choose(batch, real)
        with torch.no_grad():
            if self.head is not None and self.head.fits(lambda: self.logits(model, batch), chosen):
                found = self.head.scores(lambda: self.logits(model, batch), chosen)
            else:
                logits = self.logits(model, batch).flatten(0, 1)
                found = score_rows(logits[chosen.positions], chosen.labels)
        scores = np.zeros((2, batch.labels.size), dtype=np.float32)
        scores[:, np.flatnonzero(real)] = found.cpu().numpy()
        losses, winners = scores.reshape(2, *batch.labels.shape)
        return TokenScores(losses=losses, winners=winners.astype(np.int64))

    def set_training(self, model: Any, training: bool) -> None:
        """Of every module: what wraps a model need not know what it is set to, as DeepSpeed's engine
        does not, and a pretrained model comes as it is evaluated.
        """
        if any(module.training != training for module in self._modules_of(model)):
            model.train(training)

    def _modules_of(self, model: Any) -> tuple[torch.nn.Module, ...]:
        """Found once: to walk through a model of 12 layers takes as long as to collate a micro-batch."""
        known = self._modules.get(id(model))
        if known is None:
            known = self._modules[id(model)] = tuple(model.modules())
        return known
