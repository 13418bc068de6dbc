"""Tags of words from the command line: trained, evaluated alone, and what ends with exit code 2."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import (
    WORDS,
    assert_mistake,
    ftlaunch,
    read_lines,
    said,
    summary_of,
    write_model,
    write_rows,
)

PLAIN = [word for word in WORDS if not word.startswith("[")]


def tagged_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Words of which a third are entities: which, and of how many words, the words say."""
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        words = generator.choices(PLAIN, k=generator.randint(3, 12))
        tags = [("O", "B-X", "B-Y")[PLAIN.index(word) % 3] for word in words]
        rows.append({"tokens": words, "ner_tags": tags})
    return rows


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("tags")
    (root / "data").mkdir()
    write_rows(root / "data" / "train.jsonl", tagged_rows(240, 1))
    write_rows(root / "data" / "validation.jsonl", tagged_rows(40, 2))
    return write_model(root / "model"), root / "data"


def command(inputs: tuple[Path, Path], data: Path, out: Path) -> list[object]:
    return [
        *("--task", "token-classification", "--nodes", 2, "--model", inputs[0]),
        *("--dataset", data, "-o", out, "--precision", "fp32", "model.random_weights=true"),
        *("train.global_batch_size=16", "train.learning_rate=3e-3", "train.max_steps=60"),
    ]


def test_tags_are_learned_and_evaluated_alone(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = ftlaunch(*command(inputs, inputs[1], out))
    assert result.returncode == 0, said(result)
    assert "words = 'tokens', tags = 'ner_tags'" in result.stdout
    trained = summary_of(out)["eval"]
    assert {"loss", "precision", "recall", "f1", "accuracy"} <= set(trained)
    assert trained["f1"] > 0.9 and trained["accuracy"] > 0.9
    result = ftlaunch("eval", out, "--dataset", inputs[1], "--precision", "fp32")
    assert result.returncode == 0, said(result)
    alone = summary_of(out / "eval")["eval"]
    for name in ("loss", "precision", "recall", "f1", "accuracy"):
        assert alone[name] == pytest.approx(trained[name], rel=1e-6)
    records = read_lines(out / "eval" / "predictions.jsonl")
    rows = read_lines(inputs[1] / "validation.jsonl")
    assert [record["expected"] for record in records] == [row["ner_tags"] for row in rows]
    right = sum(
        tag == wanted
        for record in records
        for tag, wanted in zip(record["tags"], record["expected"], strict=True)
    )
    assert right / sum(len(row["tokens"]) for row in rows) == pytest.approx(alone["accuracy"])


def test_a_span_outside_its_text_is_named(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    rows = [{"text": "the film", "spans": [{"start": 4, "end": 8, "label": "X"}]}] * 20
    rows.append({"text": "the plot", "spans": [{"start": 4, "end": 18, "label": "X"}]})
    data = write_rows(tmp_path / "train.jsonl", rows)
    result = ftlaunch(*command(inputs, data, tmp_path / "out"), "data.eval_fraction=0.05")
    assert_mistake(result, "Row 21", "from 4 to 18", "its text has 8 characters")
