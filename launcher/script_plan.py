"""What will happen to a user's own script, and why: a pure function, like that of a training job."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.events import Prepare, RankStart, StartMethod
from ftlaunch.cluster.gathering import Network
from ftlaunch.cluster.machine import Machine
from ftlaunch.launcher.config import ClusterOptions
from ftlaunch.launcher.layout import HostPlan, Layout, Reason, describe, make_layout
from ftlaunch.launcher.ranks import (
    device_environment,
    interface_environment,
    log_path,
    shows_output,
    worlds,
)
from ftlaunch.launcher.script_imports import ScriptImports
from ftlaunch.launcher.site import Site

# The process that holds the store, numbered apart from the ranks.
_STORE = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What the user wants run: a file, or a module as for `python -m`.

    copy   a file that holds what `target` held when the job was submitted; this is what runs
    """

    kind: Literal["path", "module"]
    target: str
    arguments: tuple[str, ...]
    copy: str | None = None

    @property
    def text_path(self) -> str:
        """Where the text of a file is."""
        return self.copy or self.target

    def words(self) -> list[str]:
        """The arguments of `ftlaunch.launcher.script`."""
        if self.copy is not None:
            return ["copy", self.copy, self.target, *self.arguments]
        return [self.kind, self.target, *self.arguments]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptPlan:
    """Everything that is decided before the first rank starts. `has_store`: torch is installed."""

    script: Script
    cluster: ClusterOptions
    working_dir: str
    accelerator: str
    num_nodes: int
    world_size: int
    threads_per_rank: int
    start_method: StartMethod
    has_store: bool
    preload: tuple[str, ...]
    hosts: tuple[HostPlan, ...]
    reasons: tuple[Reason, ...]

    def to_json(self) -> Any:
        return {"kind": "script", **asdict(self)}

    def describe(self) -> list[str]:
        return describe(self.hosts, self.reasons)


def make_script_plan(
    cluster: ClusterOptions,
    machines: Sequence[Machine],
    site: Site,
    script: Script,
    *,
    working_dir: str,
    imports: ScriptImports,
    assumed: bool = False,
) -> ScriptPlan:
    """UserError when the ranks do not fit the machines."""
    name = script.target if script.kind == "path" else f"-m {script.target}"
    reasons = [Reason(choice="script", value=name, why=f"in {working_dir}")]
    layout = make_layout(cluster, machines, site, reasons, assumed=assumed, default_start="exec")
    start_method, preload = layout.start_method, imports.anywhere
    if cluster.start_method is None and _shares_imports(layout, site, imports):
        start_method, preload = "fork", imports.leading
        why = (
            "no rank has more than a core, and the script imports torch before anything else: they are "
            "forked from a process that has imported it once"
        )
        changed = Reason(choice="start", value="fork", why=why)
        reasons = [changed if reason.choice == "start" else reason for reason in reasons]
    return ScriptPlan(
        script=script,
        cluster=cluster,
        working_dir=working_dir,
        accelerator=layout.accelerator,
        num_nodes=len(layout.hosts),
        world_size=layout.world_size,
        threads_per_rank=layout.threads_per_rank,
        start_method=start_method,
        has_store="torch" in machines[0].versions,
        preload=preload if start_method == "fork" else (),
        hosts=layout.hosts,
        reasons=tuple(reasons),
    )


def _shares_imports(layout: Layout, site: Site, imports: ScriptImports) -> bool:
    """Whether to fork the ranks of a script without having been asked to.

    Where each has one core only they would import one after the other. With more cores they import side
    by side, and numpy's pool of threads, which does not survive a fork, is worth having. On accelerators
    forked ranks have not been tried.
    """
    ranks = [host.num_devices for host in layout.hosts]
    on_one_machine = sum(ranks) if site.is_one_machine else max(ranks)
    return (
        layout.accelerator == "cpu"
        and on_one_machine > 1
        and layout.threads_per_rank == 1
        and "torch" in imports.leading
    )


def check_script(script: Script) -> None:
    """UserError when the file is not there, or cannot be read."""
    if script.kind == "module":
        if not all(part.isidentifier() for part in script.target.split(".")):
            raise UserError(f"-m {script.target!r}: a module is named like package.module.")
        return
    path = Path(script.text_path)
    try:
        if path.is_dir():
            raise UserError(f"the script {path} is a folder. Name the file that is to be run.")
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise UserError(
            f"the script {path} cannot be read: {error.strerror}. Correct its path; the working "
            f"folder is {Path.cwd()}."
        ) from None


def preparation(plan: ScriptPlan, environ: Mapping[str, str]) -> Prepare:
    """What every rank finds in its environment; what the user has set stays as it is, but for what a
    fork cannot bear.
    """
    env = {"PYTHONUNBUFFERED": "1"}
    if "OMP_NUM_THREADS" not in environ:
        env["OMP_NUM_THREADS"] = str(plan.threads_per_rank)
    if plan.start_method == "fork":
        # Counting GPUs must not call the driver in the process that ranks are forked from, and a
        # pool of threads would not survive a fork.
        env |= {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "OPENBLAS_NUM_THREADS": "1"}
    return Prepare(
        start_method=plan.start_method,
        env=env,
        preload=["ftlaunch.launcher.script", *plan.preload] if plan.start_method == "fork" else [],
        grace_seconds=plan.cluster.grace_seconds,
    )


def script_starts(
    plan: ScriptPlan, network: Network, port: int, folder: Path, *, restart: int
) -> list[list[RankStart]]:
    """The ranks of each node, and on node 0 the store that they meet at."""
    starts = []
    for host, ranks, interface in zip(
        plan.hosts, worlds(plan.hosts, network.address, port), network.interfaces, strict=True
    ):
        starts.append(
            [
                RankStart(
                    rank=world.rank,
                    title="",
                    module="ftlaunch.launcher.script",
                    arguments=plan.script.words(),
                    env={
                        **world.to_environment(),
                        **_torchrun_variables(plan, world.rank, restart),
                        **device_environment(host),
                        **interface_environment(interface, os.environ),
                    },
                    working_dir=plan.working_dir,
                    log_path=log_path(folder, world.rank),
                    inherits_listener=False,
                    shows_output=shows_output(plan.cluster.show_output or "first", world.rank),
                )
                for world in ranks
            ]
        )
    if plan.has_store:
        starts[0].insert(
            0,
            RankStart(
                rank=_STORE,
                title="the store of the ranks",
                module="ftlaunch.strategies.torch.store",
                arguments=[str(plan.world_size)],
                env={},
                working_dir=None,
                log_path=str(folder / "logs" / "store.log"),
                inherits_listener=True,
                shows_output=False,
            ),
        )
    return starts


def _torchrun_variables(plan: ScriptPlan, rank: int, restart: int) -> dict[str, str]:
    """What scripts written for torchrun look for."""
    return {
        "ROLE_NAME": "default",
        "ROLE_RANK": str(rank),
        "ROLE_WORLD_SIZE": str(plan.world_size),
        "TORCHELASTIC_RUN_ID": os.environ.get("TORCHELASTIC_RUN_ID", "ftlaunch"),
        "TORCHELASTIC_RESTART_COUNT": str(restart),
        "TORCHELASTIC_MAX_RESTARTS": str(plan.cluster.max_restarts),
        "TORCHELASTIC_USE_AGENT_STORE": str(plan.has_store),
        "FTLAUNCH_RESTART_COUNT": str(restart),
    }
