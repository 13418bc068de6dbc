"""The peers that we are measured beside do the same work: from the same batches the same losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from ftlaunch.launcher.bench_peers import PEERS, run_program
from ftlaunch.strategies.loop import Cursor, train
from ftlaunch.strategies.schedule import Schedule
from ftlaunch.strategies.torch.ddp import create
from tests import tiny
from tests.ranks import run_ranks

STEPS = 4
SAMPLES = 48
GLOBAL_BATCH = 12
SEED = 7
RATE = 1e-3
# Below the norm of every step here, so that clipping is seen to be the same. It also takes out the
# factor by which the Trainer's gradients are too large (facts of transformers 5.23: see `_factor`).
CLIP = 0.05


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny BERT with a head for three classes, its weights in the folder."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    folder = tiny.write_config(tmp_path_factory.mktemp("bert"), "bert")
    torch.manual_seed(3)
    config = AutoConfig.from_pretrained(folder, num_labels=3)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    table = tiny.random_table(SAMPLES)
    lengths = [len(ids) for ids in table.input_ids]
    file = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file(
        {
            "offsets": np.cumsum([0, *lengths]).astype(np.int64),
            "input_ids": np.concatenate(table.input_ids).astype(np.int32),
            "labels": table.targets.astype(np.int64),
        },
        file,
    )
    return file


def _order(ranks, micro_batch):
    """Ours: order[step][rank][micro-batch]."""
    table = tiny.random_table(SAMPLES)
    world = run_world(0, ranks)
    view = tiny.windows(world, table, global_batch=GLOBAL_BATCH, micro_batch=micro_batch)
    order = []
    for step in range(STEPS):
        indices = view.order.global_batch(step)
        per_rank = [
            tiny.windows(
                run_world(rank, ranks), table, global_batch=GLOBAL_BATCH, micro_batch=micro_batch
            ).micro_batches(indices, step)
            for rank in range(ranks)
        ]
        order.append([[batch.indices.tolist() for batch, _ in each] for each in per_rank])
    return order


def run_world(rank, size):
    from ftlaunch.cluster.world import World

    return World(
        rank=rank,
        size=size,
        local_rank=rank,
        local_size=size,
        node_rank=0,
        num_nodes=1,
        master_address="127.0.0.1",
        master_port=1,
    )


def _train_ours(world, listen_fd, folder, micro_batch):
    request = tiny.request(
        world,
        listen_fd,
        folder,
        learning_rate=RATE,
        max_grad_norm=CLIP,
        model={"random_weights": False},
    )
    strategy = create(request)
    table = tiny.random_table(SAMPLES)
    losses = []

    def after_step(report):
        assert report.outcome.grad_norm > CLIP
        losses.append(report.outcome.loss)
        return False

    train(
        strategy,
        tiny.windows(world, table, global_batch=GLOBAL_BATCH, micro_batch=micro_batch),
        Schedule(name="linear", peak=RATE, warmup_steps=0, total_steps=STEPS),
        Cursor(),
        total_steps=STEPS,
        after_step=after_step,
    )
    strategy.close()
    return losses


@pytest.fixture(scope="module")
def ours(model):
    """Losses of the steps; they do not depend on how the samples are divided."""
    return run_ranks(1, _train_ours, model, GLOBAL_BATCH)[0]


def _work(model, tokens, ranks, accumulation, **more):
    micro_batch = GLOBAL_BATCH // (ranks * accumulation)
    return {
        "model": str(model),
        "tokens": str(tokens),
        "num_labels": 3,
        "dropout": 0.0,
        "order": _order(ranks, micro_batch),
        "micro_batch": micro_batch,
        "accumulation": accumulation,
        "steps": STEPS,
        "warmup_steps": 1,
        "threads": 1,
        "seed": SEED,
        "learning_rate": RATE,
        "max_grad_norm": CLIP,
        **more,
    }


def _run(name, work, ranks, folder):
    return run_program(name, work, ranks=ranks, folder=folder / name, timeout_seconds=180).result


def _factor(name, ranks, accumulation):
    """What the Trainer's loss is multiplied by for a model that takes loss arguments and divides by
    its own rows all the same: nobody divides by the micro-batches, and W is multiplied by.
    """
    return ranks * accumulation if name == "hf" else 1


def _check(result, ours, ranks, factor=1):
    assert result["num_ranks"] == ranks
    assert result["steps"] == len(result["step_seconds"]) == STEPS - 1
    assert result["samples"] == (STEPS - 1) * GLOBAL_BATCH
    expected = np.array(ours) * factor
    worst = np.abs(np.array(result["losses"]) / expected - 1).max()
    print(f"{result['peer']}, {ranks} ranks: {worst:.1e}")
    assert worst < 1e-5


# A sample of what peers and ranks there are; the others run with make test-long.
_SHORT = (("hf", 2), ("accelerate", 1), ("torchrun", 2))
_CELLS = [
    pytest.param(name, ranks, marks=() if (name, ranks) in _SHORT else pytest.mark.long)
    for name in PEERS
    for ranks in (1, 2)
]


@pytest.mark.parametrize(("name", "ranks"), _CELLS)
def test_a_peer_computes_what_we_compute(tmp_path, model, tokens, ours, name, ranks):
    work = _work(model, tokens, ranks, 2)
    _check(_run(name, work, ranks, tmp_path), ours, ranks, _factor(name, ranks, 2))


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_computes_it_at_every_stage(tmp_path, model, tokens, ours, stage):
    work = _work(model, tokens, 2, 2, zero_stage=stage)
    _check(_run("deepspeed", work, 2, tmp_path), ours, 2)


@pytest.mark.long
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_draws_its_own_order(tmp_path, model, tokens, name):
    """Over the end of an epoch: 48 samples are 4 steps of 12."""
    work = _work(model, tokens, 2, 2, order=None, steps=6, precision="bf16")
    result = _run(name, work, 2, tmp_path)
    assert (result["steps"], result["samples"], len(result["losses"])) == (5, 60, 6)
    assert np.isfinite(result["losses"]).all()
