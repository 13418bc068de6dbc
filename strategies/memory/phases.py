"""What a step holds at most in each of its phases, of the parts that it is made of."""

from __future__ import annotations

from dataclasses import dataclass

from ftlaunch.strategies.memory.buckets import BROADCAST_BYTES, zero_traffic
from ftlaunch.strategies.memory.output import Output
from ftlaunch.strategies.memory.request import FP32_BYTES, MemoryRequest
from ftlaunch.strategies.memory.states import States


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the phases are made of, in bytes.

    held       by every phase: weights, masters, moments
    kept       by autograd at the end of the forward pass
    left       of it when the backward pass is widest, with what it computes there
    passing    in a layer that keeps nothing, before anything is kept
    casts      of weights to the dtype of products, until the window's end
    largest    the gradient of the largest weight that is trained
    """

    held: int
    kept: int
    left: int
    passing: int
    casts: int
    largest: int
    output: Output


def data_parallel_phases(
    request: MemoryRequest, parts: Parts, trained: int, total: int
) -> tuple[dict[str, int], int]:
    """(phase → bytes, bytes of buckets) of ddp and mindspore."""
    gradients = FP32_BYTES * trained
    alone = request.world_size == 1
    # A rank that is alone drops its gradients after each step; DDP keeps them in its buckets.
    before = 0 if alone and not request.accumulates else gradients
    base = parts.held + parts.casts
    loss = parts.kept + parts.output.weight + parts.output.work
    forward = base + before + max(parts.passing, loss)
    backward = base + before + parts.left + parts.output.weight
    # The embeddings are last; the head's gradient of a shared weight waits for theirs.
    end = base + gradients + parts.output.weight + parts.largest
    phases = {
        "forward": forward,
        "backward": backward,
        "end of backward": end,
        "optimizer": parts.held + gradients,
    }
    if alone or request.strategy == "mindspore":
        return phases, 0
    # After the first step DDP lays its buckets in the order that it has seen.
    phases["buckets laid anew"] = parts.held + 2 * gradients
    phases["start"] = FP32_BYTES * (total + trained) + min(FP32_BYTES * total, BROADCAST_BYTES)
    return phases, gradients


def zero_phases(
    request: MemoryRequest, parts: Parts, held: States, trained: int, total: int
) -> tuple[dict[str, int], int]:
    """(phase → bytes, bytes of buckets) of zero1, zero2 and zero3."""
    stage = int(request.strategy[-1])
    width = held.gradient_width
    traffic = zero_traffic(
        request.zero,
        stage=stage,
        width=width,
        num_parameters=total,
        num_trainable=trained,
        overlaps=request.accelerator != "cpu",
        is_gloo=request.accelerator == "cpu",
    )
    # Stage 3 has a place for its gradients, stages 1 and 2 keep those of micro-batches before.
    gradients = held.gradients if stage == 3 or request.accumulates else 0
    base = parts.held + gradients + (traffic.bucket if stage == 3 else 0)
    bucket = traffic.bucket if stage < 3 else 0
    weight = parts.output.weight
    whole = base + traffic.gathered
    loss = weight + parts.output.work
    left = round(parts.kept * (1 - traffic.filled))
    # Stage 1 keeps what the backward pass gives whole until its step.
    whole_gradients = held.gradients if stage == 1 and not request.accumulates else 0
    exchange = base + min(traffic.gathered, parts.largest) + left + weight + whole_gradients
    exchange += bucket + traffic.copies
    phases = {
        "forward": whole + max(parts.passing, parts.kept + max(traffic.fetched, loss)),
        "backward": whole + parts.left + weight + bucket,
        "exchange": exchange,
        "optimizer": base + held.stepping + whole_gradients,
    }
    return phases, traffic.bucket + traffic.copies + traffic.gathered + traffic.fetched
