"""Attention with dropout on a CPU: written out, with masks from two random bytes an element.

torch has no fused kernel for it there. Its own way draws a float for every place, which takes as long
as the products. Only transformers' "sdpa" is replaced, and of that only what wins; all else goes on to
the function that was there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

# Of shorter rows there is little to be had.
_SHORTEST = 48
_NUMBERS = 1 << 16
# Arguments that change what is computed, or that torch's attention refuses.
_OTHERS = ("position_bias", "softcap", "cache")
_Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


def use_byte_dropout() -> None:
    """From now on, in this process. Does nothing where transformers has no such interface."""
    try:
        from transformers import AttentionInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
    except ImportError:
        return
    AttentionInterface.register("sdpa", _instead_of(sdpa_attention_forward))


def _instead_of(plain: _Attention) -> _Attention:
    def forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """query, key, value (rows, heads, length, width); a mask that is True, or 0, where to look."""
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        threshold = round(dropout * _NUMBERS)
        if (
            not 0 < threshold < _NUMBERS
            or query.device.type != "cpu"
            or query.shape[-2] < _SHORTEST
            or query.shape[1] != key.shape[1]
            or (attention_mask is None and causal)
            or any(others.get(name) is not None for name in _OTHERS)
        ):
            return plain(
                module,
                query,
                key,
                value,
                attention_mask,
                dropout=dropout,
                scaling=scaling,
                is_causal=is_causal,
                **others,
            )
        width = query.shape[-1] ** -0.5 if scaling is None else scaling
        if torch.is_autocast_enabled("cpu"):
            # As it does for the kernel: rotated queries and keys may be in fp32 beside values in bf16.
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        # Autocast would give the weights in fp32. The kernel computes them so, and rounds once.
        with torch.autocast("cpu", enabled=False):
            scores = torch.matmul(query * width, key.transpose(-1, -2))
            if attention_mask is not None:
                scores = _masked(scores, attention_mask)
            weights: torch.Tensor = ByteDropout.apply(  # type: ignore[no-untyped-call]
                torch.softmax(scores, -1), threshold
            )
            return torch.matmul(weights, value).transpose(1, 2).contiguous(), None

    return forward


def _masked(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    # Not minus infinity, which the least number of a wider dtype becomes as well: a row that may look
    # nowhere is to be a number.
    least = torch.finfo(scores.dtype).min
    if mask.dtype != torch.bool:
        return scores + mask.to(scores.dtype).clamp(min=least)
    return scores.masked_fill(~mask, least)


class ByteDropout(torch.autograd.Function):
    """Dropout at a rate of `threshold` / 65,536, which is within 1e-5 of the one asked for; what is kept
    is scaled by what that rate, not the one asked for, makes of the mean.
    """

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, threshold: int) -> torch.Tensor:
        # From torch's generator: so it follows from the micro-batch's seed, and is drawn again where
        # activations are computed again.
        seed = int(torch.empty((), dtype=torch.int64).random_())
        generator = np.random.Generator(np.random.SFC64(seed))
        count = values.numel()
        numbers = generator.integers(0, 1 << 64, size=-(-count // 4), dtype=np.uint64)
        drawn = torch.from_numpy(numbers.view(np.int16)[:count]).view(values.shape)
        kept = drawn >= threshold - _NUMBERS // 2
        ctx.save_for_backward(kept)
        ctx.factor = _NUMBERS / (_NUMBERS - threshold)
        return (values * kept).mul_(ctx.factor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (kept,) = ctx.saved_tensors
        return (gradients[0] * kept).mul_(ctx.factor), None
