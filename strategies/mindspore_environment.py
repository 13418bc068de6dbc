"""The variables by which MindSpore's processes find each other, instead of msrun. Pure.

https://www.mindspore.cn/tutorials/en/r2.7.1/parallel/dynamic_cluster.html
"""

from __future__ import annotations

from ftlaunch.cluster.world import World

# The process that the ranks meet at, numbered apart from them.
SCHEDULER_RANK = -1
SCHEDULER_TITLE = "MindSpore's scheduler"
SCHEDULER_MODULE = "ftlaunch.strategies.mindspore.scheduler"


def rank_variables(world: World, *, timeout_seconds: float) -> dict[str, str]:
    """Of one rank; none where there is nobody to meet."""
    if world.size == 1:
        return {}
    return {
        **_cluster(world, timeout_seconds),
        "MS_ROLE": "MS_WORKER",
        "MS_NODE_ID": str(world.rank),
        # One that lies in the user's environment is for NPUs, which get it again.
        "RANK_TABLE_FILE": "",
    }


def scheduler_variables(world: World, *, timeout_seconds: float) -> dict[str, str]:
    """Of the scheduler; `world` is that of any rank."""
    return {
        **_cluster(world, timeout_seconds),
        "MS_ROLE": "MS_SCHED",
        # By a rank table it would number the ranks anew.
        "RANK_TABLE_FILE": "",
    }


def _cluster(world: World, timeout_seconds: float) -> dict[str, str]:
    return {
        "MS_WORKER_NUM": str(world.size),
        "MS_SCHED_HOST": world.master_address,
        "MS_SCHED_PORT": str(world.master_port),
        # Until everybody is there.
        "MS_TOPO_TIMEOUT": str(max(1, int(timeout_seconds))),
    }


def logging_variables() -> dict[str, str]:
    """Warnings and errors only; its lines of the level INFO are hundreds a start."""
    return {"GLOG_v": "2"}
