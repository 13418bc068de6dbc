from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from ftlaunch.launcher.line_log import read_lines
from ftlaunch.launcher.recorder import METRIC_KEYS, Recorder
from ftlaunch.strategies.progress import (
    DataReady,
    Evaluated,
    Finished,
    Note,
    Resumed,
    Saved,
    StepDone,
)


def step_done(step: int, **changes: Any) -> StepDone:
    fields: dict[str, Any] = {
        "step": step,
        "epoch": step / 10,
        "loss": 1 / step,
        "learning_rate": 1e-4,
        "grad_norm": 0.5,
        "loss_scale": 1.0,
        "applied": True,
        "samples_per_second": 16.0,
        "tokens_per_second": 48.0,
        "samples_digest": f"d{step}",
        "num_samples": 8,
        "num_tokens": 24,
        "num_padded_tokens": 32,
        "culprit": None,
    }
    return StepDone(**{**fields, **changes})


def evaluated(step: int, **metrics: float) -> Evaluated:
    return Evaluated(
        step=step, epoch=1.0, metrics=metrics, num_samples=4, seconds=0.1, is_best=True
    )


def lines(path: Path) -> list[dict[str, Any]]:
    """Strict: every line whole, and no NaN or Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"not strict JSON: {name}")

    text = path.read_text(encoding="utf-8")
    assert not text or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def steps(path: Path) -> list[int]:
    return [line["step"] for line in lines(path)]


def test_a_metrics_line_has_the_keys_in_order_and_no_others(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.handle(step_done(1))
        # Flushed per step: it is on the file system before the recorder is closed.
        (line,) = lines(tmp_path / "metrics.jsonl")
    assert tuple(line) == METRIC_KEYS
    assert METRIC_KEYS == (
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


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.handle(
            step_done(
                1, loss=float("nan"), grad_norm=float("inf"), applied=False, culprit="head.weight"
            )
        )
        recorder.handle(evaluated(1, loss=float("-inf"), accuracy=0.5))
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert line["loss"] is None
    assert line["grad_norm"] is None
    skipped, evaluation = lines(tmp_path / "events.jsonl")
    assert (skipped["kind"], skipped["culprit"]) == ("skipped", "head.weight")
    assert evaluation["metrics"] == {"loss": None, "accuracy": 0.5}


def test_rewind_drops_every_line_after_the_step(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        for step in range(1, 7):
            recorder.handle(step_done(step, applied=step != 5, culprit="x" if step == 5 else None))
            if step % 2 == 0:
                recorder.handle(evaluated(step, loss=float(step)))
                recorder.handle(
                    Saved(step=step, path=f"step-{step}", seconds=0.1, blocked_seconds=0.1)
                )
        recorder.restarted("rank 1 was killed")
        recorder.rewind(4)
        assert recorder.totals().eval == {"loss": 4.0}
        assert recorder.totals().overflow_steps == 0
        recorder.handle(step_done(5))
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5]
    events = lines(tmp_path / "events.jsonl")
    assert [event["step"] for event in events if "step" in event] == [2, 2, 4, 4]
    # What happened to the run stays, although it happened after step 4.
    (restart,) = [event for event in events if event["kind"] == "restarted"]
    assert (restart["after_step"], restart["reason"]) == (6, "rank 1 was killed")
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*"))


def test_a_resume_and_a_restart_from_scratch_rewind_by_themselves(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        for step in (1, 2, 3):
            recorder.handle(step_done(step))
        recorder.handle(Resumed(step=2, epoch=0.2, checkpoint="checkpoints/step-2"))
        recorder.handle(step_done(3, loss=9.0))
        assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3]
        recorder.handle(step_done(1, loss=7.0))
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert line["loss"] == 7.0
    assert [event["after_step"] for event in lines(tmp_path / "events.jsonl")] == [2]


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.handle(step_done(1))
        recorder.handle(step_done(2))
    for name in ("metrics.jsonl", "events.jsonl", "totals.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 3, "ep' + "x" * 70_000)
    with Recorder(tmp_path) as recorder:
        assert recorder.totals().optimizer_steps == 2
        recorder.handle(step_done(3))
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3]
    assert lines(tmp_path / "events.jsonl") == []


def test_damaged_lines_are_passed_over_and_leave_with_a_rewind(tmp_path: Path) -> None:
    good = '{"step": 1}\n'
    # Zeros are what some file systems leave after a power cut.
    (tmp_path / "metrics.jsonl").write_text(good + "\0\0\0\n[1]\n" + '{"step": 2}\n')
    with Recorder(tmp_path) as recorder:
        assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]
        recorder.rewind(1)
    assert (tmp_path / "metrics.jsonl").read_text() == good


def test_totals_survive_a_resume_exactly(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        assert recorder.totals().samples_per_second == 0.0
        for step in (1, 2, 3):
            recorder.handle(step_done(step, applied=step != 2))
        recorder.handle(evaluated(3, accuracy=0.75))
    with Recorder(tmp_path) as recorder:
        recorder.restarted("again")
        recorder.handle(Resumed(step=2, epoch=0.2, checkpoint="c"))
        recorder.handle(step_done(3, num_padded_tokens=56))
        totals = recorder.totals()
    assert (totals.optimizer_steps, totals.overflow_steps, totals.restarts) == (3, 1, 1)
    assert (totals.samples_seen, totals.tokens_seen) == (24, 72)
    # 72 tokens of 32 + 32 + 56 = 120 positions.
    assert totals.padding_fraction == pytest.approx(1 - 72 / 120)
    # Each step: 8 samples at 16 a second.
    assert totals.train_seconds == pytest.approx(1.5)
    assert totals.samples_per_second == pytest.approx(16.0)
    assert totals.tokens_per_second == pytest.approx(48.0)
    assert totals.epochs == pytest.approx(0.3)
    # The evaluation of step 3 belonged to the attempt that was rewound.
    assert totals.eval == {}


def test_what_every_attempt_says_again_is_kept_once(tmp_path: Path) -> None:
    ready = DataReady(
        num_train_samples=8,
        num_eval_samples=2,
        steps_per_epoch=4,
        total_steps=8,
        seconds=0.5,
        notes=("text column guessed",),
    )
    for _ in range(2):
        with Recorder(tmp_path) as recorder:
            recorder.handle(ready)
            recorder.handle(Note(text="slow disk", warning=True))
    kinds = [event["kind"] for event in lines(tmp_path / "events.jsonl")]
    assert kinds == ["data_ready", "note", "note"]


def test_the_end_is_on_record(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.handle(step_done(1))
        recorder.handle(
            Finished(
                stopped=True,
                reason="SIGTERM",
                step=1,
                epoch=0.1,
                model_dir=None,
                metrics={},
                train_seconds=1.0,
                peak_memory_bytes=1,
            )
        )
    (event,) = lines(tmp_path / "events.jsonl")
    assert (event["kind"], event["reason"], event["stopped"]) == ("finished", "SIGTERM", True)


def test_a_full_disk_passes_through_and_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_write = os.write

    def half_then_full(descriptor: int, data: Any) -> int:
        if len(data) > 20:
            return real_write(descriptor, data[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    with Recorder(tmp_path) as recorder:
        recorder.handle(step_done(1))
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", half_then_full)
            with pytest.raises(OSError, match="No space left"):
                recorder.handle(step_done(2))
        assert steps(tmp_path / "metrics.jsonl") == [1]
        assert steps(tmp_path / "totals.jsonl") == [1]


def test_tensorboard_reads_the_scalars_and_forgets_what_was_rewound(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Recorder(tmp_path) as recorder:
        for step in (1, 2, 3, 4):
            recorder.handle(step_done(step))
        recorder.handle(evaluated(4, accuracy=0.5))
        # Within one file ...
        recorder.rewind(3)
        recorder.handle(step_done(4, loss=4.5))
    with Recorder(tmp_path) as recorder:
        # ... and from one file to the next.
        recorder.handle(Resumed(step=2, epoch=0.2, checkpoint="c"))
        recorder.handle(step_done(3, loss=3.5))
        recorder.handle(evaluated(3, accuracy=0.75))
    accumulator = accumulators.EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    assert set(accumulator.Tags()["scalars"]) == {
        "train/loss",
        "train/learning_rate",
        "train/grad_norm",
        "train/loss_scale",
        "train/samples_per_second",
        "train/tokens_per_second",
        "eval/accuracy",
    }
    loss = [(event.step, event.value) for event in accumulator.Scalars("train/loss")]
    assert loss == [(1, 1.0), (2, 0.5), (3, 3.5)]
    accuracy = [(event.step, event.value) for event in accumulator.Scalars("eval/accuracy")]
    assert accuracy == [(3, 0.75)]
