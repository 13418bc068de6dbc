"""A finished adapter put into a torch model that is built: what is evaluated is the merged model."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.adapter import ADAPTER_CONFIG, read_adapter_config
from ftlaunch.strategies.checkpoint.adapted_config import tied
from ftlaunch.strategies.checkpoint.adapter_weights import Fitted, fit_adapter, read_adapter_weights
from ftlaunch.strategies.checkpoint.low_rank import Rows, changed_rows, read_floats
from ftlaunch.strategies.checkpoint.model_files import ModelShapes
from ftlaunch.strategies.checkpoint.run_reader import RunReader


def put_adapter_in(model: Any, folder: Path, missing: Collection[str]) -> None:
    """Change the model's parameters as the adapter says; those become fp32.

    missing   parameters that the base's files do not have: the adapter has to
    UserError when the adapter does not fit the model.
    """
    parameters = dict(model.named_parameters())
    fitted = fit_adapter(
        read_adapter_weights(folder),
        read_adapter_config(folder / ADAPTER_CONFIG),
        ModelShapes({name: tuple(p.shape) for name, p in parameters.items()}),
        adapter=str(folder),
        base=str(model.config.name_or_path),
    )
    lacking = sorted(set(missing) - fitted.replaced.keys())
    if lacking:
        raise UserError(
            f"neither the adapter {folder} nor its base has {', '.join(lacking)}: there is no trained "
            "head. Evaluate an adapter that was trained for this task."
        )
    _untie(model, fitted, str(folder))
    parameters = dict(model.named_parameters())
    with torch.no_grad(), RunReader() as reader:
        for name, weight in fitted.replaced.items():
            parameter = parameters.get(name)
            if parameter is None or tuple(parameter.shape) != weight.shape:
                found = None if parameter is None else tuple(parameter.shape)
                raise UserError(
                    f"the adapter {folder} does not fit its base: {name} has shape {weight.shape}, in the "
                    f"model {found}. Pass an adapter of a model of this kind."
                )
            parameter.data = torch.from_numpy(read_floats(weight, reader))
        for name, change in fitted.changed.items():
            parameter = parameters[name]
            rows = changed_rows(change, _rows_of(parameter), tuple(parameter.shape), reader)
            parameter.data = torch.from_numpy(np.concatenate(list(rows)))


def _untie(model: Any, fitted: Fitted, adapter: str) -> None:
    """Give the output a matrix of its own where the adapter has one.

    UserError when it changes the input's matrix alone, which the output's is, too.
    """
    words, output = model.get_input_embeddings(), model.get_output_embeddings()
    if output is None or output.weight is not words.weight:
        return
    names = {
        id(module): f"{name}.weight"
        for name, module in model.named_modules()
        if module is words or module is output
    }
    touched = {*fitted.replaced, *fitted.changed}
    if names[id(output)] in touched:
        output.weight = torch.nn.Parameter(output.weight.detach().clone())
        if names[id(output)].replace(".weight", ".bias") in touched:
            output.bias = torch.nn.Parameter(output.bias.detach().clone())
        model.config.tie_word_embeddings = False
    elif names[id(words)] in touched:
        raise tied(names[id(words)], adapter)


def _rows_of(parameter: torch.Tensor) -> Rows:
    values: NDArray[np.float32] = parameter.detach().float().numpy()
    return lambda first, last: values[first:last]
