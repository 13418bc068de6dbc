"""What a user sees in the terminal while a job runs; nothing about how it is kept (`recorder`).

A terminal gets one progress bar with lines above it, anything else plain lines. Texts come from
workers, so they are cleaned of escape sequences and never read as markup.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO, cast

from ftlaunch.launcher.wording import duration, one_line, plain_text, short_number
from ftlaunch.strategies.progress import (
    DataReady,
    Evaluated,
    Finished,
    Note,
    Progress,
    Proved,
    Resumed,
    Saved,
    StepDone,
)

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.progress import Progress as RichProgress

LINE_INTERVAL_SECONDS = 2.0
BAR_INTERVAL_SECONDS = 0.1


class Console:
    """Shows the messages of one job on `stream`. Nothing in it raises when the stream breaks."""

    def __init__(
        self,
        stream: TextIO,
        *,
        interactive: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = _QuietStream(stream)
        self._clock = clock
        self._pace = _Pace(clock)
        self._screen = _open_screen(self._stream, interactive)
        self._bar: _Bar | None = None
        self._shown_at = -float("inf")
        self._unshown: StepDone | None = None

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def say(self, text: str) -> None:
        """One plain line, above the bar where there is one."""
        self._print(plain_text(text))

    def warn(self, text: str) -> None:
        self._print(f"warning: {plain_text(text)}", "yellow")

    def output(self, text: str, label: str) -> None:
        """What a rank printed, line by line, each behind `label` where several ranks are shown."""
        for line in text.splitlines():
            self._print(label + plain_text(line))

    def plan(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.say(line)

    def handle(self, message: Progress) -> None:
        if isinstance(message, StepDone):
            self._handle_step(message)
        elif isinstance(message, DataReady):
            self._handle_data(message)
        elif isinstance(message, Note):
            (self.warn if message.warning else self.say)(message.text)
        elif isinstance(message, Resumed):
            self._pace.restart()
            self.say(_resumed_line(message))
        elif isinstance(message, Proved):
            self.say(_proved_line(message))
        elif isinstance(message, Evaluated):
            self._flush_step()
            self.say(_evaluated_line(message))
        elif isinstance(message, Saved):
            self._flush_step()
            self.say(_saved_line(message))
        elif isinstance(message, Finished):
            self._handle_finish(message)

    def failure(self, title: str, body: str, footer: str) -> None:
        """The verdict: what went wrong, the indented traceback or log tail, where the log is."""
        self.close()
        self._print(f"error: {plain_text(title)}", "bold red")
        for line in plain_text(body).strip("\n").split("\n") if body.strip() else ():
            self._print(f"    {line}".rstrip())
        if footer:
            self._print(plain_text(footer))

    def done(self, summary: Mapping[str, Any]) -> None:
        """Where the model is, how good, how fast. `summary` is what summary.json holds."""
        self.close()
        for line in _done_lines(summary):
            self._print(plain_text(line))

    def close(self) -> None:
        """Take the bar down and give the cursor back. May be called twice."""
        self._flush_step()
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _handle_data(self, message: DataReady) -> None:
        self._pace.total = message.total_steps
        if not message.total_steps:
            self.say(f"data: {message.num_eval_samples:,} samples")
            for note in message.notes:
                self.say(note)
            return
        self.say(
            f"data: {message.num_train_samples:,} training and {message.num_eval_samples:,} "
            f"evaluation samples, {message.steps_per_epoch:,} steps an epoch, "
            f"{message.total_steps:,} in all"
        )
        for note in message.notes:
            self.say(note)

    def _handle_step(self, message: StepDone) -> None:
        self._pace.step_done(message.step)
        self._unshown = message
        now = self._clock()
        ends = message.step == self._pace.total
        interval = BAR_INTERVAL_SECONDS if self._screen else LINE_INTERVAL_SECONDS
        if ends or now - self._shown_at >= interval:
            self._shown_at = now
            self._flush_step()

    def _handle_finish(self, message: Finished) -> None:
        self.close()
        if message.stopped:
            self.say(f"stopped after step {message.step:,}: {one_line(message.reason)}")

    def _flush_step(self) -> None:
        message, self._unshown = self._unshown, None
        if message is None:
            return
        if self._screen is None:
            count = _count(message.step, self._pace.total)
            self._print(f"step {count}: {', '.join(_step_facts(message, self._pace))}")
            return
        if self._bar is None:
            self._bar = _Bar(self._screen)
        self._bar.show(message, self._pace)

    def _print(self, text: str, style: str = "") -> None:
        if self._screen is None:
            self._stream.write(text + "\n")
            self._stream.flush()
            return
        from rich.text import Text

        # No wrapping by rich: what is copied out of a terminal should be one line.
        self._screen.print(Text(text, style=style), soft_wrap=True)


class _Bar:
    """One line: how far, loss, throughput, time left."""

    def __init__(self, screen: RichConsole) -> None:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        # Drawn only when a message comes: a thread that draws would meet a broken stream alone,
        # and the streams of the process are not ours to redirect.
        self._progress: RichProgress = RichProgress(
            TextColumn("step {task.fields[count]}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[facts]}", markup=False),
            console=screen,
            auto_refresh=False,
            expand=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._progress.add_task("", total=None, count="", facts="")
        self._progress.start()

    def show(self, message: StepDone, pace: _Pace) -> None:
        self._progress.update(
            self._task,
            total=pace.total,
            completed=message.step,
            count=_count(message.step, pace.total),
            facts="  ".join(_step_facts(message, pace)),
            refresh=True,
        )

    def close(self) -> None:
        self._progress.stop()


class _Pace:
    """How long is left, from the steps of the last while; a resume or restart starts it anew."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.total: int | None = None
        self._clock = clock
        self._times: deque[tuple[int, float]] = deque(maxlen=100)

    def restart(self) -> None:
        self._times.clear()

    def step_done(self, step: int) -> None:
        if self._times and step <= self._times[-1][0]:
            self._times.clear()
        self._times.append((step, self._clock()))

    def seconds_left(self) -> float | None:
        if self.total is None or len(self._times) < 2:
            return None
        (first, began), (last, ended) = self._times[0], self._times[-1]
        return (ended - began) / (last - first) * max(0, self.total - last)


class _QuietStream:
    """A text stream that swallows everything once its other end is gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._broken = False
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        if not self._broken:
            writable = text.encode(self.encoding, "replace").decode(self.encoding)
            self._attempt(lambda: self._stream.write(writable))
        return len(text)

    def flush(self) -> None:
        if not self._broken:
            self._attempt(self._stream.flush)

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        return self._stream.fileno()

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (OSError, ValueError):
            self._broken = True
            self._discard_rest()

    def _discard_rest(self) -> None:
        """What is left in the buffer would fail again at exit and turn the exit code into 120."""
        try:
            descriptor = self._stream.fileno()
            null = os.open(os.devnull, os.O_WRONLY)
        except (OSError, ValueError):
            return
        try:
            os.dup2(null, descriptor)
        except OSError:
            pass
        finally:
            os.close(null)


def _open_screen(stream: _QuietStream, interactive: bool | None) -> RichConsole | None:
    """None where lines are all that the stream can show."""
    if not (stream.isatty() if interactive is None else interactive):
        return None
    from rich.console import Console as RichConsole

    screen = RichConsole(
        file=cast("TextIO", stream),
        force_terminal=True,
        markup=False,
        emoji=False,
        highlight=False,
    )
    return None if screen.is_dumb_terminal else screen


def _count(step: int, total: int | None) -> str:
    return f"{step}" if total is None else f"{step}/{total}"


def _step_facts(message: StepDone, pace: _Pace) -> list[str]:
    if message.applied:
        facts = [f"loss {_decimal(message.loss)}"]
    else:
        facts = [f"skipped, overflow in {one_line(message.culprit or 'a gradient')}"]
    facts.append(f"{short_number(message.samples_per_second or 0.0)} samples/s")
    facts.append(f"{short_number(message.tokens_per_second or 0.0)} tokens/s")
    left = pace.seconds_left()
    if left is not None:
        facts.append(f"{duration(left)} left")
    return facts


def _decimal(value: Any) -> str:
    """None is how a number that is not finite comes out of strict JSON."""
    return f"{value:.4f}" if isinstance(value, (int, float)) else "not finite"


def _resumed_line(message: Resumed) -> str:
    where = one_line(message.checkpoint)
    return f"resumed after step {message.step:,} (epoch {message.epoch:.2f}): {where}"


def _proved_line(message: Proved) -> str:
    shapes = " and ".join(f"{rows:,} × {length:,} tokens" for rows, length in message.shapes)
    return (
        f"the largest micro-batch fits: {shapes}, {message.peak_memory_bytes / 2**30:.3g} GiB at most "
        f"({duration(message.seconds)})"
    )


def _evaluated_line(message: Evaluated) -> str:
    best = ", best so far" if message.is_best else ""
    return (
        f"evaluation at step {message.step:,}: {_metrics_text(message.metrics)} "
        f"({message.num_samples:,} samples, {duration(message.seconds)}){best}"
    )


def _saved_line(message: Saved) -> str:
    seconds = duration(message.seconds)
    if message.blocked_seconds < message.seconds:
        seconds += f", training waited {duration(message.blocked_seconds)}"
    return f"checkpoint of step {message.step:,} saved: {one_line(message.path)} ({seconds})"


def _metrics_text(metrics: Mapping[str, Any]) -> str:
    return ", ".join(f"{one_line(str(name))} {_decimal(value)}" for name, value in metrics.items())


def _done_lines(summary: Mapping[str, Any]) -> list[str]:
    evaluated_only = bool(summary.get("predictions"))
    lines = ["done" if evaluated_only else _trained_line(summary)]
    metrics = summary.get("eval")
    if isinstance(metrics, Mapping) and metrics:
        lines.append(f"evaluation: {_metrics_text(metrics)}")
    if evaluated_only:
        lines.append(f"predictions: {one_line(str(summary['predictions']))}")
    if summary.get("model_dir"):
        lines.append(f"model: {one_line(str(summary['model_dir']))}")
    return lines


def _trained_line(summary: Mapping[str, Any]) -> str:
    facts = [f"{summary.get('optimizer_steps') or 0:,} optimizer steps"]
    if summary.get("epochs"):
        facts.append(f"{summary['epochs']:.4g} epochs")
    if summary.get("train_seconds"):
        facts.append(duration(summary["train_seconds"]))
    for key, unit in (("samples_per_second", "samples/s"), ("tokens_per_second", "tokens/s")):
        if summary.get(key):
            facts.append(f"{short_number(summary[key])} {unit}")
    if summary.get("overflow_steps"):
        facts.append(f"{summary['overflow_steps']:,} skipped for overflow")
    if summary.get("restarts"):
        facts.append(f"{summary['restarts']:,} restarts")
    status = one_line(str(summary.get("status") or "done"))
    return f"{status}: {', '.join(facts)}"
