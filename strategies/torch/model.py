"""The torch model of a job: read from a folder or the hub, its missing weights drawn from the seed."""

from __future__ import annotations

import copy
import fnmatch
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.dynamic_module_utils import custom_object_save

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.base import StrategyRequest
from ftlaunch.strategies.model_config import POSITIONS_AFTER_PADDING
from ftlaunch.strategies.options import ModelOptions
from ftlaunch.strategies.safetensors_file import FileDamaged, read_places
from ftlaunch.strategies.weights import RANDOM_WEIGHT_FAMILIES, draw_weight


def load_model(request: StrategyRequest, *, keep_file_dtype: bool = False) -> Any:
    """The model in fp32 on the CPU, identical on every rank. UserError when it cannot be had.

    keep_file_dtype   where all weight files have one dtype the parameters keep it, and are views of
                      the mapped files
    """
    # Each rank would draw its own bar and its own table of missing weights.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options = request.options.model
    config = _load_config(request)
    _check_tokenizer_fits(config, request)
    seed = request.options.train.seed
    if options.random_weights:
        model = _random_model(config, options, seed)
    else:
        dtype = _file_dtype(options) if keep_file_dtype else torch.float32
        model = _pretrained_model(config, options, seed, dtype, trained_head=request.trained_head)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    freeze(model, options.freeze)
    return model


def _load_config(request: StrategyRequest) -> Any:
    options = request.options.model
    labels = list(request.label_names)
    arguments: dict[str, Any] = {"num_labels": request.num_outputs}
    if labels:
        arguments["id2label"] = dict(enumerate(labels))
        arguments["label2id"] = {label: i for i, label in enumerate(labels)}
    if options.attn_implementation is not None:
        arguments["attn_implementation"] = options.attn_implementation
    try:
        config = AutoConfig.from_pretrained(
            options.name_or_path,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            **arguments,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _cannot_load(options, error) from error
    config.problem_type = (
        "single_label_classification" if request.loss == "cross_entropy" else "regression"
    )
    if config.model_type not in POSITIONS_AFTER_PADDING:
        # Heads of decoder models look for the last token that is not padding: ours.
        config.pad_token_id = request.pad_token_id
    if options.dropout is not None:
        set_dropout(config, options.dropout)
    return config


def set_dropout(config: Any, probability: float) -> None:
    """Set every dropout probability that the configuration has."""
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("pdrop")) and (
            isinstance(value, float | int) or value is None
        ):
            setattr(config, name, probability)


def _check_tokenizer_fits(config: Any, request: StrategyRequest) -> None:
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is not None and request.max_token_id >= vocabulary:
        raise UserError(
            f"the tokenizer does not fit the model: it makes token {request.max_token_id}, and "
            f"{request.options.model.name_or_path} has a vocabulary of {vocabulary}. "
            "Set model.tokenizer to the tokenizer that the model was trained with."
        )


def _pretrained_model(
    config: Any,
    options: ModelOptions,
    seed: int,
    dtype: torch.dtype,
    *,
    trained_head: bool,
) -> Any:
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
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
        raise _cannot_load(options, error) from error
    # Entries of mismatched_keys are names, or tuples that begin with the name.
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    missing = set(info["missing_keys"]) | mismatched
    prefix = f"{model.base_model_prefix}."
    base = [name for name, _ in model.named_parameters() if name.startswith(prefix)]
    lost = sorted(missing.intersection(base))
    if base and len(lost) > len(base) // 2:
        raise UserError(
            f"the weights in {options.name_or_path} are not this model's: {len(lost)} of "
            f"{len(base)} weights below the head are missing, such as {lost[0]}. "
            "Pass a folder whose config.json and model.safetensors belong together."
        )
    if trained_head and missing:
        raise UserError(
            f"the model in {options.name_or_path} has no trained head: {', '.join(sorted(missing))} "
            "are missing from its weights. Evaluate a model that was fine-tuned for this task."
        )
    for name, parameter in model.named_parameters():
        if name in missing:
            parameter.data = parameter.data.float()
    draw_parameters(model, missing, seed=seed, initializer_range=_initializer_range(config))
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()
    return model


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


def _random_model(config: Any, options: ModelOptions, seed: int) -> Any:
    if config.model_type not in RANDOM_WEIGHT_FAMILIES:
        raise UserError(
            f"model.random_weights cannot be used with a {config.model_type!r} model: its "
            f"initialisation is only known for {', '.join(RANDOM_WEIGHT_FAMILIES)}. "
            "Pass a model with weights."
        )
    model = AutoModelForSequenceClassification.from_config(
        config, trust_remote_code=options.trust_remote_code
    ).float()
    names = {name for name, _ in model.named_parameters()}
    draw_parameters(model, names, seed=seed, initializer_range=_initializer_range(config))
    return model


def _initializer_range(config: Any) -> float:
    return float(getattr(config, "initializer_range", None) or 0.02)


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
    """Take the parameters that match any pattern out of training.

    A pattern is "base_model" (everything below the head), a prefix by dots, or a glob.
    UserError when one matches nothing, or when nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen: set[str] = set()
    for pattern in patterns:
        prefix = str(model.base_model_prefix) if pattern == "base_model" else pattern
        matched = {
            name
            for name in names
            if name == prefix or name.startswith(f"{prefix}.") or fnmatch.fnmatchcase(name, prefix)
        }
        if not matched:
            parts = sorted({".".join(name.split(".")[:2]) for name in names})
            raise UserError(
                f"model.freeze: no parameter matches {pattern!r}. A pattern is 'base_model', the "
                f"beginning of a name, or a glob. The model has: {', '.join(parts)}."
            )
        frozen |= matched
    if len(frozen) == len(names):
        raise UserError(
            f"model.freeze {list(patterns)} freezes every parameter: nothing is left to train. "
            "Leave the head out of it."
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)


def aliases_of(model: Any) -> dict[str, str]:
    """Names in the state dict of weights that have another name among the parameters → that name."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        name: first[id(value)]
        for name, value in model.state_dict(keep_vars=True).items()
        if first.get(id(value), name) != name
    }


def model_files(model: Any) -> dict[str, bytes]:
    """config.json and, where the model has them, its generation settings and its own code."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = torch.float32
    with tempfile.TemporaryDirectory(prefix="ftlaunch-") as folder:
        if model._auto_class is not None:
            custom_object_save(model, folder, config=config)
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def _cannot_load(options: ModelOptions, error: Exception) -> UserError:
    name = str(options.name_or_path)
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if Path(name).is_dir():
        found = ", ".join(sorted(f.name for f in Path(name).iterdir())[:12]) or "nothing"
        return UserError(
            f"the model in {name} cannot be loaded: {reason} The folder must hold config.json and "
            f"model.safetensors (or shards with an index); it holds {found}."
        )
    return UserError(
        f"the model {name!r} is neither a folder here nor could it be had from the hub: {reason} "
        "Check the name, or pass the path of a folder with config.json and model.safetensors."
    )
