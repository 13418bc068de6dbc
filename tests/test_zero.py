"""ZeRO against the plain full batch, and checkpoints that go from every strategy to every other."""

from __future__ import annotations

import gc
import importlib
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from ftlaunch.strategies import registry
from ftlaunch.strategies.checkpoint import resuming
from ftlaunch.strategies.checkpoint.manifest import (
    CheckpointDamaged,
    read_manifest,
    write_manifest,
)
from ftlaunch.strategies.checkpoint.resuming import load_newest
from ftlaunch.strategies.checkpoint.saver import Saver
from ftlaunch.strategies.checkpoint.store import CheckpointReader
from ftlaunch.strategies.data.sample_order import samples_digest
from ftlaunch.strategies.loop import Cursor, train
from ftlaunch.strategies.options import DeepSpeedOptions
from tests import tiny
from tests.jobs import assert_no_process_left, ftlaunch, metrics_of, said, summary_of
from tests.ranks import run_ranks
from tests.test_parity import GLOBAL_BATCH, SAMPLES, STEPS, _reference, _schedule
from tests.training_jobs import Inputs, assert_same_training

ZERO = ("zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny.write_config(tmp_path_factory.mktemp("bert"), "bert")


@pytest.fixture(scope="module")
def reference(bert):
    return run_ranks(1, _reference, bert)[0]


def _train(world, listen_fd, folder, name, micro_batch, deepspeed=None):
    request = tiny.request(world, listen_fd, folder, weight_decay=0.1, deepspeed=deepspeed)
    strategy = registry.load(name)(request)
    seen = []

    def after_step(report):
        outcome = report.outcome
        seen.append((samples_digest(report.indices), outcome.loss, outcome.grad_norm))
        return False

    train(
        strategy,
        tiny.windows(
            world, tiny.random_table(SAMPLES), global_batch=GLOBAL_BATCH, micro_batch=micro_batch
        ),
        _schedule(),
        Cursor(),
        total_steps=STEPS,
        after_step=after_step,
    )
    return seen


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 4), (2, 2), (3, 2)])
@pytest.mark.parametrize("name", ZERO)
def test_thirty_steps_are_those_of_the_full_batch(bert, reference, name, ranks, micro_batch):
    for seen in run_ranks(ranks, _train, bert, name, micro_batch):
        _assert_is(seen, reference, f"{name}, {ranks} ranks")


@pytest.mark.parametrize("name", ZERO)
def test_thirty_steps_with_offload_are_those_of_the_full_batch(bert, reference, name):
    deepspeed = DeepSpeedOptions(offload="cpu")
    for seen in run_ranks(2, _train, bert, name, 2, deepspeed):
        _assert_is(seen, reference, f"{name}, offload")


@pytest.mark.parametrize("name", ZERO)
def test_a_users_configuration_is_deepspeeds(bert, reference, name):
    """Small buckets and sub-groups lay the state out in another way, and change no number."""
    for seen in run_ranks(2, _train, bert, name, 2, DeepSpeedOptions(config=_small(name))):
        _assert_is(seen, reference, f"{name}, a user's configuration")


def _small(name):
    return {
        "train_batch_size": GLOBAL_BATCH,
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": int(name[-1]),
            "reduce_bucket_size": 1000,
            "allgather_bucket_size": 1000,
            "sub_group_size": 1000,
            "stage3_param_persistence_threshold": 0,
        },
    }


def _assert_is(seen, reference, what):
    """Asserted ten times as close as promised."""
    assert [digest for digest, _, _ in seen] == [digest for digest, _, _ in reference]
    losses = np.array([(loss, norm) for _, loss, norm in seen])
    expected = np.array([(loss, norm) for _, loss, norm in reference])
    worst = np.abs(losses / expected - 1).max(axis=0)
    print(f"{what}: loss {worst[0]:.1e} norm {worst[1]:.1e}")
    assert worst[0] < 1e-6
    assert worst[1] < 1e-5


# -- from every strategy to every other ---------------------------------------------------------

SAVED_AT, GOES_ON = 10, 10
STRATEGIES = ("ddp", *ZERO)


def _steps(world, strategy, cursor, until):
    seen = []

    def after_step(report):
        seen.append((samples_digest(report.indices), report.outcome.loss))
        return False

    train(
        strategy,
        tiny.windows(world, tiny.random_table(SAMPLES), global_batch=GLOBAL_BATCH, micro_batch=2),
        _schedule(),
        cursor,
        total_steps=until,
        after_step=after_step,
    )
    return seen


def _request(world, listen_fd, folder, deepspeed=None):
    # Frozen parameters, and sizes that neither 2 nor 3 ranks divide.
    model = {"freeze": ("bert.embeddings.position_embeddings", "bert.encoder.layer.0.attention")}
    return tiny.request(
        world, listen_fd, folder, weight_decay=0.1, model=model, deepspeed=deepspeed
    )


def _save(world, listen_fd, folder, name, root, deepspeed=None):
    """10 steps, a checkpoint, 10 more."""
    strategy = registry.load(name)(_request(world, listen_fd, folder, deepspeed))
    cursor = Cursor()
    _steps(world, strategy, cursor, SAVED_AT)
    Saver(strategy, root).save(tiny.manifest(SAVED_AT, world_size=strategy.world.size), now=True)
    return _steps(world, strategy, cursor, SAVED_AT + GOES_ON)


def _resume(world, listen_fd, folder, name, root, deepspeed=None):
    strategy = registry.load(name)(_request(world, listen_fd, folder, deepspeed))
    found = load_newest(strategy, root, on_damaged=print)
    assert found is not None
    cursor = Cursor(step=found[1].step, applied=found[1].applied_steps)
    return _steps(world, strategy, cursor, SAVED_AT + GOES_ON)


@pytest.fixture(scope="module")
def saved(bert, tmp_path_factory):
    """strategy → (its checkpoints, the 10 losses that follow)."""
    made = {}

    def save(name):
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            made[name] = (root, run_ranks(2, _save, bert, name, root)[0])
        return made[name]

    return save


def _pairs_and_ranks():
    """Each strategy from each on one number of ranks, 1 to 3 in turn; the other numbers are `long`."""
    for first, origin in enumerate(STRATEGIES):
        for second, to in enumerate(STRATEGIES):
            for ranks in (1, 2, 3):
                marks = () if ranks == (first + second) % 3 + 1 else pytest.mark.long
                yield pytest.param(origin, to, ranks, marks=marks)


@pytest.mark.parametrize(("origin", "to", "ranks"), _pairs_and_ranks())
def test_every_strategy_goes_on_from_every_other(bert, saved, origin, to, ranks):
    root, expected = saved(origin)
    for seen in run_ranks(ranks, _resume, bert, to, root):
        _assert_goes_on(seen, expected)


def _assert_goes_on(seen, expected):
    assert [digest for digest, _ in seen] == [digest for digest, _ in expected]
    losses, wanted = (np.array([loss for _, loss in each]) for each in (seen, expected))
    assert np.abs(losses / wanted - 1).max() < 1e-5


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("zero3", "offload"),
        pytest.param("zero3", "a user's configuration", marks=pytest.mark.long),
        *(
            pytest.param(name, layout, marks=pytest.mark.long)
            for name in ("zero1", "zero2")
            for layout in ("offload", "a user's configuration")
        ),
    ],
)
def test_another_layout_of_the_state_is_the_same_checkpoint(bert, saved, tmp_path, name, layout):
    deepspeed = DeepSpeedOptions(offload="cpu")
    if layout != "offload":
        deepspeed = DeepSpeedOptions(config=_small(name))
    expected = run_ranks(2, _save, bert, name, tmp_path, deepspeed)[0]
    _assert_goes_on(run_ranks(3, _resume, bert, "ddp", tmp_path)[0], expected)
    root, expected = saved("ddp")
    _assert_goes_on(run_ranks(3, _resume, bert, name, root, deepspeed)[0], expected)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_checkpoint_holds_everything_once(bert, saved, name):
    root, _ = saved(name)
    reference, _ = saved("ddp")
    folders = [path / f"step-{SAVED_AT:08d}" for path in (root, reference)]
    mine, ddp = (CheckpointReader(folder, read_manifest(folder)) for folder in folders)
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        assert mine.names(kind) == ddp.names(kind)
        for tensor in mine.names(kind):
            np.testing.assert_allclose(
                mine.read_whole(kind, tensor), ddp.read_whole(kind, tensor), rtol=1e-4, atol=1e-6
            )


# -- tied weights -------------------------------------------------------------------------------

TIED, ALIAS = (f"bert.encoder.layer.{layer}.intermediate.dense.weight" for layer in (0, 1))


def _tie(name):
    """Have both layers use one weight, as encoders and decoders share their embeddings."""
    module = importlib.import_module(f"ftlaunch.strategies.torch.{name.rstrip('123')}")
    load = vars(module)["load_model"]

    def load_tied(*args, **kwargs):
        model = load(*args, **kwargs)
        first, second = (model.bert.encoder.layer[i].intermediate.dense for i in (0, 1))
        second.weight = first.weight
        return model

    vars(module)["load_model"] = load_tied


def _save_tied(world, listen_fd, folder, name, root):
    _tie(name)
    return _save(world, listen_fd, folder, name, root)


def _resume_tied(world, listen_fd, folder, name, root):
    _tie(name)
    return _resume(world, listen_fd, folder, name, root)


@pytest.mark.parametrize(
    "name",
    ["zero3", *(pytest.param(name, marks=pytest.mark.long) for name in ("ddp", "zero1", "zero2"))],
)
def test_tied_weights_are_kept_once_with_their_other_name(bert, tmp_path, name):
    expected = run_ranks(2, _save_tied, bert, name, tmp_path / name)[0]
    folder = tmp_path / name / f"step-{SAVED_AT:08d}"
    manifest = read_manifest(folder)
    assert manifest.aliases == {ALIAS: TIED}
    weights = CheckpointReader(folder, manifest).names("weight")
    assert TIED in weights
    assert ALIAS not in weights
    for to in ("ddp", "zero2", "zero3"):
        _assert_goes_on(run_ranks(3, _resume_tied, bert, to, tmp_path / name)[0], expected)


# -- a model that is too large for one ----------------------------------------------------------


def _anonymous_bytes():
    """Memory that is this process's own: mapped files are not in it."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in x)
    return int(line.split()[1]) * 1024


def _load_with_zero3(world, listen_fd, folder, precision):
    """Peak of this rank's own memory above the start, while the model is loaded and split."""
    request = tiny.request(
        world, listen_fd, folder, model={"random_weights": False}, precision=precision
    )
    from ftlaunch.strategies.torch import zero

    start, peak, done = _anonymous_bytes(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, _anonymous_bytes() - start)

    # The engine of the optimizer is not the matter here.
    vars(zero)["TorchZero"] = lambda request, stage, model, *rest: model
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = registry.load("zero3")(request)
    done.set()
    watcher.join()
    largest = model.get_parameter("bert.embeddings.word_embeddings.weight")
    return peak, sum(p.ds_numel for p in model.parameters()), largest.ds_tensor.numel()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_rank_of_zero3_never_holds_the_whole_model(tmp_path, precision):
    config = {**tiny.CONFIGS["bert"], "hidden_size": 512, "intermediate_size": 2048}
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(**{**config, "num_hidden_layers": 24, "num_labels": 3})
    )
    model.save_pretrained(tmp_path)
    whole = sum(p.numel() for p in model.parameters()) * 4
    for peak, elements, part in run_ranks(4, _load_with_zero3, tmp_path, precision):
        assert elements * 4 == whole
        assert part == -(-tiny.VOCABULARY * 512 // 4)
        # A quarter of the weights is in bf16 an eighth of the file; libraries have some of their own.
        print(f"peak {peak / 2**20:.0f} MiB of {whole / 2**20:.0f} MiB")
        assert peak < whole / 2


def _left_of_loading(world, listen_fd, folder):
    """Tensors that are as large as the largest parameter, in the dtype that computes."""
    strategy = registry.load("zero3")(tiny.request(world, listen_fd, folder, precision="bf16"))
    largest = max(p.ds_numel for p in strategy._engine.module.parameters())
    tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor]
    return [list(t.shape) for t in tensors if t.dtype == torch.bfloat16 and t.numel() == largest]


def test_the_place_through_which_zero3_loads_is_given_back(bert):
    """Of an 8B model it is 1 GB of each rank."""
    assert run_ranks(2, _left_of_loading, bert) == [[], []]


def _weights_at_the_start(world, listen_fd, folder, name, precision):
    """What a checkpoint would hold before the first step: this rank's slices."""
    model = {"random_weights": False, "freeze": ("bert.embeddings",)}
    request = tiny.request(world, listen_fd, folder, model=model, precision=precision)
    return list(registry.load(name)(request).state_slices())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_no_weight_is_rounded_before_it_is_trained(bert, tmp_path, name, precision):
    """config.json may say another dtype than the weights have; bf16 computes, fp32 is kept."""
    config = transformers.AutoConfig.from_pretrained(bert, num_labels=3)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert '"float32"' in text
    (tmp_path / "config.json").write_text(text.replace('"float32"', '"float16"'))
    expected = load_file(tmp_path / "model.safetensors")
    found = {key: np.full(value.size, np.nan) for key, value in expected.items()}
    for slices in run_ranks(2, _weights_at_the_start, tmp_path, name, precision):
        for piece in slices:
            if piece.name in found:
                found[piece.name][piece.start : piece.start + piece.values.size] = piece.values
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value.reshape(-1), err_msg=key)


def _states_made(world, listen_fd, folder, name, root):
    """(states that loading has made, flat vectors that have one)"""
    from ftlaunch.strategies.torch import zero_state

    made = []

    def new_state(*args):
        made.append(1)
        return make(*args)

    make = vars(zero_state)["_new_state"]
    vars(zero_state)["_new_state"] = new_state
    strategy = registry.load(name)(_request(world, listen_fd, folder))
    assert load_newest(strategy, root, on_damaged=print) is not None
    return len(made), len(strategy._optimizer.optimizer.state)


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_loading_makes_one_state_for_each_flat_vector(bert, saved, name):
    """One is as large as the vector, and dozens of parameters share it."""
    for made, vectors in run_ranks(2, _states_made, bert, name, saved("ddp")[0]):
        assert made == vectors > 0


def _frozen_after_loading(world, listen_fd, folder, name, root, seed):
    """This rank's slices of what is frozen, after loading into a model of other random weights."""
    model = {"freeze": ("bert.embeddings",)}
    request = tiny.request(world, listen_fd, folder, model=model, precision="bf16", seed=seed)
    strategy = registry.load(name)(request)
    if seed == 7:
        Saver(strategy, root).save(tiny.manifest(1, world_size=world.size), now=True)
    else:
        assert load_newest(strategy, root, on_damaged=print) is not None
    return [piece for piece in strategy.state_slices() if "embeddings" in piece.name]


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_frozen_weights_are_saved_again_as_the_checkpoint_has_them(bert, tmp_path, name):
    """Neither as the model came nor rounded to bf16, in which it computes."""
    found = []
    for seed in (7, 8):
        for slices in run_ranks(2, _frozen_after_loading, bert, name, tmp_path, seed):
            found.append({(piece.name, piece.start): piece.values for piece in slices})
    for before, after in zip(found[:2], found[2:], strict=True):
        assert before.keys() == after.keys()
        for key, values in before.items():
            np.testing.assert_array_equal(after[key], values, err_msg=str(key))


def _resume_with_damage(world, listen_fd, folder, name, root, where):
    """Rank 1 alone finds the newest checkpoint damaged: in its manifest, or halfway through it."""
    strategy = registry.load(name)(_request(world, listen_fd, folder))
    newest = f"step-{SAVED_AT + 1:08d}"

    def damaged(path):
        if world.rank == 1 and newest in str(path):
            raise CheckpointDamaged(path, "for the test")

    def read_manifest_of(path):
        damaged(path)
        return read_manifest(path)

    class Reader(CheckpointReader):
        def read(self, kind, name, start, stop):
            if name == "bert.encoder.layer.1.output.dense.weight":
                damaged(self.folder)
            return super().read(kind, name, start, stop)

    if where == "manifest":
        vars(resuming)["read_manifest"] = read_manifest_of
    else:
        vars(resuming)["CheckpointReader"] = Reader
    told: list[str] = []
    found = load_newest(strategy, root, on_damaged=told.append)
    assert found is not None
    return found[1].step, len(told)


@pytest.mark.parametrize("where", ["manifest", "weight"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_what_one_rank_finds_damaged_is_passed_over_by_all(bert, saved, tmp_path, name, where):
    root, _ = saved("ddp")
    shutil.copytree(root, tmp_path / "checkpoints")
    older = tmp_path / "checkpoints" / f"step-{SAVED_AT:08d}"
    newest = older.with_name(f"step-{SAVED_AT + 1:08d}")
    shutil.copytree(older, newest)
    write_manifest(newest, replace(read_manifest(older), step=SAVED_AT + 1))
    for step, told in run_ranks(
        2, _resume_with_damage, bert, name, tmp_path / "checkpoints", where
    ):
        assert (step, told) == (SAVED_AT, 1)


# -- overflow -----------------------------------------------------------------------------------

POISONED = "bert.encoder.layer.1.output.dense.weight"


def _overflow(world, listen_fd, folder, name, precision, deepspeed):
    """One step with a gradient that is infinite on rank 1, and one without."""
    request = tiny.request(world, listen_fd, folder, precision=precision, deepspeed=deepspeed)
    strategy = registry.load(name)(request)
    model = strategy.model if name == "ddp" else strategy._engine.module
    parameter = model.get_parameter(POISONED)
    hook = parameter.register_hook(
        lambda gradient: gradient * (float("inf") if world.rank == 1 else 1.0)
    )
    outcomes = []

    def after_step(report):
        outcomes.append(report.outcome)
        hook.remove()
        return False

    windows = tiny.windows(
        world, tiny.random_table(SAMPLES), global_batch=GLOBAL_BATCH, micro_batch=2
    )
    cursor = Cursor()
    train(
        *(strategy, windows, _schedule(), cursor),
        total_steps=2,
        after_step=after_step,
    )
    return [(outcome.applied, outcome.culprit) for outcome in outcomes], cursor.applied


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("offload", [None, "cpu"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_an_overflow_on_one_rank_is_skipped_by_all_and_named(bert, name, offload, precision):
    deepspeed = DeepSpeedOptions(offload=offload)
    for outcomes, applied in run_ranks(2, _overflow, bert, name, precision, deepspeed):
        assert outcomes == [(False, POISONED), (True, None)]
        assert applied == 1


# -- in lower precision, and as a user does -----------------------------------------------------


def _low_precision(world, listen_fd, folder, name):
    request = tiny.request(world, listen_fd, folder, precision="bf16")
    strategy = registry.load(name)(request)
    losses = [loss for _, loss in _steps(world, strategy, Cursor(), 10)]
    weights = {s.values.dtype for s in strategy.state_slices() if s.kind == "weight"}
    return losses, weights


@pytest.mark.parametrize("name", ZERO)
def test_bf16_learns_and_keeps_fp32_masters(bert, saved, name):
    (losses, dtypes), _ = run_ranks(2, _low_precision, bert, name)
    (expected, _), _ = run_ranks(2, _low_precision, bert, "ddp")
    assert dtypes == {np.dtype(np.float32)}
    # bf16 has 8 bits: 0.4 % a rounding.
    np.testing.assert_allclose(losses, expected, rtol=0.02)


@pytest.mark.long
def test_a_job_that_changes_its_strategy_on_the_way(tmp_path):
    """ZeRO-2 on 2 ranks, stopped, gone on with ZeRO-3 on 3: the losses are those of ddp."""
    inputs = Inputs(tmp_path / "inputs")
    ddp, out = tmp_path / "ddp", tmp_path / "out"
    assert ftlaunch(*inputs.command(ddp)).returncode == 0
    stopped = ftlaunch(
        *("rehearse", "--fault", "interrupt@step40"),
        *inputs.command(out, "--strategy", "zero2"),
    )
    assert stopped.returncode == 75, said(stopped)
    result = ftlaunch(*inputs.command(out, "--strategy", "zero3", nodes=3))
    assert result.returncode == 0, said(result)
    assert_same_training(metrics_of(out), metrics_of(ddp))
    assert (summary_of(out)["strategy"], summary_of(out)["world_size"]) == ("zero3", 3)
    mine, theirs = (load_file(each / "model" / "model.safetensors") for each in (out, ddp))
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        # A bias of the keys changes no attention: its gradient is the rounding, and AdamW makes steps
        # of full size of that.
        if not name.endswith("key.bias"):
            np.testing.assert_allclose(weight, theirs[name], rtol=1e-3, atol=1e-4)
    losses = [summary_of(each)["eval"]["loss"] for each in (out, ddp)]
    assert abs(losses[0] / losses[1] - 1) < 1e-5
    assert_no_process_left(out)


# -- the model that comes of it -----------------------------------------------------------------


def _logits_and_checkpoint(world, listen_fd, folder, name, root):
    """Logits of the first rows after 10 steps, by the engine that has trained them."""
    strategy = registry.load(name)(_request(world, listen_fd, folder))
    _steps(world, strategy, Cursor(), SAVED_AT)
    files = strategy.model_files() if world.is_main else {}
    Saver(strategy, root, model_files=files).save(
        tiny.manifest(SAVED_AT, world_size=strategy.world.size), now=True
    )
    table = tiny.random_table(SAMPLES)
    collator = tiny.windows(world, table, global_batch=GLOBAL_BATCH, micro_batch=2).collator
    batch = collator.batch(np.arange(8), seed=0)
    return strategy.predict(batch), batch.inputs


def _logits_of_folder(world, listen_fd, folder, inputs):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    model.eval()
    with torch.no_grad():
        tensors = {name: torch.from_numpy(values) for name, values in inputs.items()}
        return model(**tensors).logits.numpy(), model.config.id2label


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_merged_model_predicts_what_the_engine_did(bert, tmp_path, name):
    logits, inputs = run_ranks(2, _logits_and_checkpoint, bert, name, tmp_path / "checkpoints")[0]
    merged = tmp_path / "merged"
    result = ftlaunch("merge", tmp_path / "checkpoints" / f"step-{SAVED_AT:08d}", merged)
    assert result.returncode == 0, said(result)
    assert not (merged / "tokenizer.json").exists()
    [(found, labels)] = run_ranks(1, _logits_of_folder, merged, inputs)
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-5)
    assert labels == {0: "a", 1: "b", 2: "c"}
