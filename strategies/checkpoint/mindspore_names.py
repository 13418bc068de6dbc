"""Which entries of a MindSpore checkpoint are a model's weights, and what Hugging Face calls them.

A checkpoint has names and shapes, but does not say of which cell a tensor is. Nothing is told by a
name alone: a Dense may be called `gamma`, a module `accum`. What surrounds an entry decides, and
where the model is known, its names and shapes do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.checkpoint.model_files import ModelShapes
from ftlaunch.strategies.checkpoint.weights import Weight

Shape = tuple[int, ...]

# An optimizer calls its state for the parameter X `PREFIX.X`: Adam and its kin, LAMB, mint's SGD;
# gradients that are accumulated.
_STATE = re.compile(
    r"adam_[mv]|moment[12]|vhat|exp_avg|(max_)?exp_avg_sq|lamb_[mv]|momentum_buf"
    r"|accum_grad|accu_grads|grad_accumulated_"
)
# Words that a module may be called, too: of momentum and SGD, AdaGrad, RMSProp; copies in fp32, moving
# averages, and the parts that mindone's ZeRO-1 and 2 make of whole parameters.
_WORD = re.compile(r"moments?|accum(_update)?|stat|mean_(grad|square)|master|ema|swap|wrapper")
# Of optimizers, loss scalers, train steps, and what callbacks append; one number each.
_NUMBER = re.compile(
    r"(global|state|afactor|accum)_step|step_t|beta[12]_power|momentum|lr|scale_(value|sense)|counter"
    r"|(current|last_overflow)_iterator_step|cur_step(_num)?|(epoch|step|batch)_num|loss_scale"
)
# One number, or one for each step.
_RATE = re.compile(r"learning_rate(_group_\d+)?")
_NORM = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
_AFFINE = {"gamma", "beta"}
_RENAMED = {**_NORM, "embedding_table": "weight"}
_SHOWN = 3


def optimizer_state(shapes: Mapping[str, Shape], known: ModelShapes) -> dict[str, str]:
    """Entries that are no weights → what they are, such as "adam_m" or "global_step".

    shapes  of all entries
    known   of the model, where it is at hand; what it has is a weight
    A moment is one only where what it belongs to is there, in a shape that fits.
    """
    found: dict[str, str] = {}
    words: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        prefix, _, rest = name.partition(".")
        if rest and _WORD.fullmatch(prefix):
            words.setdefault(prefix, []).append(name)
        if name in known.exact:
            continue
        if _is_number(name, shape):
            found[name] = name
        elif _STATE.fullmatch(prefix) and _is_of(shape, shapes.get(rest)):
            found[name] = prefix
    for word, names in words.items():
        # All or nothing: a module of this name has an entry that is not called like another.
        if all(
            n not in known.exact and _is_of(shapes[n], shapes.get(n[len(word) + 1 :]))
            for n in names
        ):
            found |= dict.fromkeys(names, word)
    return found


def _is_number(name: str, shape: Shape) -> bool:
    if _RATE.fullmatch(name):
        return len(shape) <= 1
    return _NUMBER.fullmatch(name) is not None and math.prod(shape) == 1


def _is_of(state: Shape, weight: Shape | None) -> bool:
    """Whether it has the shape of state of such a weight: the same, one rank's part, or one number."""
    if weight is None:
        return False
    return state == weight or math.prod(state) <= 1 or parts_of(state, weight) is not None


def parts_of(state: Shape, weight: Shape) -> int | None:
    """How many such parts along axis 0 a weight consists of; None when it does not."""
    if not state or len(state) != len(weight) or state[1:] != weight[1:] or not state[0]:
        return None
    return None if weight[0] % state[0] else weight[0] // state[0]


def hugging_face_names(
    weights: Sequence[Weight], known: ModelShapes
) -> tuple[tuple[Weight, ...], int]:
    """(the weights as torch has them, how many have changed); the bytes stay.

    UserError when two would have one name.
    """
    norms = _norms(weights)
    found: dict[str, Weight] = {}
    origin: dict[str, str] = {}
    for weight in weights:
        named = _as_known(weight, known) or _by_structure(weight, norms)
        if named.name in found:
            raise UserError(
                f"{origin[named.name]!r} and {weight.name!r} would both be called {named.name!r} in "
                "the model. Pass --model with the folder of the model that was trained, whose "
                "weights say which names it has."
            )
        found[named.name], origin[named.name] = named, weight.name
    changed = sum(name != origin[name] for name in found)
    return tuple(found.values()), changed


def _norms(weights: Sequence[Weight]) -> set[str]:
    """Prefixes of what can only be a normalization: gamma and beta of one size, and nothing strange."""
    cells: dict[str, dict[str, Shape]] = {}
    for weight in weights:
        prefix, _, leaf = weight.name.rpartition(".")
        cells.setdefault(prefix, {})[leaf] = weight.shape
    return {
        prefix
        for prefix, leaves in cells.items()
        if leaves.keys() in (_AFFINE, _NORM.keys())
        and len(set(leaves.values())) == 1
        and len(leaves["gamma"]) == 1
    }


def _by_structure(weight: Weight, norms: set[str]) -> Weight:
    prefix, dot, leaf = weight.name.rpartition(".")
    is_embedding = leaf == "embedding_table" and len(weight.shape) == 2
    if is_embedding or (prefix in norms and leaf in _NORM):
        return replace(weight, name=f"{prefix}{dot}{_RENAMED[leaf]}")
    return weight


def _as_known(weight: Weight, known: ModelShapes) -> Weight | None:
    """Under the name and in the shape that the model has; None when it has none of them."""
    if not known:
        return None
    candidates = tuple(_candidates(weight))
    for name, shape in candidates:
        if known.exact.get(name) == shape:
            return replace(weight, name=name, shape=shape)
    for name, shape in candidates:
        if known.shape(name) == shape:
            return replace(weight, name=name, shape=shape)
    return None


def _candidates(weight: Weight) -> Iterator[tuple[str, Shape]]:
    prefix, dot, leaf = weight.name.rpartition(".")
    yield weight.name, weight.shape
    if leaf in _RENAMED:
        yield f"{prefix}{dot}{_RENAMED[leaf]}", weight.shape
    if is_flat_convolution(weight):
        yield weight.name, (*weight.shape[:-2], weight.shape[-1])


def is_flat_convolution(weight: Weight) -> bool:
    """Whether it can be of a Conv1d, whose weight has an axis of size 1 in MindSpore that torch has not."""
    return weight.name.endswith("weight") and len(weight.shape) == 4 and weight.shape[-2] == 1


def shown(names: Sequence[str]) -> str:
    """The first few, for a message."""
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(repr(name) for name in names[:_SHOWN]) + more
