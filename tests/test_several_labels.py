"""Texts with several labels: columns, loss, metrics, and that the topology changes nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies import registry
from ftlaunch.strategies.data.batches import Collator
from ftlaunch.strategies.data.sample_order import samples_digest
from ftlaunch.strategies.data.sources import Splits
from ftlaunch.strategies.data.tasks import ModelLabels, TaskSpec
from ftlaunch.strategies.data.text_classification import TextClassification
from ftlaunch.strategies.evaluation import RowEvaluator
from ftlaunch.strategies.loop import Cursor, train
from ftlaunch.strategies.metrics import load_metrics
from ftlaunch.strategies.options import DataOptions
from ftlaunch.strategies.schedule import Schedule
from ftlaunch.strategies.torch.ddp import create
from tests import tiny
from tests.ranks import run_ranks
from tests.word_pieces import Data

TASK = TextClassification()
NAMES = ("a", "b", "c")
SPEC = TaskSpec(
    task="text-classification",
    text_columns=("text",),
    label_column="labels",
    problem="several-labels",
    label_names=NAMES,
    num_outputs=3,
    loss="binary_cross_entropy",
)


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(tmp_path, "text-classification")


def labels_of(tokens: Any) -> list[list[float]]:
    found: list[list[float]] = tokens.train.labels(np.arange(len(tokens.train))).tolist()
    return found


def rows_of(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": "anna lives", "labels": each} for each in labels]


# -- columns ------------------------------------------------------------------------------------


def test_lists_of_names_and_of_numbers(data: Data) -> None:
    tokens = data.prepare(rows_of(["c", "a"], [], ["b"]))
    assert tokens.spec.problem == "several-labels" and tokens.spec.loss == "binary_cross_entropy"
    assert tokens.spec.label_names == ("a", "b", "c")
    assert labels_of(tokens) == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    numbers = data.prepare(rows_of([7], [3, 20]))
    assert numbers.spec.label_names == ("3", "7", "20")
    assert labels_of(numbers) == [[0, 1, 0], [1, 0, 1]]


def test_class_labels_keep_their_ids() -> None:
    import datasets

    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "labels": datasets.Sequence(datasets.ClassLabel(names=["x", "y", "z"])),
        }
    )
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "labels": [[2, 0], []]}, features)
    splits = Splits(train=rows, eval=None, description="", notes=(), whole_train=None)
    spec = TASK.inspect(splits, DataOptions())
    assert spec.label_names == ("x", "y", "z") and spec.labels_are_ids


def test_columns_of_zero_and_one(data: Data) -> None:
    rows = [
        {"text": "anna", "rude": 1, "loud": False},
        {"text": "bob", "rude": 0, "loud": True},
    ]
    tokens = data.prepare(rows, label_columns=("rude", "loud"))
    assert tokens.spec.label_names == ("rude", "loud") and tokens.spec.label_column == ""
    assert labels_of(tokens) == [[1, 0], [0, 1]]
    model = ModelLabels(problem="several-labels", label_names=("loud", "rude"))
    turned = data.prepare(rows, rows, label_columns=("rude", "loud"), labels=model)
    assert labels_of(turned) == [[0, 1], [1, 0]]


GOOD = {"text": "anna", "rude": 1, "loud": 0, "n": 3, "s": "x"}


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        (rows_of(["a", "b"], ["a", "a"]), {}, r"Row 2 .* has a label twice in 'labels'"),
        (rows_of([0, 1, 1], [1, 0, 0]), {}, r"If these are 0 and 1 for each label"),
        (rows_of(["a"], ["a"]), {}, "All labels in 'labels' are 'a'"),
        (rows_of(["a"], None), {}, r"missing in 1 of 2 rows, the first is row 2"),
        (rows_of(["a"], [None]), {}, "missing value in row 2"),
        (rows_of([0.5]), {}, "each label must be a string or a whole number"),
        ([GOOD], {"label_columns": ("rude",)}, "needs two or more different columns"),
        ([GOOD], {"label_columns": ("rude", "rude")}, "needs two or more different columns"),
        ([GOOD], {"label_columns": ("rude", "no")}, "no column 'no' in the training data"),
        ([GOOD], {"label_columns": ("rude", "n")}, "'n' of the training data holds '3'"),
        ([GOOD], {"label_columns": ("rude", "s")}, "'s' of the training data holds 'x'"),
        (
            [GOOD],
            {"label_columns": ("rude", "loud"), "label_column": "n"},
            "one column of lists or in several of 0 and 1",
        ),
    ],
)
def test_what_is_refused(data: Data, rows: Any, options: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        data.prepare(rows, **options)


def test_labels_that_training_or_the_model_lacks(data: Data) -> None:
    with pytest.raises(UserError, match=r"evaluation data holds labels .*: 'z' in 'labels'"):
        data.prepare(rows_of(["a"], ["b"]), rows_of(["z"]))
    several = ModelLabels(problem="several-labels", label_names=("b", "a", "c"))
    rows = rows_of(["a"], ["c", "b"])
    assert labels_of(data.prepare(rows, rows, labels=several)) == [[0, 1, 0], [1, 0, 1]]
    with pytest.raises(UserError, match="are not the model's"):
        data.prepare(rows, rows_of(["z"]), labels=several)
    one = ModelLabels(problem="classification", label_names=("a", "b"))
    with pytest.raises(UserError, match="the model gives one label or number of 'a', 'b'"):
        data.prepare(rows, rows_of(["a"], ["b"]), labels=one)
    plain = [{"text": "anna", "label": "a"}]
    with pytest.raises(UserError, match="model gives any number of labels a text, but"):
        data.prepare(plain, labels=several)


# -- formulas -----------------------------------------------------------------------------------


def test_the_loss_by_hand() -> None:
    # sigmoid(ln 3) = 3/4 and sigmoid(0) = 1/2.
    logits = np.array([[math.log(3), 0.0, math.log(3)], [1000.0, -1000.0, 0.0]])
    labels = np.array([[1, 0, 0], [1, 0, 1]], np.float32)
    weights = np.array([[1, 1, 2], [1, 1, 0]], np.float32)
    loss, weight = TASK.evaluation_loss(logits, labels, weights, SPEC)
    # ln(4/3) + ln 2 + 2 ln 4 in the first row; certain and right twice in the second.
    assert loss == pytest.approx(math.log(4 / 3) + math.log(2) + 2 * math.log(4), rel=1e-12)
    assert weight == 6.0


def test_predictions_have_a_threshold_of_one_half() -> None:
    found = TASK.predictions(np.array([[math.log(3), -1e4, 1e-3], [-1, 0, -2]]), SPEC)
    assert [each["labels"] for each in found] == [["a", "c"], []]
    assert found[0]["scores"] == pytest.approx({"a": 0.75, "b": 0.0, "c": 0.50025}, abs=1e-6)
    assert found[1]["scores"]["b"] == 0.5


def test_metrics_by_hand() -> None:
    # Predicted 110 001 000, expected 100 011 000. a: TP 1; b: FP 1, FN 1; c: TP 1.
    # micro 2*2/(2*2+1+1) = 2/3; macro (1 + 0 + 1)/3; one row of three is wholly right.
    logits = np.array([[1, 1, -1], [-1, -1, 1], [-1, -1, -1]], np.float32)
    labels = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 0]], np.float32)
    names = TASK.default_metrics(SPEC)
    found = load_metrics(names, SPEC).compute(logits, labels)
    assert found == pytest.approx({"f1_micro": 2 / 3, "f1_macro": 2 / 3, "subset_accuracy": 1 / 3})
    with pytest.raises(
        UserError, match="it is for a classification, and the labels in 'labels' mak"
    ):
        load_metrics(["accuracy"], SPEC)


# -- topology -----------------------------------------------------------------------------------

SAMPLES = 18


def _table() -> tiny.Table:
    table = tiny.random_table(SAMPLES)
    targets = np.random.default_rng(5).integers(0, 2, (SAMPLES, 3)).astype(np.float32)
    return tiny.Table(table.input_ids, targets)


def _request(world: Any, listen_fd: Any, folder: Path) -> Any:
    return replace(tiny.request(world, listen_fd, folder), loss="binary_cross_entropy")


def _full_loss(model: Any, table: tiny.Table, indices: Any) -> torch.Tensor:
    """torch's own mean over all outputs of all rows."""
    inputs = {k: torch.from_numpy(v) for k, v in tiny.full_batch(table, indices).items()}
    labels = torch.from_numpy(table.labels(indices))
    return functional.binary_cross_entropy_with_logits(model(**inputs).logits, labels)


def _flat(model: Any) -> Any:
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(grads).double().numpy()


def _window(world: Any, listen_fd: Any, folder: Path, step: int) -> Any:
    strategy = create(_request(world, listen_fd, folder))
    view = tiny.windows(world, _table(), global_batch=15, micro_batch=2)
    indices = view.order.global_batch(step)
    batches = list(view.micro_batches(indices, step))
    for batch, last in batches:
        strategy.accumulate(batch, view.collator.total_items(indices), last=last)
    flat = _flat(strategy.model)
    strategy.close()
    return flat, len(batches), strategy.model.config.problem_type


def _full(world: Any, listen_fd: Any, folder: Path, step: int) -> Any:
    model, table = create(_request(world, listen_fd, folder)).model.train(), _table()
    order = tiny.windows(world, table, global_batch=15, micro_batch=15).order
    torch.autograd.backward(_full_loss(model, table, order.global_batch(step)))
    return _flat(model)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_config(tmp_path_factory.mktemp("bert"), "bert")


# 15 and then 3 of 18 samples: 4 micro-batches of 2 a rank, then 1.
@pytest.mark.parametrize(("step", "accumulation"), [(0, 4), (1, 1)], ids=["whole", "last"])
def test_window_gradient_is_that_of_the_full_batch(
    bert: Path, step: int, accumulation: int
) -> None:
    expected = run_ranks(1, _full, bert, step)[0]
    for gradient, batches, problem_type in run_ranks(2, _window, bert, step):
        assert (batches, problem_type) == (accumulation, "multi_label_classification")
        ratio = np.linalg.norm(gradient) / np.linalg.norm(expected)
        print(f"ratio {ratio:.7f}")
        assert abs(ratio - 1) < 1e-5
        assert np.linalg.norm(gradient - expected) / np.linalg.norm(expected) < 1e-5


def _steps(world: Any, listen_fd: Any, folder: Path, name: str) -> Any:
    """(digest, loss) of four steps, then an evaluation."""
    strategy = registry.load(name)(_request(world, listen_fd, folder))
    table, seen = _table(), []

    def after_step(report: Any) -> bool:
        seen.append((samples_digest(report.indices), report.outcome.loss))
        return False

    train(
        strategy,
        tiny.windows(world, table, global_batch=7, micro_batch=2),
        Schedule(name="constant", peak=1e-3, warmup_steps=0, total_steps=4),
        Cursor(),
        total_steps=4,
        after_step=after_step,
    )
    evaluator = RowEvaluator(
        collator=Collator(table=table, pad_token_id=0),
        task=TASK,
        spec=SPEC,
        metrics=load_metrics(TASK.default_metrics(SPEC), SPEC),
        micro_batch=4,
    )
    outputs = evaluator.run(strategy)
    return seen, evaluator.evaluate(outputs), evaluator.records(outputs)


def _plain_steps(world: Any, listen_fd: Any, folder: Path) -> Any:
    model, table = create(_request(world, listen_fd, folder)).model.train(), _table()
    order = tiny.windows(world, table, global_batch=7, micro_batch=7).order
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    seen = []
    for step in range(4):
        indices = order.global_batch(step)
        loss = _full_loss(model, table, indices)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen.append((samples_digest(indices), float(loss.detach())))
    with torch.no_grad():
        return seen, float(_full_loss(model.eval(), table, np.arange(SAMPLES)))


@pytest.fixture(scope="module")
def plain(bert: Path) -> Any:
    return run_ranks(1, _plain_steps, bert)[0]


@pytest.mark.parametrize(
    ("name", "ranks"), [("ddp", 1), ("ddp", 2), ("ddp", 3), ("zero2", 2), ("zero3", 3)]
)
def test_losses_and_evaluations_are_the_same_everywhere(
    bert: Path, plain: Any, name: str, ranks: int
) -> None:
    steps, evaluated = plain
    results = run_ranks(ranks, _steps, bert, name)
    for seen, metrics, records in results:
        assert [digest for digest, _ in seen] == [digest for digest, _ in steps]
        worst = max(abs(a / b - 1) for (_, a), (_, b) in zip(seen, steps, strict=True))
        print(
            f"{name} on {ranks}: loss {worst:.1e}, evaluated {metrics['loss'] / evaluated - 1:.1e}"
        )
        assert worst < 1e-6 and abs(metrics["loss"] / evaluated - 1) < 1e-6
        assert len(records) == SAMPLES
        assert set(records[0]) == {"index", "labels", "scores", "expected"}
    assert all(result[1:] == results[0][1:] for result in results)
