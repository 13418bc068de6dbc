"""Random samples in place of data: their lengths, tokens and labels, the same on every rank."""

from __future__ import annotations

import numpy as np
import pytest

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.data.batches import Collator
from ftlaunch.strategies.data.synthetic import make_tokens, read_lengths
from ftlaunch.strategies.data.task_names import TASKS
from ftlaunch.strategies.data.tasks import UNSUPERVISED
from ftlaunch.strategies.data.token_batches import TokenCollator
from ftlaunch.strategies.job_data import make_collator
from ftlaunch.strategies.options import JobOptions

CONFIG = {"vocab_size": 20, "pad_token_id": 7, "max_position_embeddings": 64}
EVERYTHING = np.arange(50)


def tokens_of(task, lengths="5-9", **changed):
    return make_tokens(
        task,
        changed.pop("config", CONFIG),
        read_lengths(lengths),
        **{"num_samples": 50, "max_length": None, "seed": 3, **changed},
    )


@pytest.mark.parametrize("task", TASKS)
def test_they_are_samples_of_the_task(task):
    tokens = tokens_of(task)
    again = tokens_of(task)
    lengths = tokens.train.lengths(EVERYTHING)
    assert set(lengths.tolist()) == {5, 6, 7, 8, 9}
    batches = make_collator(JobOptions(task=task), tokens, tokens.train, class_weights=None)
    same = make_collator(JobOptions(task=task), again, again.train, class_weights=None)
    batch, other = batches.batch(EVERYTHING, seed=1), same.batch(EVERYTHING, seed=1)
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    assert np.array_equal(ids, other.inputs["input_ids"])
    assert np.array_equal(batch.labels, other.labels)
    # Every token but padding, and padding nowhere else.
    assert set(ids[mask == 1].tolist()) == set(range(20)) - {7}
    assert set(ids[mask == 0].tolist()) == {7}
    assert batch.num_tokens == lengths.sum()
    if isinstance(batches, Collator):
        assert set(batch.labels.tolist()) == {0, 1}
        assert batches.total_items(EVERYTHING) == 50
        return
    assert isinstance(batches, TokenCollator)
    learned = batch.labels != UNSUPERVISED
    assert batches.total_items(EVERYTHING) == learned.sum()
    assert learned.any(axis=1).all()
    if task == "causal-lm":
        # What comes next, and nothing after the last.
        assert np.array_equal(batch.labels[:, :-1][learned[:, :-1]], ids[:, 1:][mask[:, 1:] == 1])
        assert learned.sum() == (lengths - 1).sum()
    if task == "masked-lm":
        assert np.array_equal(batch.labels[learned], ids[learned])


@pytest.mark.parametrize(
    ("text", "lowest", "highest"), [("12", 12, 12), (12, 12, 12), ("3-4", 3, 4), ("200", 64, 64)]
)
def test_lengths(text, lowest, highest):
    found = read_lengths(text).draw(500, 64, np.random.default_rng(0))
    assert (found.min(), found.max()) == (lowest, highest)


def test_lognormal_lengths():
    found = read_lengths("lognormal:40:0.5").draw(20_000, 10**6, np.random.default_rng(0))
    assert np.median(found) == pytest.approx(40, abs=1)
    # Of a normal distribution 68.3 % are within one standard deviation.
    logs = np.log(found)
    within = (np.log(40) - 0.5 < logs) & (logs < np.log(40) + 0.5)
    assert within.mean() == pytest.approx(0.683, abs=0.02)


def test_lengths_beyond_all_measure_are_cut():
    found = read_lengths("lognormal:9999999:999").draw(1000, 64, np.random.default_rng(0))
    assert found.min() >= 2
    assert found.max() <= 64


@pytest.mark.parametrize(
    "text",
    ["", "1", "0-5", "9-5", "5-", "a", "-3", "1e3", "lognormal:5", "lognormal:1:1", "9" * 99],
)
def test_what_is_no_length(text):
    with pytest.raises(UserError, match=r"bench\.lengths"):
        read_lengths(text)


def test_samples_longer_than_the_model_takes():
    with pytest.raises(UserError, match="it takes 64 at most"):
        tokens_of("causal-lm", "65")
    with pytest.raises(UserError, match="it takes 64 at most"):
        tokens_of("causal-lm", "5", max_length=65)
    assert tokens_of("causal-lm", "lognormal:60:2").train.lengths(EVERYTHING).max() == 64
    assert tokens_of("causal-lm", "5-64", max_length=8).train.lengths(EVERYTHING).max() == 8


def test_what_random_lengths_are_cut_to():
    long = {**CONFIG, "max_position_embeddings": 2048}
    for lengths, longest in (("lognormal:300:2", 512), ("lognormal:700:2", 700), ("600-610", 610)):
        tokens = tokens_of("causal-lm", lengths, config=long)
        assert tokens.train.lengths(EVERYTHING).max() == longest


@pytest.mark.parametrize("vocabulary", [None, 3, -1, 10**12, "many", True, 1.5])
def test_a_model_without_a_vocabulary(vocabulary):
    with pytest.raises(UserError, match="vocab_size"):
        tokens_of("causal-lm", config={**CONFIG, "vocab_size": vocabulary})
