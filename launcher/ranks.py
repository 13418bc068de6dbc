"""The ranks of a plan: their numbers, commands, environments and logs. Starts nothing itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ftlaunch.cluster.events import Prepare, RankStart
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

ADDRESS = "127.0.0.1"
# Below logs/. It becomes the folder's plan.json once the ranks have seen that the job is the folder's.
PLAN_OF_RANKS = "plan-of-ranks.json"


def worlds(hosts: Sequence[HostPlan], devices: int, port: int) -> Iterator[list[World]]:
    """The ranks of each node: rank numbers rise node by node."""
    for node in range(len(hosts)):
        yield [
            World(
                rank=node * devices + local_rank,
                size=len(hosts) * devices,
                local_rank=local_rank,
                local_size=devices,
                node_rank=node,
                num_nodes=len(hosts),
                master_address=ADDRESS,
                master_port=port,
            )
            for local_rank in range(devices)
        ]


def log_path(folder: Path, rank: int) -> str:
    return str(folder / "logs" / f"rank-{rank:05d}.log")


def preparation(plan: LaunchPlan) -> Prepare:
    """What the fork servers import, and what every rank finds in its environment."""
    preload: list[str] = []
    if plan.start_method == "fork":
        preload = ["ftlaunch.launcher.worker", "ftlaunch.strategies.session"]
        preload += entry(plan.strategy).preload
        model_type = model_type_of(plan.options.model)
        if model_type is not None and "torch" in entry(plan.strategy).implementation:
            preload.append(f"transformers.models.{model_type}.modeling_{model_type}")
    return Prepare(
        start_method=plan.start_method,
        env=rank_environment(plan),
        preload=preload,
        # A rank of ours has nothing to save that is not saved already.
        grace_seconds=0.0,
    )


def rank_starts(
    plan: LaunchPlan, port: int, folder: Path, hccl: Mapping[str, str]
) -> list[list[RankStart]]:
    """The ranks of each node, and on node 0 what they meet at where that is a process of its own.

    hccl   what ranks on NPUs need beside their own variables (`npus.hccl_variables`)
    """
    scheduled = entry(plan.strategy).scheduler and plan.world_size > 1
    timeout = plan.cluster.collective_timeout_seconds
    all_worlds = list(worlds(plan.hosts, plan.hosts[0].num_devices, port))
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
        for host, ranks in zip(plan.hosts, all_worlds, strict=True)
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
    return f"[{hosts[rank // hosts[0].num_devices].name}:{rank}] "


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
        # All ranks are on this machine; its host name may resolve to an address that is not.
        "GLOO_SOCKET_IFNAME": "lo",
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
