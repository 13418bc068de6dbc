"""A low-rank adapter of peft's in a model that is built: where, with which first values, what it is saved as.

The frozen model below it is no part of a checkpoint. Knows neither strategies nor ranks: it runs
before parameters are split, and every rank draws the same numbers.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.pytorch_utils import Conv1D

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.adapter import ADAPTER_CONFIG, MODEL_CONFIG
from ftlaunch.strategies.options import LoraOptions, ModelOptions

_ALL = "all-linear"
_SHOWN_NAMES = 40
# peft's names of tasks, by the ends of transformers' names of classes.
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
}


def add_lora(
    model: Any, options: LoraOptions, base: ModelOptions, *, missing: Collection[str], seed: int
) -> None:
    """Put an adapter into the model and freeze all but it, the head and `options.modules_to_save`.

    missing   parameters that no file of the base provides: they are trained and saved, too
    UserError when peft is not installed, or when the model has no such modules.
    """
    peft = _import_peft()
    whole = _trained_modules(model, missing, options.modules_to_save)
    targets = _targets(model, options.target_modules, whole)
    has_conv = any(isinstance(module, Conv1D) for module in targets.values())
    config = peft.LoraConfig(
        r=options.r,
        lora_alpha=options.alpha if options.alpha is not None else options.r,
        lora_dropout=options.dropout,
        target_modules=list(targets),
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        fan_in_fan_out=has_conv,
        # The values are drawn below.
        init_lora_weights=True,
    )
    training = model.training
    peft.inject_adapter_in_model(config, model)
    model.train(training)
    _draw(model, seed)
    trained = tuple(f"{name}." for name in whole)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_of_adapter(name) or name.startswith(trained))
    # What is written of it. peft overwrites this at each module with what that one is.
    config.fan_in_fan_out = has_conv
    # Names in full: the shorter ones might mean more in another model.
    config.target_modules = sorted(targets)
    config.modules_to_save = sorted(whole) or None
    config.base_model_name_or_path = str(base.name_or_path)
    config.revision = base.revision
    config.inference_mode = True
    config.task_type = next(
        (task for end, task in _TASKS.items() if type(model).__name__.endswith(end)), None
    )
    model.ftlaunch_adapter = config


def has_adapter(model: Any) -> bool:
    return getattr(model, "ftlaunch_adapter", None) is not None


def is_of_adapter(name: str) -> bool:
    """Whether a parameter belongs to the adapter's own."""
    return ".lora_" in name


def adapter_files(model: Any, files: dict[str, bytes]) -> dict[str, bytes]:
    """What an adapter's folder has beside its weights, of what the whole model's would have."""
    with tempfile.TemporaryDirectory(prefix="ftlaunch-") as folder:
        model.ftlaunch_adapter.save_pretrained(folder)
        found = {ADAPTER_CONFIG: (Path(folder) / ADAPTER_CONFIG).read_bytes()}
    return {MODEL_CONFIG: files["config.json"], **found}


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError(
            f"lora.r is set, but peft cannot be imported ({error}): it makes the adapter. Install it: "
            "pip install 'ftlaunch[lora]'."
        ) from None
    return peft


# -- which modules ------------------------------------------------------------------------------


def _trained_modules(model: Any, missing: Collection[str], wanted: Collection[str]) -> set[str]:
    """Names of the modules that are trained whole: the head, what no file provides, what is asked for."""
    prefix = f"{model.base_model_prefix}."
    names = [name for name, _ in model.named_parameters()]
    found: set[str] = set()
    if model.get_output_embeddings() is None:
        # A head of a task. A language model's is as pretrained as what is below it.
        found |= {name.partition(".")[0] for name in names if not name.startswith(prefix)}
    modules = dict(model.named_modules())
    for name in missing:
        owner = name.rpartition(".")[0]
        if any(owner == each or owner.startswith(f"{each}.") for each in found):
            continue
        if owner not in modules or next(modules[owner].children(), None) is not None:
            raise UserError(
                f"no file of the model has {name}, which an adapter cannot hold. Pass a model whose "
                "weights are complete, or leave lora out."
            )
        found.add(owner)
    for end in wanted:
        matched = {name for name in modules if _ends(name, end)}
        if not matched:
            raise UserError(
                f"lora.modules_to_save: no module is called {end!r}. The model has: "
                f"{_listed({name.rpartition('.')[2] for name in modules if name})}."
            )
        found |= matched
    found = {n for n in found if not any(n.startswith(f"{other}.") for other in found)}
    _check_not_shared(model, found)
    return found


def _check_not_shared(model: Any, found: set[str]) -> None:
    """Training a copy would take apart what the model ties together."""
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = owners.setdefault(id(parameter), name)
        for module in found:
            if first != name and (name.startswith(f"{module}.") or first.startswith(f"{module}.")):
                raise UserError(
                    f"lora.modules_to_save has {module}, whose weight is the same as another's ({first} "
                    f"and {name}): it cannot be trained by itself. Leave it out."
                )


def _targets(model: Any, wanted: Collection[str], whole: Collection[str]) -> dict[str, Any]:
    """Modules that get an adapter, by name. UserError when a name means none of them."""
    output = model.get_output_embeddings()
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and not any(name == each or name.startswith(f"{each}.") for each in whole)
    }
    if tuple(wanted) == (_ALL,):
        found = {name: module for name, module in linear.items() if module is not output}
        if not found:
            raise UserError("lora.target_modules is all-linear, but the model has no such modules.")
        return found
    found = {}
    for end in wanted:
        matched = {name: module for name, module in linear.items() if _ends(name, end)}
        if not matched:
            trained = any(_ends(name, end) for name in whole)
            why = " It is trained whole, with the head." if trained else ""
            raise UserError(
                f"lora.target_modules: no linear module is called {end!r}.{why} The model has: "
                f"{_listed({name.rpartition('.')[2] for name in linear})}. Several are named with commas "
                "between them; all-linear means all of them."
            )
        found |= matched
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, module in found.items():
        others = owners[id(module.weight)]
        if len(others) > 1:
            raise UserError(
                f"lora.target_modules has {name}, whose weight is the same as another's "
                f"({' and '.join(others)}): an adapter of one would change both. Leave it out."
            )
    return found


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _listed(names: Collection[str]) -> str:
    shown = sorted(name for name in names if not name.isdecimal())
    more = f" and {len(shown) - _SHOWN_NAMES} more" if len(shown) > _SHOWN_NAMES else ""
    return ", ".join(shown[:_SHOWN_NAMES]) + more


# -- first values -------------------------------------------------------------------------------


def _draw(model: Any, seed: int) -> None:
    """Overwrite peft's first values: A as peft draws it, but from the seed and its name; B zero.

    With these the model computes what its base does. All fp32, whatever the dtype of the base.
    """
    with torch.no_grad():
        for name, module in model.named_modules():
            if not hasattr(module, "lora_A") or "default" not in module.lora_A:
                continue
            down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
            values = draw_down(f"{name}.lora_A", tuple(down.shape), seed=seed)
            down.data = torch.from_numpy(values)
            up.data = torch.zeros(up.shape, dtype=torch.float32)
            if "default" in module.lora_magnitude_vector:
                weight = module.get_base_layer().weight.detach()
                lengths = weight.double().norm(
                    dim=0 if isinstance(module.get_base_layer(), Conv1D) else 1
                )
                module.lora_magnitude_vector["default"].weight.data = lengths.float()


def draw_down(name: str, shape: tuple[int, ...], *, seed: int) -> NDArray[np.float32]:
    """First value of A, (rank, inputs): uniform up to 1/√inputs, which is He's with a = √5.

    Depends on the name, the shape and the seed alone.
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype="<u8")))
    values: NDArray[np.float32] = generator.random(shape, dtype=np.float32)
    values -= np.float32(0.5)
    values *= np.float32(2 / math.sqrt(shape[1]))
    return values
