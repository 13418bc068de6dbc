"""What config.json says of a model, read without a framework. Weights are looked for, not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.adapter import MODEL_CONFIG, adapter_folder, base_options, is_adapter
from ftlaunch.strategies.options import ModelOptions

_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Tokens of a row, where nobody says more and the model takes so many.
DEFAULT_MAX_LENGTH = 512
# Their positions begin after the padding id: that many embeddings are never reached.
POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "longformer")


def looks_local(name: str) -> bool:
    """Whether a name is meant as a path: it exists, or no hub name is written like it."""
    if name.startswith(("/", "./", "../", "~")):
        return True
    try:
        return Path(name).exists()
    except OSError:
        return False


def absolute_path(name: str) -> Path:
    """`name` from here, "~" expanded. UserError for a path that cannot be."""
    try:
        path = Path(name).expanduser().absolute()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"the path {name[:200]} cannot be used: {reason.rstrip('.')}. Correct it."
        ) from None
    return path


def check_model_folder(options: ModelOptions, *, or_adapter: bool = False) -> None:
    """UserError when a local model lacks its configuration or its weights. Hub names pass.

    or_adapter   an adapter's folder will do, with the model that it names
    """
    name = str(options.name_or_path)
    if not looks_local(name):
        return
    folder = Path(name).expanduser()
    if not folder.exists():
        raise UserError(
            f"the model folder {name} does not exist. Pass a folder with config.json and "
            "model.safetensors, or the name of a model on the hub."
        )
    if not folder.is_dir():
        raise UserError(
            f"the model {name} is a file; --model takes the folder that holds config.json and "
            "model.safetensors."
        )
    if is_adapter(folder):
        if not or_adapter:
            raise UserError(
                f"the model folder {name} holds an adapter, which is no model by itself. Put it into its "
                f"base: ftlaunch merge --adapter {name} BASE TARGET, and name TARGET."
            )
        check_model_folder(base_options(options))
        return
    if not (folder / "config.json").is_file():
        raise UserError(
            f"the model folder {name} has no config.json, so it is not a model that transformers "
            "can load. Pass the folder that save_pretrained wrote."
        )
    if not options.random_weights and not any((folder / f).is_file() for f in _WEIGHT_FILES):
        raise UserError(
            f"the model folder {name} has no weights: none of {', '.join(_WEIGHT_FILES)} is there. "
            "Pass a folder with weights, or set model.random_weights=true to start from random ones."
        )


def reads_both_ways(options: ModelOptions, family: str) -> UserError:
    """What to answer where a language model is to predict tokens that its attention sees."""
    return UserError(
        f"{options.name_or_path} is a {family!r} model, which reads in both directions: it "
        "would see the tokens that it is to predict. Choose a model that reads from left to right, "
        "such as Qwen2, Llama or GPT-2, for the task causal-lm."
    )


def family_of(options: ModelOptions) -> str | None:
    """What config.json of a local model calls its architecture, if its code is the library's own; never
    asks the hub.
    """
    name = str(options.name_or_path)
    if options.trust_remote_code or not looks_local(name):
        return None
    try:
        config = json.loads((Path(name).expanduser() / "config.json").read_bytes())
        return str(config["model_type"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def model_type_of(options: ModelOptions) -> str | None:
    """The same as the name of transformers' module."""
    model_type = (family_of(options) or "").replace("-", "_")
    return model_type if model_type.isidentifier() else None


def read_model_config(options: ModelOptions) -> dict[str, Any]:
    """config.json of a local folder, or of the hub (from its cache when offline).

    Of a local adapter: what it and its base make together.
    """
    adapter = adapter_folder(options)
    own = adapter is not None and (adapter / MODEL_CONFIG).is_file()
    options = base_options(options)
    name = str(options.name_or_path)
    if adapter is not None and own:
        path = adapter / MODEL_CONFIG
    elif looks_local(name):
        check_model_folder(options)
        path = Path(name).expanduser() / "config.json"
    else:
        path = config_from_hub(name, options.revision)
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({error}). Download the model anew."
        ) from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a model configuration: it holds no JSON object.")
    return config


def config_from_hub(name: str, revision: str | None) -> Path:
    """config.json in the hub's cache, fetched if need be. UserError when it cannot be had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"the model {name!r} is neither a folder here nor could it be had from the hub: "
            f"{why_not_from_hub(error)} "
            "Check the name, or pass the path of a folder with config.json and model.safetensors."
        ) from None


def why_not_from_hub(error: Exception) -> str:
    """What an error of huggingface_hub comes to, as a sentence of some 200 characters at most."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            return (
                "it is not in the local cache, and HF_HUB_OFFLINE keeps the hub from being asked."
            )
        return "it is not in the local cache, and the hub could not be reached."
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]}…"


def labels_of(config: dict[str, Any]) -> tuple[str, ...]:
    """The names of the model's outputs in the order of their ids; () for a regression."""
    names = config.get("id2label")
    if config.get("problem_type") == "regression" or not isinstance(names, dict):
        return ()
    if len(names) == 1:
        return ()  # transformers takes one output for a number
    try:
        return tuple(str(names[key]) for key in sorted(names, key=int))
    except ValueError:
        raise UserError(
            f"config.json maps label ids to names by {list(names)[:5]}, which are not numbers. "
            "Correct its id2label."
        ) from None


def max_length_of(config: dict[str, Any]) -> int | None:
    """The longest row that the model can take, None if it has no limit that we know."""
    limit = config.get("max_position_embeddings") or config.get("n_positions")
    if not isinstance(limit, int) or limit <= 0:
        return None
    if config.get("model_type") in POSITIONS_AFTER_PADDING:
        padding = config.get("pad_token_id")
        return limit - (padding if isinstance(padding, int) else 1) - 1
    return limit


def check_max_length(wanted: int | None, limit: int | None) -> None:
    """UserError for data.max_length above what the model takes (`max_length_of`)."""
    if wanted is not None and limit is not None and wanted > limit:
        raise UserError(
            f"Rows of up to {wanted} tokens do not fit the model: it takes {limit} at most. "
            f"data.max_length must not be above that. Set it to {limit} or less."
        )
