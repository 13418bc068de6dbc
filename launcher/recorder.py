"""The files a run appends to: metrics.jsonl, events.jsonl, totals.jsonl and TensorBoard's.

Nothing here knows how they are shown (`launcher.report`) or where messages come from.

Every line that belongs to an optimizer step has the key "step" and is dropped by a rewind behind
it. What happened to the run itself (restarts, resumes, notes) has "after_step" and stays.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from ftlaunch.launcher.line_log import LineLog, strict
from ftlaunch.launcher.scalar_log import ScalarLog
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

METRIC_KEYS = (
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "loss_scale",
    "applied",
    "samples_per_second",
    "tokens_per_second",
    "samples_digest",
)
SCALAR_KEYS = (
    "loss",
    "learning_rate",
    "grad_norm",
    "loss_scale",
    "samples_per_second",
    "tokens_per_second",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What the steps on record add up to, earlier runs of the same job included.

    optimizer_steps  number of the last step on record, skipped ones included
    overflow_steps   of them, how many were skipped
    train_seconds    sum of num_samples / samples_per_second over the steps
    *_per_second     samples (tokens) seen / train_seconds; 0.0 before the first step
    padding_fraction 1 - tokens / padded tokens; 0.0 before the first step
    eval             metrics of the last evaluation on record; {} before the first
    """

    optimizer_steps: int
    overflow_steps: int
    epochs: float
    samples_seen: int
    tokens_seen: int
    padding_fraction: float
    train_seconds: float
    samples_per_second: float
    tokens_per_second: float
    restarts: int
    eval: Mapping[str, float]


class Recorder:
    """Owns the files of one output folder that grow while a run goes on.

    Each message is on the file system when `handle` returns. An OSError passes through, and what
    was written of the line that failed is cut off again, so that every file stays whole lines.
    """

    def __init__(self, output_dir: Path) -> None:
        output_dir.mkdir(parents=True, exist_ok=True)
        self._metrics = LineLog(output_dir / "metrics.jsonl")
        self._events = LineLog(output_dir / "events.jsonl")
        # A file of its own: metrics.jsonl has no counts, and totals must survive a resume exactly.
        self._totals = LineLog(output_dir / "totals.jsonl")
        self._scalars = ScalarLog(output_dir / "tensorboard")
        self._recall()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def handle(self, message: Progress) -> None:
        """Write one message. A step that is already on record starts over from there."""
        if isinstance(message, StepDone):
            self._handle_step(message)
        elif isinstance(message, Evaluated):
            self._handle_evaluation(message)
        elif isinstance(message, Saved):
            self._event(
                "saved",
                step=message.step,
                path=message.path,
                seconds=message.seconds,
                blocked_seconds=message.blocked_seconds,
            )
        elif isinstance(message, Resumed):
            self.rewind(message.step)
            self._event(
                "resumed",
                after_step=message.step,
                epoch=message.epoch,
                checkpoint=message.checkpoint,
            )
        elif isinstance(message, Proved):
            self._happened(
                "proved",
                shapes=[list(shape) for shape in message.shapes],
                seconds=message.seconds,
                peak_memory_bytes=message.peak_memory_bytes,
            )
        elif isinstance(message, DataReady):
            self._handle_data(message)
        elif isinstance(message, Note):
            self._note(message.text, message.warning)
        elif isinstance(message, Finished):
            self._handle_finish(message)

    def rewind(self, step: int) -> None:
        """Forget every line of the steps after `step`."""
        for log in (self._metrics, self._events, self._totals):
            log.rewind(step)
        self._recall()
        self._scalars.rewind(step)

    def restarted(self, reason: str, **changes: Any) -> None:
        """A new attempt begins; `reason` is what ended the one before, `changes` what is other now."""
        self._restarts += 1
        self._happened("restarted", reason=reason, **changes)

    def totals(self) -> Totals:
        run = self._running
        rate = 1 / run.seconds if run.seconds > 0 else 0.0
        padding = 1 - run.tokens / run.padded_tokens if run.padded_tokens else 0.0
        return Totals(
            optimizer_steps=run.step,
            overflow_steps=run.overflow_steps,
            epochs=run.epoch,
            samples_seen=run.samples,
            tokens_seen=run.tokens,
            padding_fraction=padding,
            train_seconds=run.seconds,
            samples_per_second=run.samples * rate,
            tokens_per_second=run.tokens * rate,
            restarts=self._restarts,
            eval=dict(self._eval),
        )

    def close(self) -> None:
        for log in (self._metrics, self._events, self._totals, self._scalars):
            log.close()

    def _recall(self) -> None:
        """Read back what the files say, after opening or cutting them."""
        self._running = _Running.from_line(self._totals.last() or {})
        self._restarts = 0
        self._eval: Mapping[str, float] = {}
        self._told: set[str] = set()
        for line in self._events.read():
            if line.get("kind") == "restarted":
                self._restarts += 1
            elif line.get("kind") == "evaluated":
                self._eval = line.get("metrics") or {}
            elif line.get("kind") in ("note", "data_ready"):
                self._told.add(_told_key(line))

    def _handle_step(self, message: StepDone) -> None:
        if message.step <= self._running.step:
            self.rewind(message.step - 1)
        self._running = self._running.after(message)
        self._totals.append(self._running.to_line())
        if not message.applied:
            self._event(
                "skipped",
                step=message.step,
                loss_scale=message.loss_scale,
                culprit=message.culprit,
            )
        self._metrics.append({key: getattr(message, key) for key in METRIC_KEYS})
        self._scalars.append(
            message.step, {f"train/{key}": getattr(message, key) for key in SCALAR_KEYS}
        )

    def _handle_evaluation(self, message: Evaluated) -> None:
        self._eval = dict(message.metrics)
        self._event(
            "evaluated",
            step=message.step,
            epoch=message.epoch,
            metrics=dict(message.metrics),
            num_samples=message.num_samples,
            seconds=message.seconds,
            is_best=message.is_best,
        )
        self._scalars.append(
            message.step, {f"eval/{name}": value for name, value in message.metrics.items()}
        )

    def _handle_data(self, message: DataReady) -> None:
        self._happened_once(
            "data_ready",
            num_train_samples=message.num_train_samples,
            num_eval_samples=message.num_eval_samples,
            steps_per_epoch=message.steps_per_epoch,
            total_steps=message.total_steps,
        )
        for text in message.notes:
            self._note(text, warning=False)

    def _handle_finish(self, message: Finished) -> None:
        self._happened(
            "finished",
            stopped=message.stopped,
            reason=message.reason,
            model_dir=message.model_dir,
            metrics=dict(message.metrics),
            train_seconds=message.train_seconds,
            peak_memory_bytes=message.peak_memory_bytes,
        )

    def _note(self, text: str, warning: bool) -> None:
        self._happened_once("note", text=text, warning=warning)

    def _happened_once(self, kind: str, **fields: Any) -> None:
        """Every attempt says these again after a restart; the record needs them once."""
        key = _told_key({"kind": kind, **fields})
        if key not in self._told:
            self._told.add(key)
            self._happened(kind, **fields)

    def _happened(self, kind: str, **fields: Any) -> None:
        self._event(kind, after_step=self._running.step, **fields)

    def _event(self, kind: str, **fields: Any) -> None:
        self._events.append({"kind": kind, **fields, "time": round(time.time(), 3)})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Running:
    """One line of totals.jsonl: sums up to and including `step`."""

    step: int = 0
    epoch: float = 0.0
    samples: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    seconds: float = 0.0
    overflow_steps: int = 0

    @classmethod
    def from_line(cls, line: Mapping[str, Any]) -> _Running:
        return cls(**{each.name: line[each.name] for each in fields(cls) if each.name in line})

    def to_line(self) -> dict[str, Any]:
        # Of every step: asdict copies every value.
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def after(self, message: StepDone) -> _Running:
        rate = message.samples_per_second
        measured = isinstance(rate, (int, float)) and math.isfinite(rate) and rate > 0
        return _Running(
            step=message.step,
            epoch=message.epoch,
            samples=self.samples + message.num_samples,
            tokens=self.tokens + message.num_tokens,
            padded_tokens=self.padded_tokens + message.num_padded_tokens,
            seconds=self.seconds + (message.num_samples / rate if measured else 0.0),
            overflow_steps=self.overflow_steps + (not message.applied),
        )


def _told_key(line: Mapping[str, Any]) -> str:
    """What makes two notes the same: all that they say, not when."""
    said = {key: value for key, value in line.items() if key not in ("time", "after_step")}
    return json.dumps(strict(said), sort_keys=True)
