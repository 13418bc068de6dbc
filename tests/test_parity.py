"""The result does not depend on the topology: losses and gradients against the plain computation.

The reference is written out here: one process, the whole batch in one piece, torch's own mean loss,
clipping and AdamW.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from ftlaunch.strategies.data.sample_order import samples_digest
from ftlaunch.strategies.loop import Cursor, train
from ftlaunch.strategies.schedule import Schedule
from ftlaunch.strategies.torch.ddp import create
from tests import tiny
from tests.ranks import run_ranks

STEPS = 30
SAMPLES = 100
GLOBAL_BATCH = 12


def _schedule() -> Schedule:
    return Schedule(name="linear", peak=1e-3, warmup_steps=3, total_steps=STEPS)


def _train(world, listen_fd, folder, micro_batch):
    """(digest, loss, grad_norm) of each of 30 steps."""
    strategy = create(tiny.request(world, listen_fd, folder, weight_decay=0.1))
    table = tiny.random_table(SAMPLES)
    seen = []

    def after_step(report):
        outcome = report.outcome
        seen.append((samples_digest(report.indices), outcome.loss, outcome.grad_norm))
        return False

    train(
        strategy,
        tiny.windows(world, table, global_batch=GLOBAL_BATCH, micro_batch=micro_batch),
        _schedule(),
        Cursor(),
        total_steps=STEPS,
        after_step=after_step,
    )
    strategy.close()
    return seen


def _reference(world, listen_fd, folder):
    """The same 30 steps, written plainly."""
    strategy = create(tiny.request(world, listen_fd, folder, weight_decay=0.1))
    model, table = strategy.model.train(), tiny.random_table(SAMPLES)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-3,
    )
    order = tiny.windows(world, table, global_batch=GLOBAL_BATCH, micro_batch=12).order
    seen = []
    for step in range(STEPS):
        indices = order.global_batch(step)
        inputs = {k: torch.from_numpy(v) for k, v in tiny.full_batch(table, indices).items()}
        logits = model(**inputs).logits
        loss = functional.cross_entropy(logits, torch.from_numpy(table.labels(indices)))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        # Warmup over 3 steps, then linear to 0 at step 30.
        rate = 1e-3 * (step / 3 if step < 3 else (STEPS - step) / (STEPS - 3))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        seen.append((samples_digest(indices), float(loss.detach()), float(norm)))
    return seen


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny.write_config(tmp_path_factory.mktemp("bert"), "bert")


@pytest.fixture(scope="module")
def reference(bert):
    return run_ranks(1, _reference, bert)[0]


# 12 samples a step: (ranks, micro-batch) → accumulation 12 / (ranks · micro-batch)
@pytest.mark.parametrize(
    ("ranks", "micro_batch"),
    [(1, 12), (1, 3), (2, 6), (2, 2), (4, 3), (4, 1), (3, 2), (5, 1)],
    ids=lambda value: str(value),
)
def test_thirty_steps_are_those_of_the_full_batch(bert, reference, ranks, micro_batch):
    for seen in run_ranks(ranks, _train, bert, micro_batch):
        assert [digest for digest, _, _ in seen] == [digest for digest, _, _ in reference]
        losses = np.array([(loss, norm) for _, loss, norm in seen])
        expected = np.array([(loss, norm) for _, loss, norm in reference])
        worst = np.abs(losses / expected - 1).max(axis=0)
        print(f"{ranks} ranks, micro-batch {micro_batch}: loss {worst[0]:.1e} norm {worst[1]:.1e}")
        # The bar is 1e-5; what differs by more than 1e-6 is a bug to be found.
        assert worst[0] < 1e-6
        assert worst[1] < 1e-5


def _window_gradients(world, listen_fd, folder, regression, micro_batch, step, model=None):
    """The gradient of one window, before it is clipped or applied."""
    strategy = create(tiny.request(world, listen_fd, folder, regression=regression, model=model))
    table = tiny.random_table(18, regression=regression)
    view = tiny.windows(world, table, global_batch=15, micro_batch=micro_batch)
    indices = view.order.global_batch(step)
    total = view.collator.total_items(indices)
    batches = list(view.micro_batches(indices, step))
    for batch, last in batches:
        strategy.accumulate(batch, total, last=last)
    flat = torch.cat([p.grad.flatten() for p in strategy.model.parameters() if p.grad is not None])
    strategy.close()
    return flat.double().numpy(), len(batches)


def _full_gradient(world, listen_fd, folder, regression, step):
    strategy = create(tiny.request(world, listen_fd, folder, regression=regression))
    model, table = strategy.model.train(), tiny.random_table(18, regression=regression)
    indices = tiny.windows(world, table, global_batch=15, micro_batch=15).order.global_batch(step)
    inputs = {k: torch.from_numpy(v) for k, v in tiny.full_batch(table, indices).items()}
    logits, labels = model(**inputs).logits, torch.from_numpy(table.labels(indices))
    if regression:
        loss = functional.mse_loss(logits.squeeze(-1), labels)
    else:
        loss = functional.cross_entropy(logits, labels)
    torch.autograd.backward(loss)
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return flat.double().numpy()


# 18 samples in global batches of 15: the second window has 3. On 2 ranks with micro-batches of 2
# that is 4 micro-batches a rank (runs of 2, …, 2, 1), then 1 (runs of 2 and 1).
@pytest.mark.parametrize(("step", "accumulation"), [(0, 4), (1, 1)], ids=["whole", "last"])
@pytest.mark.parametrize("regression", [False, True], ids=["classification", "regression"])
@pytest.mark.parametrize("family", ["bert", "modernbert", "qwen2"])
def test_window_gradient_is_that_of_the_full_batch(
    tmp_path, family, regression, step, accumulation
):
    folder = tiny.write_config(tmp_path / family, family)
    expected = run_ranks(1, _full_gradient, folder, regression, step)[0]
    for gradient, batches in run_ranks(2, _window_gradients, folder, regression, 2, step):
        assert batches == accumulation
        ratio = np.linalg.norm(gradient) / np.linalg.norm(expected)
        cosine = gradient @ expected / np.linalg.norm(gradient) / np.linalg.norm(expected)
        print(f"{family}: ratio {ratio:.7f} cosine {cosine:.9f}")
        assert abs(ratio - 1) < 1e-5
        assert cosine > 0.99999


def test_a_rank_without_samples_takes_part(tmp_path):
    """3 samples in the last window on 4 ranks: one rank has only filler."""
    folder = tiny.write_config(tmp_path / "bert", "bert")
    expected = run_ranks(1, _full_gradient, folder, False, 1)[0]
    for gradient, _ in run_ranks(4, _window_gradients, folder, False, 2, 1):
        assert np.linalg.norm(gradient - expected) / np.linalg.norm(expected) < 1e-5


def test_gradient_checkpointing_changes_nothing(tmp_path):
    folder = tiny.write_config(tmp_path / "bert", "bert")
    expected = run_ranks(1, _full_gradient, folder, False, 0)[0]
    again = {"gradient_checkpointing": True}
    for gradient, _ in run_ranks(2, _window_gradients, folder, False, 2, 0, again):
        assert np.linalg.norm(gradient - expected) / np.linalg.norm(expected) < 1e-5
