"""A pretrained model's safetensors files, read by the names that a model here gives its parameters.

For frameworks whose model library does not load them itself. Knows numpy and names; no framework.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download
from numpy.typing import NDArray

from ftlaunch.strategies.checkpoint.conversion import convert
from ftlaunch.strategies.options import ModelOptions
from ftlaunch.strategies.pretrained import cannot_load
from ftlaunch.strategies.safetensors_file import FileDamaged, TensorPlace, read_places

_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
# Names that TensorFlow's layers gave and that old files still have.
_OLD_ENDINGS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file, not read yet."""

    path: Path
    place: TensorPlace

    @property
    def shape(self) -> tuple[int, ...]:
        return self.place.shape

    def read(self) -> NDArray[Any]:
        """As fp32 if it is of a floating-point dtype. ValueError for a dtype that is not known."""
        place = self.place
        if place.dtype not in _FLOATS:
            raise ValueError(f"{self.path.name} holds a weight of dtype {place.dtype}")
        if place.nbytes == 0:
            return np.zeros(place.shape, dtype=np.float32)
        data = np.memmap(
            self.path, dtype=np.uint8, mode="r", offset=place.offset, shape=(place.nbytes,)
        )
        return convert(np.asarray(data), place.dtype, "F32").view(np.float32).reshape(place.shape)


def stored_weights(
    options: ModelOptions, names: Iterable[str], base_prefix: str
) -> dict[str, StoredTensor]:
    """Name of a parameter → where it is stored; what no file has is left out. UserError without files.

    base_prefix   what the names of everything below the head begin with, without the dot. Files of
                  the base model alone lack it.
    """
    try:
        stored = _read_headers(_folder(options))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, FileDamaged) as error:
        raise cannot_load(options, error) from error
    return match_names(stored, names, base_prefix)


def match_names(
    stored: Mapping[str, StoredTensor], names: Iterable[str], base_prefix: str
) -> dict[str, StoredTensor]:
    """The stored tensor of each name that has one, whatever the files' prefix and age."""
    modern = {_modern(name): tensor for name, tensor in stored.items()}
    prefix = f"{base_prefix}."
    if base_prefix and not any(name.startswith(prefix) for name in modern):
        bare = {prefix + name: tensor for name, tensor in modern.items()}
        # A head is stored under its own name even where the base has no prefix.
        modern = bare | modern
    return {name: modern[name] for name in names if name in modern}


def _modern(name: str) -> str:
    for old, new in _OLD_ENDINGS.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _folder(options: ModelOptions) -> Path:
    name = str(options.name_or_path)
    local = Path(name).expanduser()
    if local.is_dir():
        return local
    return Path(
        snapshot_download(
            name, revision=options.revision, allow_patterns=["model*.safetensors", _INDEX]
        )
    )


def _read_headers(folder: Path) -> dict[str, StoredTensor]:
    index = folder / _INDEX
    if (folder / _ONE_FILE).is_file():
        files = [_ONE_FILE]
    elif index.is_file():
        files = _files_of(index)
    else:
        raise ValueError(
            "there are no safetensors weights, the only ones that are read without torch. Convert "
            "them where torch is installed: AutoModel.from_pretrained(…).save_pretrained(…)."
        )
    return {
        name: StoredTensor(folder / file, place)
        for file in files
        for name, place in read_places(folder / file).items()
    }


def _files_of(index: Path) -> list[str]:
    weight_map = json.loads(index.read_bytes())["weight_map"]
    files = sorted({str(file) for file in weight_map.values()})
    if outside := [file for file in files if Path(file).name != file]:
        raise ValueError(f"{index.name} names {outside[0]!r}, which is no file beside it")
    return files


def missing_names(
    found: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]
) -> set[str]:
    """Parameters that no file has, or only in another shape (a head for other labels)."""
    return {
        name for name, shape in shapes.items() if name not in found or found[name].shape != shape
    }
