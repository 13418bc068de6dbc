"""A benchmark as a PNG: throughput over ranks, and where the time goes. matplotlib is loaded here only."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftlaunch.launcher.bench_report import (
    SHARES,
    CellResult,
    mean_shares,
    tokens_per_second,
)

_COLORS = {"compute": "#4477aa", "communication": "#ee6677", "data": "#ccbb44", "idle": "#bbbbbb"}
_DPI = 130


def can_plot() -> bool:
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def write_plot(path: Path, results: Sequence[CellResult]) -> None:
    """ImportError where matplotlib is missing. Draws nothing of cells without a result."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ftlaunch.strategies.files import replace_file

    done = [result for result in results if result.runs]
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _draw_throughput(left, done)
    _draw_shares(right, done)
    with replace_file(path) as file:
        figure.savefig(file, format="png", dpi=_DPI)


def _draw_throughput(axes: Any, done: Sequence[CellResult]) -> None:
    for group in dict.fromkeys(result.cell.group for result in done):
        of_group = [result for result in done if result.cell.group == group]
        base = next((each for each in of_group if each.cell.scaling == "base"), None)
        for scaling, style in (("strong", "-"), ("weak", "--")):
            points = [each for each in of_group if each.cell.scaling in ("base", scaling)]
            if len(points) > 1 or scaling == "strong":
                axes.plot(
                    [len(each.runs[0].ranks) for each in points],
                    [_tokens(each) for each in points],
                    style,
                    marker="o",
                    label=f"{' '.join(_named(of_group[0]))}, {scaling}",
                )
        if base is not None:
            most = max(len(each.runs[0].ranks) for each in of_group)
            ranks = len(base.runs[0].ranks)
            axes.plot(
                [ranks, most],
                [_tokens(base), _tokens(base) * most / ranks],
                ":",
                color="#888888",
                linewidth=1,
            )
    axes.set_xlabel("ranks (dotted: as many times the smallest)")
    axes.set_ylabel("tokens/s, padding not counted")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize="small")


def _draw_shares(axes: Any, done: Sequence[CellResult]) -> None:
    names = [f"{_ranks(each)} {each.cell.scaling}\n{' '.join(_named(each))}" for each in done]
    bottoms = [0.0] * len(done)
    for share in SHARES:
        heights = [mean_shares(each.runs)[share] for each in done]
        axes.bar(range(len(done)), heights, bottom=bottoms, label=share, color=_COLORS[share])
        bottoms = [a + b for a, b in zip(bottoms, heights, strict=True)]
    axes.set_xticks(range(len(done)), names, fontsize="x-small", rotation=45, ha="right")
    axes.set_ylabel("share of a rank's time")
    axes.set_ylim(0, 1)
    axes.legend(fontsize="small", ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _tokens(result: CellResult) -> float:
    return statistics.median(tokens_per_second(run) for run in result.runs)


def _ranks(result: CellResult) -> str:
    count = len(result.runs[0].ranks)
    return f"{count} rank{'s' if count > 1 else ''}"


def _named(result: CellResult) -> tuple[str, str]:
    if result.plan is None:
        return result.cell.group
    return result.plan.strategy, result.plan.precision
