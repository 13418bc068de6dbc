"""Jobs of language models as a user runs them: conversations, another topology, an evaluation alone."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import tiny, word_pieces
from tests.jobs import (
    assert_mistake,
    assert_no_process_left,
    ftlaunch,
    metrics_of,
    read_lines,
    said,
    summary_of,
    write_rows,
)
from tests.test_causal_lm import WORDS, write_tokenizer
from tests.training_jobs import assert_same_training

STEPS = 8


def _conversations(num_rows: int, seed: int) -> list[dict[str, Any]]:
    """The assistant repeats the user; now and then nobody answers."""
    generator = random.Random(seed)
    rows = []
    for number in range(num_rows):
        said_by_user = " ".join(generator.choices("abcdefghij", k=generator.randint(1, 9)))
        turns = [{"role": "user", "content": said_by_user}]
        if number % 7 != 3:
            turns.append({"role": "assistant", "content": said_by_user})
        rows.append({"messages": turns})
    return rows


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """(model, data)"""
    root = tmp_path_factory.mktemp("language")
    write_tokenizer(root / "model")
    config = {
        "model_type": "llama",
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
    }
    (root / "model" / "config.json").write_text(json.dumps(config))
    (root / "data").mkdir()
    write_rows(root / "data" / "train.jsonl", _conversations(60, 1))
    write_rows(root / "data" / "validation.jsonl", _conversations(15, 2))
    return root / "model", root / "data"


def _command(inputs, out: Path, *more: object, nodes: int = 2) -> list[object]:
    model, data = inputs
    return [
        *("--task", "causal-lm", "--nodes", nodes, "--model", model, "--dataset", data, "-o", out),
        *("--precision", "fp32", "model.random_weights=true", "train.global_batch_size=12"),
        *("train.per_device_train_batch_size=2", f"train.max_steps={STEPS}"),
        *("train.learning_rate=3e-3", "checkpoint.save_steps=4", "data.max_length=24"),
        *("checkpoint.async_save=false", "train.eval_strategy=steps", "train.eval_steps=4"),
        *(f"data.cache_dir={out.parent / 'cache'}", *more),
    ]


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "job"
    result = ftlaunch(*_command(inputs, out), timeout=400)
    assert result.returncode == 0, said(result)
    return out, result


def test_what_a_job_says_of_itself(trained):
    out, result = trained
    # Of 60 conversations those numbered 3, 10, … have no answer: 9 of them, and 2 of 15.
    assert "train: 9 of 60 samples have no token to be learned" in said(result)
    assert "eval: 2 of 15 samples have no token to be learned" in said(result)
    found = summary_of(out)["eval"]
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert 0 < found["token_accuracy"] < 1
    losses = [line["loss"] for line in metrics_of(out) if "samples_digest" in line]
    assert len(losses) == STEPS and losses[-1] < losses[0]


def test_it_goes_on_under_another_strategy_on_more_ranks(inputs, trained, tmp_path):
    out, _ = trained
    shutil.copytree(out, tmp_path / "job")
    shutil.rmtree(tmp_path / "job" / "checkpoints" / f"step-{STEPS:08d}")
    shutil.rmtree(tmp_path / "job" / "model")
    command = _command(inputs, tmp_path / "job", "--strategy", "zero3", nodes=3)
    result = ftlaunch(*command, timeout=500)
    assert result.returncode == 0, said(result)
    steps, expected = (
        [line for line in metrics_of(folder) if "samples_digest" in line]
        for folder in (tmp_path / "job", out)
    )
    assert_same_training(steps, expected)
    for name, value in summary_of(out)["eval"].items():
        assert summary_of(tmp_path / "job")["eval"][name] == pytest.approx(value, rel=1e-4)
    assert_no_process_left(tmp_path)


def test_an_evaluation_alone_tells_of_each_sample(inputs, trained):
    out, _ = trained
    _, data = inputs
    command = ("eval", out, "--dataset", data, "--nodes", "3", "--precision", "fp32")
    result = ftlaunch(*command, timeout=400)
    assert result.returncode == 0, said(result)
    lines = read_lines(out / "eval" / "predictions.jsonl")
    # Rows 3 and 10 have nothing to be learned.
    assert [line["index"] for line in lines] == [i for i in range(15) if i % 7 != 3]
    found, trained_eval = summary_of(out / "eval")["eval"], summary_of(out)["eval"]
    items = sum(line["num_tokens"] for line in lines)
    mean = sum(line["loss"] * line["num_tokens"] for line in lines) / items
    assert found["loss"] == pytest.approx(mean)
    assert found["loss"] == pytest.approx(trained_eval["loss"], rel=1e-5)
    assert found["token_accuracy"] == pytest.approx(trained_eval["token_accuracy"])


@pytest.mark.long
def test_an_evaluation_hides_what_the_jobs_own_hid(tmp_path):
    """Its seed and its metrics, both other than the defaults, come with the job."""
    model, data = tmp_path / "model", tmp_path / "data"
    data.mkdir()
    word_pieces.write_tokenizer(model)
    config = {**tiny.CONFIGS["bert"], "vocab_size": len(word_pieces.PIECES)}
    (model / "config.json").write_text(json.dumps(config))
    generator = random.Random(0)
    texts = [{"text": " ".join(generator.choices(word_pieces.WORDS, k=12))} for _ in range(24)]
    write_rows(data / "train.jsonl", texts)
    write_rows(data / "validation.jsonl", texts[:9])
    command = ("--task", "masked-lm", "--model", model, "--dataset", data, "--precision", "fp32")
    small = (f"data.cache_dir={tmp_path / 'cache'}", "train.global_batch_size=8")
    changes = ("model.random_weights=true", "train.max_steps=2", "train.seed=7")
    out = tmp_path / "job"
    result = ftlaunch(*command, "-o", out, *small, *changes, "train.metrics=[token_accuracy]")
    assert result.returncode == 0, said(result)
    result = ftlaunch("eval", out, "--dataset", data, "--precision", "fp32", small[0])
    assert result.returncode == 0, said(result)
    found, of_job = summary_of(out / "eval")["eval"], summary_of(out)["eval"]
    assert set(found) == set(of_job) == {"loss", "token_accuracy"}
    assert found["loss"] == pytest.approx(of_job["loss"], rel=1e-5)
    # And with nothing to guess there is nothing to say.
    nothing = ftlaunch(
        *command, "-o", tmp_path / "n", *small, *changes, "data.mlm_probability=1e-9"
    )
    assert_mistake(nothing, "9 samples to evaluate", "data.mlm_probability is 1e-09")


def test_what_is_refused_before_anything_starts(inputs, tmp_path):
    command = _command(inputs, tmp_path / "job", "--dry-run", "--strategy", "ddp")
    changed = [word if word != "causal-lm" else "text-classification" for word in command]
    result = ftlaunch(*changed, "data.packing=samples")
    assert_mistake(result, "data.packing", "text-classification", "causal-lm")
