"""What gradients and gathered weights travel in. Knows how torch's DDP and DeepSpeed 0.19 lay them out.

Sources: torch's `reducer.cpp`; DeepSpeed's `stage_1_and_2.py`, `stage3.py` and
`partitioned_param_coordinator.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

# DeepSpeed's defaults, in elements: `make_deepspeed_config` leaves them.
REDUCE_BUCKET = 500_000_000
PREFETCH_BUCKET = 50_000_000
MAX_LIVE = 1_000_000_000
# Parameters up to this size are never split.
PERSISTENT = 100_000
# What DDP sends its first weights in.
BROADCAST_BYTES = 250 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroBuffers:
    """DeepSpeed's settings of its buffers, in elements."""

    reduce_bucket: int = REDUCE_BUCKET
    prefetch_bucket: int = PREFETCH_BUCKET
    max_live: int = MAX_LIVE


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes on one device.

    bucket     gradients are put into it in the backward pass
    copies     of it while it is reduced
    filled     the share of the gradients after which it is reduced: 1 where it holds them all
    gathered   weights that are whole although they are held in parts
    fetched    of them on their way
    """

    bucket: int
    copies: int
    filled: float
    gathered: int
    fetched: int


def zero_traffic(
    buffers: ZeroBuffers,
    *,
    stage: int,
    width: int,
    num_parameters: int,
    num_trainable: int,
    overlaps: bool,
    is_gloo: bool,
) -> Traffic:
    """width   bytes of a weight and of a gradient on its way

    overlaps   two buckets take turns (stages 1 and 2)
    is_gloo    its reduce-scatter works on a copy
    """
    full = min(buffers.reduce_bucket, num_trainable)
    number = 2 if overlaps and stage < 3 else 1
    copies = 2 if stage == 3 and is_gloo else 1
    gathered = min(num_parameters, buffers.max_live) if stage == 3 else 0
    fetched = min(num_parameters, buffers.prefetch_bucket) if stage == 3 else 0
    return Traffic(
        bucket=number * width * buffers.reduce_bucket,
        copies=copies * width * full,
        filled=full / max(1, num_trainable),
        gathered=width * gathered,
        fetched=width * fetched,
    )
