"""The manifest of a checkpoint: what it belongs to, how far it got, which files it consists of.

It is written last, by rename: a folder without one is no checkpoint. The tensors themselves and
where each slice lies are in the files' own headers (`store`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ftlaunch.cluster.errors import FtlaunchError, UserError
from ftlaunch.strategies.files import replace_file

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
MODEL_FOLDER = "model"
FOLDER_PREFIX = "step-"


class CheckpointDamaged(FtlaunchError):
    """A checkpoint cannot be used as it is; the one before it may."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"checkpoint {path} is damaged: {reason}")
        self.path = Path(path)
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything of a checkpoint that is not a tensor.

    identity         what makes two jobs the same job (see `identity.job_identity`)
    step             optimizer steps done, skipped ones included: the data cursor
    applied_steps    optimizer steps that changed the weights: the schedule's and AdamW's clock
    files            name → size in bytes of every shard
    best             {"step", "metric", "value", "metrics"} of the best evaluation so far, if there is one
    evaluation       {"step", "metrics"} of the last evaluation
    aliases          other names of weights that several modules share → the name they are under here
    model_files      name → size of what a finished model has beside its weights, in MODEL_FOLDER
    """

    identity: Mapping[str, Any]
    step: int
    applied_steps: int
    epoch: float
    world_size: int
    strategy: str
    precision: str
    loss_scale: Mapping[str, float]
    best: Mapping[str, Any] | None
    evaluation: Mapping[str, Any] | None
    evaluations_without_gain: int
    schedule: Mapping[str, Any]
    files: Mapping[str, int]
    aliases: Mapping[str, str] = field(default_factory=dict)
    model_files: Mapping[str, int] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def holds_adapter(self) -> bool:
        """An adapter alone, without the model below it."""
        return self.identity.get("lora") is not None


def folder_name(step: int) -> str:
    return f"{FOLDER_PREFIX}{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name, None for any other folder."""
    digits = folder.name.removeprefix(FOLDER_PREFIX)
    if folder.name.startswith(FOLDER_PREFIX) and digits.isascii() and digits.isdigit():
        return int(digits)
    return None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_json(folder / MANIFEST_NAME, asdict(manifest))


def read_manifest(folder: Path) -> Manifest:
    """CheckpointDamaged when it is not whole; UserError for another format version."""
    path = folder / MANIFEST_NAME
    try:
        if path.exists() and not path.is_file():
            # Opening a pipe would wait for ever.
            raise CheckpointDamaged(folder, f"{MANIFEST_NAME} is no file")
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointDamaged(folder, f"it has no {MANIFEST_NAME}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointDamaged(folder, f"{MANIFEST_NAME} cannot be read ({error})") from None
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise UserError(
            f"checkpoint {folder} is of format version {version}; this ftlaunch reads and writes "
            f"version {FORMAT_VERSION}. Continue it with the ftlaunch that wrote it, or start anew "
            "in another output folder."
        )
    try:
        manifest = Manifest(**raw)
        _check_types(manifest)
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise CheckpointDamaged(folder, f"{MANIFEST_NAME} is malformed ({error})") from None
    model_files = {f"{MODEL_FOLDER}/{name}": size for name, size in manifest.model_files.items()}
    for name, size in (dict(manifest.files) | model_files).items():
        file = folder / name
        if not file.is_file():
            raise CheckpointDamaged(folder, f"{name} is missing")
        if file.stat().st_size != size:
            raise CheckpointDamaged(
                folder, f"{name} has {file.stat().st_size} bytes where {size} were written"
            )
    return manifest


def _check_types(manifest: Manifest) -> None:
    expected: dict[str, type | tuple[type, ...]] = {
        "identity": dict,
        "step": int,
        "applied_steps": int,
        "epoch": (int, float),
        "world_size": int,
        "strategy": str,
        "precision": str,
        "loss_scale": dict,
        "best": (dict, type(None)),
        "evaluation": (dict, type(None)),
        "evaluations_without_gain": int,
        "schedule": dict,
        "files": dict,
        "aliases": dict,
        "model_files": dict,
    }
    for name, kind in expected.items():
        value = getattr(manifest, name)
        if not isinstance(value, kind) or (kind is int and not _is_count(value)):
            raise ValueError(f"{name} is {value!r}")
    for evaluation in (manifest.best, manifest.evaluation):
        if evaluation is not None:
            _check_evaluation(evaluation)
    if manifest.best is not None:
        float(manifest.best["value"])
        str(manifest.best["metric"])
    scale = {"scale", "applied_in_a_row", "enabled"}
    if not (
        set(manifest.loss_scale) == scale and all(map(_is_number, manifest.loss_scale.values()))
    ):
        raise ValueError(f"loss_scale is {manifest.loss_scale!r}")
    if not all(isinstance(name, str) for name in manifest.aliases.values()):
        raise ValueError(f"aliases is {manifest.aliases!r}")
    for name in (*manifest.files, *manifest.model_files):
        # A manifest is untrusted: a name must not lead out of the folder.
        if Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"file name {name!r}")
    if any(".safetensors" in name for name in manifest.model_files):
        raise ValueError("model_files names weights")
    if "adapter_config.json" in manifest.model_files and not manifest.holds_adapter:
        # With it in the folder, from_pretrained would load the model that it names.
        raise ValueError("model_files names adapter_config.json")
    if manifest.holds_adapter and "config.json" in manifest.model_files:
        raise ValueError("model_files names config.json, which an adapter does not have")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _check_evaluation(evaluation: Mapping[str, Any]) -> None:
    metrics = evaluation["metrics"]
    whole = _is_count(evaluation["step"]) and isinstance(metrics, dict)
    if not whole or not all(map(_is_number, metrics.values())):
        raise ValueError(f"evaluation is {evaluation!r}")


def _is_number(value: object) -> bool:
    """OverflowError for one that no float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    float(value)
    return True


def write_json(path: Path, content: Any) -> None:
    """The name holds all of it or what was there before."""
    with replace_file(path) as file:
        text = json.dumps(content, indent=2, ensure_ascii=False)
        # A lone surrogate (a file name that is no UTF-8) becomes its escape, which reads back the same.
        file.write(text.encode(errors="backslashreplace") + b"\n")
