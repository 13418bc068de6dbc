"""What ranks tell each other with their gradients."""

from dataclasses import replace
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from ftlaunch.cluster.errors import JobError
from ftlaunch.strategies import registry
from ftlaunch.strategies.base import Said
from ftlaunch.strategies.loop import Cursor
from ftlaunch.strategies.torch.group import join_process_group, use_device
from ftlaunch.strategies.torch.ledger import DataParallel
from ftlaunch.strategies.training import TrainingRun
from tests import tiny
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny.write_config(tmp_path_factory.mktemp("bert"), "bert")


def _steps(strategy, world, says, *, micro_batch=6, weights=()):
    """The outcome of one step of 12 samples for each entry of `says`.

    weights   what this rank's are multiplied with in each step
    """
    view = tiny.windows(world, tiny.random_table(12), global_batch=12, micro_batch=micro_batch)
    for say, factor in zip_longest(says, weights, fillvalue=1.0):
        indices = view.order.global_batch(0)
        for batch, last in view.micro_batches(indices, 0):
            weighed = replace(batch, weights=batch.weights * np.float32(factor))
            strategy.accumulate(weighed, 12.0, last=last, say=say)
        yield strategy.apply(1e-3)


def _said_and_heard(world, listen_fd, folder, says, unused, micro_batch, name="ddp"):
    strategy = registry.load(name)(tiny.request(world, listen_fd, folder))
    if unused:
        strategy._has_unused = True
    asked = []

    def say(said):
        asked.append(said)
        return said

    outcomes = list(
        _steps(
            strategy,
            world,
            [lambda said=each[world.rank]: say(said) for each in says],
            micro_batch=micro_batch,
        )
    )
    strategy.close()
    return [(o.stop, o.saving, o.loss, o.applied) for o in outcomes], len(asked)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("unused", [False, True], ids=["", "unused"])
@pytest.mark.parametrize("micro_batch", [2, 12])
def test_all_ranks_hear_in_the_same_step_what_one_has_said(bert, ranks, unused, micro_batch):
    """Three is where a mean times the number of ranks is not always what was added up."""
    quiet = Said(stop=False, saving=0.0)
    says = [
        [quiet] * ranks,
        [*[quiet] * (ranks - 1), Said(stop=False, saving=float(1 << 20))],
        [*[quiet] * (ranks - 1), Said(stop=True, saving=0.0)],
        [Said(stop=False, saving=1.0)] * ranks,
    ]
    found = run_ranks(ranks, _said_and_heard, bert, says, unused and ranks > 1, micro_batch)
    for outcomes, asked in found:
        assert [o[0] for o in outcomes] == [False, False, True, False]
        assert [o[1] for o in outcomes] == [0.0, float(1 << 20), 0.0, float(ranks)]
        assert asked == 4
    losses = [[o[2] for o in outcomes] for outcomes, _ in found]
    assert all(each == losses[0] for each in losses)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_zero_asks_once_a_step_too(bert, name):
    pytest.importorskip("deepspeed")
    quiet = Said(stop=False, saving=0.0)
    says = [[quiet] * 2, [quiet, Said(stop=True, saving=1.0)]]
    for outcomes, asked in run_ranks(2, _said_and_heard, bert, says, False, 3, name):
        assert [o[:2] for o in outcomes] == [(False, 0.0), (True, 1.0)]
        assert asked == 2


def _through_an_overflow(world, listen_fd, folder):
    """Two steps; in the first, gradients of rank 1 are infinite and rank 0 is asked to stop."""
    request = tiny.request(world, listen_fd, folder, precision="fp16", initial_loss_scale=4.0)
    strategy = registry.load("ddp")(request)
    says = [lambda stop=stop: Said(stop=stop, saving=1.0) for stop in (world.rank == 0, False)]
    factors = (float("inf") if world.rank == 1 else 1.0, 1.0)
    found = [
        (o.applied, o.stop, o.saving, np.isfinite(o.loss), strategy._skipped)
        for o in _steps(strategy, world, says, weights=factors)
    ]
    strategy.close()
    return found


def test_what_is_said_is_heard_in_a_step_that_is_skipped(bert):
    for found in run_ranks(2, _through_an_overflow, bert):
        assert found == [(False, True, 2.0, False, 1), (True, False, 2.0, True, 1)]


def test_the_loss_that_all_hear_is_that_of_one_rank(bert):
    quiet = [[Said(stop=False, saving=0.0)] * 3] * 3
    alone = run_ranks(1, _said_and_heard, bert, quiet, False, 12)[0][0]
    for outcomes, _ in run_ranks(3, _said_and_heard, bert, quiet, False, 2):
        np.testing.assert_allclose(
            [o[2] for o in outcomes], [o[2] for o in alone], rtol=2e-6, atol=0
        )


def _one_who_skipped(world, listen_fd, folder):
    strategy = registry.load("ddp")(tiny.request(world, listen_fd, folder))
    says = [lambda: Said(stop=False, saving=0.0)] * 2
    steps = _steps(strategy, world, says)
    next(steps)
    strategy._skipped += world.rank == 1
    try:
        next(steps)
    except JobError as error:
        return str(error)
    return None


def test_ranks_that_have_not_skipped_the_same_steps_end_the_job(bert):
    zero, one = run_ranks(2, _one_who_skipped, bert)
    assert zero is not None and "rank 0 has skipped 0 steps" in zero and "together 1" in zero
    assert one is not None and "rank 1 has skipped 1 steps" in one and "together 1" in one


class _Run(TrainingRun):
    """No more of it than a save takes."""

    def __init__(self, strategy, applied, saved):
        self._strategy, self._cursor = strategy, Cursor(step=5, applied=applied)
        self._emit = lambda message: None
        self._saver = cast(Any, SimpleNamespace(save=lambda manifest, now: saved.append(now)))

    def _manifest(self):
        return cast(Any, None)


def _saved(world, listen_fd, folder, applied):
    strategy = registry.load("ddp")(tiny.request(world, listen_fd, folder))
    saved: list[Any] = []
    try:
        _Run(strategy, applied[world.rank], saved)._save(now=True)
    except JobError as error:
        saved.append(str(error))
    strategy.close()
    return saved


def test_nothing_is_saved_where_ranks_have_applied_other_steps(bert):
    """3, 4 and 5: rank 1 has as many as all have in the mean."""
    assert run_ranks(3, _saved, bert, [4, 4, 4]) == [[True]] * 3
    for [text] in run_ranks(3, _saved, bert, [3, 4, 5]):
        assert "nothing is saved after step 5" in text and "have applied 3, 4, 5," in text


class _Square(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([2.0]))

    def forward(self, x):
        return (self.weight * x) ** 2


def _by_hand(world, listen_fd, folder):
    """The gradient of the mean of (2 x)², x = 1 on rank 0 and 3 on rank 1, after each of two steps that
    add up, the first of them not exchanged.
    """
    request = tiny.request(world, listen_fd, folder)
    join_process_group(request, use_device(request))
    model = _Square()
    exchange = DataParallel(model, torch.device("cpu"), num_entries=2, has_unused=False)
    x = torch.tensor([1.0 + 2 * world.rank])
    with exchange.no_sync():
        torch.autograd.backward(exchange(x=x).sum())
    assert model.weight.grad is not None
    own = float(model.weight.grad)
    heard = []
    for step in (1, 2):
        exchange.backward(exchange(x=x).sum(), torch.tensor([1.0 + world.rank, 10.0 * step]))
        heard.append(exchange.heard().tolist())
    return own, float(model.weight.grad), heard


def test_gradients_are_averaged_and_what_is_said_is_added_up(bert):
    """d (w x)² / dw = 2 w x²: 4 on rank 0, 36 on rank 1, 20 in the mean. What was summed in a rank's own
    time is averaged with what follows: 2 · 20; and once more on top of that: 3 · 20.
    """
    for own, gradient, heard in run_ranks(2, _by_hand, bert):
        assert own in (4.0, 36.0)
        assert gradient == 60.0
        assert heard == [[3.0, 20.0], [3.0, 40.0]]
