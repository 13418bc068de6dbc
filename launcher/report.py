"""`report.html`: what a finished, stopped or failed run was, read from its output folder.

Nothing here knows the running job: every figure comes from a file, any file may be missing, and
every text in them is untrusted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import Any

from ftlaunch.launcher.curves import Curves, eval_points, number, plots
from ftlaunch.launcher.line_log import read_lines
from ftlaunch.launcher.page import page
from ftlaunch.launcher.plots import figure
from ftlaunch.launcher.wording import duration, one_line, plain_text, short_number
from ftlaunch.strategies.files import replace_file

MAX_EVENT_ROWS = 300
MAX_TEXT = 2_000
MAX_TRACEBACK = 50_000
MAX_CONFIG = 200_000
MAX_PARTS = 20

Table = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All that the files of one output folder say."""

    name: str
    plan: Table
    summary: Table
    events: Sequence[Table]
    curves: Curves


def write_report(output_dir: Path) -> Path:
    """Write `report.html` and return its path. OSError when it cannot be written."""
    run = Run(
        name=output_dir.resolve().name,
        plan=_read_object(output_dir / "plan.json"),
        summary=_read_object(output_dir / "summary.json"),
        events=list(read_lines(output_dir / "events.jsonl")),
        curves=Curves.read(output_dir / "metrics.jsonl"),
    )
    target = output_dir / "report.html"
    # "replace": a file name may hold bytes that are no text.
    with replace_file(target) as file:
        file.write(render(run).encode("utf-8", "replace"))
    return target


def render(run: Run) -> str:
    """The report as one HTML document."""
    sections = (
        _header(run),
        _verdict(run.summary),
        _tiles(run),
        _plots(run),
        _startup(run.summary),
        _plan(run.plan),
        _hosts(run.plan),
        _events(run.events),
        _configuration(run.plan),
        "<footer>Raw numbers: metrics.jsonl, events.jsonl, summary.json, plan.json and "
        "tensorboard/ in the same folder.</footer>",
    )
    return page(_title(run), "\n".join(section for section in sections if section))


def _header(run: Run) -> str:
    status = str(run.summary.get("status") or "running or interrupted")
    code = run.summary.get("exit_code")
    tone = "good" if code == 0 else "bad" if _failed(run.summary) else "wait"
    data = _option(run.plan, "data")
    parts = [f"trained on {data}"] if data else []
    parts += [f"model in {run.summary['model_dir']}"] if run.summary.get("model_dir") else []
    subtitle = f"<p>{_text(' · '.join(parts))}</p>" if parts else ""
    return (
        f"<header><h1>{_text(_title(run))}</h1>"
        f'<span class="chip {tone}">{_text(status)}</span>{subtitle}</header>'
    )


def _verdict(summary: Table) -> str:
    failure = summary.get("failure")
    if not failure:
        return ""
    told = failure if isinstance(failure, Mapping) else {"title": failure}
    title = _first(told, "title", "message", "reason", "summary") or "The job failed."
    where = [f"{key} {told[key]}" for key in ("node", "host", "rank") if told.get(key) is not None]
    body = _first(told, "traceback", "body", "log_tail", "details")
    if not body and "\n" in title:
        title, body = title.split("\n", 1)
    log = _first(told, "log", "log_path", "footer")
    parts = [f"<p>{_text(title)}</p>"]
    if where:
        parts.append(f"<footer>{_text(', '.join(where))}</footer>")
    if body:
        # The end of a traceback says what happened.
        parts.append(f"<pre>{escape(plain_text(body)[-MAX_TRACEBACK:])}</pre>")
    if log:
        parts.append(f"<footer>{_text(log)}</footer>")
    return f'<h2>What went wrong</h2><section class="card verdict">{"".join(parts)}</section>'


def _tiles(run: Run) -> str:
    rows = (_eval_tiles(run), _progress_tiles(run))
    tiles = "".join(f'<section class="tiles">{"".join(row)}</section>' for row in rows if row)
    facts = "".join(_setup_facts(run))
    return tiles + (f'<dl class="card facts">{facts}</dl>' if facts else "")


def _eval_tiles(run: Run) -> list[str]:
    metrics = run.summary.get("eval")
    if not isinstance(metrics, Mapping) or not metrics:
        metrics = {name: points[-1][1] for name, points in eval_points(run.events).items()}
    return [
        _tile(f"eval {name}", short_number(value), main=True)
        for name, given in list(metrics.items())[:6]
        if (value := number(given)) is not None
    ]


def _progress_tiles(run: Run) -> list[str]:
    summary, tiles = run.summary, []
    steps = _amount(summary, "optimizer_steps") or run.curves.last_step
    if steps:
        tiles.append(_tile("optimizer steps", f"{steps:,.0f}", _steps_note(run)))
    for key, label, seen in (
        ("samples_per_second", "samples/s", "samples_seen"),
        ("tokens_per_second", "tokens/s", "tokens_seen"),
    ):
        if _amount(summary, key):
            note = f"{short_number(_amount(summary, seen))} in all" if seen in summary else ""
            tiles.append(_tile(label, short_number(_amount(summary, key)), note))
    if _amount(summary, "train_seconds"):
        startup = _amount(summary, "startup_seconds")
        note = f"after {duration(startup)} to start" if startup else ""
        tiles.append(_tile("training time", duration(_amount(summary, "train_seconds")), note))
    return tiles


def _steps_note(run: Run) -> str:
    epochs = _amount(run.summary, "epochs") or run.curves.last_epoch
    skipped, restarts = _amount(run.summary, "overflow_steps"), _amount(run.summary, "restarts")
    notes = [f"{epochs:.4g} epoch{'s' if epochs != 1 else ''}"]
    notes += [f"{skipped:,.0f} skipped"] if skipped else []
    notes += [f"{restarts:,.0f} restart{'s' if restarts != 1 else ''}"] if restarts else []
    return ", ".join(notes)


def _setup_facts(run: Run) -> list[str]:
    known = {**run.plan, **{key: value for key, value in run.summary.items() if value is not None}}
    facts = [_fact(key, known[key]) for key in ("strategy", "precision") if known.get(key)]
    if known.get("world_size"):
        nodes = known.get("num_nodes")
        where = f" on {nodes} node{'s' if nodes != 1 else ''}" if nodes else ""
        facts.append(_fact("world size", f"{known['world_size']}{where}"))
    if known.get("global_batch_size"):
        facts.append(_fact("global batch", known["global_batch_size"]))
    if known.get("micro_batch"):
        accumulation = known.get("accumulation")
        times = f" \N{MULTIPLICATION SIGN} {accumulation}" if accumulation else ""
        facts.append(_fact("micro-batch", f"{known['micro_batch']}{times}"))
    if _amount(known, "tokens_seen"):
        facts.append(_fact("padding", f"{_amount(known, 'padding_fraction'):.1%}"))
    if _amount(known, "peak_memory_bytes"):
        memory = _amount(known, "peak_memory_bytes") / 2**30
        facts.append(_fact("peak memory", f"{memory:.3g} GiB a rank"))
    return facts


def _plots(run: Run) -> str:
    figures = "".join(figure(plot) for plot in plots(run.curves, run.events))
    return f'<h2>Curves</h2><section class="plots">{figures}</section>' if figures else ""


def _startup(summary: Table) -> str:
    told = summary.get("startup")
    parts = told.get("parts") if isinstance(told, Mapping) else None
    rows = [
        _row(
            ("name", part.get("name")),
            ("number", f"{_amount(part, 'seconds'):.3f}"),
            ("why", part.get("measured_by")),
        )
        for part in (parts[:MAX_PARTS] if isinstance(parts, list) else ())
        if isinstance(part, Mapping)
    ]
    if not rows or not isinstance(told, Mapping):
        return ""
    preloaded = _amount(told, "preload_seconds")
    if preloaded:
        beside = ("why", "fork server, beside the first three")
        rows.append(_row(("name", "imports"), ("number", f"({preloaded:.3f})"), beside))
    rows.append(
        _row(("name", "in all"), ("number", f"{_amount(told, 'total_seconds'):.3f}"), ("", ""))
    )
    return _table("Start-up", ("Until the first step", "#Seconds", "Measured by"), rows)


def _plan(plan: Table) -> str:
    reasons = plan.get("reasons")
    rows = [
        _row(("name", reason.get("choice")), ("", reason.get("value")), ("why", reason.get("why")))
        for reason in (reasons if isinstance(reasons, list) else ())
        if isinstance(reason, Mapping)
    ]
    return _table("Plan and reasons", ("Choice", "Value", "Why"), rows)


def _hosts(plan: Table) -> str:
    hosts = plan.get("hosts")
    rows = [
        _row(
            ("name", host.get("name")),
            ("", host.get("accelerator")),
            ("", host.get("device_name")),
            ("number", host.get("num_devices")),
            ("why", "assumed, not seen" if host.get("assumed") else "detected"),
        )
        for host in (hosts if isinstance(hosts, list) else ())
        if isinstance(host, Mapping)
    ]
    return _table("Nodes", ("Node", "Accelerator", "Device", "#Devices", ""), rows)


def _configuration(plan: Table) -> str:
    options = plan.get("options")
    if not isinstance(options, Mapping) or not options:
        return ""
    lines = "\n".join(_flat(options, ""))[:MAX_CONFIG]
    return (
        '<h2>Configuration</h2><details class="card"><summary>All options</summary>'
        f"<pre>{escape(plain_text(lines))}</pre></details>"
    )


def _events(events: Sequence[Table]) -> str:
    rows = [row for row in map(_event_row, events) if row]
    if len(rows) > MAX_EVENT_ROWS:
        half = MAX_EVENT_ROWS // 2
        left_out = len(rows) - 2 * half
        more = f'<tr><td class="more" colspan="4">{left_out:,} more in events.jsonl</td></tr>'
        rows = [*rows[:half], more, *rows[-half:]]
    return _table("Events", ("#Step", "Event", "What", "When"), rows, kind="card long")


def _event_row(event: Table) -> str:
    kind = str(event.get("kind"))
    told = _EVENT_TEXTS.get(kind)
    if told is None:
        return ""
    name, tone = _EVENT_NAMES.get(kind, kind), ""
    if kind in ("skipped", "restarted"):
        tone = "bad"
    elif event.get("warning"):
        name, tone = "warning", "wait"
    step = number(event.get("step", event.get("after_step")))
    return _row(
        ("number", "" if step is None else f"{step:,.0f}"),
        ("name", name),
        ("", told(event)),
        ("why", _when(_amount(event, "time"))),
        tone=tone,
    )


def _evaluated_text(event: Table) -> str:
    metrics = event.get("metrics")
    values = metrics.items() if isinstance(metrics, Mapping) else ()
    text = ", ".join(
        f"{key} {short_number(v)}" for key, each in values if (v := number(each)) is not None
    )
    return f"{text} (best so far)" if event.get("is_best") else text


def _finished_text(event: Table) -> str:
    reason = event.get("reason") or ""
    return f"stopped: {reason}" if event.get("stopped") else f"to the end. {reason}".strip()


def _skipped_text(event: Table) -> str:
    scale = number(event.get("loss_scale"))
    at = "" if scale is None else f" at loss scale {scale:,.6g}"
    return f"overflow in {event.get('culprit') or 'a gradient'}{at}"


def _proved_text(event: Table) -> str:
    shapes = event.get("shapes")
    sizes = [
        f"{shape[0]} × {shape[1]} tokens"
        for shape in (shapes if isinstance(shapes, list) else ())
        if isinstance(shape, list) and len(shape) == 2
    ]
    memory = _amount(event, "peak_memory_bytes") / 2**30
    return f"the largest micro-batch fits: {' and '.join(sizes)}, {memory:.3g} GiB at most"


def _data_text(event: Table) -> str:
    return (
        f"{_amount(event, 'num_train_samples'):,.0f} training and "
        f"{_amount(event, 'num_eval_samples'):,.0f} evaluation samples, "
        f"{_amount(event, 'total_steps'):,.0f} steps planned"
    )


_EVENT_NAMES = {
    "data_ready": "data",
    "evaluated": "evaluation",
    "saved": "checkpoint",
    "proved": "memory",
}
_EVENT_TEXTS = {
    "data_ready": _data_text,
    "evaluated": _evaluated_text,
    "saved": lambda event: str(event.get("path")),
    "skipped": _skipped_text,
    "proved": _proved_text,
    "resumed": lambda event: f"from {event.get('checkpoint')}",
    "restarted": lambda event: str(event.get("reason")),
    "note": lambda event: str(event.get("text")),
    "finished": _finished_text,
}


def _table(title: str, columns: Sequence[str], rows: Sequence[str], kind: str = "card") -> str:
    """A column whose name begins with # holds numbers."""
    if not rows:
        return ""
    head = "".join(
        f'<th class="number">{column[1:]}</th>' if column[:1] == "#" else f"<th>{column}</th>"
        for column in columns
    )
    return (
        f'<h2>{escape(title)}</h2><section class="{kind}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></section>"
    )


def _row(*cells: tuple[str, Any], tone: str = "") -> str:
    inner = "".join(
        f'<td class="{kind}">{_text(value)}</td>' if kind else f"<td>{_text(value)}</td>"
        for kind, value in cells
    )
    return f'<tr class="{tone}">{inner}</tr>' if tone else f"<tr>{inner}</tr>"


def _tile(label: str, value: str, note: str = "", *, main: bool = False) -> str:
    below = f"<small>{_text(note)}</small>" if note else ""
    kind = "tile main" if main else "tile"
    return f'<div class="{kind}"><span>{_text(label)}</span><b>{_text(value)}</b>{below}</div>'


def _text(value: Any) -> str:
    """`value` as one line of HTML."""
    if value is None:
        return ""
    line = one_line(str(value))
    return escape(line if len(line) <= MAX_TEXT else line[:MAX_TEXT] + " …")


def _fact(label: str, value: Any) -> str:
    return f"<div><dt>{_text(label)}</dt><dd>{_text(value)}</dd></div>"


def _title(run: Run) -> str:
    return one_line(_option(run.plan, "model") or run.name)


def _option(plan: Table, section: str) -> str:
    options = plan.get("options")
    part = options.get(section) if isinstance(options, Mapping) else None
    return str(part.get("name_or_path") or "") if isinstance(part, Mapping) else ""


def _failed(summary: Table) -> bool:
    # 75: stopped on request, the same command goes on.
    return bool(summary.get("failure")) or summary.get("exit_code") not in (None, 0, 75)


def _first(table: Table, *keys: str) -> str:
    return next((str(table[key]) for key in keys if table.get(key)), "")


def _flat(options: Mapping[str, Any], prefix: str) -> Iterable[str]:
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key} = {json.dumps(value, ensure_ascii=False)}"


def _when(time: float) -> str:
    # Outside of what a calendar holds, and 0 for a missing one.
    if not 0 < time < 1e11:
        return ""
    return datetime.fromtimestamp(time, tz=timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def _amount(table: Table, key: str) -> float:
    return number(table.get(key)) or 0.0


def _read_object(path: Path) -> Table:
    """{} for a missing or damaged file: a report of what is there is better than none."""
    try:
        parsed = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}
