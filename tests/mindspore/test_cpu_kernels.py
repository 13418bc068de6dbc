"""The CPU equivalents of operations that MindSpore lacks there: their numbers, and that they give way."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.mindspore.ranks import run_ranks


def _numbers(world):
    """Name → (what the operation gives, its gradient by the first argument or None)."""
    import mindspore as ms
    from mindspore import mint, ops

    from ftlaunch.strategies.mindspore import cpu_kernels

    ms.set_context(mode=ms.PYNATIVE_MODE)
    ms.set_device("CPU")
    replaced = cpu_kernels.replace_missing_kernels()
    again = cpu_kernels.replace_missing_kernels()
    functional = mint.nn.functional
    x = ms.Tensor(np.linspace(-2, 2, 12, dtype=np.float32).reshape(3, 4))
    table = ms.Tensor(np.arange(15, dtype=np.float32).reshape(5, 3))
    ids = ms.Tensor(np.array([[1, 0], [4, 1]]), ms.int64)
    scale = ms.Tensor(np.array([1, 2, 3, 4], dtype=np.float32))
    shift = ms.Tensor(np.array([0, 1, 0, 1], dtype=np.float32))
    weights = ms.Tensor(np.linspace(1, 2, 12, dtype=np.float32).reshape(3, 4))
    found = {}

    def differentiable(name, function, first, weight=None):
        def total(value):
            out = function(value)
            return (out * weight).sum() if weight is not None else out.sum()

        gradient = ms.grad(total)(first)
        found[name] = (function(first).asnumpy().copy(), gradient.asnumpy().copy())

    def plain(name, value):
        found[name] = (value.asnumpy().copy(), None)

    differentiable("embedding", lambda t: functional.embedding(ids, t, 0), table)
    differentiable(
        "layer_norm", lambda v: functional.layer_norm(v, (4,), scale, shift, 1e-5), x, weights
    )
    differentiable("gelu", functional.gelu, x)
    differentiable("log_softmax", lambda v: functional.log_softmax(v, -1), x, weights)
    differentiable("rms_norm", lambda v: ops.rms_norm(v, scale, 1e-6)[0], x, weights)
    differentiable("repeat_interleave", lambda v: mint.repeat_interleave(v, 2, 1), x)
    differentiable("pad", lambda v: functional.pad(v, (1, 2)), x)
    plain("arange", mint.arange(2, 9, 3))
    plain("cumsum", mint.cumsum(ids, 1))
    plain("argmax", mint.argmax(x, -1))
    plain("full", mint.full((2, 3), 7.5))
    plain("one_hot", functional.one_hot(ms.Tensor(np.array([2, 0]), ms.int64), 3))
    plain("clone", x.clone())
    return replaced, again, found


@pytest.fixture(scope="module")
def numbers():
    [result] = run_ranks(1, _numbers)
    return result


def test_what_is_there_by_now_is_left_alone(numbers):
    replaced, again, _ = numbers
    assert replaced
    assert again == ()


def test_the_numbers_are_those_of_the_definitions(numbers):
    found = {name: value for name, (value, _) in numbers[2].items()}
    x = np.linspace(-2, 2, 12).reshape(3, 4)
    scale, shift = np.array([1.0, 2, 3, 4]), np.array([0.0, 1, 0, 1])
    table = np.arange(15.0).reshape(5, 3)
    normed = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    erf = np.vectorize(math.erf)
    expected = {
        "embedding": table[[[1, 0], [4, 1]]],
        "layer_norm": normed * scale + shift,
        "gelu": 0.5 * x * (1 + erf(x / np.sqrt(2))),
        "log_softmax": x - np.log(np.exp(x).sum(1, keepdims=True)),
        "rms_norm": x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6) * scale,
        "repeat_interleave": x.repeat(2, axis=1),
        "pad": np.pad(x, ((0, 0), (1, 2))),
        "arange": np.array([2, 5, 8]),
        "cumsum": np.array([[1, 1], [4, 5]]),
        "argmax": np.array([3, 3, 3]),
        "full": np.full((2, 3), 7.5),
        "one_hot": np.array([[0, 0, 1], [1, 0, 0]]),
        "clone": x,
    }
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=2e-6, err_msg=name)


def test_the_gradients_are_those_of_the_definitions(numbers):
    found = {name: gradient for name, (_, gradient) in numbers[2].items() if gradient is not None}
    x = np.linspace(-2, 2, 12).reshape(3, 4)
    weights = np.linspace(1, 2, 12).reshape(3, 4)
    scale = np.array([1.0, 2, 3, 4])
    erf = np.vectorize(math.erf)

    def numeric(function):
        """Central differences in fp64."""
        gradient = np.zeros_like(x)
        for index in np.ndindex(x.shape):
            step = np.zeros_like(x)
            step[index] = 1e-6
            gradient[index] = (function(x + step) - function(x - step)) / 2e-6
        return gradient

    def norm(v):
        return (v - v.mean(1, keepdims=True)) / np.sqrt(v.var(1, keepdims=True) + 1e-5)

    expected = {
        # Row 1 is looked up twice; row 0 is padding and learns nothing.
        "embedding": np.array([[0.0] * 3, [2.0] * 3, [0.0] * 3, [0.0] * 3, [1.0] * 3]),
        "layer_norm": numeric(lambda v: (norm(v) * scale * weights).sum()),
        "gelu": numeric(lambda v: (0.5 * v * (1 + erf(v / np.sqrt(2)))).sum()),
        "log_softmax": numeric(
            lambda v: ((v - np.log(np.exp(v).sum(1, keepdims=True))) * weights).sum()
        ),
        "rms_norm": numeric(
            lambda v: (v / np.sqrt((v**2).mean(1, keepdims=True) + 1e-6) * scale * weights).sum()
        ),
        "repeat_interleave": np.full_like(x, 2.0),
        "pad": np.ones_like(x),
    }
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
