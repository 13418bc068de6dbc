"""What a model has beside its weights: config.json, the tokenizer and the like.

Finds them, copies them, fits config.json's dtype to the weights, and checks the weights' shapes
against a model without reading its weights. Knows no framework.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.checkpoint.conversion import TORCH_NAMES, SaveDtype
from ftlaunch.strategies.checkpoint.weights import Weight
from ftlaunch.strategies.files import replace_file
from ftlaunch.strategies.model_config import absolute_path, why_not_from_hub
from ftlaunch.strategies.safetensors_file import FileDamaged, read_places

CONFIG_NAME = "config.json"
# By name, so that neither weights nor a trainer's own files come along.
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "bpe.codes",
    "*.model",
    "*.tiktoken",
)
_TOKENIZER = (
    *_VOCABULARIES,
    "tokenizer*.json",
    "tokenizer*.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template*.json",
    "chat_template*.jinja",
)
_PATTERNS = (
    CONFIG_NAME,
    "generation_config.json",
    *_TOKENIZER,
    "preprocessor_config.json",
    "processor_config.json",
)
# Code of the model's own, which config.json's auto_map names.
_CODE = ("configuration_*.py", "modeling_*.py", "tokenization_*.py", "processing_*.py")
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
# Ends of the names of the matrix that has a row for each word.
EMBEDDINGS = (
    "embed_tokens.weight",
    "word_embeddings.weight",
    "wte.weight",
    "tok_embeddings.weight",
)


def model_files(folder: Path) -> tuple[str, ...]:
    """Names of the files in `folder` that a finished model has beside its weights."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return tuple(name for name in names if _is_any(name, (*_PATTERNS, *_CODE)))


def is_of_tokenizer(name: str) -> bool:
    """Whether a file of that name is a part of a tokenizer."""
    return _is_any(name, _TOKENIZER)


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a whole one: with a vocabulary."""
    return any(_is_any(name, _VOCABULARIES) for name in model_files(folder))


def _is_any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def model_folder(
    name: str, *, of: str = "--model", weights: bool = False, revision: str | None = None
) -> Path:
    """A model's folder: as it stands, or downloaded from the hub, without its weights unless asked for.

    of         what takes it, for the message
    revision   on the hub; None: its main branch
    UserError when there is none, or it has no config.json.
    """
    folder = absolute_path(name)
    if not folder.exists() and not name.startswith(("/", ".", "~")):
        folder = _from_hub(name, _WEIGHTS if weights else (), revision)
    if not (folder / CONFIG_NAME).is_file() and not (weights and folder.is_dir()):
        state = "has no config.json" if folder.is_dir() else "is no folder"
        raise UserError(
            f"the model {name} {state}. {of} takes a folder with config.json and the tokenizer, "
            "or the name of a model on the hub."
        )
    return folder


def _from_hub(name: str, weights: tuple[str, ...], revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = [*_PATTERNS, *_CODE, *weights]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"the model {name!r} is neither a folder here nor could it be had from the hub: "
            f"{why_not_from_hub(error)} Check the name, or pass the path of a folder with config.json."
        ) from None


def copy_model_files(
    source: Path, names: Sequence[str], target: Path, *, dtype: SaveDtype
) -> tuple[str, ...]:
    """Copy into an existing folder, synced to the disk; config.json says `dtype` then. The names."""
    for name in names:
        shutil.copyfile(source / name, target / name)
    fit_config(target, dtype)
    for name in names:
        with open(target / name, "rb") as file:
            os.fsync(file.fileno())
    return tuple(names)


def fit_config(folder: Path, dtype: SaveDtype) -> None:
    """Have the config.json in `folder`, if there is one, say `dtype`."""
    if (folder / CONFIG_NAME).is_file():
        text = json.dumps(with_dtype(read_config(folder), dtype), indent=2) + "\n"
        with replace_file(folder / CONFIG_NAME) as file:
            file.write(text.encode())


def with_dtype(config: Mapping[str, Any], dtype: SaveDtype) -> dict[str, Any]:
    """A config.json that says `dtype`, under the key it had: transformers 5 writes "dtype", 4 "torch_dtype".

    Parts of the model that have a configuration of their own (text_config) follow.
    """
    changed = dict(config)
    for name, value in config.items():
        if isinstance(value, dict) and ("dtype" in value or "torch_dtype" in value):
            changed[name] = with_dtype(value, dtype)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    return changed | dict.fromkeys(keys, TORCH_NAMES[dtype])


def check_shapes(weights: Sequence[Weight], folder: Path) -> None:
    """UserError when the weights do not fit the model in `folder`.

    With safetensors weights there: every name that both have must have one shape (their headers are
    read, not their data), also when one side has the names below a prefix such as "bert.". Without:
    the input embedding against vocab_size and hidden_size of config.json, where both can be told.
    """
    known = model_shapes(folder)
    differences = []
    for weight in weights:
        shape = known.shape(weight.name)
        if shape is not None and shape != weight.shape:
            differences.append(f"{weight.name} has shape {weight.shape}, there {shape}")
    if not known:
        differences = _against_config(weights, read_config(folder))
    if differences:
        more = f", and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise UserError(
            f"the checkpoint does not fit the model {folder}: {'; '.join(differences[:3])}{more}. "
            "Pass the --model that was trained, or one of the same configuration."
        )


def model_shapes(folder: Path) -> ModelShapes:
    """From the headers of the safetensors files in `folder`; none where there are no such files."""
    known: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            known |= {name: place.shape for name, place in read_places(path).items()}
        except FileDamaged as error:
            raise UserError(f"{error}. It is a file of --model: repair or remove it.") from None
    return ModelShapes(known)


class ModelShapes:
    """Shapes of a model's weights by their names, found also below a prefix such as "bert.".

    exact  by the names that the model itself has
    """

    def __init__(self, exact: Mapping[str, tuple[int, ...]]) -> None:
        self.exact = exact
        # Without the first part → the whole name, or None where two are the same without it.
        self._longer: dict[str, str | None] = {}
        for name in exact:
            rest = name.partition(".")[2]
            self._longer[rest] = None if rest in self._longer else name

    def __bool__(self) -> bool:
        return bool(self.exact)

    def name(self, name: str) -> str | None:
        """As the model has it: with the first part of the name, without it, or with one more."""
        if name in self.exact:
            return name
        shorter = name.partition(".")[2]
        return shorter if shorter in self.exact else self._longer.get(name)

    def shape(self, name: str) -> tuple[int, ...] | None:
        found = self.name(name)
        return None if found is None else self.exact[found]


def _against_config(weights: Sequence[Weight], config: Mapping[str, Any]) -> list[str]:
    inner = config.get("text_config")
    config = inner if isinstance(inner, dict) else config
    width = config.get("embedding_size", config.get("hidden_size", config.get("n_embd")))
    expected = (config.get("vocab_size"), width)
    if not all(isinstance(size, int) for size in expected):
        return []
    return [
        f"{weight.name} has shape {weight.shape}, by its config.json {expected}"
        for weight in weights
        if weight.name.endswith(EMBEDDINGS) and weight.shape != expected
    ]


def read_config(folder: Path, name: str = CONFIG_NAME) -> dict[str, Any]:
    """config.json of a folder, or what is of its kind. UserError when it is none."""
    try:
        config = json.loads((folder / name).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / name} cannot be read ({error}). Repair it.") from None
    if not isinstance(config, dict):
        raise UserError(f"{folder / name} holds no JSON object. Repair it.")
    return config
