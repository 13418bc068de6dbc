"""Tensor bytes in another dtype, against torch and against bits worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ftlaunch.strategies.checkpoint.conversion import convert, overflows, target_dtype

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy()


def every_pattern(dtype: str) -> torch.Tensor:
    """All numbers of 16 bits; of more, a million random bit patterns and the edges of the narrower ones."""
    if dtype in ("F16", "BF16"):
        patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        return patterns.view(TORCH[dtype])
    generator = np.random.default_rng(5)
    edges = [0.0, -0.0, 65504, 65519.99, 65520, 3.3895e38, 3.3961776e38, 1e-45, 1e-40, np.inf]
    numbers = np.concatenate(
        [
            generator.integers(0, 2**32, 1 << 20, dtype=np.uint32).view(np.float32),
            np.array(edges, dtype=np.float32),
        ]
    )
    return torch.from_numpy(numbers).to(TORCH[dtype])


@pytest.mark.parametrize("target", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("source", list(TORCH))
def test_every_number_becomes_what_torch_makes_of_it(source, target):
    values = every_pattern(source)
    expected = values.float().to(TORCH[target])
    found = torch.from_numpy(convert(as_bytes(values), source, target)).view(TORCH[target])
    nan = expected.isnan()
    assert torch.equal(nan, found.isnan())
    # Of a NaN torch itself has several ways, by processor.
    integers = torch.int32 if target == "F32" else torch.int16
    assert torch.equal(found[~nan].view(integers), expected[~nan].view(integers))


def test_rounding_by_hand():
    """1 + 2^-8 lies between 1 and 1 + 2^-7: to the even one; a hair above, up."""
    bits = np.array([0x3F808000, 0x3F808001, 0x3F818000, 0x7F7FFFFF, 0x7F800001], dtype="<u4")
    found = convert(bits.view(np.uint8), "F32", "BF16").view("<u2")
    # The largest fp32 becomes infinite; the NaN stays one, though its upper half alone is infinity.
    assert [hex(each) for each in found] == ["0x3f80", "0x3f81", "0x3f82", "0x7f80", "0x7fc0"]


def test_what_is_no_floating_point_number_stays():
    data = np.arange(16, dtype=np.uint8)
    for dtype in ("I64", "I32", "U8", "BOOL", "U16"):
        assert target_dtype(dtype, "bf16") == dtype
        assert convert(data, dtype, dtype) is data
    assert target_dtype("F64", "fp32") == target_dtype("BF16", "fp32") == "F32"


@pytest.mark.parametrize(
    ("numbers", "lossy"), [([1.0, 65504], False), ([np.inf, np.nan], False), ([1.0, 65520], True)]
)
@pytest.mark.parametrize("source", ["F64", "F32", "BF16"])
def test_numbers_that_become_infinite(source, numbers, lossy):
    if source == "BF16" and numbers[-1] == 65504:
        numbers = [1.0, 65280]  # the next bf16 below
    data = as_bytes(torch.tensor(numbers, dtype=TORCH[source]))
    assert overflows(data, source, convert(data, source, "F16")) == lossy
