"""Precision, recall and F1 of whole entities, by the seqeval library; needs no network and no files.

Knows tags of words by name, in the schemes BIO, IOBES and BILOU; nothing of models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ftlaunch.strategies.data.tasks import UNSUPERVISED

if TYPE_CHECKING:
    from ftlaunch.strategies.data.tasks import TaskSpec
    from ftlaunch.strategies.data.token_outputs import TokenMetric, TokenOutputs

ENTITY_SCORES = ("precision", "recall", "f1")
# Of all tasks with labels of tokens: these names bring no script with them.
TOKEN_METRICS = ("perplexity", "token_accuracy", "accuracy", *ENTITY_SCORES)
_TAG = re.compile(r"O|[BIESLU]-.+", re.DOTALL)
# seqeval knows BILOU's marks by their names in IOBES.
_MARKS = {"L": "E", "U": "S"}


def are_entities(names: Sequence[str]) -> bool:
    """Whether tags mark entities, rather than give each word a class of its own."""
    return all(_TAG.fullmatch(name) for name in names) and any(name != "O" for name in names)


def tag_names(outputs: TokenOutputs, spec: TaskSpec) -> tuple[list[list[str]], list[list[str]]]:
    """(predicted, expected) tags of the words of each sample that have a token."""
    assert outputs.winners is not None and outputs.labels is not None
    predicted, expected = [], []
    for winners, labels in zip(outputs.winners, outputs.labels, strict=True):
        real = labels != UNSUPERVISED
        predicted.append([spec.label_names[i] for i in winners[real].tolist()])
        expected.append([spec.label_names[i] for i in labels[real].tolist()])
    return predicted, expected


def entity_metric(name: str) -> TokenMetric:
    """One of `ENTITY_SCORES` as a metric of tokens."""

    def compute(outputs: TokenOutputs, spec: TaskSpec) -> Mapping[str, float]:
        predicted, expected = tag_names(outputs, spec)
        return {name: entity_scores(predicted, expected)[name]}

    return compute


def entity_scores(
    predicted: Sequence[Sequence[str]], expected: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Of all entities together (micro); an entity counts if its words and its label are right.

    0 where there is nothing to divide by.
    """
    from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

    precision, recall, f1, _ = precision_recall_fscore_support(
        [_as_iobes(row) for row in expected],
        [_as_iobes(row) for row in predicted],
        average="micro",
        zero_division=0,
    )
    return {"precision": float(precision), "recall": float(recall), "f1": float(f1)}


def _as_iobes(tags: Sequence[str]) -> list[str]:
    return [_MARKS.get(tag[0], tag[0]) + tag[1:] for tag in tags]
