"""Reaching the nodes of a SLURM allocation, from inside it: one `srun` for each node.

Not one for all: that would splice the lines of the nodes, and end all agents with one. Submitting a
job is `cluster.submit`'s.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.transport import Way

# How the allocation was cut into tasks is no business of a step that starts one agent: inherited,
# these would divide the node's cores and devices by tasks that do not exist.
_OF_TASKS = re.compile(
    r"(SLURM|SRUN)_(NTASKS.*|NPROCS|TASKS_PER_NODE|CPUS_PER_TASK|TRES_PER_TASK|GPUS_PER_TASK"
    r"|GPUS_PER_SOCKET|GPU_BIND|CPU_BIND.*|MEM_BIND.*|DISTRIBUTION|HINT|EXACT|EXCLUSIVE|OVERCOMMIT"
    r"|OVERLAP|WHOLE|THREADS_PER_CORE|CORE_SPEC|STEP_.*|PROCID|LOCALID|NODEID|JOB_NODELIST_STEP"
    r"|KILL_BAD_EXIT|WAIT|UNBUFFEREDIO|LABELIO|MULTI_PROG|STDINMODE|STDOUTMODE|STDERRMODE"
    r"|OPEN_MODE|PROLOG|EPILOG|TASK_PROLOG|TASK_EPILOG|WORKING_DIR|HET_SIZE|MPI_TYPE|QUIET|VERBOSE)"
)
_ADVICE = {
    "expired": "the allocation has ended: ask for a new one",
    "invalid job id": "the allocation has ended: ask for a new one",
    "already completing or completed": "the allocation has ended: ask for a new one",
    "not in job": "the node is not part of this allocation",
    "node is not in this": "the node is not part of this allocation",
    "unable to contact slurm controller": "SLURM's controller does not answer from here",
    "munge": "munged, by which SLURM knows who you are, does not run on one of the nodes",
}


def srun_way(host: str, environ: Mapping[str, str]) -> Way:
    """UserError where there is no srun."""
    program = shutil.which("srun")
    if program is None:
        raise UserError(
            f"SLURM_JOB_ID is {environ.get('SLURM_JOB_ID')}, but there is no srun on this machine, "
            "which starts the job's processes on the nodes of an allocation. Put it on PATH, or run "
            "on this machine alone with --cluster local."
        )
    words = (
        program,
        "--nodes=1",
        "--ntasks=1",
        f"--nodelist={host}",
        # Beside whatever else runs in the allocation: never waits for it.
        "--overlap",
        # Everything that was granted on the node; ranks choose their own cores.
        "--cpu-bind=none",
        "--mpi=none",
        "--export=ALL",
    )
    env = {name: value for name, value in environ.items() if not _OF_TASKS.fullmatch(name)}
    return Way(name=host, kind="slurm", words=words, env=env)


def advice(host: str, words: str) -> str:
    """What to do about what srun has said; "" where it means nothing to us."""
    lowered = words.lower()
    for sign, remedy in _ADVICE.items():
        if sign in lowered:
            return remedy
    return ""
