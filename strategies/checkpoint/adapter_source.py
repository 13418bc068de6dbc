"""An adapter and its base as one model that can be written: where both lie, which files come along.

Knows peft's folders and our checkpoints of adapters; how tensors fit is `adapter_weights`'.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MODEL_CONFIG,
    AdapterConfig,
    is_adapter,
    read_adapter_config,
)
from ftlaunch.strategies.checkpoint.adapted_config import (
    change_config,
    check_sizes,
    config_changes,
    fit_labels,
)
from ftlaunch.strategies.checkpoint.adapter_weights import (
    fit_adapter,
    merged_weights,
    read_adapter_weights,
    weights_of_file,
)
from ftlaunch.strategies.checkpoint.conversion import SAVE_DTYPES, SaveDtype
from ftlaunch.strategies.checkpoint.model_files import (
    CONFIG_NAME,
    ModelShapes,
    fit_config,
    has_tokenizer,
    is_of_tokenizer,
    model_files,
    read_config,
)
from ftlaunch.strategies.checkpoint.sources import open_source
from ftlaunch.strategies.checkpoint.torch_zip import ITEM_BYTES
from ftlaunch.strategies.checkpoint.weights import Weight
from ftlaunch.strategies.safetensors_file import FileDamaged

_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedModel:
    """A base with an adapter put in.

    what     a line for the user
    weights  of the whole model; what the adapter changes says how
    changes  what its config.json says other than the base's
    adapter  the folder of the adapter's other files
    base     the folder of the base
    """

    what: str
    weights: tuple[Weight, ...]
    changes: Mapping[str, Any]
    notes: tuple[str, ...]
    adapter: Path
    base: Path

    @property
    def dtype(self) -> SaveDtype | None:
        """Of the base's floating-point weights; None where they are not all of one."""
        found = {weight.dtype for weight in self._of_base() if weight.dtype in _SAVED}
        return _SAVED[found.pop()] if len(found) == 1 else None

    @property
    def main_dtype(self) -> SaveDtype:
        """That of most of its bytes."""
        sizes = dict.fromkeys(SAVE_DTYPES, 0)
        for weight in self._of_base():
            if weight.dtype in _SAVED:
                sizes[_SAVED[weight.dtype]] += weight.num_elements * ITEM_BYTES[weight.dtype]
        return max(_SAVED.values(), key=lambda name: sizes[name])

    def _of_base(self) -> list[Weight]:
        return [w for w in self.weights if all(run.path.parent == self.base for run in w.runs)]


_SAVED: dict[str, SaveDtype] = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter alone.

    name     as the user called it
    what     a line for the user
    folder   of its files beside the weights
    """

    name: str
    what: str
    weights: tuple[Weight, ...]
    notes: tuple[str, ...]
    folder: Path
    config: AdapterConfig


def open_adapter(path: Path) -> Adapter:
    """Reads headers alone. UserError when it is none.

    path   peft's folder, a checkpoint of ours that holds an adapter, or such a job's output folder
    """
    what, weights, notes, folder = _open_adapter(path)
    return Adapter(
        name=str(path),
        what=what,
        weights=weights,
        notes=notes,
        folder=folder,
        config=read_adapter_config(folder / ADAPTER_CONFIG),
    )


def open_adapted(adapter: Adapter, base: Path) -> AdaptedModel:
    """Reads headers alone. UserError when they do not belong together.

    base   a folder with config.json and safetensors files
    """
    own = base_weights(base)
    known = ModelShapes({weight.name: weight.shape for weight in own})
    names = {"adapter": adapter.name, "base": str(base)}
    fitted = fit_adapter(adapter.weights, adapter.config, known, **names)
    says = read_config(base) if (base / CONFIG_NAME).is_file() else {}
    if (adapter.folder / MODEL_CONFIG).is_file():
        trained = read_config(adapter.folder, MODEL_CONFIG)
        check_sizes(trained, says, **names)
        says = trained
    return AdaptedModel(
        what=(
            f"{adapter.what}; {len(fitted.changed)} matrices of {base}{_named(adapter.config, base)}"
        ),
        weights=merged_weights(own, fitted),
        changes=config_changes(own, fitted, adapter.config, says, **names),
        notes=adapter.notes,
        adapter=adapter.folder,
        base=base,
    )


def _named(config: AdapterConfig, base: Path) -> str:
    if config.base is None or Path(config.base).name == base.name:
        return ""
    return f" (it names {config.base})"


def _open_adapter(path: Path) -> tuple[str, tuple[Weight, ...], tuple[str, ...], Path]:
    """(what it is, its tensors, notes, the folder of its other files)."""
    if not path.is_dir():
        state = "is a file" if path.exists() else "does not exist"
        raise UserError(
            f"the adapter {path} {state}. --adapter takes a folder with {ADAPTER_CONFIG}, or a checkpoint "
            "of a job with lora.r."
        )
    if (path / ADAPTER_CONFIG).is_file():
        return str(path), read_adapter_weights(path), (), path
    if (path / ADAPTER_WEIGHTS).exists():
        raise UserError(
            f"the adapter {path} has no {ADAPTER_CONFIG}, which says what its numbers are multiplied by. "
            "Copy it anew."
        )
    source = open_source(path)
    if not source.adapter or source.model is None:
        raise UserError(
            f"{path} holds no adapter: there is no {ADAPTER_CONFIG}. A whole checkpoint is merged without "
            "--adapter: ftlaunch merge SOURCE TARGET."
        )
    return source.what, source.weights, source.notes, source.model[0]


def base_weights(folder: Path) -> tuple[Weight, ...]:
    """Of a model's folder. UserError when there are none that can be read."""
    if is_adapter(folder):
        raise UserError(f"the base {folder} is an adapter itself. Name the model below it.")
    if (folder / _ONE_FILE).is_file():
        names = [_ONE_FILE]
    elif (folder / _INDEX).is_file():
        names = _shards(folder / _INDEX)
    else:
        raise UserError(
            f"the base {folder} has no {_ONE_FILE} and no {_INDEX}. Other formats are not read: save the "
            "base anew with save_pretrained."
        )
    found: dict[str, Weight] = {}
    for name in names:
        try:
            weights = weights_of_file(folder / name)
        except FileDamaged as error:
            raise UserError(f"{error}. It is a file of the base: copy it anew.") from None
        except FileNotFoundError:
            raise UserError(f"the base {folder} lacks {name}, which {_INDEX} names.") from None
        for weight in weights:
            if weight.name in found:
                raise UserError(f"the base {folder} has {weight.name} in two files. Copy it anew.")
            found[weight.name] = weight
    return tuple(found.values())


def _shards(path: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} cannot be read. It is a file of the base: copy it anew.") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise UserError(f"{path} names a file {name!r}, which is not beside it.")
    return names


def copy_adapted_files(
    model: AdaptedModel, folder: Path, *, given: Path | None, dtype: SaveDtype
) -> None:
    """config.json and the tokenizer into `folder`, synced to the disk.

    From `given`, else from the adapter, and what that lacks from the base; a tokenizer is of one place.
    """
    places = [given] if given is not None else [model.base, model.adapter]
    own_tokenizer = given is None and has_tokenizer(model.adapter)
    for place in places:
        for name in model_files(place):
            # The adapter's own configuration is under another name, which follows.
            if name == CONFIG_NAME and place == model.adapter:
                continue
            if own_tokenizer and place == model.base and is_of_tokenizer(name):
                continue
            shutil.copyfile(place / name, folder / name)
    if given is None and (model.adapter / MODEL_CONFIG).is_file():
        shutil.copyfile(model.adapter / MODEL_CONFIG, folder / CONFIG_NAME)
    elif given is None and (folder / CONFIG_NAME).is_file():
        fit_labels(folder, model.weights)
    if (folder / CONFIG_NAME).is_file():
        change_config(folder, model.changes)
    fit_config(folder, dtype)
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
