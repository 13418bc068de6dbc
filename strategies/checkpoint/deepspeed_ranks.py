"""All files of a DeepSpeed checkpoint: read, and found to be of one save of one job as far as they say.

Knows ranks and what they have in common, not where a weight lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.checkpoint.deepspeed_files import DeepSpeedFiles
from ftlaunch.strategies.checkpoint.deepspeed_state import (
    ModelState,
    Partition,
    first_difference,
    read_model_state,
    read_partition,
)


def read_models(files: DeepSpeedFiles) -> list[ModelState]:
    """Rank 0's first; under ZeRO-3 all ranks', else only that."""
    if 0 not in files.model:
        raise _missing(files, files.model_name(0), len(files.optimizer))
    first, *others = [files.model[rank] for rank in sorted(files.model)]
    # Of the other ranks only what they hold of frozen parameters is needed: not a table each.
    return [read_model_state(first), *(replace(read_model_state(p), tensors={}) for p in others)]


def read_partitions(files: DeepSpeedFiles) -> list[Partition]:
    """Of all ranks in their order, as many as the files themselves say."""
    if not files.optimizer:
        raise _missing(files, files.optimizer_name(0), 0)
    first = read_partition(next(iter(files.optimizer.values())))
    size = first.num_partitions
    if surplus := sorted(rank for rank in files.optimizer if rank >= size):
        raise mixed(
            files,
            f"{first.path.name} says that {size} rank(s) wrote it, but there are files of "
            f"{len(files.optimizer)}, such as {files.optimizer[surplus[0]].name}",
        )
    for rank in range(size):
        if rank not in files.optimizer:
            raise _missing(files, files.optimizer_name(rank), size)
        if files.sharded and rank not in files.model:
            raise _missing(files, files.model_name(rank), size)
    if files.sharded and len(files.model) > size:
        raise mixed(
            files, f"{size} rank(s) wrote it, but {len(files.model)} have files of model states"
        )
    return [
        first if path == first.path else read_partition(path)
        for _, path in sorted(files.optimizer.items())
    ]


def check_together(
    files: DeepSpeedFiles, models: Sequence[ModelState], partitions: Sequence[Partition]
) -> None:
    """UserError unless the files are of one save of one job, as far as they say."""
    stage, size = partitions[0].stage, partitions[0].num_partitions
    if (stage == 3) != files.sharded:
        raise mixed(
            files,
            f"{partitions[0].path.name} is of ZeRO-{stage}, {models[0].path.name} is not",
        )
    parts = [
        (p.path, {**p.facts, "the ZeRO stage": p.stage, "the number of ranks": p.num_partitions})
        for p in partitions
    ]
    states = [(m.path, {**m.facts, "the parameters": m.param_shapes}) for m in models]
    for model in models:
        if isinstance(ranks := model.facts["dp_world_size"], int) and ranks != size:
            raise mixed(
                files, f"{model.path.name} says {ranks} ranks, {partitions[0].path.name} {size}"
            )
    version = [
        (models[0].path, {"ds_version": models[0].facts["ds_version"]}),
        (partitions[0].path, {"ds_version": partitions[0].facts["ds_version"]}),
    ]
    for facts in (parts, states, version):
        if (difference := first_difference(facts)) is not None:
            name, path, value, other, other_value = difference
            values = "" if name == "the parameters" else f": {value} and {other_value}"
            raise mixed(files, f"{name} of {path.name} and {other.name} differ{values}")


def _missing(files: DeepSpeedFiles, name: str, size: int) -> UserError:
    wrote = f"{size} rank(s) wrote this checkpoint, and" if size else "In a checkpoint of ZeRO"
    return UserError(
        f"{files.folder / name} is missing. {wrote} each of them has one such file. Copy it from "
        "the node that wrote it."
    )


def mixed(files: DeepSpeedFiles, reason: str) -> UserError:
    """The error for files that contradict each other."""
    return UserError(
        f"the files in {files.folder} do not belong together: {reason}. All have to be of one save "
        "of one job. Copy the checkpoint anew, or merge another."
    )
