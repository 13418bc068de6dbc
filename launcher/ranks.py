"""The ranks of a plan: their numbers, commands, environments and logs. Starts nothing itself."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ftlaunch.cluster.events import Prepare, RankStart
from ftlaunch.cluster.gathering import Network
from ftlaunch.cluster.hccl import rank_variables as hccl_rank_variables
from ftlaunch.cluster.world import World
from ftlaunch.launcher.config import ClusterOptions
from ftlaunch.launcher.layout import HostPlan
from ftlaunch.launcher.npus import rank_table_path
from ftlaunch.launcher.plan import LaunchPlan
from ftlaunch.strategies.mindspore_environment import (
    SCHEDULER_MODULE,
    SCHEDULER_RANK,
    SCHEDULER_TITLE,
    logging_variables,
    rank_variables,
    scheduler_variables,
)
from ftlaunch.strategies.model_config import model_type_of
from ftlaunch.strategies.registry import entry

# Below logs/. It becomes the folder's plan.json once the ranks have seen that the job is the folder's.
PLAN_OF_RANKS = "plan-of-ranks.json"


def worlds(hosts: Sequence[HostPlan], address: str, port: int) -> Iterator[list[World]]:
    """The ranks of each node: rank numbers rise node by node."""
    first = 0
    for node, host in enumerate(hosts):
        yield [
            World(
                rank=first + local_rank,
                size=sum(each.num_devices for each in hosts),
                local_rank=local_rank,
                local_size=host.num_devices,
                node_rank=node,
                num_nodes=len(hosts),
                master_address=address,
                master_port=port,
            )
            for local_rank in range(host.num_devices)
        ]
        first += host.num_devices


def log_path(folder: Path, rank: int) -> str:
    return str(folder / "logs" / f"rank-{rank:05d}.log")


def preparation(plan: LaunchPlan) -> Prepare:
    """What the fork servers import, and what every rank finds in its environment."""
    preload: list[str] = []
    if plan.start_method == "fork":
        preload = ["ftlaunch.launcher.worker", "ftlaunch.launcher.plan_file"]
        preload.append("ftlaunch.strategies.session")
        preload += entry(plan.strategy).preload
        model_type = model_type_of(plan.options.model)
        if model_type is not None and "torch" in entry(plan.strategy).implementation:
            preload.append(f"transformers.models.{model_type}.modeling_{model_type}")
        if plan.mode == "bench":
            preload.append("ftlaunch.strategies.measurement")
        if plan.mode != "eval" and plan.options.lora.r is not None:
            preload.append("peft")
    return Prepare(
        start_method=plan.start_method,
        env=rank_environment(plan),
        preload=preload,
        # A rank of ours has nothing to save that is not saved already.
        grace_seconds=0.0,
    )


def rank_starts(
    plan: LaunchPlan, network: Network, port: int, folder: Path, hccl: Mapping[str, str]
) -> list[list[RankStart]]:
    """The ranks of each node, and on node 0 what they meet at where that is a process of its own.

    hccl   what ranks on NPUs need beside their own variables (`npus.hccl_variables`)
    """
    scheduled = entry(plan.strategy).scheduler and plan.world_size > 1
    timeout = plan.cluster.collective_timeout_seconds
    all_worlds = list(worlds(plan.hosts, network.address, port))
    starts = [
        [
            RankStart(
                rank=world.rank,
                title="",
                module="ftlaunch.launcher.worker",
                arguments=[str(folder / "logs" / PLAN_OF_RANKS)],
                env={
                    **world.to_environment(),
                    **device_environment(host),
                    **interface_environment(interface, os.environ),
                    **(rank_variables(world, timeout_seconds=timeout) if scheduled else {}),
                    **_npu_environment(plan, host, world, hccl),
                },
                working_dir=None,
                log_path=log_path(folder, world.rank),
                inherits_listener=world.rank == 0 and plan.world_size > 1 and not scheduled,
                shows_output=shows_output(plan.cluster.show_output or "none", world.rank),
            )
            for world in ranks
        ]
        for host, ranks, interface in zip(plan.hosts, all_worlds, network.interfaces, strict=True)
    ]
    if scheduled:
        scheduler = RankStart(
            rank=SCHEDULER_RANK,
            title=SCHEDULER_TITLE,
            module=SCHEDULER_MODULE,
            arguments=[],
            env=scheduler_variables(all_worlds[0][0], timeout_seconds=timeout),
            working_dir=None,
            log_path=str(folder / "logs" / "scheduler.log"),
            inherits_listener=False,
            shows_output=False,
        )
        starts[0].insert(0, scheduler)
    return starts


def shows_output(choice: str, rank: int) -> bool:
    return choice == "all" or (choice == "first" and rank == 0)


def output_label(cluster: ClusterOptions, hosts: Sequence[HostPlan], rank: int) -> str:
    """What stands before a line that a rank has printed."""
    if cluster.show_output != "all":
        return ""
    ends = itertools.accumulate(host.num_devices for host in hosts)
    name = next(host.name for host, end in zip(hosts, ends, strict=True) if rank < end)
    return f"[{name}:{rank}] "


def _npu_environment(
    plan: LaunchPlan, host: HostPlan, world: World, hccl: Mapping[str, str]
) -> dict[str, str]:
    if plan.accelerator != "ascend":
        return {}
    table = rank_table_path(plan.cluster)
    device = host.npus[world.local_rank]
    return {**hccl, **hccl_rank_variables(world, device=device, rank_table=table)}


def device_environment(host: HostPlan) -> dict[str, str]:
    if host.devices is None:
        return {}
    # By name: places would count devices that the plan has left out.
    return {"CUDA_VISIBLE_DEVICES": ",".join(host.devices)}


def interface_environment(interface: str, environ: Mapping[str, str]) -> dict[str, str]:
    """By which interface a node's ranks talk to the others; what the user has set stays as it is.

    Without it each of these libraries guesses, gloo by the address of the host's name, which is
    often one that only the host itself can reach.
    """
    if not interface:
        return {}
    names = ["GLOO_SOCKET_IFNAME"]
    if interface != "lo":
        # "=": this one, not all whose names begin so.
        names += ["NCCL_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME"]
    prefix = {"NCCL_SOCKET_IFNAME": "=", "HCCL_SOCKET_IFNAME": "="}
    return {name: prefix.get(name, "") + interface for name in names if name not in environ}


def rank_environment(plan: LaunchPlan) -> dict[str, str]:
    """Every variable that all ranks are given, and why."""
    threads = str(plan.threads_per_rank)
    env = {
        # Threads of torch, of its libraries and of the tokenizers: never more than the cores.
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "RAYON_NUM_THREADS": threads,
        # numpy's own products are small here, and a pool of threads would not survive a fork.
        "OPENBLAS_NUM_THREADS": "1",
        # A thread that waits for another spins for a moment, not for the 300,000 rounds of libgomp:
        # beside other work it burns the core that the slower one needs (steps 3 to 20 times as long).
        "GOMP_SPINCOUNT": "20000",
        # Counting GPUs must not call the driver in the process that ranks are forked from.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        # Logs are files.
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if entry(plan.strategy).scheduler:
        env |= logging_variables()
    if plan.accelerator == "cpu":
        # glibc gives large blocks back to the kernel at once, and the next tensor of that size pays
        # for fresh pages: 4 to 7 % of a step of a 22 M model. Keep them.
        env["MALLOC_MMAP_THRESHOLD_"] = str(1 << 30)
        env["MALLOC_TRIM_THRESHOLD_"] = str(1 << 32)
    return env
