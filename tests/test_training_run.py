"""A training run from start to end, in real ranks: stopping, resuming, evaluating, overflowing."""

from __future__ import annotations

import json
import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies import session
from ftlaunch.strategies.checkpoint.manifest import CheckpointDamaged, read_manifest
from ftlaunch.strategies.checkpoint.retention import checkpoint_folders
from ftlaunch.strategies.checkpoint.store import CheckpointReader
from ftlaunch.strategies.data.batches import Collator, evaluation_batches
from ftlaunch.strategies.options import (
    CheckpointOptions,
    DataOptions,
    JobOptions,
    ModelOptions,
    TrainOptions,
)
from ftlaunch.strategies.progress import (
    DataReady,
    Evaluated,
    Finished,
    Note,
    Resumed,
    Saved,
    StepDone,
)
from ftlaunch.strategies.torch.group import use_device
from tests import tiny
from tests.ranks import run_ranks

WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(model folder, data folder): 100 training and 7 evaluation rows of 3 to 30 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    root = tmp_path_factory.mktemp("job")
    model = tiny.write_config(root / "model", "bert")
    vocabulary = {"[PAD]": 0, "[UNK]": 1, **{word: i + 2 for i, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"})
    )
    generator = random.Random(1)
    data = root / "data"
    data.mkdir()
    for name, rows in (("train", 100), ("test", 7)):
        lines = []
        for number in range(rows):
            words = generator.choices(WORDS, k=generator.randint(3, 30))
            lines.append(json.dumps({"text": " ".join(words), "label": "abc"[number % 3]}))
        (data / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return model, data


def _options(folders, **changes):
    model, data = folders
    options = JobOptions(
        model=ModelOptions(name_or_path=str(model), random_weights=True, dropout=0.0),
        data=DataOptions(name_or_path=str(data)),
        # 100 samples in batches of 12: 9 steps an epoch, the last of 4; 30 steps are 3.3 epochs.
        train=TrainOptions(
            global_batch_size=12, max_steps=30, learning_rate=1e-3, weight_decay=0.01, seed=3
        ),
        checkpoint=CheckpointOptions(save_total_limit=10),
    )
    return replace(
        options,
        **{name: replace(getattr(options, name), **values) for name, values in changes.items()},
    )


class _Stop:
    """Asks to stop while step `at` is under way, on one rank only: the others have to be told."""

    def __init__(self, at=None):
        self.at = at
        self.calls = 0
        self.ends_at_once = True

    def requested(self):
        self.calls += 1
        return self.calls == self.at


def _run(world, listen_fd, options, folder, stop_at=None, precision="fp32", micro_batch=4):
    """Every message of this rank. The stop is asked of the last rank alone."""
    messages: list[object] = []
    session.train(
        session.SessionRequest(
            options=options,
            output_dir=Path(folder),
            strategy="ddp",
            precision=precision,
            accelerator="cpu",
            device=0,
            micro_batch=micro_batch,
            eval_micro_batch=4,
            num_threads=1,
            timeout_seconds=60,
            world=world,
            listen_fd=listen_fd,
        ),
        emit=messages.append,
        stop=_Stop(stop_at if world.rank == world.size - 1 else None),
    )
    return messages


def _of(kind, messages):
    return [message for message in messages if isinstance(message, kind)]


@pytest.fixture(scope="module")
def undisturbed(folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return _of(StepDone, run_ranks(1, _run, _options(folders), folder)[0])


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1), (1, 2)])
def test_stopped_at_step_13_resumes_on_another_number_of_ranks(
    folders, tmp_path, undisturbed, before, after
):
    options = _options(folders)
    first = run_ranks(before, _run, options, tmp_path, 13)[0]
    assert _of(Finished, first)[0].stopped
    assert [step.step for step in _of(StepDone, first)] == list(range(1, 14))

    second = run_ranks(after, _run, options, tmp_path)[0]
    assert _of(Resumed, second)[0].step == 13
    steps = _of(StepDone, first) + _of(StepDone, second)
    # No sample lost or repeated, the same losses, the same rates.
    assert [step.step for step in steps] == list(range(1, 31))
    assert [s.samples_digest for s in steps] == [s.samples_digest for s in undisturbed]
    assert [s.learning_rate for s in steps] == [s.learning_rate for s in undisturbed]
    losses = np.array([step.loss for step in steps])
    expected = np.array([step.loss for step in undisturbed])
    worst = np.abs(losses / expected - 1).max()
    print(f"{before} → {after} ranks: {worst:.1e}")
    assert worst < 1e-5
    assert not _of(Finished, second)[0].stopped


def test_every_sample_once_an_epoch(folders, tmp_path, undisturbed):
    assert [step.num_samples for step in undisturbed[:9]] == [12] * 8 + [4]
    assert undisturbed[8].epoch == 1.0
    assert undisturbed[17].epoch == 2.0


def test_the_same_topology_with_dropout_resumes_exactly(folders, tmp_path):
    options = _options(folders, model={"dropout": 0.2}, train={"max_steps": 12})
    whole = _of(StepDone, run_ranks(2, _run, options, tmp_path / "whole")[0])
    first = _of(StepDone, run_ranks(2, _run, options, tmp_path / "cut", 5)[0])
    second = _of(StepDone, run_ranks(2, _run, options, tmp_path / "cut")[0])
    assert [s.loss for s in first + second] == [s.loss for s in whole]


def test_the_same_command_again_has_nothing_left_to_train(folders, tmp_path):
    options = _options(folders, train={"max_steps": 3})
    first = run_ranks(1, _run, options, tmp_path)[0]
    [ready] = _of(DataReady, first)
    longest = []
    for name in ("train", "test"):
        lines = (folders[1] / f"{name}.jsonl").read_text().splitlines()
        longest.append(max(len(json.loads(line)["text"].split()) for line in lines))
    assert [ready.longest_sample, ready.longest_eval_sample] == longest
    again = run_ranks(2, _run, options, tmp_path)[0]
    assert not _of(StepDone, again)
    assert _of(Finished, again)[0].metrics == _of(Finished, first)[0].metrics


def test_a_longer_schedule_goes_on_and_is_told(folders, tmp_path):
    run_ranks(1, _run, _options(folders, train={"max_steps": 3}), tmp_path)
    longer = run_ranks(1, _run, _options(folders, train={"max_steps": 5}), tmp_path)[0]
    assert [step.step for step in _of(StepDone, longer)] == [4, 5]
    assert any("total_steps 3 → 5" in note.text for note in _of(Note, longer))


# -- evaluation ---------------------------------------------------------------------------------


def test_evaluation_is_the_same_on_any_ranks_and_batches(folders, tmp_path):
    """7 samples: with 2 ranks and batches of 4 a rank has a filler row, with 3 and 4 likewise."""
    options = _options(folders, train={"max_steps": 2})
    seen = {}
    for ranks in (1, 2, 3):
        for batch in (2, 4):
            folder = tmp_path / f"{ranks}-{batch}"
            messages = run_ranks(ranks, _evaluate_with, options, folder, batch)[0]
            seen[ranks, batch] = _of(Evaluated, messages)[-1].metrics
    expected = seen[1, 4]
    assert set(expected) == {"loss", "accuracy", "f1"}
    for metrics in seen.values():
        assert metrics == pytest.approx(expected, abs=5e-7)


def _evaluate_with(world, listen_fd, options, folder, batch):
    messages: list[object] = []
    session.train(
        session.SessionRequest(
            options=options,
            output_dir=Path(folder),
            strategy="ddp",
            precision="fp32",
            accelerator="cpu",
            device=0,
            micro_batch=12,
            eval_micro_batch=batch,
            num_threads=1,
            timeout_seconds=60,
            world=world,
            listen_fd=listen_fd,
        ),
        emit=messages.append,
        stop=_Stop(),
    )
    return messages


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("batch", [2, 4])
def test_evaluation_visits_each_sample_once(ranks, batch):
    collator = Collator(table=tiny.random_table(7), pad_token_id=0)
    batches = [
        list(evaluation_batches(collator, rank=rank, world_size=ranks, micro_batch=batch))
        for rank in range(ranks)
    ]
    assert len({len(each) for each in batches}) == 1
    indices = [i for each in batches for b in each for i in b.indices if i >= 0]
    assert sorted(indices) == list(range(7))


def test_best_checkpoint_is_kept_and_becomes_the_model(folders, tmp_path):
    options = _options(
        folders,
        train={"max_steps": 12, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.02},
        # The highest loss counts as the best, so that it is not the last step's.
        checkpoint={
            "load_best_model_at_end": True,
            "save_total_limit": 1,
            "greater_is_better": True,
        },
    )
    messages = run_ranks(2, _run, options, tmp_path)[0]
    evaluations = _of(Evaluated, messages)
    best = max(evaluations, key=lambda e: e.metrics["loss"])
    assert best.step < 12
    assert _of(Finished, messages)[0].metrics == best.metrics
    kept = [folder.name for folder in checkpoint_folders(tmp_path / "checkpoints")]
    assert kept == ["step-00000012", f"step-{best.step:08d}"]

    from safetensors.numpy import load_file

    weights = load_file(tmp_path / "model" / "model.safetensors")
    folder = tmp_path / "checkpoints" / kept[1]
    reader = CheckpointReader(folder, read_manifest(folder))
    for name, values in weights.items():
        np.testing.assert_array_equal(values, reader.read_whole("weight", name))


def test_early_stopping_ends_and_stays_ended(folders, tmp_path):
    options = _options(
        folders,
        train={
            "eval_strategy": "steps",
            "eval_steps": 1,
            "early_stopping_patience": 2,
            "learning_rate": 0.05,
        },
    )
    messages = run_ranks(1, _run, options, tmp_path)[0]
    finished = _of(Finished, messages)[0]
    assert finished.step < 30
    assert finished.reason == "early stopping: 2 evaluations without a better one"
    again = run_ranks(1, _run, options, tmp_path)[0]
    assert not _of(StepDone, again)


# -- overflow -----------------------------------------------------------------------------------


def test_fp16_overflow_is_skipped_by_all_counted_and_named(folders, tmp_path):
    """A scale of 2^40 overflows fp16 (largest number 65504) until it has been halved often enough."""
    options = _options(folders, train={"max_steps": 40, "initial_loss_scale": 2.0**40})
    messages = run_ranks(2, _run, options, tmp_path, None, "fp16")[0]
    steps = _of(StepDone, messages)
    first = next(i for i, step in enumerate(steps) if step.applied)
    assert 10 < first < 35
    skipped = [step for step in steps if not step.applied]
    # Each halves the scale and names a parameter. (Windows of 4 samples may overflow again later.)
    assert [step.loss_scale for step in skipped] == [2.0 ** (40 - i) for i in range(len(skipped))]
    assert all(step.culprit for step in skipped)
    # A skip does not advance the schedule, but the data moves on.
    rates = [step.learning_rate for step in steps]
    assert set(rates[: first + 1]) == {1e-3}
    assert rates[first + 1] < 1e-3
    assert len({step.samples_digest for step in steps}) == 40
    applied = [step for step in steps if step.applied]
    assert len(applied) == 40 - len(skipped)
    assert all(np.isfinite(step.loss) and np.isfinite(step.grad_norm) for step in applied)


def _weights_after(world, listen_fd, folder):
    """Both ranks' weights after a window whose gradient overflows on one rank only."""
    from ftlaunch.strategies.torch.ddp import create

    strategy = create(
        tiny.request(world, listen_fd, folder, precision="fp16", initial_loss_scale=4.0)
    )
    table = tiny.random_table(12)
    view = tiny.windows(world, table, global_batch=12, micro_batch=6)
    outcomes = []
    for step, factor in enumerate((float("inf") if world.rank == 1 else 1.0, 1.0)):
        indices = view.order.global_batch(0)
        for batch, last in view.micro_batches(indices, step):
            poisoned = replace(batch, weights=batch.weights * np.float32(factor))
            strategy.accumulate(poisoned, 12.0, last=last)
        outcomes.append(strategy.apply(1e-3))
    weights = np.concatenate([p.detach().numpy().ravel() for p in strategy.model.parameters()])
    strategy.close()
    return [outcome.applied for outcome in outcomes], weights


def test_overflow_on_one_rank_is_skipped_on_both(tmp_path):
    folder = tiny.write_config(tmp_path / "bert", "bert")
    (applied, first), (other_applied, second) = run_ranks(2, _weights_after, folder)
    assert applied == other_applied == [False, True]
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, second)


def test_too_many_skips_in_a_row_end_the_run_with_a_verdict(folders, tmp_path):
    options = _options(folders, train={"initial_loss_scale": 2.0**100, "max_skipped_steps": 5})
    with pytest.raises(AssertionError, match="JobError: 5 optimizer steps in a row were skipped"):
        run_ranks(2, _run, options, tmp_path, None, "fp16")


# -- checkpoints that cannot be used ------------------------------------------------------------


def _two_checkpoints(folders, folder):
    options = _options(folders, train={"max_steps": 6}, checkpoint={"save_steps": 3})
    run_ranks(2, _run, options, folder)
    return options, checkpoint_folders(folder / "checkpoints")


def _flip(path, offset=-5):
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(folders, tmp_path, damage):
    options, (newest, before) = _two_checkpoints(folders, tmp_path)
    shard = newest / "state-00001-of-00002.safetensors"
    if damage == "flipped":
        _flip(shard)
    elif damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        shard.unlink()
    messages = run_ranks(3, _run, options, tmp_path)[0]
    assert any(newest.name in note.text and note.warning for note in _of(Note, messages))
    assert _of(Resumed, messages)[0].checkpoint == str(before)
    assert [step.step for step in _of(StepDone, messages)] == [4, 5, 6]
    # The damaged one was written anew and is whole now.
    assert _of(Saved, messages)[-1].step == 6
    read_manifest(newest)


def test_a_copy_under_another_step_is_passed_over(folders, tmp_path):
    """Taken for the newest, it would have set aside what is newer than its own step."""
    options, (newest, before) = _two_checkpoints(folders, tmp_path)
    copy = newest.with_name("step-00000999")
    shutil.copytree(before, copy)
    messages = run_ranks(2, _run, options, tmp_path)[0]
    [note] = [note for note in _of(Note, messages) if copy.name in note.text]
    assert "a copy of step 3" in note.text and note.warning
    assert _of(Resumed, messages)[0].checkpoint == str(newest)
    assert checkpoint_folders(tmp_path / "checkpoints") == [newest, before]


def test_a_folder_without_manifest_is_no_checkpoint(folders, tmp_path):
    options, (newest, before) = _two_checkpoints(folders, tmp_path)
    (newest / "manifest.json").unlink()
    messages = run_ranks(1, _run, options, tmp_path)[0]
    assert _of(Resumed, messages)[0].checkpoint == str(before)


def test_another_format_version_is_refused(folders, tmp_path):
    options, (newest, _) = _two_checkpoints(folders, tmp_path)
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["format_version"] = 99
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(AssertionError, match=r"UserError: checkpoint .* of format version 99"):
        run_ranks(1, _run, options, tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"train": {"seed": 4}}, "seed: 3 there, 4 now"),
        ({"train": {"global_batch_size": 10}}, "global_batch_size: 12 there, 10 now"),
        ({"model": {"freeze": ("base_model",)}}, "freeze"),
        ({"data": {"max_length": 20}}, "max_length"),
    ],
)
def test_another_job_is_refused_and_nothing_lost(folders, tmp_path, change, named):
    _, checkpoints = _two_checkpoints(folders, tmp_path)
    other = _options(folders, **{"train": {"max_steps": 6}, **change})
    if "train" in change:
        other = _options(folders, train={"max_steps": 6, **change["train"]})
    with pytest.raises(AssertionError, match=f"(?s)UserError: .*another job.*{named}"):
        run_ranks(1, _run, other, tmp_path)
    assert checkpoint_folders(tmp_path / "checkpoints") == checkpoints


def test_a_manifest_that_leads_out_of_its_folder_is_damaged(folders, tmp_path):
    _, (newest, _) = _two_checkpoints(folders, tmp_path)
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"] = {"../../secret": 3}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointDamaged, match="malformed"):
        read_manifest(newest)


# -- freezing, weights, refusals ----------------------------------------------------------------


def test_freezing_the_encoder_leaves_it_as_it_was(folders, tmp_path):
    options = _options(folders, model={"freeze": ("base_model",)}, train={"max_steps": 4})
    run_ranks(2, _run, options, tmp_path)
    newest = checkpoint_folders(tmp_path / "checkpoints")[0]
    reader = CheckpointReader(newest, read_manifest(newest))
    assert set(reader.names("exp_avg")) == {"classifier.weight", "classifier.bias"}
    from ftlaunch.strategies.weights import draw_weight

    name = "bert.encoder.layer.0.output.dense.weight"
    first = draw_weight(name, reader.names("weight")[name], seed=3, initializer_range=0.02)
    np.testing.assert_array_equal(reader.read_whole("weight", name), first)


def test_balanced_class_weights_give_the_loss_of_the_formula(folders, tmp_path):
    """34 of a, 33 of b and c: weight of a class is 100 / (3 · count)."""
    options = _options(folders, train={"max_steps": 1, "class_weights": "balanced"})
    steps = _of(StepDone, run_ranks(2, _run, options, tmp_path)[0])
    listed = replace(
        options, train=replace(options.train, class_weights=(100 / 102, 100 / 99, 100 / 99))
    )
    same = _of(StepDone, run_ranks(1, _run, listed, tmp_path / "listed")[0])
    assert steps[0].loss == pytest.approx(same[0].loss, rel=1e-6)


def test_refusals_before_the_model_is_loaded(folders, tmp_path):
    from ftlaunch.cluster.world import World

    few = _options(folders, data={"max_train_samples": 3})
    with pytest.raises(AssertionError, match="3 training samples for 4 ranks"):
        run_ranks(4, _run, few, tmp_path)
    for options, message in (
        (_options(folders, train={"class_weights": (1.0, 2.0)}), "2 values; the data has 3"),
        (_options(folders, checkpoint={"metric_for_best_model": "bleu"}), "does not yield"),
        (_options(folders, model={"freeze": ("nothing.here",)}), "no parameter matches"),
        (_options(folders, data={"max_length": 65}), "65"),
    ):
        with pytest.raises(UserError, match=message):
            _run(World.alone(), None, options, tmp_path)


def _policies_of_a_rank(world, listen_fd, folder, policy):
    """Its own and that of a thread that it makes then."""
    os.sched_setscheduler(0, policy, os.sched_param(0))
    use_device(tiny.request(world, listen_fd, folder))
    with ThreadPoolExecutor(1) as pool:
        return os.sched_getscheduler(0), pool.submit(os.sched_getscheduler, 0).result()


@pytest.mark.parametrize(
    ("before", "after"),
    [(os.SCHED_OTHER, os.SCHED_BATCH), (os.SCHED_IDLE, os.SCHED_IDLE)],
    ids=["usual", "chosen"],
)
def test_threads_of_a_rank_on_cpus_do_not_interrupt_each_other(tmp_path, before, after):
    folder = tiny.write_config(tmp_path / "bert", "bert")
    assert run_ranks(1, _policies_of_a_rank, folder, before) == [(after, after)]
