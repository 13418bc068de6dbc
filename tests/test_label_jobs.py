"""Tags of words from the command line: what ends with exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.jobs import assert_mistake, ftlaunch, write_model, write_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tags")
    return write_model(root / "model")


def command(model: Path, data: Path, out: Path) -> list[object]:
    return [
        *("--task", "token-classification", "--nodes", 2, "--model", model),
        *("--dataset", data, "-o", out, "--precision", "fp32", "model.random_weights=true"),
        *("train.global_batch_size=16", "train.learning_rate=3e-3", "train.max_steps=60"),
    ]


def test_a_span_outside_its_text_is_named(model: Path, tmp_path: Path) -> None:
    rows = [{"text": "the film", "spans": [{"start": 4, "end": 8, "label": "X"}]}] * 20
    rows.append({"text": "the plot", "spans": [{"start": 4, "end": 18, "label": "X"}]})
    data = write_rows(tmp_path / "train.jsonl", rows)
    result = ftlaunch(*command(model, data, tmp_path / "out"), "data.eval_fraction=0.05")
    assert_mistake(result, "Row 21", "from 4 to 18", "its text has 8 characters")
