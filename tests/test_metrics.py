"""Metrics against numbers derived by hand."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.data.tasks import TaskSpec
from ftlaunch.strategies.metrics import load_metrics


def classes(count: int) -> TaskSpec:
    return TaskSpec(
        task="text-classification",
        text_columns=("text",),
        label_column="label",
        problem="classification",
        label_names=tuple(map(str, range(count))),
        num_outputs=count,
        loss="cross_entropy",
    )


REGRESSION = TaskSpec(
    task="text-classification",
    text_columns=("text",),
    label_column="score",
    problem="regression",
    label_names=(),
    num_outputs=1,
    loss="mse",
)


def one_hot(ids: Any, count: Any) -> Any:
    return np.eye(count, dtype=np.float32)[ids] * 5 - 2


def test_binary_metrics() -> None:
    # Predictions 1 1 1 0 0 0, labels 1 1 0 1 0 0: TP 2, FP 1, FN 1, TN 2.
    # accuracy 4/6; F1 of class 1 = 2*2 / (2*2 + 1 + 1) = 2/3;
    # MCC = (2*2 - 1*1) / sqrt(3 * 3 * 3 * 3) = 3/9.
    metrics = load_metrics(["accuracy", "f1", "matthews_correlation", "f1"], classes(2))
    assert metrics.names == ("accuracy", "f1", "matthews_correlation")
    found = metrics.compute(one_hot([1, 1, 1, 0, 0, 0], 2), np.array([1, 1, 0, 1, 0, 0]))
    assert found == pytest.approx({"accuracy": 4 / 6, "f1": 2 / 3, "matthews_correlation": 1 / 3})
    assert all(type(value) is float for value in found.values())


def test_f1_of_three_classes_is_the_mean_over_classes() -> None:
    # Predictions 0 0 1 2, labels 0 1 1 2. Class 0: TP 1 FP 1 FN 0 -> 2/3;
    # class 1: TP 1 FP 0 FN 1 -> 2/3; class 2: TP 1 -> 1. Mean 7/9.
    labels = np.array([0, 1, 1, 2])
    found = load_metrics(["f1"], classes(3)).compute(one_hot([0, 0, 1, 2], 3), labels)
    assert found == pytest.approx({"f1": 7 / 9})


def test_regression_metrics() -> None:
    # Predictions 1 2 3 5, targets 2 1 4 6. Means 2.75 and 3.25; deviations -1.75 -.75 .25 2.25 and
    # -1.25 -2.25 .75 2.75: covariance sum 2.1875 + 1.6875 + .1875 + 6.1875 = 10.25, squares 8.75
    # and 14.75. Ranks 1 2 3 4 and 2 1 3 4: 1 - 6 * 2 / (4 * 15) = 0.8. Errors 1 1 1 1.
    metrics = load_metrics(["pearson", "spearman", "mse"], REGRESSION)
    found = metrics.compute(np.array([[1.0], [2.0], [3.0], [5.0]]), np.array([2, 1, 4, 6.0]))
    expected = {"pearson": 10.25 / (8.75 * 14.75) ** 0.5, "spearman": 0.8, "mse": 1.0}
    assert found == pytest.approx(expected)
    assert all(type(value) is float for value in found.values())


def test_constant_predictions_give_numbers_without_warnings() -> None:
    binary = load_metrics(["accuracy", "f1", "matthews_correlation"], classes(2))
    labels = np.array([0, 0, 1])
    assert binary.compute(one_hot([0, 0, 0], 2), labels) == pytest.approx(
        {"accuracy": 2 / 3, "f1": 0.0, "matthews_correlation": 0.0}
    )
    all_same = binary.compute(one_hot([0, 0, 0], 2), np.zeros(3))
    assert all_same == {"accuracy": 1.0, "f1": 0.0, "matthews_correlation": 0.0}
    regression = load_metrics(["pearson", "spearman", "mse"], REGRESSION)
    found = regression.compute(np.ones((3, 1)), np.array([1.0, 2.0, 3.0]))
    # mse: (0 + 1 + 4) / 3
    assert found == pytest.approx({"pearson": 0.0, "spearman": 0.0, "mse": 5 / 3})
    single = regression.compute(np.ones((1, 1)), np.array([3.0]))
    assert single == {"pearson": 0.0, "spearman": 0.0, "mse": 4.0}


def test_nan_logits_do_not_raise() -> None:
    found = load_metrics(["accuracy", "f1"], classes(2)).compute(
        np.full((2, 2), np.nan), np.array([0, 1])
    )
    assert set(found) == {"accuracy", "f1"}
    found = load_metrics(["pearson", "mse"], REGRESSION).compute(
        np.array([[np.nan], [1.0]]), np.array([0.0, 1.0])
    )
    assert found["pearson"] == 0.0 and np.isnan(found["mse"])


def test_a_metric_of_the_other_problem() -> None:
    with pytest.raises(UserError, match=r"'pearson' does not fit.*accuracy, f1, matthews_corr"):
        load_metrics(["pearson"], classes(2))
    with pytest.raises(UserError, match=r"'f1' does not fit.*'score' make a regression.*pearson"):
        load_metrics(["f1"], REGRESSION)


def test_an_unknown_metric_lists_the_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import evaluate
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    use_caches(monkeypatch, tmp_path)
    with pytest.raises(UserError, match="'acuracy' cannot be loaded") as caught:
        load_metrics(["acuracy"], classes(2))
    assert "accuracy, f1, matthews_correlation, pearson, spearman, mse" in str(caught.value)
    assert capfd.readouterr() == ("", "")


def use_caches(monkeypatch: pytest.MonkeyPatch, folder: Any) -> Any:
    import evaluate

    for name in ("HF_EVALUATE_CACHE", "HF_METRICS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setattr(evaluate.config, name, str(folder / "cache"))
    # evaluate puts the folder of modules on the path when it is imported, too early for a test.
    monkeypatch.syspath_prepend(folder / "cache")
    monkeypatch.delitem(sys.modules, "evaluate_modules", raising=False)


def write_metric(folder: Any, body: Any) -> Any:
    folder.mkdir()
    path = folder / f"{folder.name}.py"
    path.write_text(
        "import datasets\nimport evaluate\n"
        f"class M(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        value = datasets.Value('int64')\n"
        "        return evaluate.MetricInfo(description='', citation='', "
        "features=datasets.Features({'predictions': value, 'references': value}))\n"
        f"    def _compute(self, predictions, references):\n        {body}\n"
    )
    return str(path)


def test_a_metric_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_caches(monkeypatch, tmp_path)
    good = write_metric(
        tmp_path / "errors",
        "return {'errors': sum(p != r for p, r in zip(predictions, references)), 'list': [1]}",
    )
    metrics = load_metrics([good], classes(3))
    assert metrics.compute(one_hot([0, 1, 2], 3), np.array([0, 0, 0])) == {"errors": 2.0}
    failing = write_metric(tmp_path / "failing", "raise ValueError('average is missing')")
    with pytest.raises(UserError, match=r"average is missing.*Take it out of train.metrics"):
        load_metrics([failing], classes(3))
    listing = write_metric(tmp_path / "listing", "return {'list': [1]}")
    with pytest.raises(UserError, match="gives no number"):
        load_metrics([listing], classes(3))


def test_evaluate_comes_without_pipelines() -> None:
    script = (
        "import sys\n"
        "from ftlaunch.strategies.metrics import import_evaluate\n"
        "print(import_evaluate().Metric.__name__, 'transformers.pipelines' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "Metric False\n", done.stderr


def test_built_in_metrics_touch_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_caches(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    metrics = load_metrics(["accuracy", "f1"], classes(2))
    assert metrics.compute(np.eye(2), np.array([0, 1])) == {"accuracy": 1.0, "f1": 1.0}
    assert metrics.compute(np.eye(2), np.array([1, 1]))["accuracy"] == 0.5
    assert not list(tmp_path.rglob("*"))
