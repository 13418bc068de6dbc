from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest

from ftlaunch.launcher.console import Console
from ftlaunch.launcher.wording import duration, one_line, plain_text, short_number
from ftlaunch.strategies.progress import (
    DataReady,
    Evaluated,
    Finished,
    Note,
    Resumed,
    Saved,
    StepDone,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def step_done(step: int, **changes: Any) -> StepDone:
    fields: dict[str, Any] = {
        "step": step,
        "epoch": 0.1,
        "loss": 0.25,
        "learning_rate": 1e-4,
        "grad_norm": 0.5,
        "loss_scale": 1.0,
        "applied": True,
        "samples_per_second": 16.0,
        "tokens_per_second": 48_000.0,
        "samples_digest": "d",
        "num_samples": 8,
        "num_tokens": 24,
        "num_padded_tokens": 32,
        "culprit": None,
    }
    return StepDone(**{**fields, **changes})


def data_ready(total_steps: int) -> DataReady:
    return DataReady(
        num_train_samples=1000,
        num_eval_samples=100,
        steps_per_epoch=10,
        total_steps=total_steps,
        seconds=0.5,
        notes=("text column 'review' was guessed",),
    )


def evaluated(step: int) -> Evaluated:
    return Evaluated(
        step=step,
        epoch=1.0,
        metrics={"loss": 0.5, "accuracy": 0.875},
        num_samples=100,
        seconds=2.0,
        is_best=True,
    )


def finished(**changes: Any) -> Finished:
    fields: dict[str, Any] = {
        "stopped": False,
        "reason": "",
        "step": 3,
        "epoch": 1.0,
        "model_dir": None,
        "metrics": {},
        "train_seconds": 1.0,
        "peak_memory_bytes": 1,
    }
    return Finished(**{**fields, **changes})


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07shown", "shown"),
        ("\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x9b2Jgone", "gone"),
        ("\x1bcreset\x1b(B", "reset"),
        ("bell\x07 back\x08 nul\x00 del\x7f", "bell back nul del"),
        ("  0%\r 50%\r100%\n", "100%\n"),
        ("dos\r\nline", "dos\nline"),
        ("tab\tand\nnewline", "tab\tand\nnewline"),
        ("turned \u202eround\u200b", "turned round"),
        ("bad name \udcff", "bad name ?"),
        ("größe 数 [bold]x[/bold]", "größe 数 [bold]x[/bold]"),
        ("cut \x1b[3", "cut "),
    ],
)
def test_plain_text(text: str, plain: str) -> None:
    assert plain_text(text) == plain


def test_one_line() -> None:
    assert one_line(" a\n\tb\x1b[0m  c ") == "a b c"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.91234567, "0.9123"),
        (2e-5, "2e-5"),
        (12.345, "12.3"),
        (999.96, "1k"),
        (12_345, "12.3k"),
        (4_500_000, "4.5M"),
        (-1500, "-1.5k"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_short_number(value: float, text: str) -> None:
    assert short_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.42, "0.4s"),
        (59.4, "59s"),
        (59.6, "1m 00s"),
        (7500, "2h 05m"),
        (270_000, "3d 03h"),
        (-1, "?"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_lines_come_at_most_every_two_seconds() -> None:
    out, clock = io.StringIO(), Clock()
    console = Console(out, clock=clock)
    console.handle(data_ready(total_steps=100))
    for step in range(1, 101):
        clock.now += 0.1
        console.handle(step_done(step))
    console.handle(finished(step=100))
    shown = [int(n) for n in re.findall(r"^step (\d+)/100:", out.getvalue(), re.M)]
    # 10 s of training: the first step, then one every 2 s, then the last.
    assert shown[0] == 1
    assert shown[-1] == 100
    assert len(shown) <= 7
    assert all(b - a >= 20 for a, b in pairwise(shown[:-1]))


def test_a_step_line_says_how_far_how_good_how_fast_how_long() -> None:
    out, clock = io.StringIO(), Clock()
    console = Console(out, clock=clock)
    console.handle(data_ready(total_steps=22))
    console.handle(step_done(1))
    clock.now += 3
    console.handle(step_done(2))
    # 20 steps are left at 3 s each.
    assert out.getvalue().splitlines()[-1] == (
        "step 2/22: loss 0.2500, 16 samples/s, 48k tokens/s, 1m 00s left"
    )


def test_a_resume_does_not_count_the_skipped_steps_as_speed() -> None:
    out, clock = io.StringIO(), Clock()
    console = Console(out, clock=clock)
    console.handle(data_ready(total_steps=1000))
    console.handle(Resumed(step=900, epoch=0.9, checkpoint="checkpoints/step-900"))
    for step in (901, 902):
        clock.now += 5
        console.handle(step_done(step))
    assert "8m 10s left" in out.getvalue().splitlines()[-1]


def test_evaluations_saves_and_notes_are_always_shown() -> None:
    out = io.StringIO()
    console = Console(out, clock=Clock())
    console.handle(data_ready(total_steps=100))
    for step in (1, 2, 3):
        console.handle(step_done(step))
        console.handle(evaluated(step))
        console.handle(Saved(step=step, path=f"out/step-{step}", seconds=0.5, blocked_seconds=0.5))
    console.handle(Note(text="slow", warning=True))
    console.handle(finished(stopped=True, reason="SIGTERM"))
    text = out.getvalue()
    assert "text column 'review' was guessed" in text
    assert text.count("loss 0.5000, accuracy 0.8750 (100 samples, 2.0s), best so far") == 3
    assert text.count("saved: out/step-") == 3
    assert "warning: slow" in text
    assert "stopped after step 3: SIGTERM" in text


def test_a_skipped_step_names_its_culprit_and_a_lost_loss_does_not_break_the_line() -> None:
    out = io.StringIO()
    console = Console(out, clock=Clock())
    console.handle(step_done(1, applied=False, culprit="head\x1b[2J.weight"))
    console.handle(step_done(2, loss=None, samples_per_second=None, tokens_per_second=None))
    console.close()
    first, second = out.getvalue().splitlines()
    assert first.startswith("step 1: skipped, overflow in head.weight")
    assert second.startswith("step 2: loss not finite")


def test_the_verdict_is_plain_text_in_order() -> None:
    out = io.StringIO()
    console = Console(out, clock=Clock())
    console.handle(step_done(1))
    console.failure(
        "rank 1 failed", 'Traceback:\n  File "a"\n\x1b[31mValueError: [/x]\x1b[0m\n', "log: a"
    )
    assert out.getvalue().splitlines()[1:] == [
        "error: rank 1 failed",
        "    Traceback:",
        '      File "a"',
        "    ValueError: [/x]",
        "log: a",
    ]


def test_done_says_where_how_good_how_fast() -> None:
    out = io.StringIO()
    Console(out, clock=Clock()).done(
        {
            "status": "done",
            "optimizer_steps": 1200,
            "epochs": 3.0,
            "train_seconds": 94.0,
            "samples_per_second": 408.0,
            "tokens_per_second": 51_000.0,
            "overflow_steps": 2,
            "eval": {"accuracy": 0.875, "loss": None},
            "model_dir": "out/model",
        }
    )
    assert out.getvalue().splitlines() == [
        "done: 1,200 optimizer steps, 3 epochs, 1m 34s, 408 samples/s, 51k tokens/s, "
        "2 skipped for overflow",
        "evaluation: accuracy 0.8750, loss not finite",
        "model: out/model",
    ]


def test_done_with_nothing_known() -> None:
    out = io.StringIO()
    Console(out).done({})
    assert out.getvalue() == "done: 0 optimizer steps\n"


@pytest.fixture
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")


def run_job(console: Console) -> None:
    console.plan(["2 ranks of [bold]ddp[/bold]"])
    console.handle(data_ready(total_steps=3))
    for step in (1, 2, 3):
        console.handle(step_done(step))
    console.handle(Note(text="[red]label\x1b]0;x\x07[/red] :smile:"))
    console.handle(finished())
    console.done({"model_dir": "m"})


@pytest.mark.usefixtures("_wide_terminal")
def test_a_terminal_shows_a_bar_and_takes_markup_for_text() -> None:
    out = Terminal()
    run_job(Console(out, clock=Clock()))
    text = out.getvalue()
    assert "step 3/3" in text
    assert "loss 0.2500  16 samples/s  48k tokens/s" in text
    assert "2 ranks of [bold]ddp[/bold]" in text
    assert "[red]label[/red] :smile:" in text
    assert "\x1b]0" not in text
    # The cursor that the bar hid is back.
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")


@pytest.mark.usefixtures("_wide_terminal")
def test_no_color_leaves_no_colour_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    console = Console(out, clock=Clock())
    run_job(console)
    console.failure("bad", "", "")
    colours = re.findall(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9\d)(?:;\d+)*m", out.getvalue())
    assert colours == []


@pytest.mark.usefixtures("_wide_terminal")
@pytest.mark.parametrize("name", ["pipe", "dumb"])
def test_no_escape_codes_where_there_is_no_terminal(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    out: io.StringIO = io.StringIO()
    if name == "dumb":
        monkeypatch.setenv("TERM", "dumb")
        out = Terminal()
    run_job(Console(out, clock=Clock()))
    assert "\x1b" not in out.getvalue()


class Broken(io.StringIO):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error
        self.num_calls = 0

    def write(self, text: str) -> int:
        self.num_calls += 1
        raise self.error


@pytest.mark.usefixtures("_wide_terminal")
@pytest.mark.parametrize("interactive", [False, True])
@pytest.mark.parametrize("error", [BrokenPipeError(32, "gone"), ValueError("closed file")])
def test_a_broken_stream_silences_the_console(error: Exception, interactive: bool) -> None:
    out = Broken(error)
    console = Console(out, interactive=interactive, clock=Clock())
    run_job(console)
    console.failure("a", "b", "c")
    console.close()
    assert out.num_calls == 1


def test_a_stream_that_knows_few_characters_gets_question_marks() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    Console(out).say("größe")
    assert raw.getvalue() == b"gr??e\n"


def test_a_reader_that_leaves_does_not_change_the_exit_code() -> None:
    program = (
        "import sys\n"
        "from ftlaunch.launcher.console import Console\n"
        "console = Console(sys.stdout)\n"
        "sys.stdin.readline()\n"
        "for _ in range(1000): console.say('x' * 100)\n"
        "sys.exit(7)\n"
    )
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    os.close(reading)
    _, errors = process.communicate("go\n", timeout=60)
    assert (process.returncode, errors) == (7, "")
