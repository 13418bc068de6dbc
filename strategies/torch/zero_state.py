"""Where DeepSpeed (0.19) keeps a model's training state, as slices of named tensors.

Stages 1 and 2: each parameter group is one flat fp32 vector, of which rank r holds the r-th part.
Stage 3: each parameter is split by itself, in parts of ceil(elements / W), and a rank's parts of a
sub-group's parameters lie one behind the other in a flat vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ftlaunch.cluster.world import World
from ftlaunch.strategies.base import StateReader, TensorSlice
from ftlaunch.strategies.checkpoint.manifest import CheckpointDamaged
from ftlaunch.strategies.torch.lora import has_adapter
from ftlaunch.strategies.torch.slices import copy_whole, own_share

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class _Piece:
    """What this rank holds of a trained parameter: elements [start, start + count) of it, which are
    elements [offset, offset + count) of the flat fp32 vector `flat`.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    count: int
    flat: torch.Tensor
    offset: int

    def of(self, vector: torch.Tensor) -> torch.Tensor:
        return vector.detach().narrow(0, self.offset, self.count)


class ZeroState:
    """Reads and writes the state of one engine.

    exact   weights by name as they were before the engine rounded them to the dtype that computes
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        stage: int,
        world: World,
        exact: Mapping[str, torch.Tensor],
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._stage = stage
        self._world = world
        # Of a model with an adapter the frozen rest is in the base's files.
        self._alone = has_adapter(model)
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        # What is frozen never changes: what the model came with is what is saved.
        self._exact = {
            name: exact[name]
            for parameter, name in self._names.items()
            if name in exact
            and not self._alone
            and not parameter.requires_grad
            and not torch.equal(exact[name].to(parameter.dtype).to(exact[name].dtype), exact[name])
        }
        with torch.no_grad():
            for piece in self._pieces():
                if piece.name in exact:
                    values = exact[piece.name].reshape(-1)
                    own = values[piece.start : piece.start + piece.count]
                    piece.of(piece.flat).copy_(own.float())

    @property
    def trained_names(self) -> list[str]:
        """In the order of the model."""
        return [name for p, name in self._names.items() if p.requires_grad]

    def not_finite(self) -> tuple[str, ...]:
        """Trained parameters of whose gradient this rank's part is not finite, before the step."""
        optimizer = self._optimizer
        groups = optimizer.fp16_groups if self._stage == 3 else optimizer.params_in_partition
        found = []
        for number, parameters in enumerate(groups):
            gradients = optimizer.averaged_gradients.get(number)
            # With offload they are elsewhere: in the flat vectors of the host.
            for parameter, gradient in zip(parameters, gradients or (), strict=False):
                if gradient is not None and not torch.isfinite(gradient).all():
                    found.append(self._names[parameter])
        for piece in self._pieces():
            if piece.flat.grad is not None and not torch.isfinite(piece.of(piece.flat.grad)).all():
                found.append(piece.name)
        return tuple(found)

    def without_moments(self) -> list[torch.Tensor]:
        """The flat vectors for which the optimizer will make moments in its first step."""
        flats = {id(p.flat): p.flat for p in self._pieces() if not self._moments(p)}
        return list(flats.values())

    def drop_gradients(self) -> None:
        """Forget what was accumulated since the last step, as a step does once it is done."""
        optimizer = self._optimizer
        optimizer.zero_grad(set_to_none=True)
        optimizer._epilogue_ran_this_backward = False
        if self._stage == 3:
            optimizer.averaged_gradients = {}
            optimizer._offload_boundary_param_ids = set()
            return
        optimizer.micro_step_id = -1
        optimizer.averaged_gradients.clear()
        optimizer.all_grad_tensors.clear()
        if optimizer.cpu_offload:
            optimizer._offload_accumulated_param_ids = set()

    # -- reading ----------------------------------------------------------------------------

    def slices(self) -> Iterator[TensorSlice]:
        """What this rank owns; all ranks' together are everything once."""
        for piece in self._pieces():
            yield self._slice(piece, "weight", piece.of(piece.flat))
            for moment in _MOMENTS:
                vector = self._moments(piece).get(moment)
                if vector is not None:
                    yield self._slice(piece, moment, piece.of(vector))
        if self._alone:
            return
        if self._stage == 3:
            yield from self._frozen_parts()
            yield from own_share(list(self._buffers()), self._world)
        else:
            yield from own_share([*self._frozen(), *self._buffers()], self._world)

    def _frozen_parts(self) -> Iterator[TensorSlice]:
        """Stage 3 splits frozen parameters like the others, and nobody has to have one whole."""
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                continue
            start, count = self._own_part(parameter)
            if count > 0:
                values = parameter.ds_tensor.detach()[:count]
                if name in self._exact:
                    values = self._exact[name].reshape(-1)[start : start + count]
                yield TensorSlice(
                    name=name,
                    kind="weight",
                    shape=tuple(parameter.ds_shape),
                    start=start,
                    values=values.float().cpu().numpy(),
                )

    def _own_part(self, parameter: Any) -> tuple[int, int]:
        """Stage 3: (first element, elements) of this rank's part of a parameter, without padding."""
        part = parameter.partition_numel()
        start = min(self._world.rank * part, parameter.ds_numel)
        return start, min(part, parameter.ds_numel - start)

    def _slice(self, piece: _Piece, kind: str, values: torch.Tensor) -> TensorSlice:
        return TensorSlice(
            name=piece.name,
            kind=kind,
            shape=piece.shape,
            start=piece.start,
            values=values.float().cpu().numpy(),
        )

    def _moments(self, piece: _Piece) -> dict[str, Any]:
        state: dict[str, Any] = self._optimizer.optimizer.state.get(piece.flat, {})
        return state

    def _pieces(self) -> Iterable[_Piece]:
        return self._pieces_of_parameters() if self._stage == 3 else self._pieces_of_groups()

    def _pieces_of_groups(self) -> Iterator[_Piece]:
        optimizer = self._optimizer
        for flat, group in zip(
            optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True
        ):
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is not None:
                    here, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
                    yield _Piece(
                        self._names[parameter],
                        tuple(parameter.shape),
                        _start_in_parameter(mapping, parameter),
                        here.numel,
                        flat,
                        here.start,
                    )
                    assert here.numel == whole.numel

    def _pieces_of_parameters(self) -> Iterator[_Piece]:
        optimizer = self._optimizer
        for flat, group in zip(
            optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True
        ):
            offset = 0
            for parameter in group:
                start, count = self._own_part(parameter)
                if count > 0:
                    shape = tuple(parameter.ds_shape)
                    yield _Piece(self._names[parameter], shape, start, count, flat, offset)
                offset += parameter.partition_numel()

    def _frozen(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """(kind, name, whole tensor) of frozen parameters, under stages 1 and 2."""
        for name, parameter in self._model.named_parameters():
            if not parameter.requires_grad:
                yield "weight", name, self._exact.get(name, parameter.detach())

    def _buffers(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        persistent = self._model.state_dict(keep_vars=True).keys()
        for name, buffer in self._model.named_buffers():
            if name in persistent:
                yield "weight", name, buffer

    # -- writing ----------------------------------------------------------------------------

    def load(self, reader: StateReader, *, optimizer_steps: int) -> None:
        """Collective under stage 3, where a rank with a damaged file goes through all of it, too."""
        base = self._optimizer.optimizer
        base.state.clear()
        damage: CheckpointDamaged | None = None
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                if self._alone and not parameter.requires_grad:
                    continue
                with self._gathered(parameter):
                    try:
                        copy_whole(reader, "weight", name, parameter)
                        if not parameter.requires_grad and parameter.numel() > 0:
                            self._take_exact(reader, name, parameter)
                    except CheckpointDamaged as error:
                        damage = damage or error
            if damage is not None:
                raise damage
            for name, buffer in self._model.named_buffers():
                if name in reader.names("weight"):
                    copy_whole(reader, "weight", name, buffer)
            for piece in self._pieces():
                _copy_piece(reader, "weight", piece, piece.flat)
                if optimizer_steps > 0 and piece.name in reader.names("exp_avg"):
                    if piece.flat not in base.state:
                        base.state[piece.flat] = _new_state(piece, optimizer_steps)
                    for moment in _MOMENTS:
                        _copy_piece(reader, moment, piece, base.state[piece.flat][moment])

    def _take_exact(self, reader: StateReader, name: str, parameter: torch.Tensor) -> None:
        """What is saved of a frozen parameter is the checkpoint's number, not the one that computes."""
        values = torch.from_numpy(np.array(reader.read("weight", name, 0, parameter.numel())))
        values = values.reshape(parameter.shape)
        known = self._exact.get(name)
        # Equal ones stay where they are: in mapped files, which cost no memory.
        if known is None or not torch.equal(known.to(values.dtype), values):
            self._exact.pop(name, None)
            if not torch.equal(values.to(parameter.dtype).to(values.dtype), values):
                self._exact[name] = values

    def _gathered(self, parameter: Any) -> Any:
        """The whole parameter, where it is split; what is written to it is kept on every rank."""
        if self._stage != 3:
            return nullcontext()
        import deepspeed

        # Every rank writes the same, so rank 0's are everyone's.
        return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def _start_in_parameter(mapping: Any, parameter: torch.Tensor) -> int:
    """Of a fragment, in the flattened parameter: the fragment is a view of its storage."""
    fragment = mapping.lp_fragment
    return int(fragment.storage_offset() - parameter.data.storage_offset())


def _new_state(piece: _Piece, optimizer_steps: int) -> dict[str, torch.Tensor]:
    """What AdamW holds of a flat vector after that many steps."""
    zeros = {moment: torch.zeros_like(piece.flat.detach()) for moment in _MOMENTS}
    step = torch.tensor(float(optimizer_steps), dtype=torch.float32, device=piece.flat.device)
    return {"step": step, **zeros}


def _copy_piece(reader: StateReader, kind: str, piece: _Piece, vector: torch.Tensor) -> None:
    values = reader.read(kind, piece.name, piece.start, piece.start + piece.count)
    piece.of(vector).copy_(torch.from_numpy(np.array(values)))
