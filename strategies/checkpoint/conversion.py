"""Tensor bytes from one floating-point dtype to another, by numpy, a piece at a time.

numpy has no bfloat16: its values are handled as the upper halves of fp32. What is no floating-point
number stays as it is.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

SaveDtype = Literal["fp32", "bf16", "fp16"]
SAVE_DTYPES: dict[str, str] = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
# As config.json names them.
TORCH_NAMES: dict[str, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def target_dtype(source: str, save: SaveDtype | None) -> str:
    """What a tensor of dtype `source` is written as; None: as it is."""
    if save is None:
        return source
    return SAVE_DTYPES[save] if source in _NUMPY else source


def convert(data: NDArray[np.uint8], source: str, target: str) -> NDArray[np.uint8]:
    """The bytes of `data`, whole elements of dtype `source`, as dtype `target`.

    To a narrower dtype it rounds to the nearest, ties to even; what is too large becomes infinite.
    F64 goes by way of F32, as in torch. The same array comes back when there is nothing to do.
    """
    if source == target:
        return data
    values: NDArray[Any] = data.view(_NUMPY[source])
    if source == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    if target == "BF16":
        with np.errstate(over="ignore", invalid="ignore"):
            single = values.astype(np.float32, copy=False)
        return cast("NDArray[np.uint8]", _upper_halves(single).view(np.uint8))
    with np.errstate(over="ignore", invalid="ignore"):
        if source == "F64" and target == "F16":
            values = values.astype(np.float32)
        return cast("NDArray[np.uint8]", values.astype(_NUMPY[target]).view(np.uint8))


def overflows(data: NDArray[np.uint8], source: str, converted: NDArray[np.uint8]) -> bool:
    """Whether finite values of `data` have become infinite in `converted`, which is F16."""
    found: NDArray[Any] = np.isinf(converted.view(np.float16))
    if not found.any():
        return False
    values: NDArray[Any] = data.view(_NUMPY[source])[found]
    if source == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return bool(np.isfinite(values).any())


def _upper_halves(single: NDArray[np.float32]) -> NDArray[np.uint16]:
    """fp32 to bfloat16: add half of the last place that stays, and one more where that is odd."""
    bits = single.view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    halves: NDArray[np.uint16] = rounded.astype(np.uint16)
    nan = np.isnan(single)
    if nan.any():
        # The sum could carry a NaN over into infinity or zero: its own upper half, made quiet.
        halves[nan] = (bits[nan] >> np.uint32(16)).astype(np.uint16) | np.uint16(0x0040)
    return halves
