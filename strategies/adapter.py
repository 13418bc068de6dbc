"""An adapter's folder in peft's layout: which files it has, what adapter_config.json says.

Neither peft nor a framework is needed to read it; its weights are `checkpoint.adapter_weights`'.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.options import ModelOptions

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# config.json of what base and adapter make together. Under that name a library would look for the
# model's weights in the adapter's folder.
MODEL_CONFIG = "model_config.json"

_MAX_CONFIG_BYTES = 16 << 20
# Each makes something else of a module than W + scale·B·A, or changes the base.
_UNKNOWN_VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
# First values of A and B that are taken out of the base's weights.
_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga", "mica")
_NAME = re.compile(r"[\w.\-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """What matters of adapter_config.json.

    base            the model that it was trained on, as its maker named it
    fan_in_fan_out  some matrices have a row for each input (GPT-2's Conv1D)
    ranks, alphas   of modules whose names end so, where they differ from r and alpha
    whole           ends of names of the modules that it holds whole
    task            as peft calls it: "CAUSAL_LM"
    """

    base: str | None
    revision: str | None
    r: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    ranks: Mapping[str, float]
    alphas: Mapping[str, float]
    whole: tuple[str, ...]
    task: str | None

    def rank_of(self, module: str) -> int:
        return int(_of(self.ranks, module, self.r))

    def scale_of(self, module: str) -> float:
        """What B·A of a module is multiplied by."""
        rank = self.rank_of(module)
        divisor = math.sqrt(rank) if self.use_rslora else rank
        return float(_of(self.alphas, module, self.alpha)) / divisor


def _of(patterns: Mapping[str, float], module: str, otherwise: float) -> float:
    for end, value in patterns.items():
        if module == end or module.endswith(f".{end}"):
            return value
    return otherwise


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter rather than a model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def _expanded(name: str) -> Path:
    """The home of nobody stays as it is written: it is not there."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def adapter_folder(options: ModelOptions) -> Path | None:
    """The folder, where what is named is a local adapter."""
    folder = _expanded(str(options.name_or_path))
    try:
        return folder if is_adapter(folder) else None
    except OSError:
        return None


def base_options(options: ModelOptions) -> ModelOptions:
    """The model below a local adapter; a model's own options as they are. UserError: it has none."""
    folder = adapter_folder(options)
    if folder is None:
        return options
    config = read_adapter_config(folder / ADAPTER_CONFIG)
    if config.base is None:
        raise UserError(
            f"the adapter {folder} does not say which model it belongs to (base_model_name_or_path in "
            f"{ADAPTER_CONFIG}). Merge it: ftlaunch merge --adapter {folder} BASE TARGET."
        )
    base = _expanded(config.base)
    if config.base.startswith(("/", "./", "../", "~")) and not base.is_dir():
        raise UserError(
            f"the adapter {folder} belongs to the model {config.base}, which is not here. Put it there, or "
            f"merge the adapter into a copy: ftlaunch merge --adapter {folder} BASE TARGET."
        )
    return replace(options, name_or_path=config.base, revision=config.revision)


def with_tokenizer(options: ModelOptions) -> ModelOptions:
    """Where the tokenizer of a local adapter is; a model's own options as they are.

    With the adapter where its files say its class, which otherwise follows from the base's config.json.
    """
    folder = adapter_folder(options)
    if folder is None:
        return options
    try:
        said = json.loads((folder / "tokenizer_config.json").read_bytes())
        own = bool(said["tokenizer_class"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        own = False
    return options if own else base_options(options)


def read_adapter_config(path: Path) -> AdapterConfig:
    """UserError when it cannot be read, or is of a kind that is not understood."""
    try:
        with open(path, "rb") as file:
            raw = json.loads(file.read(_MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}). Copy the adapter anew.") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds no JSON object. Copy the adapter anew.")
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{path}: peft_type is {kind!r}; only 'LORA' is understood here.")
    strange = [name for name in _UNKNOWN_VARIANTS if raw.get(name)]
    if strange:
        raise UserError(
            f"{path}: {strange[0]} is {_short(raw[strange[0]])}, which is not understood here. Merge this "
            "adapter with peft's own merge_and_unload."
        )
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        raise UserError(
            f"{path}: init_lora_weights is {start!r}, which changes the base's weights before training: "
            "what the adapter is added to is not the base as it is. Merge it with peft's own "
            "merge_and_unload."
        )
    return AdapterConfig(
        base=_text(raw, "base_model_name_or_path", path),
        revision=_text(raw, "revision", path),
        r=_rank(raw.get("r"), "r", path),
        alpha=_number(raw.get("lora_alpha"), "lora_alpha", path),
        use_rslora=raw.get("use_rslora") is True,
        use_dora=raw.get("use_dora") is True,
        fan_in_fan_out=raw.get("fan_in_fan_out") is True,
        ranks={
            name: _rank(value, f"rank_pattern.{name}", path)
            for name, value in _pattern(raw, "rank_pattern", path).items()
        },
        alphas={
            name: _number(value, f"alpha_pattern.{name}", path)
            for name, value in _pattern(raw, "alpha_pattern", path).items()
        },
        whole=_names(raw.get("modules_to_save"), "modules_to_save", path),
        task=_text(raw, "task_type", path),
    )


def _text(raw: Mapping[str, Any], key: str, path: Path) -> str | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{path}: {key} is {_short(value)}: it must be a text. Correct it.")
    return value or None


def _rank(value: Any, key: str, path: Path) -> int:
    if type(value) is not int or value <= 0:
        raise UserError(f"{path}: {key} is {_short(value)}: it must be a whole number above 0.")
    return value


def _number(value: Any, key: str, path: Path) -> float:
    try:
        found = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise UserError(f"{path}: {key} is {_short(value)}: it must be a number.")
    return found


def _names(value: Any, key: str, path: Path) -> tuple[str, ...]:
    names = value or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"{path}: {key} is {_short(value)}: it must be a list of modules' names. Correct it."
        )
    return tuple(names)


def _pattern(raw: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: {key} is {_short(value)}: it must be an object.")
    for name in value:
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{path}: {key} has {_short(name)}: only ends of modules' names are understood here, no "
                "patterns. Merge this adapter with peft's own merge_and_unload."
            )
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
