"""Dealing a global batch: nothing lost, the same number of micro-batches, little padding."""

from __future__ import annotations

import numpy as np
import pytest

from ftlaunch.strategies.base import Batch
from ftlaunch.strategies.data.batches import Collator, micro_batch_seed
from ftlaunch.strategies.data.dealing import deal
from tests import tiny


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("micro_batch", [1, 2, 5, 64])
@pytest.mark.parametrize("size", [1, 2, 7, 32, 33])
def test_each_sample_is_dealt_once(world_size, micro_batch, size):
    indices = np.random.default_rng(0).permutation(1000)[:size]
    lengths = np.random.default_rng(1).integers(1, 100, size)
    dealt = deal(indices, lengths, world_size=world_size, micro_batch=micro_batch)
    assert len(dealt) == world_size
    assert len({len(runs) for runs in dealt}) == 1
    assert all(len(run) <= micro_batch for runs in dealt for run in runs)
    assert sorted(i for runs in dealt for run in runs for i in run) == sorted(indices)


def test_runs_are_of_one_length_and_ranks_carry_the_same():
    """Lengths 1 to 8 in four runs of 2, dealt forth and back: (8,7) and (2,1), (6,5) and (4,3).

    Rank 0 carries 18 tokens and so does rank 1; padded 2·8 + 2·2 = 20 and 2·6 + 2·4 = 20.
    """
    indices = np.arange(8)
    dealt = deal(indices, indices + 1, world_size=2, micro_batch=2)
    assert [[run.tolist() for run in runs] for runs in dealt] == [
        [[7, 6], [1, 0]],
        [[5, 4], [3, 2]],
    ]


def test_the_order_of_the_samples_does_not_matter():
    indices = np.arange(20)
    lengths = np.random.default_rng(2).integers(1, 5, 20)
    shuffled = np.random.default_rng(3).permutation(20)
    one = deal(indices, lengths, world_size=3, micro_batch=2)
    other = deal(indices[shuffled], lengths[shuffled], world_size=3, micro_batch=2)
    for runs, others in zip(one, other, strict=True):
        assert [run.tolist() for run in runs] == [run.tolist() for run in others]


def test_a_batch_is_padded_to_its_longest_row():
    table = tiny.Table([np.array([5, 6, 7], np.int32), np.array([8], np.int32)], np.array([2, 0]))
    collator = Collator(
        table=table, pad_token_id=9, class_weights=np.array([0.5, 1, 3], np.float32)
    )
    batch = collator.batch(np.array([0, 1]), seed=1)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.weights.tolist() == [3.0, 0.5]
    assert collator.total_items(np.array([0, 1])) == 3.5
    assert (batch.num_samples, batch.num_tokens, batch.num_padded_tokens) == (2, 4, 6)


@pytest.mark.parametrize(("learned", "row"), [([0, 0, 1], 2), ([0, 2, 1], 1), ([0, 0, 0], 0)])
def test_one_row_is_one_to_learn_from(learned, row):
    """Labels of tokens, and samples that share rows: each of them stays what it is."""
    weights = np.array([[0, each, 0, 0] for each in learned], dtype=np.float32)
    labels = np.where(weights != 0, np.arange(12).reshape(3, 4), -100)
    inputs = {
        "input_ids": np.arange(12).reshape(3, 4),
        "position_ids": np.array([[0, 1, 0, 1]] * 3),
    }
    batch = Batch(
        inputs=inputs,
        labels=labels,
        weights=weights,
        indices=np.array([7, 8, 9]),
        seed=5,
        lengths=np.array([2, 3, 4]),
    )
    one = batch.one_row()
    assert {name: values.tolist() for name, values in one.inputs.items()} == {
        name: [values[row].tolist()] for name, values in inputs.items()
    }
    assert one.labels.tolist() == [labels[row].tolist()]
    assert one.weights.tolist() == [weights[row].tolist()]
    assert (one.indices.tolist(), one.seed, one.num_tokens) == ([7 + row], 5, 2 + row)


def test_filler_weighs_nothing():
    collator = Collator(table=tiny.random_table(3), pad_token_id=0)
    batch = collator.batch(np.array([], dtype=np.int64), seed=1)
    assert batch.weights.tolist() == [0.0]
    assert batch.indices.tolist() == [-1]
    assert (batch.num_samples, batch.num_tokens) == (0, 0)


def test_runs_that_are_looked_up_together_are_the_batches_of_each():
    collator = Collator(table=tiny.random_table(9), pad_token_id=0)
    runs = [np.array(run, dtype=np.int64) for run in ([7, 2, 5], [], [0], [8, 1])]
    together = list(collator.batches(runs, seeds=[4, 5, 6, 7]))
    assert [batch.seed for batch in together] == [4, 5, 6, 7]
    for run, seed, batch in zip(runs, [4, 5, 6, 7], together, strict=True):
        alone = collator.batch(run, seed=seed)
        assert batch.inputs.keys() == alone.inputs.keys()
        for name, values in alone.inputs.items():
            np.testing.assert_array_equal(batch.inputs[name], values)
        for name in ("labels", "weights", "indices"):
            np.testing.assert_array_equal(getattr(batch, name), getattr(alone, name))


@pytest.mark.parametrize("labels", [np.array([2, 0, 1]), np.zeros((3, 4), np.float32)])
def test_without_weights_of_classes_every_label_counts_as_one(labels):
    rows = [np.array([5], np.int32)] * 3
    collator = Collator(table=tiny.Table(rows, labels), pad_token_id=0)
    assert collator.total_items(np.array([0, 2])) == labels[[0, 2]].size


def test_seeds_are_stateless_and_distinct():
    seeds = {
        micro_batch_seed(seed, step, rank, number)
        for seed in range(3)
        for step in range(5)
        for rank in range(4)
        for number in range(3)
    }
    assert len(seeds) == 180
    assert all(0 <= seed < 2**63 for seed in seeds)
