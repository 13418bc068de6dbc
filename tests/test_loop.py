"""The loop and its windows: what is counted, and when a micro-batch is made."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from ftlaunch.cluster.world import World
from ftlaunch.strategies import loop
from ftlaunch.strategies.base import StepOutcome
from ftlaunch.strategies.loop import Cursor, train
from ftlaunch.strategies.torch.forward import Forward
from ftlaunch.strategies.torch.losses import LOSSES
from tests import tiny

ALONE = World(
    rank=0,
    size=1,
    local_rank=0,
    local_size=1,
    node_rank=0,
    num_nodes=1,
    master_address="127.0.0.1",
    master_port=0,
)


def _windows(*, world_size=1):
    rows = [np.arange(1, 2 + n, dtype=np.int32) for n in range(8)]  # 1 to 8 tokens
    view = tiny.windows(
        ALONE, tiny.Table(rows, np.zeros(8, dtype=np.int64)), global_batch=8, micro_batch=2
    )
    return replace(view, world_size=world_size)


def test_tokens_of_all_ranks_are_counted():
    """Runs of (8, 7), (6, 5), (4, 3) and (2, 1) tokens: 36, and 2 · (8 + 6 + 4 + 2) = 40 padded."""
    for world_size in (1, 2):
        window = _windows(world_size=world_size).window(0)
        assert (window.num_tokens, window.padded_tokens) == (36, 40)
        assert window.total_items == 8.0


def test_one_more_rank_than_samples_has_nothing_to_count():
    """Nine ranks, a sample each and one without: no padding."""
    window = _windows(world_size=9).window(0)
    assert (window.num_tokens, window.padded_tokens) == (36, 36)


class _Recording:
    """A strategy that notes what was asked of it."""

    def __init__(self, log):
        self._log = log

    def accumulate(self, batch, total_items, *, last, say):
        self._log.append(f"accumulate {batch.seed % 1000}{' last' if last else ''}")

    def apply(self, learning_rate):
        self._log.append("apply")
        return StepOutcome(
            applied=True,
            loss=0.0,
            grad_norm=0.0,
            loss_scale=1.0,
            culprit=None,
            stop=False,
            saving=0.0,
        )


class _Schedule:
    def learning_rate(self, step):
        return 1.0


def _log_of(first_step, total_steps, *, end_after=None):
    log = []
    view = _windows()
    collator = view.collator

    class Noting:
        table = collator.table
        total_items = collator.total_items

        def batches(self, runs, *, seeds, epoch=0):
            for run, seed in zip(runs, seeds, strict=True):
                log.append(f"make {seed % 1000}")
                yield collator.batch(run, seed=seed, epoch=epoch)

    cursor = Cursor(step=first_step, applied=first_step)
    train(
        cast(Any, _Recording(log)),
        replace(view, collator=Noting(), micro_batch=4),
        cast(Any, _Schedule()),
        cursor,
        total_steps=total_steps,
        after_step=lambda report: cursor.step == end_after,
    )
    return log, cursor


def test_the_next_micro_batch_is_made_before_the_step_is_applied(monkeypatch):
    """So a device that still computes never waits for its data. Two steps of two micro-batches, each as
    large as what is made in one go.
    """
    monkeypatch.setattr(loop, "_TOKENS_AT_ONCE", 1)
    log, cursor = _log_of(3, 5)
    kinds = [entry.split()[0] + ("!" if entry.endswith("last") else "") for entry in log]
    step = ["accumulate", "make", "accumulate!", "make", "apply"]
    assert kinds == ["make", *step, *(step[:3] + step[4:])]
    made = [entry.split()[1] for entry in log if entry.startswith("make")]
    assert made == [entry.split()[1] for entry in log if entry.startswith("accumulate")]
    assert cursor.step == cursor.applied == 5


def test_small_micro_batches_are_made_several_in_one_go():
    """Two steps of two: the first asked for brings all, in their order."""
    log, _ = _log_of(3, 5)
    kinds = [entry.split()[0] + ("!" if entry.endswith("last") else "") for entry in log]
    assert kinds == [*["make"] * 4, *["accumulate", "accumulate!", "apply"] * 2]
    made = [entry.split()[1] for entry in log if entry.startswith("make")]
    assert made == [entry.split()[1] for entry in log if entry.startswith("accumulate")]


def test_no_more_is_made_than_the_tokens_that_are_asked_for():
    """Windows of 3 ranks with 2 micro-batches each, of 24, 54 and 12 padded tokens: 4, 9 and 2 a micro-batch.
    Ten are reached by 4, 4 and 9; then by 9 and 2; one of 2 is left.
    """
    taken = []

    def stream():
        for padded in (24, 54, 12):
            window = SimpleNamespace(padded_tokens=padded, dealt=[[None] * 2] * 3)
            for last in (False, True):
                taken.append(padded)
                yield cast(Any, (window, None, last))

    several = loop.several_at_once(stream(), 10)
    for number, expected in enumerate([3, 3, 3, 5, 5, 6]):
        next(several)
        assert len(taken) == expected, number
    assert next(several, None) is None


def test_no_more_than_64_are_made_in_one_go():
    window = SimpleNamespace(padded_tokens=1, dealt=[[None]])
    taken = []

    def stream():
        while True:
            taken.append(1)
            yield cast(Any, (window, None, True))

    next(loop.several_at_once(stream(), 10_000))
    assert len(taken) == 64


def test_all_ranks_make_theirs_before_the_same_micro_batch():
    """Three epochs of 8 samples of 1 to 8 tokens, 4 a step, on two ranks."""

    def made(rank):
        view = replace(_windows(world_size=2), rank=rank, micro_batch=1)
        view = replace(view, order=replace(view.order, global_batch_size=4))
        made_so_far = 0
        batches = view.collator.batches

        def counting(runs, **more):
            nonlocal made_so_far
            for batch in batches(runs, **more):
                made_so_far += 1
                yield batch

        noting = SimpleNamespace(
            table=view.collator.table, total_items=view.collator.total_items, batches=counting
        )
        several = loop.several_at_once(replace(view, collator=cast(Any, noting)).stream(0, 6), 9)
        return [made_so_far for _ in several]

    first, second = made(0), made(1)
    assert first == second
    assert first[0] > 1 and first[0] < len(first)


def test_nothing_is_made_where_nothing_is_left_to_do():
    assert _log_of(5, 5)[0] == []


def test_the_loop_ends_where_it_is_told_to():
    log, cursor = _log_of(0, 5, end_after=2)
    assert cursor.step == 2
    assert log.count("apply") == 2


def test_seeds_give_the_numbers_of_manual_seed_and_note_no_traceback(monkeypatch):
    forward = Forward(device=torch.device("cpu"), autocast="fp32", loss=LOSSES["cross_entropy"])
    monkeypatch.setattr("traceback.format_stack", lambda *_: 1 / 0)
    forward._seed(2**62 + 5)
    drawn = torch.rand(4)
    monkeypatch.undo()
    torch.manual_seed(2**62 + 5)
    assert torch.equal(drawn, torch.rand(4))
