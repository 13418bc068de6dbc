"""CPU equivalents of the MindSpore operations that mindone's models call and that have no CPU kernel.

Each is tried before it is replaced: what a release of MindSpore can do itself is left alone. Only for
CPUs: an NPU has all of them. `REPLACEMENTS` is the list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from mindone.transformers import activations
from mindspore import mint, ops

from ftlaunch.strategies.mindspore.dropout import draw_mask


@dataclass(frozen=True, slots=True)
class Replacement:
    """One operation.

    places     (object, attribute) under which models find it
    call       the operation on a small input, through the first of the places
    function   what takes its place
    """

    name: str
    places: Sequence[tuple[Any, str]]
    call: Callable[[], Any]
    function: Callable[..., Any]


def replace_missing_kernels() -> tuple[str, ...]:
    """Put the equivalents where kernels are missing in this process; the names of the operations."""
    replaced = []
    for each in REPLACEMENTS:
        if not _works(each.call):
            for owner, attribute in each.places:
                setattr(owner, attribute, each.function)
            replaced.append(each.name)
    return tuple(replaced)


def _works(call: Callable[[], Any]) -> bool:
    """Operations run asynchronously: only a value that is looked at tells."""
    try:
        call().asnumpy()
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return False
    return True


# -- the equivalents ------------------------------------------------------------------------


def _embedding(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
) -> Any:
    if max_norm is not None or scale_grad_by_freq:
        raise NotImplementedError("embedding with max_norm or scale_grad_by_freq on a CPU")
    rows = ops.gather(weight, input, 0)
    if padding_idx is None:
        return rows
    # The padding row takes part in the forward pass and gets no gradient.
    real = (input != padding_idx).astype(rows.dtype).expand_dims(-1)
    return rows * real + ops.stop_gradient(rows) * (1 - real)


def _layer_norm(
    input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    weight = ops.ones(shape, input.dtype) if weight is None else weight
    bias = ops.zeros(shape, input.dtype) if bias is None else bias
    norm = ops.LayerNorm(begin_norm_axis=-len(shape), begin_params_axis=-len(shape), epsilon=eps)
    return norm(input, weight, bias)[0]


def _dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if not training or p == 0.0:
        return input
    return input * ms.Tensor(draw_mask(tuple(input.shape), p)).astype(input.dtype)


def _gelu(input: Any, *, approximate: str = "none") -> Any:
    return ops.gelu(input, approximate=approximate)


def _log_softmax(input: Any, dim: int = -1, *, dtype: Any = None) -> Any:
    return ops.log_softmax(input if dtype is None else input.astype(dtype), dim)


def _cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    return ops.cross_entropy(
        input, target.astype(ms.int32), weight, ignore_index, reduction, label_smoothing
    )


def _pad(input: Any, pad: Sequence[int], mode: str = "constant", value: float = 0.0) -> Any:
    return ops.pad(input, tuple(pad), mode=mode, value=value)


def _arange(start: Any = 0, end: Any = None, step: Any = 1, *, dtype: Any = None) -> Any:
    begin, stop = (0, start) if end is None else (start, end)
    values = np.arange(*(v.item() if isinstance(v, ms.Tensor) else v for v in (begin, stop, step)))
    kind = ms.int64 if values.dtype.kind == "i" else ms.float32
    return ms.Tensor(values, dtype if dtype is not None else kind)


def _cumsum(input: Any, dim: int, dtype: Any = None) -> Any:
    # The kernel that there is knows no int64 on every release; ranks of positions fit into 32 bits.
    kind = input.dtype if dtype is None else dtype
    whole = kind in (ms.int64, ms.bool_)
    total = ops.cumsum(input.astype(ms.int32 if whole else kind), dim)
    return total.astype(ms.int64 if whole else kind)


def _argmax(input: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    # The kernel that there is wants floating-point numbers.
    values = input if input.dtype in (ms.float32, ms.float16) else input.astype(ms.float32)
    flat = values.reshape(-1) if dim is None else values
    found = ops.argmax(flat, 0 if dim is None else dim, keepdim)
    return found.astype(ms.int64)


def _repeat_interleave(
    input: Any, repeats: int, dim: int | None = None, *, output_size: int | None = None
) -> Any:
    flat = input.reshape(-1) if dim is None else input
    axis = 0 if dim is None else dim % flat.ndim
    shape = list(flat.shape)
    wide = flat.expand_dims(axis + 1)
    repeated = ops.tile(wide, (1,) * (axis + 1) + (repeats,) + (1,) * (flat.ndim - axis - 1))
    shape[axis] *= repeats
    return repeated.reshape(tuple(shape))


def _full(size: Any, fill_value: Any, *, dtype: Any = None) -> Any:
    value = fill_value.item() if isinstance(fill_value, ms.Tensor) else fill_value
    kind = dtype if dtype is not None else ms.float32
    if dtype is None and isinstance(value, int):
        kind = ms.bool_ if isinstance(value, bool) else ms.int64
    shape = (size,) if isinstance(size, int) else tuple(size)
    return ops.mul(ops.ones(shape, ms.float32), ms.Tensor(value, ms.float32)).astype(kind)


def _clone(tensor: Any) -> Any:
    return tensor.copy()


def _rms_norm(x: Any, gamma: Any, epsilon: float = 1e-6) -> tuple[Any, Any]:
    scale = ops.rsqrt(ops.square(x.astype(ms.float32)).mean(-1, keep_dims=True) + epsilon)
    return (x * scale).astype(x.dtype) * gamma, scale


def _one_hot(tensor: Any, num_classes: int = -1) -> Any:
    classes = int(tensor.max()) + 1 if num_classes < 0 else num_classes
    return (tensor.expand_dims(-1) == ms.Tensor(np.arange(classes), tensor.dtype)).astype(ms.int64)


# -- the cells that call an operation not through a place ----------------------------------------


def _construct_embedding(cell: Any, input: Any) -> Any:
    return _embedding(
        input,
        cell.weight,
        cell.padding_idx,
        cell.max_norm,
        cell.norm_type,
        cell.scale_grad_by_freq,
    )


def _construct_layer_norm(cell: Any, input: Any) -> Any:
    return _layer_norm(input, cell.normalized_shape, cell.weight, cell.bias, cell.eps)


def _construct_gelu(cell: Any, input: Any) -> Any:
    return _gelu(input, approximate=cell.approximate)


# -- the list -------------------------------------------------------------------------------

_F = mint.nn.functional


def _sample(*shape: int, dtype: Any = ms.float32) -> Any:
    return ms.Tensor(np.ones(shape), dtype)


REPLACEMENTS: tuple[Replacement, ...] = (
    Replacement(
        "mint.nn.functional.embedding",
        ((_F, "embedding"),),
        lambda: _F.embedding(_sample(2, dtype=ms.int64), _sample(3, 2)),
        _embedding,
    ),
    Replacement(
        "mint.nn.Embedding",
        ((mint.nn.Embedding, "construct"),),
        lambda: mint.nn.Embedding(3, 2)(_sample(2, dtype=ms.int64)),
        _construct_embedding,
    ),
    Replacement(
        "mint.nn.functional.layer_norm",
        ((_F, "layer_norm"),),
        lambda: _F.layer_norm(_sample(2, 3), (3,), _sample(3), _sample(3)),
        _layer_norm,
    ),
    Replacement(
        "mint.nn.LayerNorm",
        ((mint.nn.LayerNorm, "construct"),),
        lambda: mint.nn.LayerNorm(3)(_sample(2, 3)),
        _construct_layer_norm,
    ),
    Replacement(
        "mint.nn.functional.dropout",
        ((_F, "dropout"),),
        lambda: _F.dropout(_sample(2, 3), 0.5, True),
        _dropout,
    ),
    Replacement(
        "mint.nn.functional.gelu",
        # The second is made of the first when mindone is imported.
        ((_F, "gelu"), (activations.gelu, "act")),
        lambda: _F.gelu(_sample(2, 3)),
        _gelu,
    ),
    Replacement(
        "mint.nn.GELU",
        ((mint.nn.GELU, "construct"),),
        lambda: mint.nn.GELU()(_sample(2, 3)),
        _construct_gelu,
    ),
    Replacement(
        "mint.nn.functional.log_softmax",
        ((_F, "log_softmax"),),
        lambda: _F.log_softmax(_sample(2, 3), -1),
        _log_softmax,
    ),
    Replacement(
        "mint.nn.functional.cross_entropy",
        ((_F, "cross_entropy"),),
        lambda: _F.cross_entropy(_sample(2, 3), _sample(2, dtype=ms.int64)),
        _cross_entropy,
    ),
    Replacement(
        "mint.nn.functional.pad",
        ((_F, "pad"),),
        lambda: _F.pad(_sample(2, 3), (0, 1)),
        _pad,
    ),
    Replacement(
        "mint.nn.functional.one_hot",
        ((_F, "one_hot"),),
        lambda: _F.one_hot(_sample(2, dtype=ms.int64), 3),
        _one_hot,
    ),
    Replacement("mint.arange", ((mint, "arange"),), lambda: mint.arange(3), _arange),
    Replacement(
        "mint.cumsum",
        ((mint, "cumsum"),),
        lambda: mint.cumsum(_sample(2, 3, dtype=ms.int64), 1),
        _cumsum,
    ),
    Replacement(
        "mint.argmax",
        ((mint, "argmax"),),
        lambda: mint.argmax(_sample(2, 3), -1),
        _argmax,
    ),
    Replacement(
        "mint.repeat_interleave",
        ((mint, "repeat_interleave"),),
        lambda: mint.repeat_interleave(_sample(2, 3), 2, 1),
        _repeat_interleave,
    ),
    Replacement("mint.full", ((mint, "full"),), lambda: mint.full((2, 3), 1.0), _full),
    Replacement(
        "Tensor.clone",
        ((ms.Tensor, "clone"),),
        lambda: _sample(2, 3).clone(),
        _clone,
    ),
    Replacement(
        "ops.rms_norm",
        ((ops, "rms_norm"),),
        lambda: ops.rms_norm(_sample(2, 3), _sample(3))[0],
        _rms_norm,
    ),
)
