"""The ranks of a plan: their numbers, commands, environments and logs. Starts nothing itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ftlaunch.cluster.events import RankStart
from ftlaunch.cluster.transport import python_command
from ftlaunch.cluster.world import World
from ftlaunch.launcher.plan import LaunchPlan

ADDRESS = "127.0.0.1"
# Below logs/. It becomes the folder's plan.json once the ranks have seen that the job is the folder's.
PLAN_OF_RANKS = "plan-of-ranks.json"


def rank_starts(plan: LaunchPlan, port: int, folder: Path) -> list[list[RankStart]]:
    """The ranks of each node: rank numbers rise node by node."""
    starts = []
    per_node = plan.world_size // plan.num_nodes
    for node, host in enumerate(plan.hosts):
        ranks = []
        for local_rank in range(per_node):
            world = World(
                rank=node * per_node + local_rank,
                size=plan.world_size,
                local_rank=local_rank,
                local_size=per_node,
                node_rank=node,
                num_nodes=plan.num_nodes,
                master_address=ADDRESS,
                master_port=port,
            )
            ranks.append(
                RankStart(
                    rank=world.rank,
                    argv=python_command(
                        "ftlaunch.launcher.worker", str(folder / "logs" / PLAN_OF_RANKS)
                    ),
                    env={
                        **rank_environment(plan, host.devices),
                        **world.to_environment(),
                    },
                    log_path=str(folder / "logs" / f"rank-{world.rank:05d}.log"),
                    inherits_listener=world.rank == 0 and plan.world_size > 1,
                )
            )
        starts.append(ranks)
    return starts


def rank_environment(plan: LaunchPlan, devices: Sequence[str] | None) -> dict[str, str]:
    """Every variable that a rank is given, and why."""
    threads = str(plan.threads_per_rank)
    env = {
        # Threads of torch, of its libraries and of the tokenizers: never more than the cores.
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "RAYON_NUM_THREADS": threads,
        # A thread that waits for another spins for a moment, not for the 300,000 rounds of libgomp:
        # beside other work it burns the core that the slower one needs (steps 3 to 20 times as long).
        "GOMP_SPINCOUNT": "20000",
        # All ranks are on this machine; its host name may resolve to an address that is not.
        "GLOO_SOCKET_IFNAME": "lo",
        # Logs are files.
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if plan.accelerator == "cpu":
        # glibc gives large blocks back to the kernel at once, and the next tensor of that size pays
        # for fresh pages: 4 to 7 % of a step of a 22 M model. Keep them.
        env["MALLOC_MMAP_THRESHOLD_"] = str(1 << 30)
        env["MALLOC_TRIM_THRESHOLD_"] = str(1 << 32)
    if devices is not None:
        # By name: places would count devices that the plan has left out.
        env["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    return env
