"""The torch model of a job: read from a folder or the hub, its missing weights drawn from the seed."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ftlaunch.strategies.adapter import adapter_folder, base_options
from ftlaunch.strategies.base import StrategyRequest
from ftlaunch.strategies.model_config import reads_both_ways
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
from ftlaunch.strategies.safetensors_file import FileDamaged, read_places
from ftlaunch.strategies.torch.adapted import put_adapter_in
from ftlaunch.strategies.torch.lora import adapter_files, add_lora, has_adapter
from ftlaunch.strategies.weights import draw_weight

_HEADS: dict[str, Any] = {
    "sequence-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "causal-lm": AutoModelForCausalLM,
    "masked-lm": AutoModelForMaskedLM,
}


def load_model(request: StrategyRequest, *, keep_file_dtype: bool = False) -> Any:
    """The model in fp32 on the CPU, identical on every rank. UserError when it cannot be had.

    keep_file_dtype   where all weight files have one dtype the parameters keep it, and are views of
                      the mapped files
    """
    be_quiet()
    adapter = adapter_folder(request.options.model)
    options = base_options(request.options.model)
    config = load_config(request)
    if request.head == "causal-lm":
        _check_reads_forward(config, options)
    seed = request.options.train.seed
    missing: set[str] = set()
    if options.random_weights:
        model = _random_model(_HEADS[request.head], config, options, seed)
    else:
        dtype = _file_dtype(options) if keep_file_dtype else torch.float32
        model, missing = _pretrained_model(
            _HEADS[request.head],
            config,
            options,
            seed,
            dtype,
            trained_head=request.trained_head and adapter is None,
        )
    if adapter is not None:
        put_adapter_in(model, adapter, missing)
    _forgo_cache(model)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    freeze(model, options.freeze)
    lora = request.options.lora
    if lora.r is not None and not request.trained_head:
        add_lora(model, lora, options, missing=missing, seed=seed)
    return model


def _forgo_cache(model: Any) -> None:
    """A decoder would keep the keys and values of every layer for tokens that nobody generates."""
    model.ftlaunch_use_cache = getattr(model.config, "use_cache", None)
    if model.ftlaunch_use_cache:
        model.config.use_cache = False


def _check_reads_forward(config: Any, options: ModelOptions) -> None:
    """UserError for a model whose attention sees the very tokens that it would have to predict."""
    is_encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if is_encoder and not getattr(config, "is_decoder", False):
        raise reads_both_ways(options, config.model_type)


def _pretrained_model(
    head: Any,
    config: Any,
    options: ModelOptions,
    seed: int,
    dtype: torch.dtype,
    *,
    trained_head: bool,
) -> tuple[Any, set[str]]:
    """(the model, names of the parameters that no file provides, which are drawn)."""
    try:
        model, info = head.from_pretrained(
            options.name_or_path,
            config=config,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            dtype=dtype,
            # A head trained for other labels is not an error: it is drawn anew, like a missing one.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise cannot_load(options, error) from error
    # Entries of mismatched_keys are names, or tuples that begin with the name.
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    missing = set(info["missing_keys"]) | mismatched
    names = [name for name, _ in model.named_parameters()]
    check_missing(missing, names, model.base_model_prefix, options, trained_head=trained_head)
    for name, parameter in model.named_parameters():
        if name in missing:
            parameter.data = parameter.data.float()
    draw_parameters(model, missing, seed=seed, initializer_range=initializer_range(config))
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()
    return model, missing


def _file_dtype(options: ModelOptions) -> torch.dtype:
    """Of the floating-point weights, by the headers of their files; fp32 where they are not all of one.

    What config.json says of it need not be true.
    """
    name = str(options.name_or_path)
    patterns = ["model*.safetensors", "model.safetensors.index.json"]
    found: set[str] = set()
    try:
        if not Path(name).is_dir():
            name = snapshot_download(name, revision=options.revision, allow_patterns=patterns)
        for path in Path(name).glob(patterns[0]):
            found.update(place.dtype for place in read_places(path).values())
    except (OSError, ValueError, FileDamaged):
        return torch.float32  # what is wrong is told by whoever loads it
    known = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    floats = [name for name in found if name in known or name in ("F64", "F8_E4M3", "F8_E5M2")]
    return known.get(floats[0], torch.float32) if len(floats) == 1 else torch.float32


def _random_model(head: Any, config: Any, options: ModelOptions, seed: int) -> Any:
    check_random_weights(config)
    try:
        model = head.from_config(config, trust_remote_code=options.trust_remote_code).float()
    except ValueError as error:
        raise cannot_load(options, error) from error
    names = {name for name, _ in model.named_parameters()}
    draw_parameters(model, names, seed=seed, initializer_range=initializer_range(config))
    return model


def draw_parameters(
    model: torch.nn.Module, names: set[str], *, seed: int, initializer_range: float
) -> None:
    """Overwrite the named parameters with `draw_weight`. Padding embeddings stay zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                values = draw_weight(
                    name, tuple(parameter.shape), seed=seed, initializer_range=initializer_range
                )
                parameter.copy_(torch.from_numpy(values))
        for name, module in model.named_modules():
            is_embedding = isinstance(module, torch.nn.Embedding)
            if is_embedding and module.padding_idx is not None and f"{name}.weight" in names:
                module.weight[module.padding_idx] = 0.0


def freeze(model: torch.nn.Module, patterns: tuple[str, ...]) -> None:
    """Take the parameters that match any pattern out of training. UserError: `frozen_names`."""
    names = [name for name, _ in model.named_parameters()]
    frozen = frozen_names(names, patterns, str(model.base_model_prefix))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)


def aliases_of(model: Any) -> dict[str, str]:
    """Names in the state dict of weights that have another name among the parameters → that name.

    Of a model with an adapter none: what is saved of it is not shared.
    """
    if has_adapter(model):
        return {}
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        name: first[id(value)]
        for name, value in model.state_dict(keep_vars=True).items()
        if first.get(id(value), name) != name
    }


def model_files(model: Any) -> dict[str, bytes]:
    """config.json and, where the model has them, its generation settings and its own code.

    Of a model with an adapter: what the adapter's folder has.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = torch.float32
    if getattr(model, "ftlaunch_use_cache", None):
        config.use_cache = True
    with tempfile.TemporaryDirectory(prefix="ftlaunch-") as folder:
        if model._auto_class is not None:
            custom_object_save(model, folder, config=config)
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
    return adapter_files(model, files) if has_adapter(model) else files
