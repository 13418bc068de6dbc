"""What one way to run a job takes, and whether the devices and their hosts have it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ftlaunch.cluster.machine import Machine
from ftlaunch.launcher.job_memory import JobMemory
from ftlaunch.launcher.memory_table import MemoryRow
from ftlaunch.strategies.memory.buckets import ZeroBuffers
from ftlaunch.strategies.memory.estimate import MemoryEstimate, estimate, largest_micro_batch
from ftlaunch.strategies.memory.request import MemoryRequest

# What is counted on of an accelerator: the driver keeps the rest, and there are holes between tensors. An
# estimate may err by more, which the first micro-batch shows. Of a host the operating system, tokens in
# the page cache and a checkpoint on its way have the rest.
_USABLE = 0.97
_USABLE_OF_A_HOST = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A strategy with what can be added to it against want of memory."""

    strategy: str
    precision: str = "fp32"
    offload_optimizer: bool = False
    offload_parameters: bool = False
    checkpointing: bool = False

    @property
    def offload(self) -> bool:
        """Whether anything is kept in the host's memory."""
        return self.offload_optimizer or self.offload_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Bytes that each rank has; 0 where nobody knows.

    capacity   of its device, or its share of the machine on a CPU
    usable     of them
    host       of the host's memory, usable for what is offloaded; on a CPU there is no other
    sharers    ranks on a machine that share what is loaded of the framework
    """

    capacity: int
    usable: int
    host: int
    sharers: int


def find_room(machines: Sequence[Machine], counts: Sequence[int], *, is_one_machine: bool) -> Room:
    """machines and the ranks of each; on one machine all of these are its own."""
    ranks = [sum(counts)] if is_one_machine else list(counts)
    pairs = list(zip(machines, ranks, strict=False))
    share = min(machine.memory_bytes // number for machine, number in pairs)
    if machines[0].accelerator == "cpu":
        return Room(capacity=share, usable=share, host=0, sharers=max(ranks))
    capacity = min(machine.device_memory_bytes for machine in machines)
    return Room(
        capacity=capacity,
        usable=int(_USABLE * capacity),
        host=int(_USABLE_OF_A_HOST * share),
        sharers=1,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What does not depend on the way: a model that is known, and what a rank has to do.

    share   samples of a rank in an optimizer step
    rows    of the longest length that are wanted at once
    fixed   the user said how many
    zero    the sizes of DeepSpeed's buffers
    """

    memory: JobMemory
    accelerator: str
    world_size: int
    share: int
    rows: int
    fixed: bool
    attention: str | None
    zero: ZeroBuffers


def measure(way: Way, work: Work, room: Room, remark: str = "") -> MemoryRow:
    """The row of the table, with the most rows that fit, of those that are wanted."""
    request = _request(way, work)
    # Ranks on a CPU are forked from one process: what it has loaded is there once.
    found = estimate(request)
    shared = _shared(found, room)
    # What is offloaded there stays in the same memory.
    host = found.host if work.accelerator == "cpu" else 0
    usable = room.usable - host
    rows = request.micro_batch
    if room.usable and not work.fixed and found.peak - shared > usable and rows > 1:
        fewer = replace(request, accumulates=True)
        rows = max(1, largest_micro_batch(fewer, usable + shared, rows - 1))
        found = estimate(replace(fewer, micro_batch=rows))
    needed = found.peak - shared + host
    return MemoryRow(
        strategy=way.strategy,
        precision=way.precision,
        offload=way.offload,
        gradient_checkpointing=way.checkpointing,
        micro_batch=rows,
        weights=found.weights,
        masters=found.masters,
        gradients=found.gradients,
        optimizer=found.optimizer,
        activations=found.activations,
        logits=found.logits,
        buckets=found.buckets,
        framework=found.framework - shared,
        peak=needed,
        host=found.host,
        lacking=max(0, needed - room.usable) if room.usable else 0,
        host_lacking=max(0, found.host - room.host) if room.host else 0,
        remark=remark,
    )


def _request(way: Way, work: Work) -> MemoryRequest:
    architecture = work.memory.architecture
    assert architecture is not None, "there is nothing to measure"
    return MemoryRequest(
        architecture=architecture,
        strategy=way.strategy,
        offload_optimizer=way.offload_optimizer,
        offload_parameters=way.offload_parameters,
        accelerator=work.accelerator,
        precision=way.precision,
        world_size=work.world_size,
        micro_batch=work.rows,
        length=work.memory.length,
        accumulates=work.rows < work.share,
        gradient_checkpointing=way.checkpointing,
        attention=work.attention,
        trainable=work.memory.is_trained,
        zero=work.zero,
    )


def _shared(found: MemoryEstimate, room: Room) -> int:
    """Bytes of the framework that are another rank's in the same machine."""
    return found.framework - found.framework // room.sharers
