from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ftlaunch.launcher.plots import (
    MAX_POINTS,
    Plot,
    Series,
    downsample,
    figure,
    linear_axis,
    log_axis,
    smoothed,
)
from ftlaunch.launcher.report import write_report

VOID = {"meta", "br", "hr", "img", "link", "input"}
SVG_SELF_CLOSED = {"path", "polyline", "circle"}
EVIL = "<script>alert('x')</script>\"&\x1b[31m"


class Balance(HTMLParser):
    """Fails on a tag that is not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SVG_SELF_CLOSED, f"<{tag}/> is not void in HTML"
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def parse(path: Path) -> Balance:
    parser = Balance()
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close()
    assert parser.open == []
    return parser


def write_run(folder: Path, num_steps: int, **summary: Any) -> None:
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, num_steps + 1):
            skipped = step % 97 == 0
            line = {
                "step": step,
                "epoch": step / 100,
                "loss": None if skipped else 2 / step**0.3,
                "learning_rate": 5e-5 * (1 - step / num_steps),
                "grad_norm": None if skipped else 1.0 + (step % 7) / 7,
                "loss_scale": 65536.0 / 2 ** (step * 4 // num_steps),
                "applied": not skipped,
                "samples_per_second": 100.0 + step % 13,
                "tokens_per_second": 12_000.0 + step % 17 * 100,
                "samples_digest": "0" * 16,
            }
            file.write(json.dumps(line) + "\n")
    events: list[dict[str, Any]] = [
        {"kind": "note", "after_step": 0, "text": f"note {EVIL}", "warning": True, "time": 1.7e9},
        {"kind": "skipped", "step": 1, "loss_scale": 4.0, "culprit": f"w{EVIL}", "time": 1.7e9},
        {"kind": "restarted", "after_step": 2, "reason": EVIL, "time": 1.7e9},
        {"kind": "resumed", "after_step": 2, "epoch": 0.1, "checkpoint": EVIL},
        {"kind": "saved", "step": 2, "path": EVIL},
        {"kind": "data_ready", "after_step": 0, "num_train_samples": 5, "total_steps": 9},
        {"kind": "unheard_of", "step": 2},
    ]
    for step in (1, 2, 3):
        metrics = {"loss": 1 / step, f"acc{EVIL}": 0.5 + step / 10, "mse": 10.0 * step}
        events.append({"kind": "evaluated", "step": step, "metrics": metrics, "is_best": True})
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    plan = {
        "strategy": "ddp",
        "precision": "fp16",
        "world_size": 8,
        "num_nodes": 2,
        "micro_batch": 4,
        "accumulation": 2,
        "global_batch_size": 64,
        "hosts": [{"name": EVIL, "accelerator": "cuda", "num_devices": 4, "assumed": True}],
        "reasons": [{"choice": EVIL, "value": EVIL, "why": EVIL}],
        "options": {"model": {"name_or_path": f"bert{EVIL}"}, "data": {EVIL: [EVIL, None, 1e-5]}},
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "summary.json").write_text(json.dumps({"status": "done", "exit_code": 0, **summary}))


def test_the_page_is_balanced_and_says_what_happened(tmp_path: Path) -> None:
    write_run(
        tmp_path,
        400,
        optimizer_steps=400,
        samples_per_second=408.0,
        tokens_per_second=51_234.0,
        train_seconds=94.0,
        tokens_seen=1000,
        padding_fraction=0.125,
        eval={"accuracy": 0.875},
        model_dir="out/model",
    )
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    parse(path)
    text = path.read_text(encoding="utf-8")
    for said in (
        ">done<",
        ">eval accuracy<",
        ">0.875<",
        ">408<",
        ">51.2k<",
        ">1m 34s<",
        ">12.5%<",
        ">8 on 2 nodes<",
        "<b>Loss</b>",
        "<b>Learning rate</b>",
        "<b>Gradient norm</b>",
        "<b>Loss scale</b>",
        "<b>Evaluation: mse</b>",
        ">skipped</span>",
        "Plan and reasons",
        "<details",
    ):
        assert said in text, said
    assert not list(tmp_path.glob(".report*"))


def test_nothing_is_loaded_from_anywhere(tmp_path: Path) -> None:
    write_run(tmp_path, 100)
    path = write_report(tmp_path)
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|url\(|//cdn", text)
    for tag, attributes in parse(path).found:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base"}
        assert not {"src", "href", "xlink:href", "action"} & set(attributes)
    assert "default-src 'none'" in text


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    write_run(
        tmp_path,
        100,
        status=EVIL,
        exit_code=1,
        strategy=EVIL,
        eval={EVIL: 0.5},
        failure={"title": EVIL, "node": EVIL, "rank": 3, "traceback": EVIL, "log_path": EVIL},
    )
    path = write_report(tmp_path)
    parser = parse(path)
    assert [tag for tag, _ in parser.found].count("script") == 1
    text = path.read_text(encoding="utf-8")
    assert "alert('x')" not in text
    assert "\x1b" not in text
    assert "[31m" not in text.replace("\\u001b[31m", "")


def test_a_failure_shows_its_verdict(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(
        json.dumps(
            {
                "status": "failed",
                "exit_code": 1,
                "failure": "rank 3 failed\nTraceback:\n  <b>ValueError</b>",
            }
        )
    )
    path = write_report(tmp_path)
    parse(path)
    text = path.read_text(encoding="utf-8")
    assert "<p>rank 3 failed</p>" in text
    assert "Traceback:\n  &lt;b&gt;ValueError&lt;/b&gt;</pre>" in text
    assert 'class="chip bad"' in text


def test_an_empty_folder_still_gives_a_page(tmp_path: Path) -> None:
    path = write_report(tmp_path)
    parse(path)
    assert tmp_path.name in path.read_text(encoding="utf-8")


def test_damaged_files_give_what_can_be_read(tmp_path: Path) -> None:
    write_run(tmp_path, 50)
    for name in ("metrics.jsonl", "events.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 51, "lo')
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(
            '\n{"step": "x"}\n{"step": 52, "loss": "bad", "grad_norm": 1' + "0" * 400 + "}\n"
        )
    (tmp_path / "plan.json").write_text('{"strategy": "dd')
    (tmp_path / "summary.json").write_text(
        '{"status": null, "optimizer_steps": "many", "eval": [1], "samples_per_second": {}}'
    )
    path = write_report(tmp_path)
    parse(path)
    assert "<b>Loss</b>" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("num_steps", [1, 2])
def test_a_run_of_a_step_or_two_has_its_plots(tmp_path: Path, num_steps: int) -> None:
    write_run(tmp_path, num_steps)
    path = write_report(tmp_path)
    parse(path)
    assert "nan" not in re.sub(r"<script>.*?</script>", "", path.read_text(), flags=re.S)


def test_a_hundred_thousand_steps_stay_under_two_megabytes(tmp_path: Path) -> None:
    write_run(tmp_path, 100_000)
    with (tmp_path / "events.jsonl").open("a") as file:
        for step in range(20_000):
            event = {"kind": "skipped", "step": step, "loss_scale": 1.0, "culprit": "x" * 500}
            file.write(json.dumps(event) + "\n")
            event = {"kind": "evaluated", "step": step, "metrics": {"f1": step % 9 / 9}}
            file.write(json.dumps(event) + "\n")
    path = write_report(tmp_path)
    parse(path)
    assert path.stat().st_size < 2_000_000
    assert "more in events.jsonl" in path.read_text(encoding="utf-8")


def test_downsampling_is_bounded_and_keeps_ends_and_spikes() -> None:
    points = [(float(i), i % 10 / 10) for i in range(100_000)]
    points[41_234] = (41_234.0, 99.0)
    points[71_234] = (71_234.0, -99.0)
    kept = downsample(points)
    assert len(kept) <= MAX_POINTS
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert points[41_234] in kept
    assert points[71_234] in kept
    assert list(kept) == sorted(kept)
    assert downsample(points[:MAX_POINTS]) == points[:MAX_POINTS]
    assert len(downsample(points[: MAX_POINTS + 1])) <= MAX_POINTS


def test_smoothing_has_no_start_up_bias() -> None:
    averages = smoothed([(1.0, 5.0), (2.0, 5.0), (3.0, 5.0)])
    assert [x for x, _ in averages] == [1.0, 2.0, 3.0]
    assert [y for _, y in averages] == pytest.approx([5.0, 5.0, 5.0])


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.0, 5e-5, ["0", "1e-5", "2e-5", "3e-5", "4e-5", "5e-5"]),
        (0.13, 0.92, ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0.76, 0.93, ["0.75", "0.80", "0.85", "0.90", "0.95"]),
        (40_100, 61_000, ["40k", "45k", "50k", "55k", "60k", "65k"]),
        (0, 2_300_000, ["0", "0.5M", "1.0M", "1.5M", "2.0M", "2.5M"]),
        (-1.0, 1.0, ["-1.0", "-0.5", "0", "0.5", "1.0"]),
        (3.0, 3.0, ["2.6", "2.8", "3.0", "3.2", "3.4"]),
    ],
)
def test_ticks_are_nice_numbers(low: float, high: float, labels: list[str]) -> None:
    assert [label for _, label in linear_axis(low, high).ticks] == labels


def test_a_step_axis_has_whole_numbers_within_the_data() -> None:
    axis = linear_axis(1, 4, num_ticks=6, whole=True)
    assert [label for _, label in axis.ticks] == ["1", "2", "3", "4"]
    assert (axis.low, axis.high) == (1, 4)


def test_log_ticks() -> None:
    assert [label for _, label in log_axis(0.02, 40, 10).ticks] == ["0.1", "1", "10"]
    assert [label for _, label in log_axis(1.5, 30, 10).ticks] == ["2", "5", "10", "20"]
    assert [label for _, label in log_axis(2**13, 2**16, 2).ticks] == [
        "2^13",
        "2^14",
        "2^15",
        "2^16",
    ]


def test_a_log_scale_falls_back_where_a_value_is_not_positive() -> None:
    plot = Plot(
        title="t",
        series=[Series(label="a", points=[(1.0, 0.0), (2.0, 3.0)])],
        x_range=(1.0, 2.0),
        scale="log",
    )
    assert 'data-scale="linear"' in figure(plot)
