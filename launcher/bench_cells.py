"""Which cells a benchmark has, and in which order they are run. Pure; runs nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.machine import Machine
from ftlaunch.launcher.config import RunConfig
from ftlaunch.launcher.job_memory import JobMemory, read_job_memory
from ftlaunch.launcher.plan import LaunchPlan, make_plan
from ftlaunch.launcher.site import Site
from ftlaunch.strategies.adapter import adapter_folder
from ftlaunch.strategies.model_config import family_of
from ftlaunch.strategies.options import TrainOptions
from ftlaunch.strategies.registry import entry

Scaling = Literal["base", "strong", "weak"]
AskedPrecision = Literal["auto", "fp32", "bf16", "fp16"]
_MOST_NODES = 4096
# Enough for any number of ranks: only how many there are is asked for.
_ANY_BATCH = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One setting that is measured.

    scaling   "base": the smallest number of nodes, with which the others are compared; "strong": the same
              global batch on more; "weak": the same global batch for each rank on more
    """

    nodes: int
    strategy: str
    precision: AskedPrecision
    scaling: Scaling

    @property
    def name(self) -> str:
        """Also that of its folder."""
        return f"{self.strategy}-{self.precision}-{self.scaling}-{self.nodes}"

    @property
    def group(self) -> tuple[str, str]:
        """Cells of one group are compared with its base."""
        return self.strategy, self.precision


def read_nodes(text: str | None) -> tuple[int, ...]:
    """ "1,2,4" as numbers, ascending. UserError for anything that is no list of numbers of nodes."""
    if text is None:
        return ()
    words = [word.strip() for word in text.split(",")]
    numbers = [int(word) if re.fullmatch(r"[0-9]{1,6}", word) else 0 for word in words]
    if not all(0 < number <= _MOST_NODES for number in numbers):
        raise UserError(
            f"--nodes {text[:80]!r} is no list of numbers of nodes: each is a whole number from 1 to "
            f"{_MOST_NODES}. Write for example --nodes 1,2,4."
        )
    if len(set(numbers)) != len(numbers):
        raise UserError(f"--nodes {text[:80]!r} names a number twice. Name each once.")
    return tuple(sorted(numbers))


def read_names(flag: str, text: str | None) -> tuple[str, ...]:
    """ "ddp,zero2" as names. UserError for one that is empty, or stands twice."""
    if text is None:
        return ("auto",)
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) != len(names):
        raise UserError(
            f"{flag} {text[:80]!r} is no list of names, each of them once. Write for example {flag} "
            f"{'ddp,zero2' if flag == '--strategy' else 'fp32,bf16'}."
        )
    return tuple(names)


def make_cells(
    nodes: Sequence[int], strategies: Sequence[str], precisions: Sequence[str]
) -> list[Cell]:
    """The grid. UserError for a strategy or precision that does not exist.

    nodes   ascending; the first is what the others are compared with
    """
    for strategy in strategies:
        if strategy != "auto":
            entry(strategy)
    known = {name: name for name in get_args(AskedPrecision)}
    for precision in precisions:
        if precision not in known:
            raise UserError(
                f"there is no precision {precision[:80]!r}: known are {', '.join(known)}. Choose of "
                "these with --precision."
            )
    scalings: tuple[Scaling, ...] = ("strong", "weak")
    return [
        Cell(nodes=number, strategy=strategy, precision=known[precision], scaling=scaling)
        for strategy in strategies
        for precision in precisions
        for place, number in enumerate(nodes)
        for scaling in (scalings if place else ("base",))
    ]


def config_of(config: RunConfig, cell: Cell) -> RunConfig:
    """The job of a cell, but for its global batch (`plan_cell`)."""
    return replace(
        config,
        strategy=cell.strategy,
        precision=cell.precision,
        cluster=replace(config.cluster, nodes=cell.nodes, min_nodes=None),
    )


def plan_cell(
    config: RunConfig,
    cell: Cell,
    least_nodes: int,
    site: Site,
    machines: Sequence[Machine],
    *,
    output_dir: str,
    assumed: bool = False,
) -> LaunchPlan:
    """The plan of a training job with the cell's settings, to be measured. UserError as `make_plan`.

    config        of the cell, with its rank table read
    least_nodes   those of the cell that is compared with: the first of the site's
    """
    if cell.scaling == "weak":
        ranks = _num_ranks(config, site, machines)
        first = range(least_nodes)
        base = _num_ranks(config, site.only(first), [machines[number] for number in first])
        batch = config.train.global_batch_size
        if batch % base:
            raise UserError(
                f"a global batch of {batch} is not the same for each of {base} ranks, so it cannot be kept "
                f"the same for each of {ranks}. Set train.global_batch_size to a multiple of {base}."
            )
        train = replace(config.train, global_batch_size=batch // base * ranks)
        config = replace(config, train=train)
    plan = make_plan(
        config,
        machines,
        site,
        output_dir=output_dir,
        assumed=assumed,
        family=family_of(config.model),
        is_adapter=adapter_folder(config.model) is not None,
        memory=_memory_of(config),
    )
    options = replace(
        plan.options, train=replace(plan.options.train, max_steps=None, eval_strategy="no")
    )
    return replace(plan, mode="bench", options=options)


def _memory_of(config: RunConfig) -> JobMemory:
    """Random samples may be longer than any that a job without data.max_length makes of data."""
    from ftlaunch.strategies.data.synthetic import lengths_of, longest_row

    memory = read_job_memory(config)
    if config.data.name_or_path is not None:
        return memory
    wanted = config.data.max_length
    longest = longest_row(lengths_of(config.bench), wanted, memory.limit)
    return replace(memory, length=longest) if wanted is None else memory


def _num_ranks(config: RunConfig, site: Site, machines: Sequence[Machine]) -> int:
    bare = RunConfig(
        strategy=config.strategy,
        cluster=config.cluster,
        train=TrainOptions(global_batch_size=_ANY_BATCH),
    )
    return make_plan(bare, machines, site, output_dir="/").world_size


def rounds(cells: Sequence[Cell], repeats: int) -> list[tuple[int, Cell]]:
    """(number of the repeat, cell) in the order of running: all cells, then all again, so that a drift of
    the machine meets all of them.
    """
    return [(number, cell) for number in range(repeats) for cell in cells]
