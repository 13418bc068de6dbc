"""The proof that a micro-batch fits: which one is computed, and that nothing is left of it."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ftlaunch.strategies import registry
from ftlaunch.strategies.data.dealing import rows_at_once
from ftlaunch.strategies.loop import Cursor, train
from ftlaunch.strategies.options import DeepSpeedOptions
from ftlaunch.strategies.proof import largest_runs, longest_sample, prove
from ftlaunch.strategies.startup import Stages
from ftlaunch.strategies.training import TrainingRun
from tests import tiny
from tests.ranks import run_ranks
from tests.test_parity import _schedule

STEPS = 6


def _table(lengths):
    rows = [np.ones(length, dtype=np.int32) for length in lengths]
    return tiny.Table(rows, np.zeros(len(rows), dtype=np.int64))


# -- which micro-batch --------------------------------------------------------------------------


def test_the_longest_samples_are_computed():
    table = _table([3, 9, 5, 9, 7])
    assert [run.tolist() for run in largest_runs(table, 2, None)] == [[1, 3]]
    assert [run.tolist() for run in largest_runs(table, 4, None)] == [[1, 3, 4, 2]]
    assert [run.tolist() for run in largest_runs(table, 99, None)] == [[1, 3, 4, 2, 0]]
    assert longest_sample(table) == 9


def test_shorter_samples_may_add_up_to_more():
    """16 tokens: one sample of 9, two of 7 (14), or three of 5 (15), of which there are two: 5, 5, 3."""
    table = _table([3, 9, 5, 7, 7, 5])
    assert [run.tolist() for run in largest_runs(table, 8, 16)] == [[1], [2, 5, 0]]
    # Two of 9 are 18: the longest sample's own is the largest.
    assert [run.tolist() for run in largest_runs(_table([9, 9, 5, 5, 5]), 8, 18)] == [[0, 1]]


def test_nothing_to_compute():
    assert largest_runs(_table([]), 4, 100) == []
    assert longest_sample(_table([])) == 0


@pytest.mark.parametrize("seed", range(20))
def test_no_micro_batch_is_larger(seed):
    """Against every sample as the longest of a micro-batch."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 40, int(draw.integers(1, 30)))
    micro_batch, max_tokens = int(draw.integers(1, 10)), int(draw.integers(5, 150))
    ordered = sorted(lengths.tolist(), reverse=True)
    largest = max(
        length * min(rows_at_once(length, micro_batch, max_tokens), len(ordered) - place)
        for place, length in enumerate(ordered)
    )
    runs = largest_runs(_table(lengths), micro_batch, max_tokens)
    assert max(len(run) * int(lengths[run].max()) for run in runs) == largest
    assert int(lengths[runs[0]].max()) == ordered[0]


# -- when it is computed ------------------------------------------------------------------------


class _AfterRankZero(TrainingRun):
    """Comes to the proof, with a rank 0 that takes its time before, and notes whether it was told of."""

    def __init__(self, strategy, marker):
        self._strategy, self._stages, self._marker = strategy, Stages(), marker
        self._settings: Any = SimpleNamespace(prove_micro_batch=True)
        self._emit = self._note if strategy.world.is_main else lambda message: None

    _is_over = False

    def _note(self, message):
        self._marker.write_text(message.name)

    def _resume(self):
        if self._strategy.world.is_main:
            time.sleep(1.0)

    def _prove(self):
        raise LookupError(self._marker.read_text() if self._marker.exists() else "nothing said")


def _come_to_the_proof(world, listen_fd, folder, marker):
    strategy = registry.load("ddp")(tiny.request(world, listen_fd, folder))
    with pytest.raises(LookupError) as told:
        _AfterRankZero(strategy, marker).run()
    return str(told.value)


def test_no_rank_computes_before_it_is_known_what_is_being_done(bert, tmp_path):
    """Want of memory while the model is loaded ends a job; there is no micro-batch to halve yet."""
    assert run_ranks(2, _come_to_the_proof, bert, tmp_path / "told") == ["prove", "prove"]


# -- what is left of it -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny.write_config(tmp_path_factory.mktemp("bert"), "bert")


def _state(strategy):
    return {
        (piece.kind, piece.name, piece.start): np.array(piece.values)
        for piece in strategy.state_slices()
    }


def _steps(world, strategy, view, cursor, until):
    losses = []

    def after_step(report):
        losses.append(report.outcome.loss)
        return False

    train(
        strategy,
        view,
        _schedule(),
        cursor,
        total_steps=until,
        after_step=after_step,
    )
    return losses


def _run(world, listen_fd, folder, name, precision, offload, proves):
    """The losses and the state of a few steps, with dropout, with or without a proof before them."""
    request = tiny.request(
        world,
        listen_fd,
        folder,
        precision=precision,
        model={"dropout": 0.1},
        deepspeed=DeepSpeedOptions(offload="cpu") if offload else None,
        weight_decay=0.1,
    )
    strategy = registry.load(name)(request)
    view = tiny.windows(world, tiny.random_table(60), global_batch=12, micro_batch=6, max_tokens=60)
    if proves:
        before, random = _state(strategy), torch.get_rng_state()
        proof = prove(strategy, view.collator, micro_batch=6, max_tokens=60, accumulates=True)
        assert all(rows * length <= 60 for rows, length in proof.shapes)
        assert torch.equal(torch.get_rng_state(), random)
        after = _state(strategy)
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[key], after[key]) for key in before)
    losses = _steps(world, strategy, view, Cursor(), STEPS)
    state = _state(strategy)
    strategy.close()
    return losses, state


@pytest.mark.parametrize(
    ("name", "ranks", "precision"),
    [
        ("ddp", 1, "fp32"),
        ("ddp", 2, "bf16"),
        ("zero1", 2, "fp32"),
        ("zero2", 2, "bf16"),
        ("zero3", 2, "fp32"),
        pytest.param("ddp", 2, "fp16", marks=pytest.mark.long),
        pytest.param("zero1", 1, "bf16", marks=pytest.mark.long),
        pytest.param("zero2", 1, "fp32", marks=pytest.mark.long),
        pytest.param("zero3", 1, "bf16", marks=pytest.mark.long),
        pytest.param("zero3", 3, "bf16", marks=pytest.mark.long),
        pytest.param("zero1+offload", 2, "fp32", marks=pytest.mark.long),
        pytest.param("zero2+offload", 2, "bf16", marks=pytest.mark.long),
        pytest.param("zero3+offload", 2, "fp32", marks=pytest.mark.long),
    ],
)
def test_no_bit_differs_after_a_proof(bert, name, ranks, precision):
    strategy, _, offload = name.partition("+")
    proven = run_ranks(ranks, _run, bert, strategy, precision, offload, True)
    plain = run_ranks(ranks, _run, bert, strategy, precision, offload, False)
    for (losses, state), (expected, other) in zip(proven, plain, strict=True):
        assert losses == expected
        assert state.keys() == other.keys()
        assert all(np.array_equal(state[key], other[key]) for key in state)


def _first_step(world, listen_fd, folder):
    """(shapes of the first two passes, loss of the step, whether a parameter was found unused)"""
    strategy = registry.load("ddp")(tiny.request(world, listen_fd, folder, model={"dropout": 0.1}))
    shapes = []
    strategy.model.register_forward_pre_hook(
        lambda _, __, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    collator = tiny.windows(world, tiny.random_table(8), global_batch=8, micro_batch=4).collator
    mine = np.arange(4) if world.is_main else np.zeros(0, dtype=np.int64)
    strategy.accumulate(collator.batch(mine, seed=3), 4.0, last=True)
    unused = strategy._has_unused
    loss = strategy.apply(1e-3).loss
    strategy.close()
    return shapes, loss, unused


def test_one_row_tells_whether_a_parameter_is_unused(bert):
    """On a rank with four samples and on one that has filler alone."""
    alone = run_ranks(1, _first_step, bert)[0]
    found = run_ranks(2, _first_step, bert)
    (rows, length), *more = alone[0]
    assert rows == 4 and not more
    assert found[0][0] == [(1, length), (4, length)]
    assert [shape[0] for shape in found[1][0]] == [1, 1]
    for _, loss, unused in found:
        assert (loss, unused) == (alone[1], False)


def _after_different_findings(world, listen_fd, folder):
    """A step in which rank 1 alone has found that a parameter is unused."""
    strategy: Any = registry.load("ddp")(tiny.request(world, listen_fd, folder))
    strategy._has_unused = world.rank == 1
    view = tiny.windows(world, tiny.random_table(8), global_batch=8, micro_batch=4)
    indices = view.order.global_batch(0)
    for batch, last in view.micro_batches(indices, 0):
        strategy.accumulate(batch, view.total_items(indices, 0), last=last)
    strategy.apply(1e-3)
    found = strategy._exchange.ddp.find_unused_parameters
    strategy.close()
    return found


def test_ranks_agree_on_whether_a_parameter_is_unused(bert):
    """Who looks for them exchanges more than who does not, and would wait for ever."""
    assert run_ranks(2, _after_different_findings, bert) == [True, True]
