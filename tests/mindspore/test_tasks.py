"""Every task under `mindspore`, against torch's plain computation of the same samples.

Every family that a task is carried for is compared here; what is not is refused before anything starts.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.base import Batch
from tests import tiny
from tests.mindspore import heads
from tests.mindspore.ranks import run_ranks
from tests.mindspore.torch_side import run_torch


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("heads")
    run_torch("heads", root, timeout=400)
    return root


def _expected(folder, step):
    """(what torch found, its gradients by name)"""
    found = dict(np.load(folder / f"{step}.npz"))
    gradients = {
        name.removeprefix("gradient "): values.astype(np.float64)
        for name, values in found.items()
        if name.startswith("gradient ")
    }
    return found, gradients


def _create(world, folder, head):
    from ftlaunch.strategies.mindspore import data_parallel

    request = tiny.request(world, None, folder, model={"random_weights": False})
    names = heads.TAGS if head.endswith("classification") else ()
    loss = "cross_entropy" if head == "sequence-classification" else "token_cross_entropy"
    return data_parallel.create(
        replace(
            request,
            head=head,
            loss=loss,
            num_outputs=len(names),
            label_names=names,
        )
    )


def _gradients(strategy):
    return {
        name: gradient.asnumpy().astype(np.float64)
        for (name, _), gradient in zip(strategy._trained, strategy._gradients, strict=True)
    }


def _errors(found, expected):
    """(norm of one over that of the other - 1, norm of the difference over that of the other)"""
    assert found.keys() == expected.keys()
    ours, theirs = (
        np.concatenate([side[name].ravel() for name in sorted(side)]) for side in (found, expected)
    )
    norm = np.linalg.norm(theirs)
    return np.linalg.norm(ours) / norm - 1, np.linalg.norm(ours - theirs) / norm


# -- a batch, for every family -------------------------------------------------------------------


def _one_batch(world, folder, head):
    """Gradients, logits, scores, names; and gradient and scores of the same in a shape of the few."""
    from ftlaunch.strategies.mindspore.forward import pad_to_buckets

    strategy = _create(world, folder, head)
    known = dict(np.load(folder / "1.npz"))
    batch = Batch(
        inputs={"input_ids": known["ids"], "attention_mask": known["mask"]},
        labels=known["labels"],
        weights=(known["labels"] != -100).astype(np.float32),
        indices=known["indices"],
        seed=0,
    )
    found = []
    pad = int(known["ids"].min()) if (known["mask"] == 0).any() else 0
    for each in (batch, pad_to_buckets(batch, rows=5, pad_token_id=pad)):
        strategy._gradients = None
        strategy.accumulate(each, float(batch.weights.sum()), last=True)
        found.append((_gradients(strategy), strategy.score(each), each.inputs["input_ids"].shape))
    return found, strategy.predict(batch), dict(strategy.aliases())


@pytest.mark.parametrize(("head", "family"), heads.PAIRS, ids=lambda each: each)
def test_a_family_computes_what_it_does_in_torch(models, head, family):
    folder = models / f"{head}-{family}"
    expected, gradients = _expected(folder, 1)
    [(found, logits, aliases)] = run_ranks(1, _one_batch, folder, head)
    assert [f"{name} {other}" for name, other in sorted(aliases.items())] == [*expected["aliases"]]
    real, labelled = expected["mask"] == 1, expected["labels"] != -100
    worst = np.abs(logits - expected["logits"])[real].max() / np.abs(expected["logits"][real]).max()
    rows, length = labelled.shape
    for gradient, scores, shape in found:
        ratio, error = _errors(gradient, gradients)
        print(f"{head} {family} {shape}: logits {worst:.1e} ratio-1 {ratio:.1e} error {error:.1e}")
        assert abs(ratio) < 1e-5
        assert error < 1e-5
        losses = scores.losses[:rows, :length]
        np.testing.assert_allclose(losses, np.where(labelled, expected["losses"], 0), atol=2e-5)
        winners = np.where(labelled, expected["logits"].argmax(-1), 0)
        np.testing.assert_array_equal(scores.winners[:rows, :length], winners)
        assert not scores.losses[rows:].any() and not scores.losses[:, length:].any()
    assert found[1][2] > found[0][2]
    assert worst < 1e-5


def _classified(world, folder):
    """Gradients, loss and logits of the texts; the same in a shape of the few."""
    from ftlaunch.strategies.mindspore.forward import pad_to_buckets

    strategy = _create(world, folder, "sequence-classification")
    known = dict(np.load(folder / "1.npz"))
    batch = Batch(
        inputs={"input_ids": known["ids"], "attention_mask": known["mask"]},
        labels=known["labels"],
        weights=np.ones(len(known["labels"]), dtype=np.float32),
        indices=np.arange(len(known["labels"])),
        seed=0,
    )
    found = []
    pad = int(known["ids"][known["mask"] == 0][0])
    for each in (batch, pad_to_buckets(batch, rows=8, pad_token_id=pad)):
        strategy._gradients = None
        strategy.accumulate(each, float(len(batch.labels)), last=True)
        shape = each.inputs["input_ids"].shape
        found.append((_gradients(strategy), strategy._window_loss(), strategy.predict(each), shape))
    return found


@pytest.mark.parametrize("family", heads.CLASSIFIERS)
def test_a_family_classifies_as_it_does_in_torch(models, family):
    folder = models / f"sequence-classification-{family}"
    expected, gradients = _expected(folder, 1)
    [found] = run_ranks(1, _classified, folder)
    for gradient, loss, logits, shape in found:
        worst = np.abs(logits[:6] - expected["logits"]).max() / np.abs(expected["logits"]).max()
        ratio, error = _errors(gradient, gradients)
        print(f"{family} {shape}: logits {worst:.1e} ratio-1 {ratio:.1e} error {error:.1e}")
        assert worst < 1e-5
        assert loss == pytest.approx(float(expected["loss"]), rel=1e-5)
        assert abs(ratio) < 1e-5
        assert error < 1e-5
    assert found[1][3] == (8, 48)


def _said_of_padding_inside(world, folder):
    strategy = _create(world, folder, "sequence-classification")
    known = dict(np.load(folder / "1.npz"))
    inside = known["ids"].copy()
    inside[1, 11] = strategy.model.config.pad_token_id
    batch = Batch(
        inputs={"input_ids": inside, "attention_mask": known["mask"]},
        labels=known["labels"],
        weights=np.ones(6, dtype=np.float32),
        indices=np.arange(20, 26),
        seed=0,
    )
    try:
        strategy.predict(batch)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("family", ["bert", *heads.DECODERS])
def test_a_padding_token_inside_a_text(models, family):
    """What is not refused has torch's numbers: the texts of the test before have one."""
    [said] = run_ranks(1, _said_of_padding_inside, models / f"sequence-classification-{family}")
    if family in heads.CUT_OFF_AT_PADDING:
        assert "sample 21 has the padding token (number 0)" in said
        assert "--strategy ddp" in said
    else:
        assert said == ""


# -- a window ------------------------------------------------------------------------------------


def _window(world, folder, head, step):
    """The gradient of one window, summed over the ranks; the micro-batches that it took."""
    from ftlaunch.strategies.mindspore.group import all_reduce

    strategy = _create(world, folder, head)
    view = heads.windows(world, head, pad_token_id=0, micro_batch=2)
    indices = view.order.global_batch(step)
    batches = list(view.micro_batches(indices, step))
    for batch, last in batches:
        strategy.accumulate(batch, view.total_items(indices, step), last=last)
    strategy._gradients = [
        all_reduce(gradient.reshape(-1)).reshape(gradient.shape) for gradient in strategy._gradients
    ]
    found = _gradients(strategy)
    strategy.close()
    return found, len(batches)


@pytest.mark.parametrize(("step", "accumulation"), [(0, 4), (1, 1)], ids=["whole", "last"])
@pytest.mark.parametrize(("head", "family"), heads.WINDOW_PAIRS, ids=lambda each: each)
def test_window_gradient_is_that_of_the_full_batch(models, head, family, step, accumulation):
    folder = models / f"{head}-{family}"
    _, gradients = _expected(folder, step)
    for found, batches in run_ranks(2, _window, folder, head, step):
        assert batches == accumulation
        ratio, error = _errors(found, gradients)
        print(f"{head} {family}: ratio-1 {ratio:.1e} error {error:.1e}")
        assert abs(ratio) < 1e-5
        assert error < 1e-5


def _joined_window(world, folder):
    """The gradient and the loss of all pieces of the stream, both summed over the ranks."""
    from ftlaunch.strategies.mindspore.group import all_reduce, gather

    strategy = _create(world, folder, "causal-lm")
    view = heads.windows(world, "causal-lm", pad_token_id=0, micro_batch=8, is_joined=True)
    indices = view.order.global_batch(0)
    for batch, last in view.micro_batches(indices, 0):
        strategy.accumulate(batch, view.total_items(indices, 0), last=last)
    strategy._gradients = [
        all_reduce(gradient.reshape(-1)).reshape(gradient.shape) for gradient in strategy._gradients
    ]
    loss = gather(world, np.array([strategy._window_loss()])).sum()
    found = _gradients(strategy)
    strategy.close()
    return found, loss


def test_texts_that_are_joined_have_transformers_own_loss(models):
    """data.packing=concatenate"""
    folder = models / "-".join(heads.JOINED)
    expected, gradients = _expected(folder, "joined")
    for found, loss in run_ranks(2, _joined_window, folder):
        ratio, error = _errors(found, gradients)
        print(f"loss {loss / expected['loss'] - 1:.1e} ratio-1 {ratio:.1e} error {error:.1e}")
        assert loss == pytest.approx(float(expected["loss"]), rel=1e-5)
        assert abs(ratio) < 1e-5
        assert error < 1e-5


# -- several labels ------------------------------------------------------------------------------


def _binary(world, logits, labels, weights):
    import mindspore as ms

    from ftlaunch.strategies.mindspore.losses import binary_cross_entropy_sum

    ms.set_device("CPU")

    def loss(values):
        return binary_cross_entropy_sum(values, labels, weights)

    value, gradient = ms.value_and_grad(loss)(ms.Tensor(logits))
    return float(value.asnumpy()), gradient.asnumpy().copy()


def test_the_loss_of_several_labels_is_its_definition():
    generator = np.random.default_rng(0)
    logits = np.append(generator.standard_normal((7, 3)), [[0, 40, -40]], axis=0)
    labels = np.append(generator.integers(0, 2, (7, 3)), [[1, 0, 1]], axis=0)
    weights = generator.random((8, 3))
    probability = 1 / (1 + np.exp(-logits))
    # log(1 - p) is log p of the logit with the other sign.
    losses = np.where(labels == 1, np.log1p(np.exp(-logits)), np.log1p(np.exp(logits)))
    arguments = (each.astype(np.float32) for each in (logits, labels, weights))
    [(value, gradient)] = run_ranks(1, _binary, *arguments)
    np.testing.assert_allclose(value, (weights * losses).sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, weights * (probability - labels), rtol=1e-5, atol=1e-7)
