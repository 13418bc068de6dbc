"""What DeepSpeed's files say, checked and typed. Knows one file at a time, not how they fit together."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.checkpoint.restricted_pickle import Record
from ftlaunch.strategies.checkpoint.torch_zip import StoredTensor, read_torch_file

# Of elements or ranks. Longer numbers than a few thousand digits cannot even be shown.
_MAX_COUNT = 1 << 31
_MAX_AXES = 32

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelState:
    """A file *_model_states.pt.

    tensors          of `module`: weights as the forward pass uses them (ZeRO-3: empty), and buffers
    others           names in `module` that are no tensors
    param_shapes     name → shape for each parameter group, in flat order; None without ZeRO
    frozen_shapes, frozen_parts   parameters outside the optimizer; None under ZeRO-1
    shared           other name → the name under which a tied weight is stored
    facts            what every file of one save says alike
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    others: tuple[str, ...]
    buffer_names: frozenset[str]
    param_shapes: tuple[Shapes, ...] | None
    frozen_shapes: Shapes
    frozen_parts: Mapping[str, StoredTensor]
    shared: Mapping[str, str]
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """A file *_optim_states.pt: one rank's part of the fp32 weights.

    flat        ZeRO-1/2: one run for each parameter group; ZeRO-3: one for each sub-group
    alignment   elements of padding after each parameter of each group; () where there is none
    fragments   ZeRO-1/2: name → number of elements that this rank has, for each group; or ()
    """

    path: Path
    stage: int
    num_partitions: int
    flat: tuple[StoredTensor, ...]
    alignment: tuple[tuple[int, ...], ...]
    fragments: tuple[Mapping[str, int], ...]
    facts: Mapping[str, Any]


def read_model_state(path: Path) -> ModelState:
    """UserError for a file that cannot be read, is none, or is of a model-parallel job."""
    state = _dictionary(path, read_torch_file(path))
    try:
        return _model_state(path, state)
    except (TypeError, ValueError, AttributeError) as error:
        raise _unreadable(path, error) from None


def read_partition(path: Path) -> Partition:
    """UserError for a file that cannot be read, is none, or is of experts."""
    file = _dictionary(path, read_torch_file(path))
    try:
        return _partition(path, file)
    except (TypeError, ValueError, AttributeError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    """For a value of another type than DeepSpeed would have written."""
    return UserError(f"{path} is damaged: a value in it makes no sense ({error}). Copy it anew.")


def _model_state(path: Path, state: Mapping[str, Any]) -> ModelState:
    module = state.get("module")
    if not isinstance(module, dict) or "buffer_names" not in state:
        raise _not_that(path, "the model states of a DeepSpeed checkpoint", "module, buffer_names")
    if not all(isinstance(name, str) for name in module):
        raise UserError(f"{path} is damaged: a name in its module is no text. Copy it anew.")
    for size in ("mp_world_size", *_degrees(state)):
        if isinstance(degree := state.get(size, _degrees(state).get(size)), int) and degree > 1:
            raise UserError(
                f"{path} is of a model-parallel job ({size} is {degree}). Only data-parallel "
                "checkpoints can be merged."
            )
    param_shapes = state.get("param_shapes")
    return ModelState(
        path=path,
        tensors={n: t for n, t in module.items() if isinstance(t, StoredTensor)},
        others=tuple(n for n, t in module.items() if not isinstance(t, StoredTensor)),
        buffer_names=frozenset(state["buffer_names"]),
        param_shapes=None
        if param_shapes is None
        else tuple(_shapes(path, group) for group in param_shapes),
        frozen_shapes=_shapes(path, state.get("frozen_param_shapes") or {}),
        frozen_parts=_tensors(path, state.get("frozen_param_fragments") or {}),
        shared=_names(path, state.get("shared_params") or {}),
        facts={
            name: _scalar(state.get(name))
            for name in ("ds_version", "global_steps", "global_samples", "dp_world_size")
        },
    )


def _partition(path: Path, file: Mapping[str, Any]) -> Partition:
    state = file.get("optimizer_state_dict")
    if not isinstance(state, dict) or "partition_count" not in state:
        wanted = "optimizer_state_dict with partition_count"
        raise _not_that(path, "the optimizer states of a ZeRO checkpoint", wanted)
    counts = state["partition_count"]
    counts = list(counts) if isinstance(counts, list | tuple) else [counts]
    if not all(type(count) is int and 0 < count < _MAX_COUNT for count in counts):
        raise UserError(f"{path} is damaged: its partition_count is no count.")
    if state.get("ds_zero_partition_groups") or len(set(counts)) != 1:
        raise UserError(
            f"{path} is of a job with experts, whose parameters are split over groups of ranks of "
            f"their own (partition counts {counts[:8]}). Such checkpoints cannot be merged."
        )
    stage = _stage(path, state)
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    inner = state.get("optimizer_state_dict" if stage == 3 else "base_optimizer_state")
    flat = state.get(key)
    if not isinstance(flat, list | tuple) or not all(isinstance(t, StoredTensor) for t in flat):
        raise _not_that(path, f"the optimizer states of a ZeRO-{stage} checkpoint", key)
    return Partition(
        path=path,
        stage=stage,
        num_partitions=counts[0],
        flat=tuple(flat),
        alignment=tuple(
            tuple(_count(padding) for padding in group)
            for group in state.get("param_alignment_paddings") or ()
        ),
        fragments=tuple(_fragments(group) for group in state.get("param_slice_mappings") or ()),
        facts={
            "ds_version": _scalar(file.get("ds_version")),
            "the number of steps": _steps_done(inner),
            "the number of parameter groups": len(flat),
        },
    )


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MAX_COUNT:
        raise ValueError(f"{_scalar(value)} where a number of elements has to be")
    return value


def _scalar(value: Any) -> Any:
    """What can be compared and shown: nested values might be endless. ValueError for long numbers."""
    if isinstance(value, int) and value.bit_length() > 64:
        raise ValueError(f"a number of {value.bit_length():,} bits")
    return value if isinstance(value, str | int | float | None) else type(value).__name__


def _stage(path: Path, state: Mapping[str, Any]) -> int:
    stage = state.get("zero_stage")
    if isinstance(stage, Record):  # ZeroStageEnum(3)
        [stage] = stage.args
    if stage is None and "single_partition_of_fp32_groups" in state:
        # The optimizer for bf16 with fp32 gradients, which DeepSpeed takes under stage 1.
        return 1
    if type(stage) is not int or stage not in (1, 2, 3):
        raise UserError(f"{path} is of ZeRO stage {_scalar(stage)}; 1, 2 and 3 can be merged.")
    return stage


def _steps_done(state: Any) -> Any:
    """The optimizer's own count of steps, from its first entry that has one."""
    entries = state.get("state") if isinstance(state, dict) else None
    for entry in entries.values() if isinstance(entries, dict) else ():
        step = entry.get("step") if isinstance(entry, dict) else None
        if isinstance(step, StoredTensor) and step.num_elements == 1:
            formats = {"F32": "<f", "F64": "<d", "I64": "<q", "I32": "<i"}
            if step.dtype not in formats:
                return None
            with open(step.path, "rb") as file:
                data = os.pread(file.fileno(), step.nbytes, step.offset)
            return struct.unpack(formats[step.dtype], data)[0]
        if isinstance(step, int | float):
            return _scalar(step)
    return None


def _degrees(state: Mapping[str, Any]) -> Mapping[str, Any]:
    degrees = state.get("checkpoint_parallel_dimensions")
    return degrees if isinstance(degrees, dict) else {}


def _fragments(group: Any) -> Mapping[str, int]:
    """Of name → fragment_address(numel, start), a record with its state."""
    found = {}
    for name, address in group.items() if isinstance(group, dict) else ():
        if not isinstance(name, str):
            raise ValueError(f"a {type(name).__name__} where a name has to be")
        state = getattr(address, "state", None)
        if isinstance(state, dict) and isinstance(state.get("numel"), int):
            found[name] = state["numel"]
    return found


def _shapes(path: Path, value: Any) -> Shapes:
    shapes = _dictionary(path, value)
    for name, shape in shapes.items():
        sizes = isinstance(shape, tuple) and all(type(n) is int and 0 <= n < 1 << 48 for n in shape)
        if not sizes or len(shape) > _MAX_AXES or not isinstance(name, str):
            raise UserError(f"{path} is damaged: the shape of {_scalar(name)} makes no sense.")
    return shapes


def _names(path: Path, value: Any) -> Mapping[str, str]:
    names = _dictionary(path, value)
    if not all(isinstance(name, str) for pair in names.items() for name in pair):
        raise UserError(f"{path} is damaged: its shared_params are no names.")
    return names


def _tensors(path: Path, value: Any) -> Mapping[str, StoredTensor]:
    tensors = _dictionary(path, value)
    whole = (isinstance(n, str) and isinstance(t, StoredTensor) for n, t in tensors.items())
    if not all(whole):
        raise UserError(f"{path} is damaged: its frozen parameters are not all named tensors.")
    return tensors


def _dictionary(path: Path, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(
            f"{path} holds a {type(value).__name__} where a dictionary has to be. It is no file of a "
            "DeepSpeed checkpoint, or damaged: copy it anew."
        )
    return value


def _not_that(path: Path, what: str, lacks: str) -> UserError:
    return UserError(f"{path} is not {what}: it lacks {lacks}. Copy it anew.")


def first_difference(
    facts: Sequence[tuple[Path, Mapping[str, Any]]],
) -> tuple[str, Path, Any, Path, Any] | None:
    """(fact, file, value, other file, other value) of the first on which two files differ."""
    first_path, first = facts[0]
    for path, others in facts[1:]:
        for name, value in first.items():
            if others[name] != value:
                return name, first_path, value, path, others[name]
    return None
