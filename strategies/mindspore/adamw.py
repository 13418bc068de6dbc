"""AdamW as torch computes it, by MindSpore's fused kernel, which is on NPUs, GPUs and CPUs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import ops

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW:
    """Moments of the trained parameters, by name, in fp32.

    The kernel AdamWeightDecay has no bias correction. With c1 = 1 − β1^t and c2 = 1 − β2^t torch's
    step is  w −= lr·λ·w + lr/c1 · m / (√(v/c2) + ε),  which is the kernel's
    w −= lr'·(m / (√v + ε') + λ'·w)  for  lr' = lr·√c2/c1,  ε' = ε·√c2,  λ' = λ·c1/√c2.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, Any]],
        *,
        beta1: float,
        beta2: float,
        epsilon: float,
        weight_decay: float,
    ) -> None:
        self._named = list(named)
        self._betas = (beta1, beta2)
        self._epsilon = epsilon
        self._weight_decay = weight_decay
        self._kernel = ops.AdamWeightDecay()
        self.steps = 0
        self.moments: dict[str, Mapping[str, Any]] = {}

    def step(self, gradients: Sequence[Any], learning_rate: float) -> None:
        """Gradients in the order of the parameters, unscaled and clipped."""
        self.steps += 1
        beta1, beta2 = self._betas
        correction1 = 1.0 - beta1**self.steps
        correction2 = math.sqrt(1.0 - beta2**self.steps)
        rate = ms.Tensor(learning_rate * correction2 / correction1, ms.float32)
        epsilon = ms.Tensor(self._epsilon * correction2, ms.float32)
        decay = ms.Tensor(self._weight_decay * correction1 / correction2, ms.float32)
        none = ms.Tensor(0.0, ms.float32)
        first, second = ms.Tensor(beta1, ms.float32), ms.Tensor(beta2, ms.float32)
        for (name, parameter), gradient in zip(self._named, gradients, strict=True):
            moments = self.moments_of(name, parameter)
            # Biases and norm weights are vectors; everything that decays is a matrix or more.
            decays = decay if parameter.ndim >= 2 else none
            self._kernel(
                parameter,
                moments["exp_avg"],
                moments["exp_avg_sq"],
                rate,
                first,
                second,
                epsilon,
                decays,
                gradient,
            )

    def moments_of(self, name: str, parameter: Any) -> Mapping[str, Any]:
        """Those of one parameter; zeros at first."""
        if name not in self.moments:
            shape = tuple(parameter.shape)
            self.moments[name] = {
                moment: ms.Parameter(np.zeros(shape, dtype=np.float32), name=f"{moment}.{name}")
                for moment in MOMENTS
            }
        return self.moments[name]
