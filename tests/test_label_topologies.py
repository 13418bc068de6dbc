"""Masks, losses and evaluations of whole jobs do not depend on ranks, batches or an interruption."""

from __future__ import annotations

import json
import random
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftlaunch.cluster.world import World
from ftlaunch.strategies import registry, session
from ftlaunch.strategies.data.arrangements import Selection
from ftlaunch.strategies.options import (
    CheckpointOptions,
    DataOptions,
    JobOptions,
    ModelOptions,
    TrainOptions,
)
from ftlaunch.strategies.progress import Evaluated, Finished, Resumed, StepDone
from ftlaunch.strategies.token_evaluation import TokenEvaluator
from tests import tiny
from tests.ranks import run_ranks
from tests.token_label_cases import LABEL_CASES, plain_masks
from tests.word_pieces import PIECES, WORDS, write_tokenizer

# -- masks --------------------------------------------------------------------------------------


def _seen(size: int, micro_batch: int, step: int) -> dict[int, tuple[list[int], list[int]]]:
    """What each sample of a window looks like, wherever it is computed; without padding."""
    case = LABEL_CASES["masked-lm-bert"]
    table = case.make_table(18)
    found = {}
    for rank in range(size):
        world = World(
            rank=rank,
            size=size,
            local_rank=rank,
            local_size=size,
            node_rank=0,
            num_nodes=1,
            master_address="",
            master_port=0,
        )
        windows = case.windows(world, table, global_batch=7, micro_batch=micro_batch)
        indices = windows.order.global_batch(step)
        for batch, _ in windows.micro_batches(indices, step):
            for row, number in enumerate(batch.indices.tolist()):
                if number >= 0:
                    length = len(table.ids[number])
                    ids = batch.inputs["input_ids"][row, :length].tolist()
                    found[number] = (ids, batch.labels[row, :length].tolist())
                    assert (batch.labels[row, length:] == -100).all()
    assert sorted(found) == sorted(indices.tolist())
    return found


# 18 samples in windows of 7 are 3 steps an epoch: step 4 is in the second.
@pytest.mark.parametrize("step", [0, 2, 4])
def test_masks_are_the_same_on_every_topology(step: int) -> None:
    table = LABEL_CASES["masked-lm-bert"].make_table(18)
    expected = {
        number: tuple(
            each.tolist()
            for each in plain_masks(table.ids[number], table.labels[number], step // 3, number)
        )
        for number in _seen(1, 7, step)
    }
    for size, micro_batch in ((1, 7), (1, 2), (2, 2), (3, 1), (8, 1)):
        assert _seen(size, micro_batch, step) == expected


# -- evaluations --------------------------------------------------------------------------------


def _evaluate(world: Any, listen_fd: Any, folder: Path, name: str, micro_batch: int) -> Any:
    case = LABEL_CASES[name]
    strategy = registry.load("ddp")(case.request(world, listen_fd, folder))
    collator = case.collator(Selection(case.make_table(18), np.arange(11)))
    evaluator = TokenEvaluator(
        collator=collator,
        task=collator.task,
        spec=case.spec,
        metrics=dict(collator.task.metrics(case.spec)),
        micro_batch=micro_batch,
    )
    outputs = evaluator.run(strategy)
    return evaluator.evaluate(outputs), evaluator.records(outputs)


@pytest.mark.parametrize("name", ["token-classification-bert", "masked-lm-bert"])
def test_evaluations_are_equal_to_six_digits(tmp_path: Path, name: str) -> None:
    folder = LABEL_CASES[name].write_model(tmp_path / "model")
    [(expected, records)] = run_ranks(1, _evaluate, folder, name, 11)
    assert len(records) == 11
    for ranks, micro_batch in ((1, 2), (2, 3), (3, 4)):
        for metrics, others in run_ranks(ranks, _evaluate, folder, name, micro_batch):
            assert metrics == pytest.approx(expected, rel=1e-6)
            if name.startswith("token"):
                assert others == records


# -- whole jobs, stopped in the middle of an epoch ----------------------------------------------

NUM_STEPS = 9


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and 50 training and 7 evaluation rows that every task finds its columns in."""
    root = tmp_path_factory.mktemp("job")
    model = tiny.write_config(root / "model", "bert")
    write_tokenizer(model)
    generator = random.Random(1)
    words = [word for word in WORDS if not word.startswith("##")]
    (root / "data").mkdir()
    for name, count in (("train", 50), ("test", 7)):
        lines = []
        for number in range(count):
            chosen = generator.choices(words, k=generator.randint(3, 30))
            row = {
                "text": " ".join(chosen),
                "tokens": chosen,
                "ner_tags": [generator.choice(("O", "B-X", "I-X")) for _ in chosen],
                "labels": [label for i, label in enumerate("abc") if (number >> i) & 1],
            }
            lines.append(json.dumps(row) + "\n")
        (root / "data" / f"{name}.jsonl").write_text("".join(lines))
    assert len(PIECES) <= tiny.VOCABULARY
    return model, root / "data"


_OPTIONS: dict[str, dict[str, Any]] = {
    "masked-lm": {"text_columns": ("text",), "mlm_probability": 0.3, "whole_word_masking": True},
    "token-classification": {"label_column": "ner_tags"},
    "text-classification": {"text_columns": ("text",), "label_column": "labels"},
}


def _options(folders: tuple[Path, Path], task: str, cache: Path) -> JobOptions:
    model, data = folders
    return JobOptions(
        task=task,
        model=ModelOptions(name_or_path=str(model), random_weights=True, dropout=0.0),
        data=DataOptions(name_or_path=str(data), cache_dir=str(cache), **_OPTIONS[task]),
        # 50 samples in batches of 12: 5 steps an epoch, the last of 2.
        train=TrainOptions(
            global_batch_size=12, max_steps=NUM_STEPS, learning_rate=1e-3, seed=3, weight_decay=0.01
        ),
        checkpoint=CheckpointOptions(save_total_limit=10),
    )


class _Stop:
    """Asks to stop while step `at` is under way."""

    def __init__(self, at: int | None) -> None:
        self.at, self.calls, self.ends_at_once = at, 0, True

    def requested(self) -> bool:
        self.calls += 1
        return self.calls == self.at


def _run(
    world: Any, listen_fd: Any, options: JobOptions, out: Path, strategy: str, stop_at: int | None
) -> list[object]:
    messages: list[object] = []
    request = session.SessionRequest(
        options=options,
        output_dir=out,
        strategy=strategy,
        precision="fp32",
        accelerator="cpu",
        device=0,
        micro_batch=4,
        eval_micro_batch=4,
        num_threads=1,
        timeout_seconds=60,
        world=world,
        listen_fd=listen_fd,
    )
    session.train(request, emit=messages.append, stop=_Stop(stop_at))
    return messages


def _steps(messages: list[object]) -> list[tuple[int, str, float]]:
    return [(m.step, m.samples_digest, m.loss) for m in messages if isinstance(m, StepDone)]


@pytest.mark.parametrize("task", _OPTIONS)
def test_a_job_goes_on_in_the_middle_of_an_epoch(folders: Any, tmp_path: Path, task: str) -> None:
    options = _options(folders, task, tmp_path / "cache")
    whole = run_ranks(1, _run, options, tmp_path / "whole", "ddp", None)[0]
    expected = _steps(whole)
    assert [step for step, _, _ in expected] == list(range(1, NUM_STEPS + 1))
    # Stopped at step 7, the second of the second epoch, on 2 ranks; goes on with zero2 on 3.
    before = run_ranks(2, _run, options, tmp_path / "out", "ddp", 7)[0]
    after = run_ranks(3, _run, options, tmp_path / "out", "zero2", None)[0]
    assert [m.step for m in after if isinstance(m, Resumed)] == [7]
    seen = _steps(before) + _steps(after)
    assert [each[:2] for each in seen] == [each[:2] for each in expected]
    worst = max(abs(a[2] / b[2] - 1) for a, b in zip(seen, expected, strict=True))
    print(f"{task}: loss {worst:.1e}")
    assert worst < 1e-5
    for mine, other in zip(_last(after), _last(whole), strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
    assert json.loads((tmp_path / "out" / "model" / "config.json").read_text())["architectures"]


def _last(messages: list[object]) -> list[dict[str, float]]:
    """The metrics of the last evaluation, and those of the end."""
    found = [dict(m.metrics) for m in messages if isinstance(m, Evaluated)][-1:]
    return found + [dict(m.metrics) for m in messages if isinstance(m, Finished)]


def _evaluate_alone(world: Any, listen_fd: Any, options: JobOptions, out: Path) -> list[object]:
    messages: list[object] = []
    request = session.SessionRequest(
        options=options,
        output_dir=out,
        strategy="ddp",
        precision="fp32",
        accelerator="cpu",
        device=0,
        micro_batch=4,
        eval_micro_batch=3,
        num_threads=1,
        timeout_seconds=60,
        world=world,
        listen_fd=listen_fd,
    )
    session.evaluate(request, emit=messages.append, stop=_Stop(None))
    return messages


@pytest.mark.parametrize("task", _OPTIONS)
def test_the_model_of_a_job_is_evaluated_alone(folders: Any, tmp_path: Path, task: str) -> None:
    options = _options(folders, task, tmp_path / "cache")
    options = replace(options, train=replace(options.train, max_steps=2))
    trained = run_ranks(1, _run, options, tmp_path / "out", "ddp", None)[0]
    alone = replace(
        options,
        model=ModelOptions(name_or_path=str(tmp_path / "out" / "model")),
        data=replace(options.data, eval_split="test"),
    )
    (tmp_path / "eval").mkdir()
    messages = run_ranks(2, _evaluate_alone, alone, tmp_path / "eval")[0]
    assert _last(messages)[-1] == pytest.approx(_last(trained)[-1], rel=1e-5)
    lines = (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["index"] for record in records] == list(range(7))
    wanted = {
        "masked-lm": {"index", "loss", "num_tokens", "token_accuracy"},
        "token-classification": {"index", "tags", "expected"},
        "text-classification": {"index", "labels", "scores", "expected"},
    }[task]
    assert set(records[0]) == wanted
    if task == "token-classification":
        rows = [json.loads(line) for line in (folders[1] / "test.jsonl").read_text().splitlines()]
        assert [record["expected"] for record in records] == [row["ner_tags"] for row in rows]
    _assert_pipeline_agrees(tmp_path / "out" / "model", task, folders[1] / "test.jsonl", records)


def _assert_pipeline_agrees(model: Path, task: str, rows: Path, records: list[Any]) -> None:
    """What transformers makes of the model's folder, without any code of ours."""
    from transformers import pipeline

    text = json.loads(rows.read_text().splitlines()[0])["text"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if task == "text-classification":
            [found] = pipeline(task, model=str(model), top_k=None)([text])
            scores = {each["label"]: each["score"] for each in found}
            assert scores == pytest.approx(records[0]["scores"], abs=1e-5)
        elif task == "token-classification":
            found = pipeline(task, model=str(model), ignore_labels=[])(text)
            assert [each["entity"] for each in found] == records[0]["tags"]
