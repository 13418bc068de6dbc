"""The MindSpore model of a job, with the names and the weights that it has in torch."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindone.transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    modeling_utils,
)
from mindone.transformers.generation import GenerationMixin
from mindspore import mint, nn, ops
from numpy.typing import NDArray

from ftlaunch.strategies.base import StrategyRequest
from ftlaunch.strategies.mindspore_models import check_family
from ftlaunch.strategies.options import ModelOptions
from ftlaunch.strategies.pretrained import (
    be_quiet,
    cannot_load,
    check_missing,
    check_random_weights,
    frozen_names,
    initializer_range,
    load_config,
)
from ftlaunch.strategies.pretrained_weights import missing_names, stored_weights
from ftlaunch.strategies.weights import draw_weight

# What the cells of mindspore.nn call their parameters → what torch calls them.
_NORM = {"gamma": "weight", "beta": "bias"}
_BATCH_NORM = {**_NORM, "moving_mean": "running_mean", "moving_variance": "running_var"}
_CELL_NAMES: tuple[tuple[type, Mapping[str, str]], ...] = (
    (nn.Embedding, {"embedding_table": "weight"}),
    (nn.LayerNorm, _NORM),
    (nn.GroupNorm, _NORM),
    (nn.BatchNorm1d, _BATCH_NORM),
    (nn.BatchNorm2d, _BATCH_NORM),
)


# Families whose weight that head and embeddings share goes by the head's name in torch.
_HEAD_FIRST = ("camembert", "xlm-roberta")
_HEADS: dict[str, Any] = {
    "sequence-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "causal-lm": AutoModelForCausalLM,
    "masked-lm": AutoModelForMaskedLM,
}
_FLOATS = (ms.float32, ms.float16, ms.bfloat16, ms.float64)


class NamedModel:
    """A model and its parameters under the names that torch has for them.

    parameters   name → Parameter, each once, in the order of the cells
    aliases      further names of parameters that several cells share → the name in `parameters`
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.parameters: dict[str, Any] = {}
        self.aliases: dict[str, str] = {}
        first: dict[int, str] = {}
        cells = list(model.cells_and_names())
        if model.config.model_type in _HEAD_FIRST:
            cells.sort(key=lambda named: not named[0].startswith("lm_head"))
        for path, cell in cells:
            known: dict[str, str] = {}
            for kind, names in _CELL_NAMES:
                if isinstance(cell, kind):
                    known.update(names)
            for attribute, parameter in cell._params.items():
                # Position numbers are held as parameters here and there; torch has buffers for them.
                if parameter is None or parameter.dtype not in _FLOATS:
                    continue
                name = ".".join(filter(None, (path, known.get(attribute, attribute))))
                if id(parameter) in first:
                    self.aliases[name] = first[id(parameter)]
                else:
                    first[id(parameter)] = name
                    self.parameters[name] = parameter

    @property
    def base_prefix(self) -> str:
        return str(self.model.base_model_prefix)

    def trained(self) -> list[tuple[str, Any]]:
        return [(n, p) for n, p in self.parameters.items() if p.requires_grad]


def load_model(request: StrategyRequest) -> NamedModel:
    """The model in fp32, identical on every rank. UserError when it cannot be had."""
    be_quiet()
    options = request.options.model
    config = load_config(request)
    named = NamedModel(_build(request.head, config, options))
    weights = {
        n: p for n, p in named.parameters.items() if not n.endswith(("running_mean", "running_var"))
    }
    seed = request.options.train.seed
    if options.random_weights:
        check_random_weights(config)
        missing = set(weights)
    else:
        missing = _load_weights(named, weights, options, trained_head=request.trained_head)
    _draw(named, missing, seed=seed, spread=initializer_range(config))
    frozen = frozen_names(list(weights), options.freeze, named.base_prefix)
    for name, parameter in weights.items():
        parameter.requires_grad = name not in frozen
    return named


def _build(head: str, config: Any, options: ModelOptions) -> Any:
    check_family(head, config.model_type, options)
    # Every weight is set below; what mindone would draw is wasted, and needs kernels that CPUs lack.
    modeling_utils._init_weights = False
    # What config.json says is the files' dtype; the weights that are trained are fp32.
    config.dtype = "float32"
    try:
        model = _HEADS[head].from_config(config)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise cannot_load(options, error) from error
    finally:
        modeling_utils._init_weights = True
    model.tie_weights()
    _use_late_biases(model)
    _hold_padding_still(model)
    return model


def _use_late_biases(model: Any) -> None:
    """Heads of language models are made without a bias and are given one afterwards, which a Dense
    that was made without passes over.
    """
    for _, cell in model.cells_and_names():
        if (
            isinstance(cell, nn.Dense)
            and not cell.has_bias
            and cell._params.get("bias") is not None
        ):
            cell.has_bias, cell.bias_add = True, ops.BiasAdd()


def _hold_padding_still(model: Any) -> None:
    """Give the embedding of padding no gradient, wherever it stands: torch and mint do so, the classic
    cell does not.
    """
    for _, cell in model.cells_and_names():
        if isinstance(cell, nn.Embedding) and cell.padding_idx is not None:
            cell.construct = _with_padding_still(cell.construct, cell.padding_idx)


def _with_padding_still(construct: Any, padding: int) -> Any:
    def look_up(ids: Any) -> Any:
        found = construct(ids)
        return ops.where((ids == padding).expand_dims(-1), ops.stop_gradient(found), found)

    return look_up


def _load_weights(
    named: NamedModel, weights: Mapping[str, Any], options: ModelOptions, *, trained_head: bool
) -> set[str]:
    """Take what the files have; the names of the parameters that they lack."""
    shapes = {name: tuple(parameter.shape) for name, parameter in weights.items()}
    found = stored_weights(options, [*named.parameters, *named.aliases], named.base_prefix)
    for alias, name in named.aliases.items():
        # Of a weight that is shared, files have one name or another.
        if alias in found:
            found.setdefault(name, found[alias])
    missing = missing_names(found, shapes)
    check_missing(missing, shapes, named.base_prefix, options, trained_head=trained_head)
    try:
        for name, parameter in named.parameters.items():
            if name in found and name not in missing:
                set_values(parameter, found[name].read())
    except (OSError, ValueError) as error:
        raise cannot_load(options, error) from error
    return missing


def set_values(parameter: Any, values: NDArray[Any]) -> None:
    """Overwrite a parameter by values of its shape."""
    parameter.set_data(ms.Tensor(np.ascontiguousarray(values), parameter.dtype))


def _draw(named: NamedModel, missing: set[str], *, seed: int, spread: float) -> None:
    """Give the missing parameters their first values. Padding embeddings are zero."""
    for name in missing:
        parameter = named.parameters[name]
        shape = tuple(parameter.shape)
        set_values(parameter, draw_weight(name, shape, seed=seed, initializer_range=spread))
    for path, cell in named.model.cells_and_names():
        padding = getattr(cell, "padding_idx", None)
        if isinstance(cell, nn.Embedding | mint.nn.Embedding) and padding is not None:
            name = f"{path}.weight"
            if name in missing:
                values = named.parameters[name].asnumpy().copy()
                values[padding] = 0.0
                set_values(named.parameters[name], values)


def model_files(model: Any) -> dict[str, bytes]:
    """config.json and, where the model has them, its generation settings."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = "float32"
    with tempfile.TemporaryDirectory(prefix="ftlaunch-") as folder:
        config.save_pretrained(folder)
        if isinstance(model, GenerationMixin):
            model.generation_config.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
