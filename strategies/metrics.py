"""Metrics by name, through the evaluate library. The customary ones need no network and no files.

Knows predictions and labels; nothing of ranks or rows: the caller gathers them first.
"""

from __future__ import annotations

import functools
import importlib
import numbers
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.data.tasks import TaskSpec

Formula = Callable[[NDArray[Any], NDArray[Any]], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Loaded metrics of one task. `modules` are evaluate.EvaluationModule by name."""

    names: tuple[str, ...]
    spec: TaskSpec
    modules: Mapping[str, Any]

    def compute(self, logits: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
        """Plain floats by name. logits (rows, num_outputs), labels (rows,), rows > 0."""
        if self.spec.problem == "several-labels":
            predictions, references = (logits > 0).astype(np.int64), labels.astype(np.int64)
        elif self.spec.problem == "classification":
            predictions, references = logits.argmax(axis=1), labels.astype(np.int64)
        else:
            predictions, references = logits[:, 0].astype(np.float64), labels.astype(np.float64)
        result: dict[str, float] = {}
        for name, module in self.modules.items():
            result |= _compute(name, module, predictions, references)
        return result


def load_metrics(names: Sequence[str], spec: TaskSpec) -> Metrics:
    """UserError for a metric that is unknown or does not fit the problem."""
    unique = tuple(dict.fromkeys(names))
    modules = {name: _load(name, spec) for name in unique}
    metrics = Metrics(names=unique, spec=spec, modules=modules)
    # A metric of the hub may want arguments that nobody gives: found now, not after an epoch.
    if any(name not in _FORMULAS for name in unique):
        probe = np.eye(spec.num_outputs) if spec.num_outputs > 1 else np.array([[0.0], [1.0]])
        metrics.compute(probe, probe if spec.problem == "several-labels" else np.arange(len(probe)))
    return metrics


def _load(name: str, spec: TaskSpec) -> Any:
    if name not in _FORMULAS:
        return _load_from_hub(name)
    problem, formula = _FORMULAS[name]
    if problem != spec.problem:
        fitting = ", ".join(known for known, (p, _) in _FORMULAS.items() if p == spec.problem)
        raise UserError(
            f"The metric {name!r} does not fit the task: it is for {_KINDS[problem]}, and the labels"
            f"{f' in {spec.label_column!r}' if spec.label_column else ''} make {_KINDS[spec.problem]}. "
            f"Set train.metrics to some of {fitting}."
        )
    if name == "f1":
        formula = functools.partial(_f1, average="binary" if spec.num_outputs == 2 else "macro")
    with _quiet():
        return _metric_class()(name, problem, formula)


def _load_from_hub(name: str) -> Any:
    try:
        with _quiet():
            return import_evaluate().load(name, keep_in_memory=True)
    except MemoryError:
        raise
    # What a script of the hub raises while it is imported cannot be foreseen.
    except Exception as error:
        raise UserError(
            f"The metric {name!r} cannot be loaded: {_first_line(error)}. It must be one of "
            f"{', '.join(_FORMULAS)}, or one that evaluate.load finds on the Hugging Face hub or "
            "in a local file. Set train.metrics, or check the network."
        ) from error


def _compute(
    name: str,
    module: Any,
    predictions: NDArray[Any],
    references: NDArray[Any],
) -> dict[str, float]:
    try:
        with _quiet():
            # compute() would take our own through Arrow and back, where nan becomes None.
            compute = module._compute if name in _FORMULAS else module.compute
            values = compute(predictions=predictions, references=references)
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(
            f"The metric {name!r} cannot be computed: {_first_line(error)}. It must work on class "
            "numbers (or values of a regression) without further arguments. Take it out of "
            "train.metrics."
        ) from error
    scalars = {
        key: float(value)
        for key, value in (values or {}).items()
        if isinstance(value, numbers.Real)
    }
    if not scalars:
        raise UserError(
            f"The metric {name!r} gives no number: it gives {sorted(values or {})}. A metric must "
            "give single numbers. Take it out of train.metrics."
        )
    return scalars


def _metric_class() -> Callable[[str, str, Formula], Any]:
    import datasets

    evaluate: Any = import_evaluate()

    class BuiltinMetric(evaluate.Metric):  # type: ignore[misc]
        """Kept in memory: without that, each instance writes and locks a cache file."""

        def __init__(self, name: str, problem: str, formula: Formula) -> None:
            self._dtype = "float64" if problem == "regression" else "int64"
            self._is_list = problem == "several-labels"
            self._key, self._formula = name, formula
            super().__init__(keep_in_memory=True)

        def _info(self) -> Any:
            value = datasets.Value(self._dtype)
            if self._is_list:
                value = datasets.Sequence(value)
            return evaluate.MetricInfo(
                description=self._key,
                citation="",
                features=datasets.Features({"predictions": value, "references": value}),
            )

        def _build_data_dir(self) -> str:
            # The base class would make a folder that nothing is ever written to.
            return ""

        def _compute(self, predictions: NDArray[Any], references: NDArray[Any]) -> dict[str, float]:
            return {self._key: float(self._formula(predictions, references))}

    return BuiltinMetric


def import_evaluate() -> ModuleType:
    """The evaluate library without its evaluators.

    They import all of transformers.pipelines, and with it torch: 3 of the 4.4 s of CPU time that
    the import takes, and nothing here uses them. evaluate itself copes with their absence.
    """
    pipelines = "transformers.pipelines"
    if "evaluate" in sys.modules or pipelines in sys.modules:
        return importlib.import_module("evaluate")
    sys.modules[pipelines] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("evaluate")
    # Some transformers turn an ImportError of a part into a RuntimeError.
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "evaluate"]:
            del sys.modules[name]
        del sys.modules[pipelines]
        return importlib.import_module("evaluate")
    finally:
        if sys.modules.get(pipelines, ...) is None:
            del sys.modules[pipelines]


def _accuracy(predictions: NDArray[Any], references: NDArray[Any]) -> float:
    return float((predictions == references).mean())


def _f1(predictions: NDArray[Any], references: NDArray[Any], average: str = "binary") -> float:
    """2TP / (2TP + FP + FN) of class 1, or the mean over the classes that occur."""
    from sklearn.metrics import f1_score

    return float(f1_score(references, predictions, average=average, zero_division=0))


def _f1_of_outputs(predictions: NDArray[Any], references: NDArray[Any], average: str) -> float:
    """Of labels that a row may have several of, (rows, outputs) of 0 and 1."""
    from sklearn.metrics import f1_score

    return float(f1_score(references, predictions, average=average, zero_division=0))


def _subset_accuracy(predictions: NDArray[Any], references: NDArray[Any]) -> float:
    """Share of the rows whose labels are all right."""
    return float((predictions == references).all(axis=1).mean())


def _matthews(predictions: NDArray[Any], references: NDArray[Any]) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(references, predictions))


def _pearson(predictions: NDArray[Any], references: NDArray[Any]) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, references)


def _spearman(predictions: NDArray[Any], references: NDArray[Any]) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, references)


def _correlation(
    function: Callable[..., Any], predictions: NDArray[Any], references: NDArray[Any]
) -> float:
    """0 where it is undefined: of a constant, or of a single sample."""
    if len(references) < 2:
        return 0.0
    value = float(function(predictions, references)[0])
    return 0.0 if np.isnan(value) else value


def _mse(predictions: NDArray[Any], references: NDArray[Any]) -> float:
    return float(((predictions - references) ** 2).mean())


_FORMULAS: Mapping[str, tuple[str, Formula]] = {
    "accuracy": ("classification", _accuracy),
    "f1": ("classification", _f1),
    "matthews_correlation": ("classification", _matthews),
    "pearson": ("regression", _pearson),
    "spearman": ("regression", _spearman),
    "mse": ("regression", _mse),
    "f1_micro": ("several-labels", functools.partial(_f1_of_outputs, average="micro")),
    "f1_macro": ("several-labels", functools.partial(_f1_of_outputs, average="macro")),
    "subset_accuracy": ("several-labels", _subset_accuracy),
}

_KINDS = {
    "classification": "a classification",
    "regression": "a regression",
    "several-labels": "texts with several labels",
}

# Computed here; any other name is a script that evaluate.load finds and runs.
SHIPPED_METRICS = tuple(_FORMULAS)


@contextmanager
def _quiet() -> Iterator[None]:
    """Constant predictions are a fact of early training, not worth a warning at every epoch."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300].rstrip(".")
