"""Learning rates by hand, the loss scale step by step, and which evaluation is best."""

from __future__ import annotations

import pytest

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.best import BestTracker
from ftlaunch.strategies.loss_scale import LossScaler
from ftlaunch.strategies.options import CheckpointOptions, TrainOptions
from ftlaunch.strategies.schedule import make_schedule


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # 2 steps of warmup (0, 1/2), then 8 steps of decay.
        ("linear", {0: 0.0, 1: 0.5, 2: 1.0, 6: 0.5, 9: 0.125, 10: 0.0}),
        ("cosine", {0: 0.0, 1: 0.5, 2: 1.0, 6: 0.5, 10: 0.0}),
        ("constant", {0: 0.0, 1: 0.5, 2: 1.0, 9: 1.0}),
    ],
)
@pytest.mark.parametrize("warmup", [2.0, 0.2])
def test_learning_rates(name, expected, warmup):
    options = TrainOptions(learning_rate=1.0, lr_scheduler_type=name, warmup_steps=warmup)
    schedule = make_schedule(options, 10)
    rates = {step: schedule.learning_rate(step) for step in expected}
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_learning_rates_are_those_of_transformers(name):
    import torch
    from transformers import get_scheduler

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=3e-4)
    full_name = "constant_with_warmup" if name == "constant" else name
    theirs = get_scheduler(full_name, optimizer, num_warmup_steps=7, num_training_steps=50)
    options = TrainOptions(learning_rate=3e-4, lr_scheduler_type=name, warmup_steps=7)
    ours = make_schedule(options, 50)
    for step in range(50):
        assert ours.learning_rate(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_loss_scale_halves_doubles_and_has_a_floor():
    scaler = LossScaler(initial=8.0, window=2, enabled=True)
    seen = []
    for overflow in (True, False, False, False, True, False, False, True, True, True, True):
        scaler.update(overflow=overflow)
        seen.append(scaler.scale)
    #       ov  1  2→×2  1  ov 1  2→×2  ov   ov   ov   floor
    assert seen == [4, 4, 8, 8, 4, 4, 8, 4, 2, 1, 1]


def test_loss_scale_goes_on_where_it_was():
    scaler = LossScaler(initial=8.0, window=3, enabled=True)
    for _ in range(2):
        scaler.update(overflow=False)
    other = LossScaler(initial=8.0, window=3, enabled=True)
    other.load(scaler.state())
    other.update(overflow=False)
    assert other.scale == 16.0
    # A run in fp32 leaves no scale behind for one in fp16.
    off = LossScaler(initial=8.0, window=3, enabled=False)
    off.update(overflow=True)
    assert off.scale == 1.0
    fresh = LossScaler(initial=8.0, window=3, enabled=True)
    fresh.load(off.state())
    assert fresh.scale == 8.0


def _tracker(**options):
    patience = options.pop("patience", None)
    threshold = options.pop("threshold", 0.0)
    return BestTracker(CheckpointOptions(**options), patience=patience, threshold=threshold)


def test_lower_loss_and_higher_accuracy_are_better():
    tracker = _tracker()
    assert [tracker.observe(i, {"loss": v}) for i, v in enumerate((3.0, 2.0, 2.5))] == [
        True,
        True,
        False,
    ]
    tracker = _tracker(metric_for_best_model="eval_accuracy")
    assert [tracker.observe(i, {"accuracy": v}) for i, v in enumerate((0.3, 0.2, 0.5))] == [
        True,
        False,
        True,
    ]
    assert tracker.best == {
        "step": 2,
        "metric": "accuracy",
        "value": 0.5,
        "metrics": {"accuracy": 0.5},
    }


def test_patience_counts_evaluations_without_gain():
    tracker = _tracker(patience=2, threshold=0.1)
    for step, loss in enumerate((1.0, 0.95, 0.8, 0.75)):
        tracker.observe(step, {"loss": loss})
        assert not tracker.exhausted
    # 0.72 is the best of all, but by less than the threshold.
    assert tracker.observe(4, {"loss": 0.72})
    assert tracker.exhausted


def test_nan_is_never_the_best():
    tracker = _tracker()
    assert not tracker.observe(0, {"loss": float("nan")})
    assert tracker.observe(1, {"loss": 5.0})


def test_a_metric_that_evaluation_does_not_yield():
    with pytest.raises(UserError, match=r"'f1'.*loss, accuracy"):
        _tracker(metric_for_best_model="f1").check(("loss", "accuracy"))
