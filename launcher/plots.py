"""Line plots as SVG text; nothing about what is plotted.

Colours are classes (`page` holds them, light and dark), positions are in the units of the view
box. All texts are escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from ftlaunch.launcher.wording import short_number

Point = tuple[float, float]
Scale = Literal["linear", "log", "log2"]

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 36
MAX_POINTS = 900
MAX_DOTS = 40
_PROJECTIONS: dict[Scale, Callable[[float], float]] = {
    "linear": float,
    "log": math.log10,
    "log2": math.log2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line. `faint` is for raw values under a smoothed line, `dots` for a few measurements."""

    label: str
    points: Sequence[Point]
    color: int = 0
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """Series over optimizer steps.

    x_range   the same for all plots of a page, so that they can be compared by eye
    marks     steps with a tick on the x axis, called `mark_label` in the legend
    rules     steps with a dashed vertical line, called `rule_label`
    """

    title: str
    series: Sequence[Series]
    x_range: tuple[float, float]
    scale: Scale = "linear"
    marks: Sequence[float] = ()
    mark_label: str = ""
    rules: Sequence[float] = ()
    rule_label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """From `low` to `high` in plotted units (logarithms on a log scale), with labelled ticks."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]


def figure(plot: Plot) -> str:
    """`plot` as an HTML figure: caption with legend, and the SVG."""
    return (
        f"<figure><figcaption><b>{escape(plot.title)}</b>{_legend(plot)}</figcaption>"
        f"{_svg(plot)}</figure>"
    )


def downsample(points: Sequence[Point], max_points: int = MAX_POINTS) -> Sequence[Point]:
    """At most `max_points` of `points`: first, last, and the lowest and highest of each bucket.

    No spike is lost, which an average or every n-th point would do.
    """
    if len(points) <= max_points:
        return points
    inner = points[1:-1]
    num_buckets = max(1, (max_points - 2) // 2)
    kept = [points[0]]
    for bucket in range(num_buckets):
        start = bucket * len(inner) // num_buckets
        end = (bucket + 1) * len(inner) // num_buckets
        positions = range(start, end)
        low = min(positions, key=lambda i: inner[i][1])
        high = max(positions, key=lambda i: inner[i][1])
        kept.extend(inner[i] for i in sorted({low, high}))
    kept.append(points[-1])
    return kept


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Exponential moving average over about a fortieth of the points, without a start-up bias."""
    decay = 1 - 2 / (max(2.0, len(points) / 40) + 1)
    total = weight = 0.0
    result = []
    for x, y in points:
        total = decay * total + (1 - decay) * y
        weight = decay * weight + (1 - decay)
        result.append((x, total / weight))
    return result


def linear_axis(low: float, high: float, *, num_ticks: int = 5, whole: bool = False) -> Axis:
    """An axis that ends on ticks. `whole`: it ends where the data does, and ticks are integers."""
    if high <= low:
        margin = 0.5 if whole else abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    step = nice_step((high - low) / num_ticks)
    if whole:
        step = max(1.0, step)
        first, last = math.ceil(low / step), math.floor(high / step)
    else:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        low, high = first * step, last * step
    values = [n * step for n in range(first, last + 1)]
    return Axis(low=low, high=high, ticks=[(v, tick_label(v, step, values)) for v in values])


def log_axis(low: float, high: float, base: Literal[2, 10]) -> Axis:
    """An axis of exponents of `base`; `low` and `high` are values and positive."""
    first, last = math.log(low, base), math.log(high, base)
    margin = max(0.05 * (last - first), 0.15)
    first, last = first - margin, last + margin
    if base == 10 and last - first < 2:
        values = [
            factor * 10.0**exponent
            for exponent in range(math.floor(first), math.ceil(last) + 1)
            for factor in (1, 2, 5)
        ]
        ticks = [(math.log10(value), short_number(value)) for value in values]
    else:
        step = max(1, round(nice_step((last - first) / 5)))
        numbers = range(math.ceil(first / step), math.floor(last / step) + 1)
        ticks = [(float(n * step), _power(base, n * step)) for n in numbers]
    inside = [tick for tick in ticks if first <= tick[0] <= last]
    return Axis(low=first, high=last, ticks=inside)


def nice_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(n * power for n in (1, 2, 2.5, 5, 10) if n * power >= rough * 0.999999)


def tick_label(value: float, step: float, values: Sequence[float]) -> str:
    """`value` with as many decimals as `step` needs and one unit for the whole axis."""
    largest = max(abs(v) for v in values)
    if abs(value) < step * 1e-6:
        return "0"
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        # Up to 2,000 or so plain numbers read better than 0.5k, 1k, 1.5k.
        if largest >= unit * (2 if unit == 1e3 else 1):
            return f"{value / unit:.{_decimals(step / unit)}f}{suffix}"
    if largest >= 1e-3:
        return f"{value:,.{_decimals(step)}f}"
    exponent = math.floor(math.log10(largest))
    return f"{value / 10.0**exponent:.{_decimals(step / 10.0**exponent)}f}e{exponent}"


def _decimals(step: float) -> int:
    """Decimals after which `step` is exact: its leading digits are 1, 2, 5 or 25."""
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    exact = abs(step * 10**decimals - round(step * 10**decimals)) < 1e-6
    return decimals if exact else decimals + 1


def _power(base: int, exponent: int) -> str:
    if base == 10:
        return f"{10.0**exponent:g}" if -3 <= exponent <= 3 else f"1e{exponent}"
    return f"{base}^{exponent}"


def _legend(plot: Plot) -> str:
    entries = [
        f'<span class="key c{series.color}{" faint" if series.faint else ""}"><i></i>'
        f"{escape(series.label)}</span>"
        for series in plot.series
        if series.label
    ]
    if len(entries) == 1 and not plot.marks and not plot.rules:
        entries = []
    if plot.marks:
        entries.append(f'<span class="key mark"><i></i>{escape(plot.mark_label)}</span>')
    if plot.rules:
        entries.append(f'<span class="key rule"><i></i>{escape(plot.rule_label)}</span>')
    return f'<span class="legend">{"".join(entries)}</span>' if entries else ""


def _svg(plot: Plot) -> str:
    x_axis = linear_axis(*plot.x_range, num_ticks=6, whole=True)
    y_axis, scale = _y_axis(plot)
    project = _PROJECTIONS[scale]

    def place(x: float, y: float) -> Point:
        return (
            LEFT + (x - x_axis.low) / (x_axis.high - x_axis.low) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (project(y) - y_axis.low) / (y_axis.high - y_axis.low) * _inner(),
        )

    def at(steps: Sequence[float]) -> list[float]:
        some_y = plot.series[0].points[0][1]
        return [place(x, some_y)[0] for x in steps if x_axis.low <= x <= x_axis.high]

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(plot.title)}" '
        f'data-x="{x_axis.low:.9g} {x_axis.high:.9g}" data-y="{y_axis.low:.9g} {y_axis.high:.9g}" '
        f'data-scale="{scale}">',
        _grid(x_axis, y_axis),
        _rules(at(plot.rules)),
        *(_line(series, place) for series in plot.series),
        _marks(at(plot.marks)),
        "</svg>",
    ]
    return "".join(parts)


def _inner() -> float:
    return float(HEIGHT - TOP - BOTTOM)


def _y_axis(plot: Plot) -> tuple[Axis, Scale]:
    values = [y for series in plot.series for _, y in series.points]
    low, high = min(values), max(values)
    if plot.scale == "linear" or low <= 0:
        # A curve that comes close to zero is read against zero.
        return linear_axis(0.0 if 0 < low < 0.3 * high else low, high), "linear"
    return log_axis(low, high, 10 if plot.scale == "log" else 2), plot.scale


def _grid(x_axis: Axis, y_axis: Axis) -> str:
    parts = []
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
    rows = []
    for value, label in y_axis.ticks:
        y = floor - (value - y_axis.low) / (y_axis.high - y_axis.low) * _inner()
        rows.append(f"M{LEFT} {y:.1f}H{right}")
        parts.append(f'<text class="y" x="{LEFT - 8}" y="{y + 3.8:.1f}">{escape(label)}</text>')
    columns = []
    for value, label in x_axis.ticks:
        x = LEFT + (value - x_axis.low) / (x_axis.high - x_axis.low) * (right - LEFT)
        columns.append(f"M{x:.1f} {floor}v4")
        parts.append(f'<text class="x" x="{x:.1f}" y="{floor + 17}">{escape(label)}</text>')
    parts.append(f'<text class="x name" x="{(LEFT + right) / 2:.1f}" y="{HEIGHT - 3}">step</text>')
    return (
        f'<path class="grid" d="{"".join(rows)}"/>'
        f'<path class="axis" d="M{LEFT} {floor}H{right}{"".join(columns)}"/>{"".join(parts)}'
    )


def _line(series: Series, place: Callable[[float, float], Point]) -> str:
    shown = [place(x, y) for x, y in downsample(series.points)]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in shown)
    faint = " faint" if series.faint else ""
    line = (
        f'<polyline class="line c{series.color}{faint}" points="{points}" '
        f'data-label="{escape(series.label)}"/>'
    )
    if series.dots and len(shown) > MAX_DOTS:
        return line
    if not series.dots and len(shown) > 1:
        return line
    dots = (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in shown)
    return f'{line}<g class="dots c{series.color}">{"".join(dots)}</g>'


def _marks(positions: Iterable[float]) -> str:
    floor = HEIGHT - BOTTOM
    # One mark a unit at the most: more could not be told apart.
    places = sorted({round(x) for x in positions})
    if not places:
        return ""
    return f'<path class="mark" d="{"".join(f"M{x} {floor}v-9" for x in places)}"/>'


def _rules(positions: Iterable[float]) -> str:
    places = sorted({round(x) for x in positions})
    if not places:
        return ""
    return f'<path class="rule" d="{"".join(f"M{x} {TOP}V{HEIGHT - BOTTOM}" for x in places)}"/>'
