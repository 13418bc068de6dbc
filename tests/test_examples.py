"""The examples, as they stand and with tiny models and data instead of those of the hub.

The data have the columns and types that the hub's data sets have. Where torch is missing, MindSpore
runs what it carries.
"""

from __future__ import annotations

import importlib.util
import json
import math
import random
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ftlaunch.launcher.cli import parse
from ftlaunch.launcher.config import load_config
from ftlaunch.strategies.registry import entry
from tests import tiny, word_pieces
from tests.jobs import (
    WORDS,
    ftlaunch,
    make_rows,
    metrics_of,
    read_lines,
    said,
    summary_of,
    write_model,
    write_tokenizer,
)

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("*.yaml"))
HAS_TORCH = importlib.util.find_spec("torch") is not None
STRATEGY = "ddp" if HAS_TORCH else "mindspore"


def _long_in_mindspore(test: Any) -> Any:
    """What takes longest there is for `make test-long`."""
    return test if HAS_TORCH else pytest.mark.long(test)


def _skip_unless_carried(example: str) -> None:
    config = load_config(file=FOLDER / example, flags={}, overrides=[])
    if not HAS_TORCH and config.task not in (entry("mindspore").families or ()):
        pytest.skip(f"{STRATEGY} does not train {config.task}")
    if config.lora.r is not None and not HAS_TORCH:
        pytest.skip("adapters are trained with torch")
    if config.lora.r is not None:
        pytest.importorskip("peft", reason="peft is not installed")


# -- as they stand ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_can_be_planned(path: Path, tmp_path: Path) -> None:
    _skip_unless_carried(path.name)
    command = ("--config", path, "--dry-run", "-o", tmp_path / "out", "--strategy", STRATEGY)
    result = ftlaunch(*command, cwd=tmp_path)
    assert result.returncode == 0, said(result)
    assert "dry run: nothing was started" in said(result)
    assert list(tmp_path.iterdir()) == []


def test_every_example_has_its_command() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^ftlaunch --config .*$", text, flags=re.MULTILINE)
    named = [parse(shlex.split(command)[1:])[1].config for command in commands]
    assert set(named) == {f"examples/{path.name}" for path in EXAMPLES}


# -- with tiny models and data ------------------------------------------------------------------


def _save(folder: Path, columns: Mapping[str, Any], **splits: Sequence[Mapping[str, Any]]) -> Path:
    """A folder of `save_to_disk`. A column is a type, the names of a ClassLabel, or a list of one."""
    # Not above: it notes the caches' folder when it is imported.
    import datasets

    def feature(kind: Any) -> Any:
        if isinstance(kind, list):
            return [feature(kind[0])]
        if isinstance(kind, dict):
            return {name: feature(each) for name, each in kind.items()}
        if isinstance(kind, tuple):
            return datasets.ClassLabel(names=list(kind))
        return datasets.Value(kind)

    features = datasets.Features(feature(dict(columns)))
    parts = {
        name: datasets.Dataset.from_list([dict(row) for row in rows], features=features)
        for name, rows in splits.items()
    }
    datasets.DatasetDict(parts).save_to_disk(folder)
    return folder


def _run(example: str, model: Path, data: Path, out: Path, *changes: str) -> dict[str, Any]:
    """The example on two nodes, with this model and data; its summary."""
    result = ftlaunch(
        *("--config", FOLDER / example, "--model", model, "--dataset", data, "-o", out),
        *("--nodes", 2, "--strategy", STRATEGY, "--precision", "fp32", "data.config_name=null"),
        *(f"data.cache_dir={out.parent / 'cache'}", "data.max_length=32"),
        *("train.global_batch_size=12", *changes),
        timeout=400,
    )
    assert result.returncode == 0, said(result)
    summary = summary_of(out)
    assert (summary["status"], summary["world_size"]) == ("done", 2)
    return summary


def _numbered(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    return [{**row, "label": names.index(row["label"])} for row in rows]


def test_reviews(tmp_path: Path) -> None:
    _skip_unless_carried("reviews.yaml")
    names = ("bad", "good")
    data = _save(
        tmp_path / "data",
        {"text": "string", "label": names},
        train=_numbered(make_rows(60, seed=1), names),
        validation=_numbered(make_rows(20, seed=2), names),
        test=_numbered(make_rows(30, seed=3), names),
    )
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    summary = _run("reviews.yaml", model, data, out, "model.random_weights=true")
    # 60 rows in batches of 12: 5 steps an epoch, 3 epochs.
    assert [line["step"] for line in metrics_of(out)] == list(range(1, 16))
    found = [line for line in read_lines(out / "events.jsonl") if line["kind"] == "evaluated"]
    assert [line["step"] for line in found] == [5, 10, 15]
    assert set(summary["eval"]) == {"loss", "accuracy", "f1"}
    assert json.loads((out / "model" / "config.json").read_text())["label2id"] == {
        "bad": 0,
        "good": 1,
    }


@_long_in_mindspore
def test_paraphrase(tmp_path: Path) -> None:
    """Accuracy and F1 are those of a count over what `ftlaunch eval` has predicted."""
    _skip_unless_carried("paraphrase.yaml")
    texts = [row["text"] for row in make_rows(100, seed=4)]
    pairs = [
        {"sentence1": one, "sentence2": one if i % 3 else texts[-i], "label": int(i % 3 > 0)}
        for i, one in enumerate(texts, start=1)
    ]
    rows = [{**pair, "idx": i} for i, pair in enumerate(pairs)]
    columns = {
        "sentence1": "string",
        "sentence2": "string",
        "label": ("not_equivalent", "equivalent"),
        "idx": "int32",
    }
    # What GLUE has instead of the labels of its test split.
    hidden = [{**row, "label": -1} for row in rows[:10]]
    splits = {"train": rows[:60], "validation": rows[60:], "test": hidden}
    data = _save(tmp_path / "data", columns, **splits)
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    changes = ("model.random_weights=true", "train.max_steps=10", "train.learning_rate=1e-3")
    summary = _run("paraphrase.yaml", model, data, out, *changes)
    result = ftlaunch(
        *("eval", out, "--dataset", data, "--strategy", STRATEGY, "--precision", "fp32"),
        *("data.eval_split=validation", f"data.cache_dir={tmp_path / 'cache'}"),
        timeout=400,
    )
    assert result.returncode == 0, said(result)
    lines = read_lines(out / "eval" / "predictions.jsonl")
    given = np.array([line["label_id"] for line in lines])
    expected = np.array([row["label"] for row in rows[60:]])
    assert [line["expected"] == "equivalent" for line in lines] == (expected == 1).tolist()
    right = int((given & expected).sum())
    assert summary["eval"]["accuracy"] == pytest.approx((given == expected).mean())
    assert summary["eval"]["f1"] == pytest.approx(2 * right / (given.sum() + expected.sum()))


# A tokenizer's ids reach the positions that follow the padding's, as RoBERTa counts them.
_ROBERTA = {
    **tiny.CONFIGS["bert"],
    "model_type": "roberta",
    "vocab_size": len(WORDS),
    "type_vocab_size": 1,
}


def _write_roberta(folder: Path) -> dict[str, np.ndarray]:
    """A RoBERTa with weights, and a head of its own: a matrix of ±0.5 with a bias of 1."""
    generator = np.random.default_rng(0)
    hidden, inner = _ROBERTA["hidden_size"], _ROBERTA["intermediate_size"]
    weights: dict[str, np.ndarray] = {}

    def linear(name: str, outputs: int, inputs: int) -> None:
        weights[f"{name}.weight"] = generator.normal(0, 0.1, (outputs, inputs))
        weights[f"{name}.bias"] = generator.normal(0, 0.1, outputs)

    def norm(name: str) -> None:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = np.ones(hidden), np.zeros(hidden)

    rows = {"word": len(WORDS), "position": _ROBERTA["max_position_embeddings"], "token_type": 1}
    for name, num_rows in rows.items():
        values = generator.normal(0, 0.1, (num_rows, hidden))
        weights[f"roberta.embeddings.{name}_embeddings.weight"] = values
    norm("roberta.embeddings.LayerNorm")
    for number in range(_ROBERTA["num_hidden_layers"]):
        layer = f"roberta.encoder.layer.{number}"
        for part in ("query", "key", "value"):
            linear(f"{layer}.attention.self.{part}", hidden, hidden)
        linear(f"{layer}.attention.output.dense", hidden, hidden)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", inner, hidden)
        linear(f"{layer}.output.dense", hidden, inner)
        norm(f"{layer}.output.LayerNorm")
    weights["classifier.dense.weight"] = generator.choice([-0.5, 0.5], (hidden, hidden))
    weights["classifier.dense.bias"] = np.ones(hidden)
    weights = {name: values.astype(np.float32) for name, values in weights.items()}
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_ROBERTA))
    write_tokenizer(folder, WORDS)
    return weights


@_long_in_mindspore
def test_frozen_encoder(tmp_path: Path) -> None:
    _skip_unless_carried("frozen-encoder.yaml")
    names = ("World", "Sports", "Business", "Sci/Tech")
    rows = [{**row, "label": i % 4} for i, row in enumerate(make_rows(92, seed=5))]
    data = _save(
        tmp_path / "data",
        {"text": "string", "label": names},
        train=rows[:72],
        test=rows[72:],
    )
    before, out = _write_roberta(tmp_path / "model"), tmp_path / "out"
    changes = ("train.max_steps=6", "train.warmup_steps=2", "train.weight_decay=100")
    summary = _run("frozen-encoder.yaml", tmp_path / "model", data, out, *changes)
    assert {"accuracy", "f1"} <= set(summary["eval"])
    after = load_file(out / "model" / "model.safetensors")
    encoder = [name for name in before if name.startswith("roberta.")]
    assert len(encoder) == 5 + 2 * 16
    for name in encoder:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    # Two steps of warmup, then down to 0 after the sixth.
    rates = [0.0, 0.5e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3]
    assert [line["learning_rate"] for line in metrics_of(out)] == pytest.approx(rates)
    # A step of AdamW takes learning rate × weight decay of a matrix: (1 - 0.05)(1 - 0.1)… of it is
    # left after all. Adam itself moves each value by about a learning rate, 3e-3 in all.
    left = 0.95 * 0.9 * 0.925 * 0.95 * 0.975
    matrix, bias = (after[f"classifier.dense.{part}"] for part in ("weight", "bias"))
    np.testing.assert_allclose(matrix, left * before["classifier.dense.weight"], atol=6e-3)
    np.testing.assert_allclose(bias, before["classifier.dense.bias"], atol=6e-3)
    assert np.abs(bias - 1).max() > 0


@_long_in_mindspore
def test_masked_lm(tmp_path: Path) -> None:
    _skip_unless_carried("masked-lm.yaml")
    generator = random.Random(6)
    # As wikitext has them: headings, and nothing at all between paragraphs.
    lines = [
        "" if i % 4 == 0 else " ".join(generator.choices(word_pieces.WORDS[:12:2], k=9))
        for i in range(100)
    ]
    rows = [{"text": line} for line in lines]
    splits = {"train": rows[:80], "validation": rows[80:], "test": rows[:8]}
    data = _save(tmp_path / "data", {"text": "string"}, **splits)
    word_pieces.write_tokenizer(tmp_path / "model")
    config = {**_ROBERTA, "vocab_size": len(word_pieces.PIECES)}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    changes = ("model.random_weights=true", "train.num_train_epochs=2")
    summary = _run("masked-lm.yaml", tmp_path / "model", data, tmp_path / "out", *changes)
    # 60 of 80 lines hold something: 5 steps an epoch.
    assert len(metrics_of(tmp_path / "out")) == 10
    assert set(summary["eval"]) == {"loss", "perplexity", "token_accuracy"}
    assert summary["eval"]["perplexity"] == pytest.approx(math.exp(summary["eval"]["loss"]))


def test_chat_lora(tmp_path: Path) -> None:
    _skip_unless_carried("chat-lora.yaml")
    import torch
    import transformers

    from tests.test_causal_lm import WORDS as CHAT_WORDS
    from tests.test_causal_lm import write_tokenizer as write_chat_tokenizer

    generator = random.Random(7)
    rows = []
    for number in range(70):
        words = " ".join(generator.choices("abcdefghij", k=generator.randint(1, 9)))
        turns = [{"role": role, "content": words} for role in ("user", "assistant")]
        rows.append(
            {"prompt": words, "prompt_id": f"{number}", "messages": turns, "category": "Chat"}
        )
    columns = {
        "prompt": "string",
        "prompt_id": "string",
        "messages": [{"content": "string", "role": "string"}],
        "category": "string",
    }
    data = _save(tmp_path / "data", columns, train=rows[:60], test=rows[60:])
    write_chat_tokenizer(tmp_path / "model")
    values = {**tiny.CONFIGS["qwen2"], "vocab_size": len(CHAT_WORDS)}
    values.pop("model_type")
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**values))
    model.save_pretrained(tmp_path / "model")
    before, out = (tmp_path / "model" / "model.safetensors").read_bytes(), tmp_path / "out"
    changes = ("data.max_length=64", "train.global_batch_size=4")
    summary = _run("chat-lora.yaml", tmp_path / "model", data, out, *changes)
    assert set(summary["eval"]) == {"loss", "perplexity", "token_accuracy"}
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    config = json.loads((out / "model" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (16, 32, 0.05)
    # A and B of seven linear layers in each of two layers; the head of a language model is none of them.
    adapter = load_file(out / "model" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 7 * 2
    assert all(np.abs(values).max() > 0 for values in adapter.values())
    # 60 conversations of 6 to 22 tokens, packed into rows of 64.
    assert 0 < len(metrics_of(out)) < 60 / 4 / 2


@_long_in_mindspore
def test_entities(tmp_path: Path) -> None:
    _skip_unless_carried("entities.yaml")
    tags = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC")
    sentences = (
        ("anna lives in york .", "B-PER O O B-LOC O"),
        ("bob lives in new york .", "B-PER O O B-LOC I-LOC O"),
        ("york s anna .", "B-ORG O B-PER O"),
    )
    rows = []
    for words, marks in sentences * 24:
        tokens, ids = words.split(), [tags.index(mark) for mark in marks.split()]
        spans = [f"PER: {tokens[0]}"]
        rows.append(
            {"tokens": tokens, "ner_tags": ids, "langs": ["en"] * len(tokens), "spans": spans}
        )
    columns = {
        "tokens": ["string"],
        "ner_tags": [tags],
        "langs": ["string"],
        "spans": ["string"],
    }
    splits = {"train": rows[:60], "validation": rows[60:], "test": rows[:6]}
    data = _save(tmp_path / "data", columns, **splits)
    word_pieces.write_tokenizer(tmp_path / "model")
    config = {**tiny.CONFIGS["bert"], "vocab_size": len(word_pieces.PIECES)}
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({**config, "initializer_range": 0.1})
    )
    changes = ("model.random_weights=true", "train.max_steps=40", "train.learning_rate=1e-2")
    summary = _run("entities.yaml", tmp_path / "model", data, tmp_path / "out", *changes)
    assert set(summary["eval"]) == {"loss", "precision", "recall", "f1", "accuracy"}
    # Every word has its tag in every sentence but two; that much is learned in 40 steps.
    assert summary["eval"]["f1"] > 0.9
    saved = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert saved["id2label"] == {str(i): tag for i, tag in enumerate(tags)}
