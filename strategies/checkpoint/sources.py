"""Whose checkpoint it is, told by looking: ours, a job's output folder, DeepSpeed's or MindSpore's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.adapter import ADAPTER_CONFIG
from ftlaunch.strategies.checkpoint.adapter_weights import with_adapter_keys
from ftlaunch.strategies.checkpoint.deepspeed_files import find_tag_folder
from ftlaunch.strategies.checkpoint.deepspeed_layout import deepspeed_weights
from ftlaunch.strategies.checkpoint.manifest import (
    MANIFEST_NAME,
    MODEL_FOLDER,
    CheckpointDamaged,
    read_manifest,
)
from ftlaunch.strategies.checkpoint.mindspore_file import check_is_file
from ftlaunch.strategies.checkpoint.mindspore_folder import (
    SUFFIXES,
    MindsporeFiles,
    find_files,
    of_file,
)
from ftlaunch.strategies.checkpoint.mindspore_layout import mindspore_weights
from ftlaunch.strategies.checkpoint.model_files import (
    CONFIG_NAME,
    ModelShapes,
    model_files,
)
from ftlaunch.strategies.checkpoint.retention import checkpoint_folders
from ftlaunch.strategies.checkpoint.store import checkpoint_weights
from ftlaunch.strategies.checkpoint.weights import Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A checkpoint that can be merged.

    what     a line for the user: which checkpoint, of what kind
    model    the folder with config.json and the tokenizer, and the names of these files; or None
    notes    further lines for the user
    adapter  the weights are an adapter's, in peft's layout; what it belongs to is elsewhere
    beside   what `model` names lies with the weights themselves: there is nothing to compare
    """

    what: str
    weights: tuple[Weight, ...]
    model: tuple[Path, tuple[str, ...]] | None
    notes: tuple[str, ...]
    beside: bool = False
    adapter: bool = False


def open_source(folder: Path, known: ModelShapes | None = None) -> Source:
    """Reads headers, and of MindSpore what it takes to compare ranks and checksums.

    known   shapes of the model's weights by their names in it, where it is at hand
    UserError when there is no checkpoint, or none that is whole.
    """
    if folder.suffix in SUFFIXES and not folder.is_dir() and os.path.lexists(folder):
        check_is_file(folder)
        return _mindspore(folder, of_file(folder), known or ModelShapes({}))
    if not folder.exists():
        raise UserError(f"the checkpoint {folder} does not exist. Check the path.")
    if not folder.is_dir():
        raise UserError(f"the checkpoint {folder} is a file; pass the folder that it is in.")
    if (folder / MANIFEST_NAME).is_file():
        return _own(folder, ())
    if checkpoints := checkpoint_folders(folder / "checkpoints") or checkpoint_folders(folder):
        return _newest(checkpoints)
    tag_folder = find_tag_folder(folder)
    if tag_folder is not None:
        return _deepspeed(tag_folder)
    if (files := find_files(folder)) is not None:
        return _mindspore(folder, files, known or ModelShapes({}))
    raise UserError(
        f"{folder} holds no checkpoint: neither manifest.json nor a folder checkpoints/ of ftlaunch, "
        "neither latest nor *_states.pt of DeepSpeed, and no *.ckpt or *.safetensors of MindSpore."
        f"{_hint(folder)} Pass a checkpoint's folder, or the output folder of a job."
    )


def _hint(folder: Path) -> str:
    below = sorted(path.parent.name for path in folder.glob("*/latest"))
    return f" Below it are {', '.join(below[:5])}." if below else ""


def _newest(checkpoints: Sequence[Path]) -> Source:
    """The newest whole one; what is wrong with newer ones is told."""
    notes: list[str] = []
    for folder in checkpoints:
        try:
            return _own(folder, notes)
        except CheckpointDamaged as error:
            notes.append(str(error))
    raise UserError(f"no checkpoint is whole: {'; '.join(notes)}. Pass another folder.")


def _own(folder: Path, notes: Sequence[str]) -> Source:
    manifest = read_manifest(folder)
    names = tuple(manifest.model_files)
    weights = checkpoint_weights(folder, manifest)
    adapter = manifest.holds_adapter
    config = ADAPTER_CONFIG if adapter else CONFIG_NAME
    return Source(
        what=f"{folder}: {'adapter, ' if adapter else ''}step {manifest.step:,}, written by "
        f"{manifest.world_size} rank(s) under {manifest.strategy}",
        weights=with_adapter_keys(weights) if adapter else weights,
        model=(folder / MODEL_FOLDER, names) if config in names else None,
        notes=tuple(notes),
        adapter=adapter,
    )


def _deepspeed(folder: Path) -> Source:
    found = deepspeed_weights(folder)
    kind = f"ZeRO-{found.stage}" if found.stage else "no ZeRO"
    # The HF Trainer puts the model's files beside the tag folder, and some put them into it.
    places = [place for place in (folder, folder.parent) if (place / CONFIG_NAME).is_file()]
    return Source(
        what=f"{folder}: DeepSpeed, {kind}, written by {found.num_ranks} rank(s)",
        weights=found.weights,
        model=(places[0], model_files(places[0])) if places else None,
        notes=found.notes,
    )


def _mindspore(path: Path, files: MindsporeFiles, known: ModelShapes) -> Source:
    found = mindspore_weights(files, known)
    first = files.ranks[0][0].parent
    # A folder rank_0 has it beside it rather than in it.
    around = (first, files.folder, first.parent) if files.has_ranks else (first,)
    places = [place for place in around if (place / CONFIG_NAME).is_file()]
    of_ranks = f", written by {found.num_ranks} rank(s)" if files.has_ranks else ""
    return Source(
        what=f"{path}: MindSpore{of_ranks}",
        beside=True,
        weights=found.weights,
        model=(places[0], model_files(places[0])) if places else None,
        notes=found.notes,
    )
