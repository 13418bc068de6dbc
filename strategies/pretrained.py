"""What a pretrained model's configuration means for a job, and whose weights are missing or frozen.

Knows transformers' configurations and names of parameters; no framework and no tensor.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.adapter import base_options
from ftlaunch.strategies.base import StrategyRequest
from ftlaunch.strategies.model_config import POSITIONS_AFTER_PADDING
from ftlaunch.strategies.options import ModelOptions
from ftlaunch.strategies.weights import RANDOM_WEIGHT_FAMILIES

# What a configuration calls the losses of rows.
_PROBLEM_TYPES = {
    "cross_entropy": "single_label_classification",
    "mse": "regression",
    "binary_cross_entropy": "multi_label_classification",
}


def be_quiet() -> None:
    """Each rank would draw its own bar and its own table of missing weights."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def load_config(request: StrategyRequest) -> Any:
    """The model's configuration with the job's labels and dropout. UserError when it cannot be had."""
    options = base_options(request.options.model)
    labels = list(request.label_names)
    arguments: dict[str, Any] = {"num_labels": request.num_outputs} if request.num_outputs else {}
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
        raise cannot_load(options, error) from error
    _understand_rope(config, options)
    if request.loss in _PROBLEM_TYPES:
        config.problem_type = _PROBLEM_TYPES[request.loss]
    is_for_rows = request.head == "sequence-classification"
    if is_for_rows and config.model_type not in POSITIONS_AFTER_PADDING:
        # Heads of decoder models look for the last token that is not padding: ours.
        config.pad_token_id = request.pad_token_id
    if options.dropout is not None:
        set_dropout(config, options.dropout)
        if request.head == "token-classification":
            # Such heads of decoder models drop 0.1 where their configuration says nothing.
            config.classifier_dropout = options.dropout
    _check_tokenizer_fits(config, request)
    return config


def _understand_rope(config: Any, options: ModelOptions) -> None:
    """Have transformers 4 understand how transformers 5 writes rotary embeddings, which it passes over.

    UserError for a form that it has no place for.
    """
    written = getattr(config, "rope_parameters", None)
    if int(transformers.__version__.partition(".")[0]) >= 5 or not isinstance(written, dict):
        return
    if any(isinstance(value, dict) for value in written.values()):
        raise UserError(
            f"{options.name_or_path} has other rotary embeddings for each kind of layer "
            f"(rope_parameters in config.json), which transformers {transformers.__version__} does "
            "not know. Use an environment with transformers 5."
        )
    settings = dict(written)
    theta = settings.pop("rope_theta", None)
    if theta is not None:
        config.rope_theta = theta
    if settings.get("rope_type", "default") != "default":
        config.rope_scaling = settings
    del config.rope_parameters


def set_dropout(config: Any, probability: float) -> None:
    """Set every dropout probability that the configuration has."""
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("pdrop")) and (
            isinstance(value, float | int) or value is None
        ):
            setattr(config, name, probability)


def initializer_range(config: Any) -> float:
    """Standard deviation of weights that no file provides."""
    return float(getattr(config, "initializer_range", None) or 0.02)


def _check_tokenizer_fits(config: Any, request: StrategyRequest) -> None:
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is not None and request.max_token_id >= vocabulary:
        raise UserError(
            f"the tokenizer does not fit the model: it makes token {request.max_token_id}, and "
            f"{request.options.model.name_or_path} has a vocabulary of {vocabulary}. "
            "Set model.tokenizer to the tokenizer that the model was trained with."
        )


def check_random_weights(config: Any) -> None:
    """UserError for a family whose initialisation is not known."""
    if config.model_type not in RANDOM_WEIGHT_FAMILIES:
        raise UserError(
            f"model.random_weights cannot be used with a {config.model_type!r} model: its "
            f"initialisation is only known for {', '.join(RANDOM_WEIGHT_FAMILIES)}. "
            "Pass a model with weights."
        )


def check_missing(
    missing: Collection[str],
    names: Collection[str],
    base_prefix: str,
    options: ModelOptions,
    *,
    trained_head: bool,
) -> None:
    """UserError when the weight files are another model's, or lack a head that has to be trained.

    missing      parameters that no file provides in the right shape
    names        all parameters
    base_prefix  what the names of everything below the head begin with, without the dot
    """
    base = [name for name in names if name.startswith(f"{base_prefix}.")]
    lost = sorted(set(missing).intersection(base))
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


def frozen_names(names: Sequence[str], patterns: Sequence[str], base_prefix: str) -> set[str]:
    """The parameters that match any pattern.

    A pattern is "base_model" (everything below the head), a prefix by dots, or a glob.
    UserError when one matches nothing, or when nothing is left to train.
    """
    frozen: set[str] = set()
    for pattern in patterns:
        prefix = base_prefix if pattern == "base_model" else pattern
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
    return frozen


def cannot_load(options: ModelOptions, error: Exception) -> UserError:
    """What to tell the user when a library could not load the model."""
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
