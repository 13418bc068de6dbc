"""What the runs of a benchmark come to: medians and spreads, efficiencies, a table, JSON. Runs nothing."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ftlaunch.launcher.bench_cells import Cell
from ftlaunch.launcher.bench_run import CellRun
from ftlaunch.launcher.plan import LaunchPlan
from ftlaunch.launcher.wording import short_number
from ftlaunch.strategies.deepspeed_config import offload_devices
from ftlaunch.strategies.flops import utilisation
from ftlaunch.strategies.progress import Measured
from ftlaunch.strategies.registry import entry

FORMAT_VERSION = 1
SHARES = ("compute", "communication", "data", "idle")


@dataclass(slots=True, kw_only=True)
class CellResult:
    """A cell with its runs so far. `why` it has none, or no more."""

    cell: Cell
    runs: list[Measured] = field(default_factory=list)
    plan: LaunchPlan | None = None
    machines: list[dict[str, Any]] = field(default_factory=list)
    why: str = ""
    log_path: str = ""
    by_user: bool = False

    def take(self, run: CellRun) -> None:
        self.plan = run.plan or self.plan
        self.machines = [machine.to_dict() for machine in run.machines] or self.machines
        if run.measured is not None:
            self.runs.append(run.measured)
        elif not run.stopped:
            self.why, self.log_path, self.by_user = run.why, run.log_path, run.by_user


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    median: float
    lowest: float
    highest: float

    def to_json(self) -> dict[str, float]:
        return {"median": self.median, "lowest": self.lowest, "highest": self.highest}


def spread(values: Sequence[float]) -> Spread:
    return Spread(median=statistics.median(values), lowest=min(values), highest=max(values))


def samples_per_second(run: Measured) -> float:
    return run.num_samples / run.seconds


def tokens_per_second(run: Measured) -> float:
    """Padding not counted."""
    return run.num_tokens / run.seconds


def run_utilisation(run: Measured) -> float | None:
    """MFU (`flops.step_flops`); the peak is that of all ranks, measured in the same run."""
    if run.model_flops is None:
        return None
    peaks = [rank["peak_flops_per_second"] for rank in run.ranks]
    return utilisation(run.model_flops, run.seconds, peaks)


def mean_shares(runs: Sequence[Measured]) -> dict[str, float]:
    """Of all ranks of all runs; the sum is 1."""
    ranks = [rank for run in runs for rank in run.ranks]
    return {name: statistics.fmean(rank[name] for rank in ranks) for name in SHARES}


def efficiency(base: CellResult, result: CellResult) -> float | None:
    """Tokens a second of a rank, over those of a rank of the smallest: 1 where nothing is lost.

    The same formula for both kinds of scaling: with the global batch fixed (strong) it is T₁ / (n Tₙ), with
    that of a rank fixed (weak) T₁ / Tₙ, in step seconds T. None where one of the two was not measured.
    """
    if not base.runs or not result.runs:
        return None
    here, there = (
        statistics.median(tokens_per_second(run) for run in each.runs) / len(each.runs[0].ranks)
        for each in (result, base)
    )
    return here / there


def base_of(results: Sequence[CellResult], result: CellResult) -> CellResult:
    return next(
        each
        for each in results
        if each.cell.scaling == "base" and each.cell.group == result.cell.group
    )


def _recomputes(plan: LaunchPlan) -> bool:
    return bool(plan.options.model.gradient_checkpointing)


def _offloads(plan: LaunchPlan) -> bool:
    stage = entry(plan.strategy).zero_stage
    return stage is not None and "cpu" in offload_devices(plan.options.deepspeed, stage)


def way_of(plan: LaunchPlan) -> str:
    """For the user: "ddp", or "zero3 + checkpointing + offload"."""
    more = " + checkpointing" if _recomputes(plan) else ""
    return f"{plan.strategy}{more}{' + offload' if _offloads(plan) else ''}"


# -- JSON ---------------------------------------------------------------------------------------


def cell_json(results: Sequence[CellResult], result: CellResult) -> dict[str, Any]:
    """A cell with all its repeats."""
    cell, plan, runs = result.cell, result.plan, result.runs
    content: dict[str, Any] = {
        "name": cell.name,
        "nodes": cell.nodes,
        "scaling": cell.scaling,
        "asked": {"strategy": cell.strategy, "precision": cell.precision},
        "failure": {"why": result.why, "log": result.log_path} if result.why else None,
    }
    if plan is not None:
        content |= {
            "strategy": plan.strategy,
            "precision": plan.precision,
            "gradient_checkpointing": _recomputes(plan),
            "offload": "cpu" if _offloads(plan) else "none",
            "ranks": plan.world_size,
            "global_batch_size": plan.global_batch_size,
            "micro_batch": plan.micro_batch,
            "max_tokens_per_micro_batch": plan.max_tokens_per_micro_batch,
            "accumulation": plan.accumulation,
            "threads_per_rank": plan.threads_per_rank,
            "machines": result.machines,
        }
    if runs:
        utilisations = [value for run in runs if (value := run_utilisation(run)) is not None]
        content |= {
            "samples_per_second": spread([samples_per_second(run) for run in runs]).to_json(),
            "tokens_per_second": spread([tokens_per_second(run) for run in runs]).to_json(),
            "step_seconds": {
                "of_steps": spread([s for run in runs for s in run.step_seconds]).to_json(),
                "of_repeats": spread(
                    [statistics.median(run.step_seconds) for run in runs]
                ).to_json(),
            },
            "padding_share": _padding_share(runs),
            "model_flops_utilisation": spread(utilisations).to_json() if utilisations else None,
            "shares": mean_shares(runs),
            "efficiency": efficiency(base_of(results, result), result),
        }
    content["repeats"] = [run_json(run) for run in runs]
    return content


def run_json(run: Measured) -> dict[str, Any]:
    return {
        "samples_per_second": samples_per_second(run),
        "tokens_per_second": tokens_per_second(run),
        "seconds": run.seconds,
        "step_seconds": list(run.step_seconds),
        "num_samples": run.num_samples,
        "num_tokens": run.num_tokens,
        "num_padded_tokens": run.num_padded_tokens,
        "skipped_steps": run.skipped_steps,
        "model_flops": run.model_flops,
        "model_flops_utilisation": run_utilisation(run),
        "share_steps": run.share_steps,
        "ranks": [dict(rank) for rank in run.ranks],
    }


def _padding_share(runs: Sequence[Measured]) -> float:
    return 1 - sum(run.num_tokens for run in runs) / sum(run.num_padded_tokens for run in runs)


# -- the table ----------------------------------------------------------------------------------

_HEADER = (
    "nodes",
    "ranks",
    "scaling",
    "strategy",
    "precision",
    "batch",
    "samples/s",
    "tokens/s",
    "step ms (range)",
    "padding",
    "MFU",
    "compute",
    "comm",
    "data",
    "idle",
    "efficiency",
)
_WORDS = ("scaling", "strategy", "precision")
_GROUP = slice(3, 5)


def table_lines(results: Sequence[CellResult]) -> list[str]:
    """For the terminal: a line for each cell; below it why some have failed."""
    rows = [_HEADER, *(_row(results, result) for result in results)]
    lines = []
    shown = list(range(len(_HEADER)))
    groups = {row[_GROUP] for row in rows[1:]}
    if len(groups) == 1:
        # What is the same in every line is told once.
        lines.append(", ".join(groups.pop()))
        del shown[_GROUP]
    rows = [tuple(row[column] for column in shown) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += [
        "  ".join(
            cell.ljust(width) if title in _WORDS else cell.rjust(width)
            for cell, width, title in zip(row, widths, rows[0], strict=True)
        ).rstrip()
        for row in rows
    ]
    lines += [f"{each.cell.name} failed: {each.why}" for each in results if each.why]
    return lines


def _row(results: Sequence[CellResult], result: CellResult) -> tuple[str, ...]:
    cell, plan, runs = result.cell, result.plan, result.runs
    start = (
        str(cell.nodes),
        str(plan.world_size) if plan else "-",
        cell.scaling,
        way_of(plan) if plan else cell.strategy,
        plan.precision if plan else cell.precision,
        str(plan.global_batch_size) if plan else "-",
    )
    if not runs:
        return (*start, "failed" if result.why else "-", *[""] * (len(_HEADER) - len(start) - 1))
    steps = spread([s * 1000 for run in runs for s in run.step_seconds])
    utilisations = [value for run in runs if (value := run_utilisation(run)) is not None]
    shares = mean_shares(runs)
    value = efficiency(base_of(results, result), result)
    return (
        *start,
        short_number(statistics.median(samples_per_second(run) for run in runs)),
        short_number(statistics.median(tokens_per_second(run) for run in runs)),
        f"{short_number(steps.median)} ({short_number(steps.lowest)}–{short_number(steps.highest)})",
        _percent(_padding_share(runs)),
        _percent(statistics.median(utilisations)) if utilisations else "-",
        *(_percent(shares[name]) for name in SHARES),
        "-" if value is None else f"{value:.2f}",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def result_lines(run: Mapping[str, Any]) -> str:
    """One run in a few words, while the others are still to come."""
    return (
        f"{short_number(run['samples_per_second'])} samples/s, "
        f"{short_number(run['tokens_per_second'])} tokens/s"
    )
