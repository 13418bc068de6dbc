"""What to say of a job that fits nowhere: how many more machines of the same kind would hold it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ftlaunch.launcher.memory_fit import Room, Way, Work, measure
from ftlaunch.launcher.memory_table import MemoryRow, gib
from ftlaunch.strategies.registry import entry

_MOST_NODES = 4096
_ANYWAY = " An estimate is no measurement: name a --strategy to try it all the same."


def no_room(
    rows: Sequence[MemoryRow],
    ways: Sequence[Way],
    work: Work,
    room: Room,
    *,
    num_machines: int,
    is_one_machine: bool,
    device: str,
    global_batch_size: int,
) -> str:
    """rows    of the table, none of which may be chosen
    ways    that would be looked at with more machines
    """
    architecture = work.memory.architecture
    assert architecture is not None, "nothing was measured"
    lacking = next((row for row in rows if row.fits), None)
    if lacking is not None:
        each = entry(lacking.strategy)
        return (
            f"no strategy that is installed fits: {lacking.label} would, with {gib(lacking.peak)} GiB of "
            f"{gib(room.usable)} for a rank, but {lacking.remark}. Install it: pip install "
            f"'{each.package}>={each.at_least}'.{_ANYWAY}"
        )
    least = min(rows, key=lambda row: (row.lacking + row.host_lacking, row.peak))
    length = work.memory.length
    text = (
        f"the model's {architecture.num_parameters:,} parameters do not fit on {work.world_size} × "
        f"{device}: even {least.label} needs {gib(least.peak)} GiB for a rank with "
        f"{least.micro_batch} row(s) of {length:,} tokens, and {gib(room.usable)} are counted on"
    )
    if least.host_lacking:
        text += f"; in the host's memory {gib(least.host)}, of {gib(room.host)}"
    words, number = smallest_in_words(
        ways, work, room, num_machines=num_machines, is_one_machine=is_one_machine
    )
    text += f". {words}. "
    if number is None:
        return (
            f"{text}Choose devices with more memory, a smaller data.max_length or a smaller model."
            f"{_ANYWAY}"
        )
    text += "Use so many" + ("" if is_one_machine else f" (--nodes {number})")
    text += " or a smaller data.max_length"
    text += ", or an adapter (lora.r=16)." if work.memory.is_trained is None else "."
    ranks = number * (work.world_size // num_machines)
    if ranks > global_batch_size:
        text += f" So many ranks need train.global_batch_size={ranks} or more."
    return text + _ANYWAY


def smallest_in_words(
    ways: Sequence[Way], work: Work, room: Room, *, num_machines: int, is_one_machine: bool
) -> tuple[str, int | None]:
    """("The smallest cluster that would hold it: 4 such nodes …", its number of nodes, None for none)."""
    found = {
        offload: smallest_cluster(some, work, room, num_nodes=num_machines)
        for offload in (False, True)
        if (some := [way for way in ways if way.offload == offload])
    }
    sizes = [(number, way) for number, way in filter(None, found.values())]
    if not sizes:
        whole = {way.strategy for way in ways} <= {"ddp", "mindspore"}
        why = "every rank has the whole model" if whole else "activations are not divided"
        return f"No number of such devices would hold it, since {why}", None
    number, way = min(sizes, key=lambda size: (size[0], size[1].offload))
    kind = "machines like this one" if is_one_machine else "such nodes"
    label = measure(way, work, room).label
    ranks = work.world_size // num_machines
    text = f"The smallest cluster that would hold it: {number} {kind} with {ranks} rank(s) each, {label}"
    without = found.get(False)
    if way.offload and without is not None:
        text += f" ({without[0]} without offload)"
    return text, number


def smallest_cluster(
    ways: Sequence[Way], work: Work, room: Room, *, num_nodes: int
) -> tuple[int, Way] | None:
    """(the least number of nodes that holds it, how); None: no number does, for all that is known.

    num_nodes   of which is known that they do not; each has the same number of ranks

    More nodes never make it worse, so the number is found by doubling and halving.
    """
    ranks = work.world_size // num_nodes

    def way_on(nodes: int) -> Way | None:
        world_size = nodes * ranks
        total = work.share * work.world_size
        share = -(-total // world_size)
        rows = min(work.rows, share)
        larger = replace(work, world_size=world_size, share=share, rows=rows)
        return next((way for way in ways if measure(way, larger, room).fits), None)

    too_few, enough = num_nodes, num_nodes
    while (way := way_on(enough)) is None:
        if enough >= _MOST_NODES:
            return None
        too_few, enough = enough, min(2 * enough, _MOST_NODES)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        found = way_on(middle)
        if found is None:
            too_few = middle
        else:
            enough, way = middle, found
    return enough, way
