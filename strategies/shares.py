"""What a rank saves of what every rank has whole: the r-th of W equal runs of all elements. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ftlaunch.cluster.world import World


def own_runs(sizes: Sequence[int], world: World) -> Iterator[tuple[int, int, int]]:
    """(number of the tensor, first element, end) of this rank's run, in the order of the tensors.

    sizes   elements of each tensor
    """
    total = sum(sizes)
    first = total * world.rank // world.size
    last = total * (world.rank + 1) // world.size
    position = 0
    for number, size in enumerate(sizes):
        begin, end = max(first, position), min(last, position + size)
        if begin < end:
            yield number, begin - position, end - position
        position += size
