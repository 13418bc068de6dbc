"""What is known of a model before anything runs: its tensors, its longest row. Reads config.json alone.

From a folder, a file or the hub's cache; it asks nobody, and loads neither a framework nor weights.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ftlaunch.cluster.errors import UserError
from ftlaunch.launcher.config import RunConfig
from ftlaunch.strategies.data.task_names import check_task
from ftlaunch.strategies.memory import encoders
from ftlaunch.strategies.memory.architecture import Architecture, TensorSpec, read_architecture
from ftlaunch.strategies.memory.settings import MAX_SIZE
from ftlaunch.strategies.model_config import (
    DEFAULT_MAX_LENGTH,
    check_max_length,
    labels_of,
    looks_local,
    max_length_of,
    reads_both_ways,
)
from ftlaunch.strategies.options import LoraOptions, ModelOptions

_MAX_BYTES = 16 << 20
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HEADS = {"text-classification": "sequence-classification"}
# A family's code that comes with the model may compute anything.
_OWN_CODE = "code of its own"
# What families call it, of which a file need not say all.
_DROPOUTS = (
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "dropout",
    "embd_pdrop",
    "hidden_dropout_prob",
    "resid_pdrop",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobMemory:
    """What a plan needs to know of a model for its memory.

    architecture   None where config.json cannot be had, or cannot be understood
    why_not        why it is None, in words
    length         tokens of the longest row that there can be
    limit          tokens of the longest row that the model takes; None where nothing is known of that
    is_trained     whether a parameter is, by its name; None: all are
    family         as `model_config.family_of` has it, also of what the hub's cache has
    """

    architecture: Architecture | None
    why_not: str = ""
    length: int = DEFAULT_MAX_LENGTH
    limit: int | None = None
    is_trained: Callable[[str], bool] | None = None
    family: str | None = None


def read_job_memory(config: RunConfig, *, why_not: str = "") -> JobMemory:
    """UserError for rows longer than the model takes, and for an encoder that is to learn causal-lm; any
    other trouble with config.json is `why_not`.

    why_not   what is said where it cannot be read, in place of that
    """
    check_task(config.task)
    if config.is_demo:
        from ftlaunch.strategies.data.demo import demo_model_config

        return _known(config, demo_model_config())
    try:
        content = read_config_json(config.model)
    except UserError as error:
        return JobMemory(architecture=None, why_not=why_not or str(error))
    # Before anything else is asked of the file: whatever family it is, this cannot run.
    check_max_length(config.data.max_length, max_length_of(content))
    _check_reads_forward(config, content)
    try:
        return _known(config, content)
    except UserError as error:
        return JobMemory(architecture=None, why_not=str(error))


def _check_reads_forward(config: RunConfig, content: Mapping[str, Any]) -> None:
    """UserError for what the ranks would refuse when they load the model."""
    family = content.get("model_type")
    own_code = config.model.trust_remote_code and "auto_map" in content
    if config.task != "causal-lm" or own_code or content.get("is_decoder"):
        return
    if isinstance(family, str) and family in encoders.FAMILIES:
        raise reads_both_ways(config.model, family)


def read_config_json(options: ModelOptions) -> dict[str, Any]:
    """The model's configuration: of a folder, of a JSON file, of the hub's cache. UserError."""
    name = str(options.name_or_path)
    if looks_local(name):
        path = Path(name).expanduser()
        path = path / "config.json" if path.is_dir() else path
    else:
        cached = cached_config(name, options.revision)
        if cached is None:
            raise UserError(
                f"config.json of the model {name!r} is not in the hub's cache here, and a plan asks no "
                "network. Pass the path of a config.json to ftlaunch plan, or of a folder that has one; a "
                "run takes the model's folder or its name, and fetches the file first unless HF_HUB_OFFLINE "
                "is set."
            )
        path = cached
    try:
        with open(path, "rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}. Pass a folder with config.json, or such a file."
        ) from None
    if len(raw) > _MAX_BYTES:
        raise UserError(f"{path} has more than {_MAX_BYTES:,} bytes: it is no model configuration.")
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}). Pass a config.json.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a model configuration: it holds no JSON object.")
    return content


def cached_config(name: str, revision: str | None) -> Path | None:
    """Where the hub's library keeps it. Its own function for that takes ten times as long to import."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}")
    commit = revision or "main"
    if not _HUB_NAME.fullmatch(name):
        return None
    with contextlib.suppress(OSError, ValueError):
        commit = (folder / "refs" / commit).read_text().strip()
    # A name that is too long, or a cache that is not for this user to look into.
    with contextlib.suppress(OSError, ValueError):
        path = folder / "snapshots" / commit / "config.json"
        if path.is_file():
            return path
    return None


def _known(config: RunConfig, content: Mapping[str, Any]) -> JobMemory:
    limit = max_length_of(dict(content))
    length = config.data.max_length or min(DEFAULT_MAX_LENGTH, limit or DEFAULT_MAX_LENGTH)
    # Of a model without a single position that can be used, and of a length that is no number of tokens.
    length = min(max(1, length), MAX_SIZE)
    if config.model.dropout is not None:
        content = _with_dropout(content, config.model.dropout)
    if config.model.trust_remote_code and "auto_map" in content:
        content = {**content, "model_type": _OWN_CODE}
    architecture = read_architecture(
        content,
        head=_HEADS.get(config.task, config.task),
        num_outputs=_num_outputs(content),
    )
    is_trained = without_frozen(architecture, config.model.freeze)
    if config.lora.r is not None:
        architecture, is_trained = with_adapter(architecture, config.lora)
    family = content.get("model_type")
    return JobMemory(
        architecture=architecture,
        length=length,
        limit=limit,
        is_trained=is_trained,
        family=family if isinstance(family, str) and not config.model.trust_remote_code else None,
    )


def _num_outputs(content: Mapping[str, Any]) -> int:
    """As the file says; two labels where it does not: the data are not looked at."""
    names = content.get("id2label")
    is_one = content.get("problem_type") == "regression" or (
        isinstance(names, dict) and len(names) == 1
    )
    return 1 if is_one else len(labels_of(dict(content))) or 2


def _with_dropout(content: Mapping[str, Any], dropout: float) -> dict[str, Any]:
    """As `strategies.pretrained` sets it: every probability of dropout, in the file or not."""
    names = [name for name in content if "dropout" in name or name.endswith("pdrop")]
    return {**content, **dict.fromkeys([*_DROPOUTS, *names], dropout)}


def without_frozen(
    architecture: Architecture, patterns: tuple[str, ...]
) -> Callable[[str], bool] | None:
    """Patterns as `model.freeze` has them; one that matches nothing is told of when the model is there."""
    if not patterns:
        return None
    base = architecture.layer_prefix.partition(".")[0]
    prefixes = [base if pattern == "base_model" else pattern for pattern in patterns]
    return lambda name: (
        not any(
            name == prefix or name.startswith(f"{prefix}.") or fnmatchcase(name, prefix)
            for prefix in prefixes
        )
    )


def with_adapter(
    architecture: Architecture, options: LoraOptions
) -> tuple[Architecture, Callable[[str], bool]]:
    """The two matrices of rank r of each linear layer below the head, which alone are trained with it."""
    rank = min(options.r or 0, MAX_SIZE)
    base = f"{architecture.layer_prefix.partition('.')[0]}."
    ends = None if options.target_modules == ("all-linear",) else options.target_modules
    added = []
    for tensor in architecture.tensors:
        module, _, kind = tensor.name.rpartition(".")
        wanted = ends is None or any(module == end or module.endswith(f".{end}") for end in ends)
        is_layer = tensor.name.startswith(architecture.layer_prefix)
        if kind != "weight" or len(tensor.shape) != 2 or not is_layer or not wanted:
            continue
        outputs, inputs = tensor.shape
        added.append(TensorSpec(name=f"{module}.lora_A.weight", shape=(rank, inputs)))
        added.append(TensorSpec(name=f"{module}.lora_B.weight", shape=(outputs, rank)))
    is_classifier = architecture.head in ("sequence-classification", "token-classification")

    def is_trained(name: str) -> bool:
        if ".lora_" in name:
            return True
        module = name.rpartition(".")[0]
        saved = any(module == e or module.endswith(f".{e}") for e in options.modules_to_save)
        return saved or (is_classifier and not name.startswith(base))

    return replace(architecture, tensors=(*architecture.tensors, *added)), is_trained
