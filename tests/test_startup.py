"""Where a start spends its time: stages that follow one another, and parts that add up."""

from __future__ import annotations

import json
import time
from typing import Any

from ftlaunch.launcher.report import write_report
from ftlaunch.launcher.startup import StartupClock
from ftlaunch.strategies.progress import Startup, from_dict, to_dict
from ftlaunch.strategies.startup import Stages


def test_stages_follow_one_another(monkeypatch):
    """10 to 11 imports, to 13 the model, to 16 the group, to 17 the model again."""
    clock = iter([10.0, 11.0, 13.0, 16.0, 17.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    stages = Stages("imports")
    stages.begin("model")
    stages.begin("process group")
    stages.begin("model")
    stages.stop()
    assert stages.seconds == {"imports": 1.0, "model": 3.0, "process group": 3.0}
    # The clock has no more to give: nothing is counted after the stop.
    stages.begin("first step")
    stages.stop()
    assert stages.seconds == {"imports": 1.0, "model": 3.0, "process group": 3.0}


def _clock():
    now = time.monotonic()
    clock = StartupClock(opened=now - 5.0)
    clock.asked = clock.asked_last = now - 4.0
    return clock


def test_parts_add_up_to_the_whole():
    """Asked for 4 s ago, of which rank 0 knows 1.5: 2.5 until its first line."""
    clock = _clock()
    clock.hear(Startup(seconds={"tokens": 0.5, "first step": 1.0}, preload_seconds=2.0))
    told = clock.to_json()
    assert told is not None
    seconds = {part["name"]: part["seconds"] for part in told["parts"]}
    assert list(seconds)[:3] == ["command line", "agents and plan", "ranks begin"]
    assert seconds["agents and plan"] == 1.0
    assert abs(seconds["ranks begin"] - 2.5) < 0.1
    assert abs(sum(seconds.values()) - told["total_seconds"]) < 0.001
    assert told["preload_seconds"] == 2.0
    assert {p["measured_by"] for p in told["parts"]} == {"coordinator", "rank 0"}


def test_the_first_start_counts():
    clock = _clock()
    asked = clock.asked
    clock.hear(Startup(seconds={"tokens": 0.5}, preload_seconds=2.0))
    first = clock.to_json()
    clock.ask()
    clock.hear(Startup(seconds={"tokens": 9.0}, preload_seconds=2.0))
    assert clock.asked == asked
    told = clock.to_json()
    assert told is not None and first is not None
    assert told["parts"][1:] == first["parts"][1:]


def test_attempts_without_a_step_are_told_apart():
    """The first ranks 4 s ago, those that did a step now, of which rank 0 knows 0.001 s."""
    clock = _clock()
    clock.ask()
    clock.hear(Startup(seconds={"proof": 0.001}, preload_seconds=0.0))
    told = clock.to_json()
    assert told is not None
    seconds = {part["name"]: part["seconds"] for part in told["parts"]}
    assert abs(seconds["earlier attempts"] - 4.0) < 0.1
    assert seconds["ranks begin"] < 0.1
    assert abs(sum(seconds.values()) - told["total_seconds"]) < 0.01


def test_nothing_is_said_without_a_step():
    assert StartupClock(opened=time.monotonic()).to_json() is None


def test_the_message_travels():
    message = Startup(seconds={"tokens": 0.25}, preload_seconds=1.0)
    assert from_dict(json.loads(json.dumps(to_dict(message)))) == message


def test_the_report_shows_the_parts(tmp_path):
    clock = _clock()
    clock.hear(Startup(seconds={"tokens": 0.5, "<b>": 1.0}, preload_seconds=2.0))
    (tmp_path / "summary.json").write_text(json.dumps({"startup": clock.to_json()}))
    text = write_report(tmp_path).read_text()
    assert "<h2>Start-up</h2>" in text
    assert '<td class="name">tokens</td><td class="number">0.500</td>' in text
    assert "&lt;b&gt;" in text


def test_the_report_takes_any_content(tmp_path):
    contents: list[Any] = [3, [], {"parts": 5}, {"parts": [1, {"name": [], "seconds": "x"}]}, None]
    for content in contents:
        (tmp_path / "summary.json").write_text(json.dumps({"startup": content}))
        write_report(tmp_path)
