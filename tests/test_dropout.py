"""Dropout of a pretrained model: there, under every strategy, and drawn as the seeds say."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional

from ftlaunch.cluster.world import World
from ftlaunch.strategies import registry
from ftlaunch.strategies.torch import attention
from ftlaunch.strategies.torch.group import use_device
from tests import tiny
from tests.ranks import run_ranks

STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
GLOBAL_BATCH = 12
STEPS = 4
TABLE = tiny.random_table(48)


def _windows(world):
    return tiny.windows(world, TABLE, global_batch=GLOBAL_BATCH, micro_batch=3)


def _losses(world, listen_fd, folder, name, evaluates=True):
    """The loss of each step; there may be an evaluation after the second."""
    model = {"random_weights": False, "dropout": None}
    strategy = registry.load(name)(tiny.request(world, listen_fd, folder, model=model))
    windows, losses = _windows(world), []
    for step in range(STEPS):
        indices = windows.order.global_batch(step)
        total = windows.collator.total_items(indices)
        for batch, last in windows.micro_batches(indices, step):
            strategy.accumulate(batch, total, last=last)
        losses.append(strategy.apply(1e-3).loss)
        if evaluates and step == 1:
            strategy.predict(windows.collator.batch(np.arange(3), seed=0))
    return losses


def _plain_first_loss(world, listen_fd, folder):
    """By transformers and torch alone: what both ranks compute, one after the other."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    model.train()
    torch.set_grad_enabled(False)
    total = 0.0
    for rank in range(2):
        windows = replace(_windows(world), rank=rank, world_size=2)
        for batch, _ in windows.micro_batches(windows.order.global_batch(0), 0):
            torch.manual_seed(batch.seed)
            inputs = {name: torch.from_numpy(values) for name, values in batch.inputs.items()}
            logits = model(**inputs).logits
            losses = functional.cross_entropy(
                logits, torch.from_numpy(batch.labels), reduction="none"
            )
            total += float((losses * torch.from_numpy(batch.weights)).sum())
    return [total / GLOBAL_BATCH]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    config = transformers.AutoConfig.from_pretrained(
        tiny.write_config(tmp_path_factory.mktemp("bert"), "bert"),
        num_labels=3,
        hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.2,
    )
    torch.manual_seed(1)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(pretrained):
    """By ddp, without an evaluation: it must not be seen in what comes after it."""
    return run_ranks(2, _losses, pretrained, "ddp", False)[0]


@pytest.fixture(scope="module")
def plain(pretrained):
    return run_ranks(1, _plain_first_loss, pretrained)[0]


@pytest.mark.parametrize("name", STRATEGIES)
def test_dropout_is_drawn_as_the_seeds_say(pretrained, plain, undisturbed, name):
    losses = run_ranks(2, _losses, pretrained, name)[0]
    assert losses[:1] == pytest.approx(plain, rel=1e-5)
    assert losses == pytest.approx(undisturbed, rel=1e-5)


def _long_rows(world, listen_fd, folder, name, precision, checkpointing):
    """Losses of a decoder whose rows are long enough for `attention.ByteDropout`, and how often it came."""
    calls = 0
    plain = attention.ByteDropout.apply

    def counted(*given):
        nonlocal calls
        calls += 1
        return plain(*given)

    attention.ByteDropout.apply = counted  # type: ignore[method-assign]
    model = {"dropout": 0.1, "gradient_checkpointing": checkpointing}
    strategy = registry.load(name)(
        tiny.request(world, listen_fd, folder, precision=precision, model=model)
    )
    draw = np.random.default_rng(0)
    rows = [draw.integers(3, tiny.VOCABULARY, n).astype(np.int32) for n in range(49, 61)]
    table = tiny.Table(rows, draw.integers(0, 3, len(rows)))
    view = tiny.windows(world, table, global_batch=6, micro_batch=3)
    losses = []
    for step in range(STEPS):
        window = view.window(step)
        for batch, last in view.batches(window):
            strategy.accumulate(batch, window.total_items, last=last)
        losses.append(strategy.apply(1e-3).loss)
    return losses, calls


@pytest.mark.parametrize(("name", "precision"), [("ddp", "bf16"), ("zero3", "fp32")])
def test_long_rows_drop_the_same_when_they_are_computed_again(tmp_path, name, precision):
    """Where rotated queries and keys are wider than values, which is so under autocast."""
    config = {**tiny.CONFIGS["llama"], "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    losses, calls = run_ranks(1, _long_rows, tmp_path, name, precision, False)[0]
    again, more_calls = run_ranks(1, _long_rows, tmp_path, name, precision, True)[0]
    assert calls >= 2 * 2 * STEPS
    assert more_calls >= calls + 2 * 2 * STEPS
    assert again == losses


def test_attention_in_bf16_is_not_widened_and_drops_as_it_should(tmp_path):
    """Equal scores over 64 places, values of one: what comes out is kept / (64 · 0.9), whose mean is 1
    and whose variance is 0.1 / (0.9 · 64); of 2,048 rows each.
    """
    folder = tiny.write_config(tmp_path / "bert", "bert")
    world = World(
        rank=0,
        size=1,
        local_rank=0,
        local_size=1,
        node_rank=0,
        num_nodes=1,
        master_address="127.0.0.1",
        master_port=0,
    )
    is_allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed
    threads, policy = torch.get_num_threads(), os.sched_getscheduler(0)
    try:
        use_device(tiny.request(world, None, folder, precision="bf16"))
        assert is_allowed()
        torch.manual_seed(1)
        query = torch.zeros(8, 4, 64, 16, dtype=torch.bfloat16)
        values = torch.ones(8, 4, 64, 16, dtype=torch.bfloat16)
        found = functional.scaled_dot_product_attention(query, query, values, dropout_p=0.1)
        rows = found[..., 0].double()
        assert abs(rows.mean() - 1) < 0.01
        assert abs(rows.var() / (0.1 / (0.9 * 64)) - 1) < 0.15
        use_device(tiny.request(world, None, folder, precision="fp32"))
        assert not is_allowed()
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)
        torch.set_num_threads(threads)
        os.sched_setscheduler(0, policy, os.sched_param(0))
