"""The NPUs of a job's ranks: the rank table that may say which, their places, who else uses them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.hccl import chooses_ports, find_interface, hold_base_port, host_variables
from ftlaunch.cluster.machine import Machine
from ftlaunch.cluster.rank_table import RankTable, device_places, read_rank_table
from ftlaunch.launcher.config import ClusterOptions
from ftlaunch.strategies.model_config import absolute_path


def with_rank_table(
    cluster: ClusterOptions, machine: Machine, environ: Mapping[str, str]
) -> ClusterOptions:
    """The options with the rank table read, once: that of the key, else RANK_TABLE_FILE's.

    The variable counts on Ascend hosts only, where MindSpore and HCCL would read it, too. UserError
    when the file is no rank table.
    """
    if isinstance(cluster.rank_table, RankTable):
        return cluster
    path = cluster.rank_table
    if machine.accelerator == "ascend" and path is None:
        path = environ.get("RANK_TABLE_FILE") or None
    if machine.accelerator != "ascend" or path is None:
        return cluster
    return replace(cluster, rank_table=read_rank_table(str(absolute_path(path))))


def rank_table_path(cluster: ClusterOptions) -> str | None:
    """The file that HCCL is to read; None without a rank table."""
    return cluster.rank_table.path if isinstance(cluster.rank_table, RankTable) else None


@contextmanager
def hccl_variables(
    machine: Machine,
    environ: Mapping[str, str],
    *,
    timeout_seconds: float,
    port: int,
    is_here: bool,
) -> Iterator[dict[str, str]]:
    """What the ranks of one host need for HCCL, none without NPUs; the ports are kept meanwhile.

    port      of the rendezvous, which HCCL is not to take
    is_here   the ranks run on this machine; else their ports are only known to be free here
    """
    if machine.accelerator != "ascend":
        yield {}
        return
    base_port, lock = None, None
    if not chooses_ports(environ):
        base_port, lock = hold_base_port(avoid=port)
    try:
        variables = host_variables(
            environ,
            base_port=base_port,
            interface=find_interface() if is_here else None,
            timeout_seconds=timeout_seconds,
            has_infinity=machine.fast_bf16,
        )
        if machine.fast_bf16:
            # Not the user's to choose: with saturation an overflow would never be seen.
            variables["MS_ASCEND_CHECK_OVERFLOW_MODE"] = "INFNAN_MODE"
        yield variables
    finally:
        if lock is not None:
            lock.close()


def npu_places(
    cluster: ClusterOptions,
    machines: Sequence[Machine],
    devices: Sequence[int],
    accelerator: str,
    *,
    is_one_machine: bool,
) -> list[tuple[int, ...]]:
    """The places of each node's NPUs. Ranks of one machine are numbered through, as MindSpore does."""
    table = cluster.rank_table
    if accelerator != "ascend":
        if table is not None:
            raise UserError(
                f"cluster.rank_table is set, but {machines[0].hostname} has no Ascend NPU that is "
                f"visible: a rank table says which NPU a rank has, and this job runs on "
                f"{accelerator}. Leave it out."
            )
        return [()] * len(machines)
    if not isinstance(table, RankTable):
        return [
            tuple(range(first, first + count))
            for number, count in enumerate(devices)
            for first in [number * count if is_one_machine else 0]
        ]
    if not is_one_machine:
        return list(device_places(table, list(zip(machines, devices, strict=True))))
    [places] = device_places(table, [(machines[0], sum(devices))])
    return [places[first : first + devices[0]] for first in range(0, len(places), devices[0])]


def refuse_busy(
    cluster: ClusterOptions, machines: Sequence[Machine], npus: Sequence[tuple[int, ...]]
) -> None:
    """UserError when a rank would share its NPU with a process that is there already."""
    if cluster.allow_busy_devices:
        return
    lines = []
    for machine, places in zip(machines, npus, strict=True):
        names = machine.device_ids
        for place in places:
            if place < len(names) and (users := machine.busy.get(names[place])):
                number = machine.device_numbers[place]
                lines.append(f"  {machine.hostname}, device {number}: {users}")
    if lines:
        raise UserError(
            "devices that this job would use are in use:\n" + "\n".join(lines) + "\n"
            "A rank needs an NPU of its own: a second process on it fails late and obscurely, for "
            "want of memory or of HCCL's ports. End these processes, choose other devices with "
            "ASCEND_RT_VISIBLE_DEVICES, or share them all the same with "
            "cluster.allow_busy_devices=true."
        )
