"""Which curves a report shows, read from metrics.jsonl and the events; nothing about drawing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlaunch.launcher.line_log import read_lines
from ftlaunch.launcher.plots import Plot, Point, Scale, Series, smoothed
from ftlaunch.launcher.wording import one_line

CURVE_KEYS = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "loss_scale")
MAX_METRIC_PLOTS = 12
MAX_SERIES = 6
# Below this a curve is short enough to be read as it is.
MIN_POINTS_TO_SMOOTH = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """The finite values of metrics.jsonl by key; what is not finite is a gap."""

    points: Mapping[str, Sequence[Point]]
    skipped: Sequence[float]
    first_step: float
    last_step: float
    last_epoch: float

    @classmethod
    def read(cls, path: Path) -> Curves:
        points: dict[str, list[Point]] = {key: [] for key in CURVE_KEYS}
        skipped: list[float] = []
        first = last = epoch = 0.0
        for line in read_lines(path):
            step = number(line.get("step"))
            if step is None:
                continue
            first, last = (first or step), max(last, step)
            epoch = number(line.get("epoch")) or epoch
            if line.get("applied") is False:
                skipped.append(step)
            for key, values in points.items():
                value = number(line.get(key))
                if value is not None:
                    values.append((step, value))
        return cls(
            points=points, skipped=skipped, first_step=first, last_step=last, last_epoch=epoch
        )


def plots(curves: Curves, events: Iterable[Mapping[str, Any]]) -> list[Plot]:
    """The plots of a report, those without a value left out."""
    events = list(events)
    evals = eval_points(events)
    x_range = _x_range(curves, evals)
    found = [_loss(curves, evals, events, x_range)]
    norm_scale = _norm_scale(curves.points["grad_norm"])
    found.append(_curve(curves, "learning_rate", "Learning rate", "linear", x_range))
    found.append(_curve(curves, "grad_norm", "Gradient norm", norm_scale, x_range))
    found.append(_curve(curves, "tokens_per_second", "Throughput, tokens/s", "linear", x_range))
    if len({value for _, value in curves.points["loss_scale"]}) > 1:
        found.append(_curve(curves, "loss_scale", "Loss scale", "log2", x_range))
    rest = {name: points for name, points in evals.items() if name != "loss"}
    return [plot for plot in found if plot is not None] + _metric_plots(rest, x_range)


def eval_points(events: Iterable[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """Each evaluation metric's values by step."""
    found: dict[str, list[Point]] = {}
    for event in events:
        metrics, step = event.get("metrics"), number(event.get("step"))
        if event.get("kind") != "evaluated" or step is None or not isinstance(metrics, Mapping):
            continue
        for name, value in metrics.items():
            finite = number(value)
            if finite is not None:
                found.setdefault(one_line(str(name))[:60], []).append((step, finite))
    return found


def number(value: Any) -> float | None:
    """`value` as a finite float, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def _x_range(curves: Curves, evals: Mapping[str, Sequence[Point]]) -> tuple[float, float]:
    steps = [step for points in evals.values() for step, _ in points]
    if curves.last_step:
        steps += [curves.first_step, curves.last_step]
    return (min(steps), max(steps)) if steps else (0.0, 1.0)


def _loss(
    curves: Curves,
    evals: Mapping[str, Sequence[Point]],
    events: Sequence[Mapping[str, Any]],
    x_range: tuple[float, float],
) -> Plot | None:
    series = _raw_and_smooth(curves.points["loss"])
    if evals.get("loss"):
        series.append(Series(label="evaluation", points=evals["loss"], color=1, dots=True))
    breaks = [
        step
        for event in events
        if event.get("kind") in ("restarted", "resumed")
        and (step := number(event.get("after_step"))) is not None
    ]
    if not series:
        return None
    return Plot(
        title="Loss",
        series=series,
        x_range=x_range,
        marks=curves.skipped,
        mark_label="skipped",
        rules=breaks,
        rule_label="restart",
    )


def _curve(
    curves: Curves, key: str, title: str, scale: Scale, x_range: tuple[float, float]
) -> Plot | None:
    points = curves.points[key]
    if not points:
        return None
    if key in ("learning_rate", "loss_scale"):
        series = [Series(label=title.lower(), points=points)]
    else:
        series = _raw_and_smooth(points)
    return Plot(title=title, series=series, x_range=x_range, scale=scale)


def _raw_and_smooth(points: Sequence[Point]) -> list[Series]:
    if not points:
        return []
    if len(points) < MIN_POINTS_TO_SMOOTH:
        return [Series(label="each step", points=points)]
    return [
        Series(label="each step", points=points, faint=True),
        Series(label="smoothed", points=smoothed(points)),
    ]


def _norm_scale(points: Sequence[Point]) -> Scale:
    """One exploding gradient would press all others onto the axis."""
    values = sorted(value for _, value in points)
    return "log" if values and values[-1] > 25 * values[len(values) // 2] > 0 else "linear"


def _metric_plots(evals: Mapping[str, list[Point]], x_range: tuple[float, float]) -> list[Plot]:
    """Metrics between 0 and 1 share plots; the others have units of their own."""
    shared = [name for name in evals if all(0 <= value <= 1 for _, value in evals[name])]
    groups = [shared[i : i + MAX_SERIES] for i in range(0, len(shared), MAX_SERIES)]
    groups += [[name] for name in evals if name not in shared]
    return [
        Plot(
            title=f"Evaluation: {group[0]}" if len(group) == 1 else "Evaluation metrics",
            series=[
                Series(label=name, points=evals[name], color=color, dots=True)
                for color, name in enumerate(group)
            ],
            x_range=x_range,
        )
        for group in groups[:MAX_METRIC_PLOTS]
    ]
