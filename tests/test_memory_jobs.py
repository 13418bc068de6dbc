"""Jobs that run out of memory for real: they go on with half the micro-batch, and nothing else differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ftlaunch.launcher.plan import LaunchPlan
from tests.jobs import (
    assert_no_process_left,
    ftlaunch,
    metrics_of,
    read_lines,
    said,
    summary_of,
    write_model,
)
from tests.training_jobs import Inputs, assert_same_training

# A model that takes a gibibyte of address space for each row, as wide activations would, and gives it
# back at once. Nothing is written there, so it costs neither memory nor time.
#
# From its N-th training pass on, in rank 1, the process has no more than it had, and {rows} gibibytes.
# That is the kernel's limit (RLIMIT_AS), at which torch's own allocator fails. A file tells the ranks
# that come after a restart: they have the limit from their first pass on.
_WIDE = """\
import os
import resource
from pathlib import Path

import torch
from transformers import BertForSequenceClassification

MARKER = Path({marker!r})


class Wide(BertForSequenceClassification):
    calls = 0
    limited = False

    def forward(self, *args, **kwargs):
        self.calls += self.training
        if self.calls == {at_call}:
            MARKER.touch()
        if MARKER.exists() and not self.limited and os.environ["RANK"] in {ranks!r}:
            self.limited = True
            has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            limit = has + int({rows} * 2**30)
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        rows = (kwargs.get("input_ids") if args == () else args[0]).shape[0]
        torch.empty(rows, 2**30, dtype=torch.uint8)
        return super().forward(*args, **kwargs)
"""
_STEPS = (
    *("train.max_steps=20", "checkpoint.save_steps=5", "model.trust_remote_code=true"),
    *("train.per_device_eval_batch_size=2", "checkpoint.async_save=false"),
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return Inputs(tmp_path_factory.mktemp("inputs"))


def _model(folder: Path, *, rows: float, at_call: int = 10**9, ranks: str = "1") -> Path:
    model = write_model(folder, auto_map={"AutoModelForSequenceClassification": "wide.Wide"})
    marker = str(folder / "no-more-memory")
    text = _WIDE.format(marker=marker, rows=rows, at_call=at_call, ranks=ranks)
    (model / "wide.py").write_text(text)
    return model


@pytest.fixture(scope="module")
def undisturbed(inputs):
    """strategy → the metrics of a job that has memory enough."""
    made: dict[str, list[dict[str, Any]]] = {}

    def run(strategy):
        if strategy not in made:
            out = inputs.folder / f"undisturbed-{strategy}"
            model = _model(inputs.folder / f"model-{strategy}", rows=100)
            result = ftlaunch(*inputs.command(out, "--strategy", strategy, *_STEPS, model=model))
            assert result.returncode == 0, said(result)
            made[strategy] = metrics_of(out)
        return made[strategy]

    return run


def _events(out: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_lines(out / "events.jsonl") if event["kind"] == kind]


def _assert_halved(out: Path, before: int, after: int) -> dict[str, Any]:
    """One restart, with half the samples and half the tokens; the event."""
    (restart,) = _events(out, "restarted")
    assert restart["before"]["micro_batch"] == before
    assert restart["after"]["micro_batch"] == after
    assert restart["before"]["max_tokens_per_micro_batch"] == 1024
    assert restart["after"]["max_tokens_per_micro_batch"] == 512
    assert "rank 1 on node1: RuntimeError" in restart["reason"]
    assert "can't allocate memory" in restart["reason"]
    assert f"({before} samples, 1,024 padded tokens → {after} samples, 512" in restart["reason"]
    plan = LaunchPlan.read(out / "plan.json")
    assert (plan.micro_batch, plan.max_tokens_per_micro_batch) == (after, 512)
    assert summary_of(out)["micro_batch"] == after
    assert "half the micro-batch" in (out / "report.html").read_text()
    return restart


# Two micro-batches of 4 a step and rank: the 13th pass is the first of step 7. Under ddp it is the 14th,
# since one pass beforehand looks for unused parameters. Three rows fit, four do not, two do.
#
# An evaluation right before that step, with no checkpoint between, is not taken for what needs so much.
@pytest.mark.parametrize(
    ("strategy", "at_call", "more"),
    [
        ("ddp", 14, ()),
        ("zero2", 13, ("train.eval_strategy=steps", "train.eval_steps=6")),
    ],
)
def test_no_memory_at_step_7_is_answered_with_half(
    inputs, undisturbed, tmp_path, strategy, at_call, more
):
    expected = undisturbed(strategy)
    model = _model(tmp_path / "model", rows=3, at_call=at_call)
    out = tmp_path / "out"
    result = ftlaunch(
        *inputs.command(
            out, "--strategy", strategy, *_STEPS, *more, "--max-restarts", 0, model=model
        )
    )
    assert result.returncode == 0, said(result)
    assert _assert_halved(out, 4, 2)["after_step"] == 6
    assert "going on from the checkpoint of step 5 with half the micro-batch" in result.stdout
    assert_same_training(metrics_of(out), expected)
    assert_no_process_left(out)


def test_the_proof_finds_it_before_the_first_step(inputs, undisturbed, tmp_path):
    expected = undisturbed("ddp")
    model = _model(tmp_path / "model", rows=3, at_call=1)
    out = tmp_path / "out"
    result = ftlaunch(*inputs.command(out, *_STEPS, "train.prove_micro_batch=true", model=model))
    assert result.returncode == 0, said(result)
    assert _assert_halved(out, 4, 2)["after_step"] == 0
    assert result.stdout.index("half the micro-batch") < result.stdout.index("step 20/20")
    (proved,) = _events(out, "proved")
    # The longest sample has 13 words at most, one that tells and 12 others, between [CLS] and [SEP].
    assert proved["shapes"] == [[2, 15]]
    assert "the largest micro-batch fits: 2 × 15 tokens" in result.stdout
    assert "the largest micro-batch fits: 2 × 15 tokens" in (out / "report.html").read_text()
    assert summary_of(out)["proof"]["shapes"] == [[2, 15]]
    assert_same_training(metrics_of(out), expected)


@pytest.mark.long
def test_no_memory_for_one_sample_ends_with_what_to_do(inputs, tmp_path):
    model = _model(tmp_path / "model", rows=0.5, at_call=1)
    out = tmp_path / "out"
    result = ftlaunch(*inputs.command(out, *_STEPS, "train.prove_micro_batch=true", model=model))
    assert result.returncode == 1, said(result)
    assert result.stdout.count("with half the micro-batch") == 2
    words = "One sample at a time does not fit into the memory: lower data.max_length"
    assert words in said(result)
    assert words in summary_of(out)["failure"]["title"]
    assert words in (out / "report.html").read_text()
    assert not metrics_of(out)
    assert_no_process_left(out)


@pytest.mark.long
def test_an_evaluation_that_does_not_fit_leaves_training_as_it_is(inputs, undisturbed, tmp_path):
    """The first 15 steps have an evaluation behind them, of 8 samples at once where 5 fit."""
    model = _model(tmp_path / "model", rows=5, at_call=14)
    out = tmp_path / "out"
    result = ftlaunch(
        *inputs.command(out, *_STEPS, "train.per_device_eval_batch_size=8", model=model)
    )
    assert result.returncode == 0, said(result)
    (restart,) = _events(out, "restarted")
    assert "(8 samples, 2,048 padded tokens → 4 samples, 1,024" in restart["reason"]
    plan = LaunchPlan.read(out / "plan.json")
    assert (plan.micro_batch, plan.max_tokens_per_micro_batch) == (4, 1024)
    assert (plan.eval_micro_batch, plan.eval_max_tokens) == (4, 1024)
    assert_same_training(metrics_of(out), undisturbed("ddp"))


@pytest.mark.long
def test_a_rehearsed_limit(inputs, undisturbed, tmp_path):
    """The limit is set from outside while the rank works, and is gone with it."""
    expected = undisturbed("ddp")
    model = _model(tmp_path / "model", rows=100)
    out = tmp_path / "out"
    result = ftlaunch(
        "rehearse",
        *("--fault", "memory-limit:1@step6", *inputs.command(out, *_STEPS, model=model)),
    )
    assert result.returncode == 0, said(result)
    assert "fault: memory-limit 1" in result.stdout
    assert _assert_halved(out, 4, 2)["after_step"] in range(6, 20)
    assert_same_training(metrics_of(out), expected)
    assert_no_process_left(out)
