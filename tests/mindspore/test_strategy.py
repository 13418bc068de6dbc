"""The strategy `mindspore` on real ranks of a CPU, against torch's plain computation and against numpy."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ftlaunch.strategies.base import Said
from ftlaunch.strategies.data.sample_order import samples_digest
from ftlaunch.strategies.loop import Cursor, train
from ftlaunch.strategies.proof import prove
from ftlaunch.strategies.schedule import Schedule
from tests import tiny
from tests.mindspore.ranks import run_ranks
from tests.mindspore.torch_side import run_torch

FAMILIES = {
    "roberta": {
        **tiny.CONFIGS["bert"],
        "model_type": "roberta",
        "pad_token_id": 1,
        "max_position_embeddings": 66,
    },
    "distilbert": {
        "model_type": "distilbert",
        "vocab_size": tiny.VOCABULARY,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 48,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    },
    "xlm-roberta": {
        **tiny.CONFIGS["bert"],
        "model_type": "xlm-roberta",
        "pad_token_id": 1,
        "max_position_embeddings": 66,
    },
    "llama": {**tiny.CONFIGS["qwen2"], "model_type": "llama"},
}


def write_config(folder, family):
    if family in tiny.CONFIGS:
        return tiny.write_config(folder, family)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(FAMILIES[family]))
    return folder


def create(world, folder, **options):
    from ftlaunch.strategies.mindspore import data_parallel

    return data_parallel.create(tiny.request(world, None, folder, **options))


# -- gradients ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_torch(tmp_path_factory):
    """(family, step) → (the model's folder, torch's gradient of that window by name), each once."""
    known = {}

    def look_up(family, step):
        if (family, step) not in known:
            folder = write_config(tmp_path_factory.mktemp(family), family)
            run_torch("gradient", folder, step, folder / "expected.npz")
            known[family, step] = folder, dict(np.load(folder / "expected.npz"))
        return known[family, step]

    return look_up


def _window_gradient(world, folder, micro_batch, step, max_tokens=None):
    """Name → the gradient of one window, summed over the ranks; and the micro-batches it took."""
    from ftlaunch.strategies.mindspore.group import all_reduce

    strategy = create(world, folder)
    table = tiny.random_table(18)
    view = tiny.windows(
        world, table, global_batch=15, micro_batch=micro_batch, max_tokens=max_tokens
    )
    indices = view.order.global_batch(step)
    total = view.collator.total_items(indices)
    batches = list(view.micro_batches(indices, step))
    for batch, last in batches:
        strategy.accumulate(batch, total, last=last)
    mine = strategy._gradients
    assert mine is not None
    summed = [all_reduce(g.reshape(-1)) if world.size > 1 else g for g in mine]
    found = {
        name: gradient.asnumpy().copy().reshape(parameter.shape)
        for (name, parameter), gradient in zip(strategy._trained, summed, strict=True)
    }
    strategy.close()
    return found, len(batches)


def _compare(gradient, expected):
    assert gradient.keys() == expected.keys()
    flat, wanted = (
        np.concatenate([side[name].ravel() for name in sorted(side)]).astype(np.float64)
        for side in (gradient, expected)
    )
    norms = np.linalg.norm(flat), np.linalg.norm(wanted)
    return norms[0] / norms[1], flat @ wanted / norms[0] / norms[1]


# As in the test of ddp: 18 samples in global batches of 15, so the second window has 3.
@pytest.mark.parametrize(
    ("ranks", "micro_batch", "step", "accumulation"),
    [(1, 4, 0, 4), (2, 4, 0, 2), (2, 2, 0, 4), (2, 2, 1, 1), (1, 4, 1, 1)],
    ids=["1x4", "2x2", "2x4", "2 ranks, last window", "1 rank, last window"],
)
def test_window_gradient_is_that_of_the_full_batch(
    in_torch, ranks, micro_batch, step, accumulation
):
    folder, expected = in_torch("bert", step)
    for gradient, batches in run_ranks(ranks, _window_gradient, folder, micro_batch, step):
        assert batches == accumulation
        ratio, cosine = _compare(gradient, expected)
        print(f"{ranks} ranks: ratio {ratio:.7f} cosine {cosine:.9f}")
        assert abs(ratio - 1) < 1e-4
        assert cosine > 0.99999


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "distilbert", "qwen2", "llama"])
def test_families_have_the_gradients_that_they_have_in_torch(in_torch, family):
    folder, expected = in_torch(family, 0)
    [(gradient, _)] = run_ranks(1, _window_gradient, folder, 4, 0)
    ratio, cosine = _compare(gradient, expected)
    print(f"{family}: ratio {ratio:.7f} cosine {cosine:.9f}")
    assert abs(ratio - 1) < 1e-4
    assert cosine > 0.99999


def test_a_rank_without_samples_takes_part(in_torch):
    """3 samples in the last window on 4 ranks: one rank has only filler."""
    folder, expected = in_torch("bert", 1)
    for gradient, _ in run_ranks(4, _window_gradient, folder, 2, 1):
        ratio, cosine = _compare(gradient, expected)
        assert abs(ratio - 1) < 1e-4
        assert cosine > 0.99999


@pytest.mark.parametrize(("ranks", "max_tokens"), [(1, 45), (2, 100)])
def test_a_bound_in_tokens_changes_no_gradient(in_torch, ranks, max_tokens):
    folder, expected = in_torch("bert", 0)
    for gradient, batches in run_ranks(ranks, _window_gradient, folder, 15, 0, max_tokens):
        assert batches > 1
        ratio, cosine = _compare(gradient, expected)
        assert abs(ratio - 1) < 1e-4
        assert cosine > 0.99999


def _reads_of_a_window(world, folder):
    """How many tensors were read in each of three micro-batches, and the window's loss and its parts."""
    import mindspore as ms

    strategy = create(world, folder)
    view = tiny.windows(world, tiny.random_table(12), global_batch=12, micro_batch=4)
    indices, reads, read = view.order.global_batch(0), [], ms.Tensor.asnumpy
    losses = []
    for number, (batch, last) in enumerate(view.micro_batches(indices, 0), start=1):
        reads.append(0)

        def counted(tensor):
            reads[-1] += 1
            return read(tensor)

        ms.Tensor.asnumpy = counted
        strategy.accumulate(batch, 3.0 * number, last=last)
        ms.Tensor.asnumpy = read
        losses.append(float(strategy._losses[-1][0].asnumpy()) / (3.0 * number))
    return reads, strategy.apply(0.0).loss, losses


def test_nothing_is_read_before_the_end_of_a_window(tmp_path):
    """An NPU that is asked for a number has to finish all that it was given."""
    folder = write_config(tmp_path / "bert", "bert")
    [(reads, loss, losses)] = run_ranks(1, _reads_of_a_window, folder)
    assert reads == [0, 0, 0]
    assert loss == (losses[0] + losses[1]) + losses[2]


def _after_a_proof(world, folder, proves, few_shapes):
    """The losses and the state of three steps with dropout."""
    strategy = create(world, folder, model={"dropout": 0.1})
    tokens, samples = 60, 12
    if few_shapes:
        # As on NPUs: lengths and rows are filled up. The proof has 6 rows, the first micro-batch 4.
        strategy._accelerator = "ascend"
        tokens, samples = 240, 10
    view = tiny.windows(
        world,
        tiny.random_table(36),
        global_batch=samples,
        micro_batch=6,
        max_tokens=tokens,
    )
    if proves:
        proof = prove(strategy, view.collator, micro_batch=6, max_tokens=tokens, accumulates=True)
        assert all(rows * length <= tokens for rows, length in proof.shapes)
    losses = []

    def after_step(report):
        losses.append(report.outcome.loss)
        return False

    train(
        strategy,
        view,
        Schedule(name="linear", peak=1e-3, warmup_steps=0, total_steps=9),
        Cursor(),
        total_steps=3,
        after_step=after_step,
    )
    state = {(s.kind, s.name, s.start): np.array(s.values) for s in strategy.state_slices()}
    strategy.close()
    return losses, state


@pytest.mark.parametrize(("ranks", "few_shapes"), [(2, False), (1, True)])
def test_no_bit_differs_after_a_proof(tmp_path, ranks, few_shapes):
    folder = write_config(tmp_path / "bert", "bert")
    proven, plain = (
        run_ranks(ranks, _after_a_proof, folder, proves, few_shapes) for proves in (True, False)
    )
    for (losses, state), (expected, other) in zip(proven, plain, strict=True):
        assert losses == expected
        assert state.keys() == other.keys()
        assert all(np.array_equal(state[key], other[key]) for key in state)


def _said_and_heard(world, folder):
    """Two steps, in the second of which rank 1 is asked to stop."""
    strategy = create(world, folder)
    view = tiny.windows(world, tiny.random_table(12), global_batch=12, micro_batch=3)
    asked, heard = [], []
    for step in range(2):
        indices = view.order.global_batch(0)

        def say(stop=step == 1 and world.rank == 1):
            asked.append(stop)
            return Said(stop=stop, saving=1.0)

        for batch, last in view.micro_batches(indices, 0):
            strategy.accumulate(batch, 12.0, last=last, say=say)
        outcome = strategy.apply(1e-3)
        heard.append((outcome.stop, outcome.saving))
    strategy.close()
    return heard, len(asked)


def test_all_ranks_hear_what_one_was_asked_for_and_each_is_asked_once_a_step(tmp_path):
    folder = tiny.write_config(tmp_path / "bert", "bert")
    for heard, asked in run_ranks(2, _said_and_heard, folder):
        assert heard == [(False, 2.0), (True, 2.0)]
        assert asked == 2


# -- samples ------------------------------------------------------------------------------------


def _epoch(world, folder):
    """The samples of this rank in one epoch of 100, as the strategy is handed them, and the digests."""
    strategy = create(world, folder)
    seen: list[int] = []
    digests: list[str] = []
    inner = strategy.accumulate

    def accumulate(batch, total_items, *, last, say):
        seen.extend(int(index) for index in batch.indices if index >= 0)
        inner(batch, total_items, last=last, say=say)

    strategy.accumulate = accumulate
    view = tiny.windows(world, tiny.random_table(100), global_batch=12, micro_batch=3)

    def after_step(report):
        digests.append(samples_digest(report.indices))
        return False

    train(
        strategy,
        view,
        Schedule(name="linear", peak=1e-3, warmup_steps=0, total_steps=9),
        Cursor(),
        total_steps=9,
        after_step=after_step,
    )
    strategy.close()
    return seen, digests


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.long), 4])
def test_every_sample_is_read_once_in_an_epoch(tmp_path, ranks):
    folder = write_config(tmp_path / "bert", "bert")
    results = run_ranks(ranks, _epoch, folder)
    everything = [index for seen, _ in results for index in seen]
    assert sorted(everything) == list(range(100))
    assert all(len(seen) > 100 // ranks - 10 for seen, _ in results)
    assert len({tuple(digests) for _, digests in results}) == 1


# -- overflow -----------------------------------------------------------------------------------


def _overflow(world, folder, precision, poison):
    """Three steps; in the second, rank 1's gradient of one parameter is not finite."""
    import mindspore as ms

    strategy = create(world, folder, precision=precision, initial_loss_scale=1024.0)
    view = tiny.windows(world, tiny.random_table(36), global_batch=12, micro_batch=3)
    seen = []
    for step in range(3):
        indices = view.order.global_batch(step)
        total = view.collator.total_items(indices)
        for batch, last in view.micro_batches(indices, step):
            strategy.accumulate(batch, total, last=last)
        if step == 1 and world.rank == 1:
            number = [name for name, _ in strategy._trained].index(poison)
            bad = strategy._gradients[number].asnumpy().copy()
            bad.flat[5] = np.inf
            strategy._gradients[number] = ms.Tensor(bad)
        before = {n: p.asnumpy().copy() for n, p in strategy._trained}
        outcome = strategy.apply(1e-3)
        changed = any(not np.array_equal(before[n], p.asnumpy()) for n, p in strategy._trained)
        seen.append((outcome, changed))
    weights = {n: p.asnumpy().copy() for n, p in strategy._trained}
    state = dict(strategy.loss_scale_state())
    strategy.close()
    return seen, weights, state


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_overflow_on_one_rank_is_skipped_by_both_and_named(tmp_path, precision):
    folder = write_config(tmp_path / "bert", "bert")
    poison = "bert.encoder.layer.1.attention.self.query.weight"
    results = run_ranks(2, _overflow, folder, precision, poison)
    (seen, weights, state), (other_seen, other_weights, other_state) = results
    assert [outcome for outcome, _ in seen] == [outcome for outcome, _ in other_seen]
    assert [outcome.applied for outcome, _ in seen] == [True, False, True]
    assert [changed for _, changed in seen] == [True, False, True]
    assert seen[1][0].culprit == poison
    assert not np.isfinite(seen[1][0].grad_norm)
    for name, values in weights.items():
        np.testing.assert_array_equal(values, other_weights[name])
    scales = [outcome.loss_scale for outcome, _ in seen]
    assert scales == ([1.0, 1.0, 1.0] if precision == "fp32" else [1024.0, 1024.0, 512.0])
    assert state == other_state


def _flag_of_saturation(world, folder):
    """Rank 1 finds its own gradient not finite; what arrives after the sum is finite, as on an NPU
    that saturates."""
    from ftlaunch.strategies.mindspore import data_parallel, group

    strategy = create(world, folder)
    view = tiny.windows(world, tiny.random_table(12), global_batch=12, micro_batch=6)
    indices = view.order.global_batch(0)
    for batch, last in view.micro_batches(indices, 0):
        strategy.accumulate(batch, 12.0, last=last)
    if world.rank == 1:
        import mindspore as ms

        bad = strategy._gradients[3].asnumpy().copy()
        bad.flat[0] = np.inf
        strategy._gradients[3] = ms.Tensor(bad)
    through = group.all_reduce

    def saturating(bucket):
        from mindspore import ops

        return through(ops.clip_by_value(bucket, -65504.0, 65504.0))

    vars(data_parallel)["all_reduce"] = saturating
    outcome = strategy.apply(1e-3)
    name = strategy._trained[3][0]
    strategy.close()
    return outcome, name


def test_the_flag_does_not_travel_with_the_gradients(tmp_path):
    folder = write_config(tmp_path / "bert", "bert")
    for outcome, name in run_ranks(2, _flag_of_saturation, folder):
        assert not outcome.applied
        assert outcome.culprit == name


# -- dropout, shapes, names -----------------------------------------------------------------------


def _losses(world, folder, dropout, seeds):
    from dataclasses import replace

    strategy = create(world, folder, model={"dropout": dropout})
    view = tiny.windows(world, tiny.random_table(12), global_batch=12, micro_batch=12)
    [(batch, _)] = view.micro_batches(view.order.global_batch(0), 0)
    found = []
    for seed in seeds:
        strategy._gradients = None
        strategy.accumulate(replace(batch, seed=seed), 12.0, last=True)
        found.append(strategy._window_loss())
    return found


@pytest.mark.parametrize("family", ["bert", "distilbert", "qwen2"])
def test_dropout_follows_from_the_seed_of_the_micro_batch(tmp_path, family):
    folder = write_config(tmp_path / family, family)
    [(first, second, again)] = run_ranks(1, _losses, folder, 0.3, [11, 12, 11])
    assert first == again
    assert abs(first - second) > 1e-4


def _padded(world, folder):
    """The gradient and the logits of a batch as it is, and in a shape of the few."""
    from ftlaunch.strategies.mindspore.forward import pad_to_buckets

    strategy = create(world, folder)
    view = tiny.windows(world, tiny.random_table(11), global_batch=11, micro_batch=11)
    [(batch, _)] = view.micro_batches(view.order.global_batch(0), 0)
    padded = pad_to_buckets(batch, rows=16, pad_token_id=0)
    found = []
    for each in (batch, padded):
        strategy._gradients = None
        strategy.accumulate(each, 11.0, last=True)
        flat = np.concatenate([g.asnumpy().ravel() for g in strategy._gradients])
        found.append((each.inputs["input_ids"].shape, strategy._window_loss(), flat))
        assert strategy.predict(each).shape == (len(each.labels), 3)
    rows = [strategy.predict(each)[:11] for each in (batch, padded)]
    return found, rows


@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_padding_to_few_shapes_changes_nothing(tmp_path, family):
    folder = write_config(tmp_path / family, family)
    [(found, rows)] = run_ranks(1, _padded, folder)
    (_, loss, gradient), (shape, padded_loss, padded_gradient) = found
    assert shape in [(16, 32), (16, 48)]
    assert abs(padded_loss / loss - 1) < 1e-6
    error = np.linalg.norm(padded_gradient - gradient) / np.linalg.norm(gradient)
    assert error < 1e-5, error
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-4, atol=1e-6)


def _shapes_on_npus(world, folder):
    """The shapes that the model sees where each new one costs a compilation: train, eval, train."""
    strategy = create(world, folder)
    strategy._accelerator = "ascend"
    shapes = []
    inner = strategy.model.construct

    def construct(*args, input_ids, **inputs):
        shapes.append(tuple(input_ids.shape))
        return inner(*args, input_ids=input_ids, **inputs)

    strategy.model.construct = construct
    for rows, training in ((4, True), (8, False), (3, True)):
        view = tiny.windows(world, tiny.random_table(rows), global_batch=rows, micro_batch=rows)
        [(batch, _)] = view.micro_batches(view.order.global_batch(0), 0)
        if training:
            strategy.accumulate(batch, float(rows), last=True)
        else:
            assert strategy.predict(batch).shape == (rows, 3)
    return shapes


def test_evaluation_does_not_widen_training(tmp_path):
    folder = write_config(tmp_path / "bert", "bert")
    [shapes] = run_ranks(1, _shapes_on_npus, folder)
    assert [rows for rows, _ in shapes] == [4, 8, 4]
    assert all(length in (16, 24, 32, 48, 64) for _, length in shapes)


def _weights_of(world, folder):
    strategy = create(world, folder, model={"random_weights": False})
    weights = {n: p.asnumpy().copy() for n, p in strategy._named.parameters.items()}
    kinds = {str(p.dtype) for p in strategy._named.parameters.values()}
    config = strategy.model.config
    return weights, kinds, getattr(config, "rope_theta", None)


def _bf16(values):
    """As the upper halves of fp32, which is what they are in a file."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _write_bf16_model(folder, config, shapes):
    """A file of the base model alone, in bf16, under old names of norms."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = np.random.default_rng(3)
    header, data, expected = {}, b"", {}
    for name, shape in shapes.items():
        values = (generator.standard_normal(shape) * 0.02).astype(np.float32)
        raw = _bf16(values).tobytes()
        old = name.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma")
        old = old.replace("LayerNorm.bias", "LayerNorm.beta")
        header[old] = {
            "dtype": "BF16",
            "shape": list(shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
        expected[name] = (_bf16(values).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return expected


def test_weights_in_bf16_without_a_prefix_under_old_names(in_torch, tmp_path):
    _, gradients = in_torch("bert", 0)
    shapes = {n: g.shape for n, g in gradients.items() if not n.startswith("classifier")}
    config = {**tiny.CONFIGS["bert"], "torch_dtype": "bfloat16"}
    expected = _write_bf16_model(tmp_path / "model", config, shapes)
    [(weights, kinds, _)] = run_ranks(1, _weights_of, tmp_path / "model")
    assert kinds == {"Float32"}
    assert weights.keys() == gradients.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(weights[name], values)
    assert weights["classifier.weight"].std() > 0


def _theta(world, folder):
    return create(world, folder).model.config.rope_theta


def test_rotary_embeddings_as_transformers_5_writes_them(tmp_path):
    folder = tmp_path / "qwen2"
    folder.mkdir()
    rope = {"rope_theta": 1e6, "rope_type": "default"}
    config = {**tiny.CONFIGS["qwen2"], "rope_parameters": rope, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    assert run_ranks(1, _theta, folder) == [1e6]


# -- AdamW --------------------------------------------------------------------------------------


def _adamw(world, gradients, rate, epsilon):
    import mindspore as ms

    from ftlaunch.strategies.mindspore.adamw import AdamW

    ms.set_device("CPU")
    parameters = [
        ("w", ms.Parameter(np.ones((3, 4), np.float32), name="w")),
        ("b", ms.Parameter(np.ones(4, np.float32), name="b")),
    ]
    optimizer = AdamW(parameters, beta1=0.9, beta2=0.999, epsilon=epsilon, weight_decay=0.1)
    for step in gradients:
        optimizer.step([ms.Tensor(g) for g in step], rate)
    return [p.asnumpy() for _, p in parameters]


def test_adamw_is_the_published_one():
    generator = np.random.default_rng(0)
    gradients = [
        [generator.standard_normal((3, 4), np.float32), generator.standard_normal(4, np.float32)]
        for _ in range(8)
    ]
    rate, epsilon = 1e-2, 1e-3
    [found] = run_ranks(1, _adamw, gradients, rate, epsilon)
    for number, decay in ((0, 0.1), (1, 0.0)):
        weight = np.ones_like(gradients[0][number], dtype=np.float64)
        first, second = np.zeros_like(weight), np.zeros_like(weight)
        for step, each in enumerate(gradients, start=1):
            gradient = each[number].astype(np.float64)
            weight -= rate * decay * weight
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            corrected = np.sqrt(second / (1 - 0.999**step)) + epsilon
            weight -= rate * (first / (1 - 0.9**step)) / corrected
        np.testing.assert_allclose(found[number], weight, rtol=2e-6)
