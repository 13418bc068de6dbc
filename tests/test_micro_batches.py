"""Micro-batches by padded tokens: whatever the bound, an optimizer step is that of the full batch."""

from __future__ import annotations

import numpy as np
import pytest

from ftlaunch.cluster.world import World
from ftlaunch.strategies import registry
from ftlaunch.strategies.data.batches import evaluation_batches
from ftlaunch.strategies.data.sample_order import samples_digest
from ftlaunch.strategies.loop import Cursor, train
from tests import tiny
from tests.ranks import run_ranks
from tests.test_parity import GLOBAL_BATCH, SAMPLES, STEPS, _reference, _schedule


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny.write_config(tmp_path_factory.mktemp("bert"), "bert")


@pytest.fixture(scope="module")
def reference(bert):
    return run_ranks(1, _reference, bert)[0]


def _train(world, listen_fd, folder, name, max_tokens):
    """What was seen of 30 steps, and how many micro-batches each had."""
    strategy = registry.load(name)(tiny.request(world, listen_fd, folder, weight_decay=0.1))
    view = tiny.windows(
        world,
        tiny.random_table(SAMPLES),
        global_batch=GLOBAL_BATCH,
        micro_batch=GLOBAL_BATCH,
        max_tokens=max_tokens,
    )
    seen, counts = [], []

    def after_step(report):
        outcome = report.outcome
        seen.append((samples_digest(report.indices), outcome.loss, outcome.grad_norm))
        counts.append(len(report.window.dealt[0]))
        return False

    train(
        strategy,
        view,
        _schedule(),
        Cursor(),
        total_steps=STEPS,
        after_step=after_step,
    )
    strategy.close()
    return seen, counts


_SAMPLE = [("ddp", 1, 45), ("ddp", 2, 45), ("ddp", 3, 100), ("zero2", 2, 100), ("zero3", 3, 45)]
_REST = [
    (name, ranks, max_tokens)
    for name in ("ddp", "zero1", "zero2", "zero3")
    for ranks in (1, 2, 3)
    for max_tokens in (20, 45, 100)
    if (name, ranks, max_tokens) not in _SAMPLE
]


@pytest.mark.parametrize(
    ("name", "ranks", "max_tokens"),
    [*_SAMPLE, *(pytest.param(*case, marks=pytest.mark.long) for case in _REST)],
)
def test_thirty_steps_are_those_of_the_full_batch(bert, reference, name, ranks, max_tokens):
    """12 samples of 5 to 40 tokens a step; a step has now more and now fewer micro-batches."""
    for seen, counts in run_ranks(ranks, _train, bert, name, max_tokens):
        assert [digest for digest, _, _ in seen] == [digest for digest, _, _ in reference]
        losses = np.array([(loss, norm) for _, loss, norm in seen])
        expected = np.array([(loss, norm) for _, loss, norm in reference])
        worst = np.abs(losses / expected - 1).max(axis=0)
        print(f"{name}, {ranks} ranks, {max_tokens} tokens: {worst} in {sorted(set(counts))}")
        assert worst[0] < 1e-6
        assert worst[1] < 1e-5
        assert len(set(counts)) > 1 or max_tokens == 20


def test_every_sample_is_evaluated_once_within_the_bound():
    table = tiny.random_table(50)
    found = []
    for rank in range(3):
        view = tiny.windows(World.alone(), table, global_batch=8, micro_batch=8)
        batches = list(
            evaluation_batches(
                view.collator, rank=rank, world_size=3, micro_batch=16, max_tokens=100
            )
        )
        assert all(batch.num_padded_tokens <= 100 and batch.num_samples <= 16 for batch in batches)
        found += [int(i) for batch in batches for i in batch.indices if i >= 0]
    assert sorted(found) == list(range(50))
