"""Where the weights of a DeepSpeed checkpoint of ZeRO-0, 1, 2 or 3 lie, as runs of bytes.

The truth about a trained parameter is the fp32 master that the optimizer holds:

ZeRO-1/2   each parameter group is one flat vector; rank r has the r-th of W equal parts. Frozen
           parameters and buffers are in `module`.
ZeRO-3     each parameter is cut into W parts of ceil(n / W) elements, the last ones padded; a rank
           has the parts of all parameters one after the other. Frozen ones are cut the same way.
ZeRO-0     `module` has everything. Under fp16 the optimizer holds masters, too, but nothing says
           whose they are; so the weights that computed are taken, and a note says so.

Imports nothing of torch or deepspeed. Nothing is guessed: what does not fit is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.checkpoint.deepspeed_files import DeepSpeedFiles, list_files
from ftlaunch.strategies.checkpoint.deepspeed_ranks import (
    check_together,
    mixed,
    read_models,
    read_partitions,
)
from ftlaunch.strategies.checkpoint.deepspeed_state import ModelState, Partition
from ftlaunch.strategies.checkpoint.torch_zip import ITEM_BYTES, StoredTensor
from ftlaunch.strategies.checkpoint.weights import Run, Weight, cut, strided_runs

# DeepSpeed fills the flat vector of a group up to a multiple of this and the number of ranks.
_ALIGNMENT = 2
_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSpeedWeights:
    """What `deepspeed_weights` found; notes are lines for the user."""

    stage: int
    num_ranks: int
    weights: tuple[Weight, ...]
    notes: tuple[str, ...]


def deepspeed_weights(folder: Path) -> DeepSpeedWeights:
    """Of the tag folder with the *_states.pt files. Reads headers and pickles, no tensor data.

    UserError for files that are missing, damaged, not of one save, or not supported.
    """
    files = list_files(folder)
    models = read_models(files)
    notes = [f"{name} is no tensor and is left out" for name in models[0].others]
    if models[0].param_shapes is None and not files.sharded:
        return _without_zero(files, models[0], notes)
    partitions = read_partitions(files)
    stage, size = partitions[0].stage, partitions[0].num_partitions
    check_together(files, models, partitions)
    trained = _zero3_trained if stage == 3 else _flat_trained
    found = trained(files, models[0], partitions)
    for name in models[0].frozen_parts if stage == 3 else ():
        found[name] = _zero3_frozen(files, models, name)
    for name, tensor in models[0].tensors.items():
        if name in models[0].buffer_names:
            found[name] = _whole(name, tensor)
        elif name not in found and not _is_alias(models[0], found, name, stage):
            # Frozen, and kept as the forward pass uses it.
            if stage == 3 and tensor.num_elements == 0:
                raise mixed(files, f"no file has the values of {name}")
            found[name] = _whole(name, tensor)
    if strange := [name for name in found if name not in models[0].tensors]:
        raise mixed(files, f"{_names(strange)} of the flat weights are not in `module`")
    return DeepSpeedWeights(
        stage=stage, num_ranks=size, weights=tuple(found.values()), notes=tuple(notes)
    )


def _flat_trained(
    files: DeepSpeedFiles, model: ModelState, partitions: Sequence[Partition]
) -> dict[str, Weight]:
    """ZeRO-1/2: walk through each group's vector, which the ranks hold one after the other."""
    groups = model.param_shapes or ()
    if len(groups) != len(partitions[0].flat):
        raise mixed(
            files,
            f"{model.path.name} has {len(groups)} parameter groups, {partitions[0].path.name} "
            f"{len(partitions[0].flat)}",
        )
    found: dict[str, Weight] = {}
    for group, shapes in enumerate(groups):
        _check_fragments(files, partitions, group, shapes)
        flats = [partition.flat[group] for partition in partitions]
        dtype, runs = _vector(files, flats)
        item = ITEM_BYTES[dtype]
        alignment = partitions[0].alignment
        paddings = alignment[group] if len(alignment) == len(groups) else (0,) * len(shapes)
        if len(paddings) != len(shapes):
            raise mixed(files, f"group {group} has {len(shapes)} parameters, {len(paddings)} gaps")
        position = 0
        for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
            numel = math.prod(shape)
            try:
                own = cut(runs, position * item, numel * item)
            except ValueError:
                raise _too_few(files, name, group, position + numel, flats) from None
            found[name] = Weight(name=name, dtype=dtype, shape=shape, runs=own)
            position += numel + padding
        available, unit = sum(flat.num_elements for flat in flats), _ALIGNMENT * len(partitions)
        if -(-position // unit) != -(-available // unit):
            raise mixed(
                files,
                f"the parameters of group {group} have {position:,} elements, the ranks' parts "
                f"{available:,}",
            )
        for name, shape in shapes.items():
            _check_shape(model, name, shape)
    return found


def _too_few(
    files: DeepSpeedFiles, name: str, group: int, needed: int, flats: Sequence[StoredTensor]
) -> UserError:
    available = sum(flat.num_elements for flat in flats)
    return mixed(
        files,
        f"{name} ends at element {needed:,} of group {group}, the ranks' parts have {available:,}",
    )


def _check_fragments(
    files: DeepSpeedFiles, partitions: Sequence[Partition], group: int, shapes: Mapping[str, object]
) -> None:
    """What each rank says it has of which parameter, where it says so."""
    for partition in partitions:
        if group < len(partition.fragments):
            strange = [name for name in partition.fragments[group] if name not in shapes]
            if strange:
                raise mixed(
                    files,
                    f"{partition.path.name} has a part of {_names(strange)}, which "
                    f"{files.model_name(0)} does not have in group {group}",
                )


def _check_shape(model: ModelState, name: str, shape: tuple[int, ...]) -> None:
    used = model.tensors.get(name)
    if used is not None and used.shape != shape:
        raise UserError(
            f"{model.path} contradicts itself: {name} has shape {used.shape} in `module` and {shape} "
            "in param_shapes. Copy the checkpoint anew."
        )


def _zero3_trained(
    files: DeepSpeedFiles, model: ModelState, partitions: Sequence[Partition]
) -> dict[str, Weight]:
    """ZeRO-3: of each parameter, one part from each rank."""
    vectors = [_vector(files, partition.flat) for partition in partitions]
    sizes = {sum(flat.num_elements for flat in partition.flat) for partition in partitions}
    dtypes = {dtype for dtype, _ in vectors}
    if len(sizes) != 1 or len(dtypes) != 1:
        raise mixed(files, f"the ranks' parts have {sorted(sizes)} elements of {sorted(dtypes)}")
    [dtype], item, ranks = dtypes, ITEM_BYTES[vectors[0][0]], len(partitions)
    found: dict[str, Weight] = {}
    position = 0
    for shapes in model.param_shapes or ():
        for name, shape in shapes.items():
            numel = math.prod(shape)
            part = -(-numel // ranks)
            runs: list[Run] = []
            for rank, (_, vector) in enumerate(vectors):
                own = max(0, min(part, numel - rank * part))
                try:
                    runs.extend(cut(vector, position * item, own * item))
                except ValueError:
                    raise _too_few(files, name, 0, position + own, partitions[rank].flat) from None
            found[name] = Weight(name=name, dtype=dtype, shape=shape, runs=tuple(runs))
            position += part
    if position != (available := sizes.pop()):
        raise mixed(
            files,
            f"the parameters need {position:,} elements of each rank, which has {available:,}",
        )
    return found


def _zero3_frozen(files: DeepSpeedFiles, models: Sequence[ModelState], name: str) -> Weight:
    shape = models[0].frozen_shapes.get(name)
    if shape is None:
        raise mixed(files, f"the frozen {name} has no shape in {models[0].path.name}")
    numel = math.prod(shape)
    part = -(-numel // len(models))
    parts = [model.frozen_parts.get(name) for model in models]
    for model, own in zip(models, parts, strict=True):
        if own is None or own.num_elements != part:
            size = "nothing" if own is None else f"{own.num_elements:,} elements"
            raise mixed(files, f"{model.path.name} has {size} of the frozen {name}, not {part:,}")
    dtype, runs = _vector(files, [own for own in parts if own is not None])
    runs = cut(runs, 0, numel * ITEM_BYTES[dtype])
    return Weight(name=name, dtype=dtype, shape=shape, runs=runs)


def _is_alias(model: ModelState, found: Mapping[str, Weight], name: str, stage: int) -> bool:
    """Whether it is another name of a weight that is there. Empty ones only seem to be shared."""
    stored = model.shared.get(name)
    if stored is None or stored not in model.tensors:
        return False
    if stage == 3:
        return stored in found
    other, own = model.tensors[stored], model.tensors[name]
    return own.num_elements > 0 and own.shape == other.shape


def _without_zero(
    files: DeepSpeedFiles, model: ModelState, notes: Sequence[str]
) -> DeepSpeedWeights:
    if files.optimizer:
        raise mixed(files, f"{model.path.name} is of a job without ZeRO, the others are not")
    places: dict[object, str] = {}
    found: list[Weight] = []
    for name, tensor in model.tensors.items():
        place = (tensor.storage, tensor.offset, tensor.shape, tensor.strides)
        if tensor.num_elements == 0 or places.setdefault(place, name) == name:
            found.append(_whole(name, tensor))
    if any(weight.dtype in ("F16", "BF16") for weight in found):
        notes = [
            *notes,
            "the weights are those that computed, in 16 bits: a checkpoint without ZeRO does not "
            "say to which parameters fp32 copies would belong",
        ]
    ranks = model.facts["dp_world_size"]
    return DeepSpeedWeights(
        stage=0,
        num_ranks=ranks if isinstance(ranks, int) else 1,
        weights=tuple(found),
        notes=tuple(notes),
    )


def _whole(name: str, tensor: StoredTensor) -> Weight:
    """A tensor that is in one file as it is."""
    if tensor.dtype not in ITEM_BYTES:
        raise UserError(f"{tensor.path}: {name} is of a dtype that cannot be merged.")
    item = ITEM_BYTES[tensor.dtype]
    try:
        runs = strided_runs(tensor.path, tensor.offset, tensor.shape, tensor.strides, item)
    except ValueError as error:
        raise UserError(f"{tensor.path}: {name} lies scattered in the file ({error}).") from None
    return Weight(name=name, dtype=tensor.dtype, shape=tensor.shape, runs=runs)


def _vector(files: DeepSpeedFiles, parts: Sequence[StoredTensor]) -> tuple[str, tuple[Run, ...]]:
    """(dtype, runs) of flat parts, one after the other."""
    for part in parts:
        if len(part.shape) != 1 or not part.is_contiguous or part.dtype not in ITEM_BYTES:
            raise UserError(
                f"{part.path} is damaged: a part of the flat weights has shape {part.shape}, strides "
                f"{part.strides}. Copy the checkpoint anew."
            )
        if part.dtype != parts[0].dtype:
            raise mixed(files, f"{part.path.name} has {part.dtype}, others {parts[0].dtype}")
    return parts[0].dtype if parts else "F32", tuple(
        Run(part.path, part.offset, part.nbytes) for part in parts
    )


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
