"""Jobs of tasks with labels of tokens under `mindspore` as a user runs them: begun there, gone on with by
ddp, ended there.
"""

from __future__ import annotations

import json
import random

import pytest

from tests.jobs import (
    MODULE,
    WORDS,
    assert_mistake,
    checkpoint_steps,
    ftlaunch,
    make_rows,
    metrics_of,
    said,
    summary_of,
    write_model,
    write_rows,
    write_tokenizer,
)
from tests.mindspore.torch_side import torch_command
from tests.training_jobs import assert_every_checkpoint_whole

MINDSPORE = ("--strategy", "mindspore")
_LLAMA = {"model_type": "llama", "num_key_value_heads": 1, "tie_word_embeddings": True}
# Task → what the model's config.json has beside BERT's.
TASKS = {"causal-lm": _LLAMA, "masked-lm": {}, "token-classification": {}}


def _rows(task, number, seed):
    if task != "token-classification":
        return [{"text": row["text"]} for row in make_rows(number, seed=seed)]
    generator = random.Random(seed)
    rows = []
    for row in make_rows(number, seed=seed):
        words = row["text"].split()
        tags = [generator.choice(("O", "B-PER", "B-LOC")) for _ in words]
        rows.append({"tokens": words, "tags": tags})
    return rows


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """(task, output folder, KEY=VALUE…, nodes) → the arguments of a job."""
    root = tmp_path_factory.mktemp("inputs")
    for task, config in TASKS.items():
        model = write_model(root / f"{task} model", vocab_size=len(WORDS) + 1, **config)
        write_tokenizer(model, (*WORDS, "[MASK]"))
        settings = json.loads((model / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(
            json.dumps({**settings, "mask_token": "[MASK]"})
        )
        (root / f"{task} data").mkdir()
        for split, number in (("train", 60), ("validation", 13)):
            write_rows(root / f"{task} data" / f"{split}.jsonl", _rows(task, number, number))

    def make(task, out, *more, nodes=2):
        return [
            *("--task", task, "--nodes", nodes, "-o", out, "--model", root / f"{task} model"),
            *("--dataset", root / f"{task} data", "--precision", "fp32", "model.dropout=0"),
            *("model.random_weights=true", "train.global_batch_size=12", "train.max_steps=6"),
            *("train.per_device_train_batch_size=2", "train.learning_rate=3e-3"),
            *("train.lr_scheduler_type=constant", "checkpoint.save_steps=2", *more),
        ]

    return make


# (up to which step, ranks, whether under MindSpore)
THERE_AND_BACK = ((2, 2, True), (4, 3, False), (6, 2, True))
BACK = THERE_AND_BACK[1:]


@pytest.mark.parametrize(
    ("task", "stages"),
    [
        pytest.param("causal-lm", THERE_AND_BACK, marks=pytest.mark.long),
        pytest.param("masked-lm", BACK, marks=pytest.mark.long),
        pytest.param("token-classification", BACK, marks=pytest.mark.long),
    ],
    ids=list(TASKS),
)
def test_what_one_framework_began_the_other_goes_on_with(command, task, stages, tmp_path):
    """2 steps on 2 ranks, 2 under ddp on 3, the last 2 on 2 again: one run of 6, and its evaluation."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    result = ftlaunch(*command(task, whole), command=torch_command(), timeout=400)
    assert result.returncode == 0, said(result)
    for steps, nodes, in_mindspore in stages:
        more = (f"train.max_steps={steps}", *(MINDSPORE if in_mindspore else ()))
        job = command(task, out, *more, nodes=nodes)
        program = MODULE if in_mindspore else torch_command()
        result = ftlaunch(*job, command=program, timeout=400)
        assert result.returncode == 0, said(result)
        assert checkpoint_steps(out)[-1] == steps
    lines, expected = (
        [line for line in metrics_of(folder) if "samples_digest" in line] for folder in (out, whole)
    )
    assert [line["step"] for line in lines] == [line["step"] for line in expected] == [*range(1, 7)]
    for line, other in zip(lines, expected, strict=True):
        assert line["samples_digest"] == other["samples_digest"]
        print(f"{task} {line['step']}: {line['loss'] / other['loss'] - 1:.1e}")
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
    found, wanted = summary_of(out)["eval"], summary_of(whole)["eval"]
    assert found.keys() == wanted.keys()
    print(found)
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
    assert_every_checkpoint_whole(out)
    # The folder that MindSpore has written, as torch reads it.
    alone = ("eval", out / "model", "--task", task, "--dataset", command(task, out)[9])
    result = ftlaunch(
        *alone, "-o", tmp_path / "eval", "--precision", "fp32", command=torch_command(), timeout=400
    )
    assert result.returncode == 0, said(result)
    assert summary_of(tmp_path / "eval")["eval"]["loss"] == pytest.approx(found["loss"], rel=1e-5)


def test_what_is_not_carried_is_said_before_anything_starts(command, tmp_path):
    model = write_model(tmp_path / "model", model_type="stablelm")
    job = command("causal-lm", tmp_path / "out", *MINDSPORE)
    job[job.index("--model") + 1] = model
    assert_mistake(ftlaunch(*job), "'stablelm' model, which gives logits of the last token only")
    packed = command("causal-lm", tmp_path / "out", *MINDSPORE, "data.packing=samples")
    assert_mistake(ftlaunch(*packed), "cannot keep the samples of a row apart")
    assert not (tmp_path / "out").exists()
