"""Random tokens of given lengths, in place of data: for measuring, never for learning."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.data.tasks import UNSUPERVISED, TaskSpec
from ftlaunch.strategies.data.token_cache import Tokens
from ftlaunch.strategies.data.token_samples import TokenSample
from ftlaunch.strategies.model_config import max_length_of, read_model_config
from ftlaunch.strategies.options import BenchOptions, JobOptions

_DEFAULT_MAX_LENGTH = 512
# About those of sentences and short reviews.
_DEFAULT_LENGTHS = "lognormal:64:0.5"
_SHORTEST = 2
_NUM_LABELS = 2
_LEARNED_SHARE = 0.15
_NUMBER = r"\d{1,7}"
_FIXED = re.compile(rf"({_NUMBER})")
_UNIFORM = re.compile(rf"({_NUMBER})-({_NUMBER})")
_LOGNORMAL = re.compile(rf"lognormal:({_NUMBER}):(\d{{1,3}}(?:\.\d{{1,6}})?)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """A distribution of lengths in tokens.

    sigma   of the logarithm; then `low` is the median, and `high` is not used
    """

    low: int
    high: int
    sigma: float | None = None

    def draw(self, count: int, longest: int, generator: np.random.Generator) -> NDArray[np.int64]:
        """(count,) lengths. What is above `longest` or below two tokens is cut to that."""
        if self.sigma is None:
            drawn = generator.integers(self.low, self.high + 1, count)
        else:
            logs = np.log(self.low) + self.sigma * generator.standard_normal(count)
            drawn = np.rint(np.exp(logs.clip(0, np.log(longest))))
        return np.clip(drawn, _SHORTEST, longest).astype(np.int64)


def read_lengths(text: int | str) -> Lengths:
    """ "128": all of that length; "16-128": each as likely; "lognormal:64:0.5": its median and the standard
    deviation of its logarithm. UserError for anything else.
    """
    words = str(text).strip()
    found: Lengths | None = None
    if match := _FIXED.fullmatch(words):
        found = Lengths(low=int(match[1]), high=int(match[1]))
    elif match := _UNIFORM.fullmatch(words):
        found = Lengths(low=int(match[1]), high=int(match[2]))
    elif match := _LOGNORMAL.fullmatch(words):
        found = Lengths(low=int(match[1]), high=int(match[1]), sigma=float(match[2]))
    if found is None or not _SHORTEST <= found.low <= found.high:
        raise UserError(
            f"bench.lengths is {words[:80]!r}: it is a length in tokens (128), the shortest and the longest "
            f"(16-128), or lognormal:MEDIAN:SIGMA (lognormal:64:0.5), of {_SHORTEST} tokens at least. "
            "Correct it."
        )
    return found


def lengths_of(options: BenchOptions) -> Lengths:
    """As asked for, or about those of sentences. UserError as `read_lengths`."""
    return read_lengths(options.lengths or _DEFAULT_LENGTHS)


def longest_row(lengths: Lengths, max_length: int | None, limit: int | None) -> int:
    """The most tokens that a sample can have. UserError where the model does not take so many.

    max_length   of the job (data.max_length); None: 512, less by the model's limit, more by `lengths`
    limit        the model's (`model_config.max_length_of`), None where it has none that we know
    """
    if limit is not None and max(lengths.high, max_length or 0) > limit:
        raise UserError(
            f"Samples of up to {max(lengths.high, max_length or 0)} tokens do not fit the model: it takes "
            f"{limit} at most. Set bench.lengths (and data.max_length) to {limit} or less."
        )
    usual = min(limit or _DEFAULT_MAX_LENGTH, _DEFAULT_MAX_LENGTH)
    return max_length or max(usual, lengths.high)


class SyntheticTable:
    """Samples in memory, the same on every rank: stands in for `TokenTable` and `TokenSamples`."""

    def __init__(
        self, ids: list[NDArray[np.int32]], spec: TaskSpec, generator: np.random.Generator
    ) -> None:
        self._ids = ids
        self._spec = spec
        self._lengths = np.array([len(row) for row in ids], dtype=np.int64)
        self._labels = generator.integers(0, _NUM_LABELS, len(ids)).astype(np.int64)
        if spec.layout.per == "token":
            self._of_tokens = [self._token_labels(row, generator) for row in ids]

    def __len__(self) -> int:
        return len(self._ids)

    def lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._lengths[indices]

    def labels(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        return self._labels[indices]

    def rows(self, indices: NDArray[np.int64]) -> list[tuple[NDArray[Any], None]]:
        return [(self._ids[number], None) for number in indices.tolist()]

    def label_counts(self) -> NDArray[np.int64]:
        return np.bincount(self._labels, minlength=_NUM_LABELS)

    def items(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        counts = [int((self._of_tokens[i] != UNSUPERVISED).sum()) for i in indices.tolist()]
        return np.array(counts, dtype=np.int64)

    def samples(self, indices: NDArray[np.int64]) -> list[TokenSample]:
        return [
            TokenSample(
                input_ids=self._ids[number], token_type_ids=None, labels=self._of_tokens[number]
            )
            for number in indices.tolist()
        ]

    def origins(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.asarray(indices, dtype=np.int64)

    def _token_labels(
        self, ids: NDArray[np.int32], generator: np.random.Generator
    ) -> NDArray[np.int32]:
        if self._spec.head == "causal-lm":
            following = np.full(len(ids), UNSUPERVISED, dtype=np.int32)
            following[:-1] = ids[1:]
            return following
        if self._spec.head == "masked-lm":
            hidden = generator.random(len(ids)) < _LEARNED_SHARE
            # A sample without a label would be none.
            hidden[0] = True
            return np.where(hidden, ids, np.int32(UNSUPERVISED)).astype(np.int32)
        return generator.integers(0, _NUM_LABELS, len(ids)).astype(np.int32)


def synthetic_tokens(options: JobOptions) -> Tokens:
    """Those of a job without data. UserError as `make_tokens`."""
    return make_tokens(
        options.task,
        read_model_config(options.model),
        lengths_of(options.bench),
        num_samples=options.bench.samples,
        max_length=options.data.max_length,
        seed=options.train.seed,
    )


def make_tokens(
    task: str,
    config: Mapping[str, Any],
    lengths: Lengths,
    *,
    num_samples: int,
    max_length: int | None,
    seed: int,
) -> Tokens:
    """What `prepare_tokens` would give of real data. Follows from the arguments: equal on every rank.

    config       the model's: its vocabulary, padding and longest row
    max_length   as `longest_row` takes it
    UserError where the lengths are beyond the model's, or the configuration has no vocabulary.
    """
    longest = longest_row(lengths, max_length, max_length_of(dict(config)))
    vocabulary = config.get("vocab_size")
    if (
        not isinstance(vocabulary, int)
        or isinstance(vocabulary, bool)
        or not (4 <= vocabulary < 1 << 31)
    ):
        raise UserError(
            f"config.json has a vocab_size of {str(vocabulary)[:80]}: random tokens need a vocabulary of "
            "4 or more. Correct it, or give real data with --dataset."
        )
    padding = config.get("pad_token_id")
    pad_token_id = padding if isinstance(padding, int) and 0 <= padding < vocabulary else 0
    generator = np.random.default_rng(seed)
    spec = _spec_of(task)
    rows = []
    for length in lengths.draw(num_samples, longest, generator).tolist():
        ids = generator.integers(0, vocabulary - 1, length)
        # Never the padding itself.
        rows.append(np.where(ids >= pad_token_id, ids + 1, ids).astype(np.int32))
    return Tokens(
        key="synthetic",
        folder=Path(),
        spec=spec,
        train=SyntheticTable(rows, spec, generator),
        eval=None,
        max_token_id=vocabulary - 1,
        pad_token_id=pad_token_id,
        padding_side="right",
        uses_token_type_ids=False,
        max_length=longest,
        notes=(f"no data: {num_samples} samples of random tokens",),
        hit=True,
    )


def _spec_of(task: str) -> TaskSpec:
    names = tuple(f"label{number}" for number in range(_NUM_LABELS))
    if task == "text-classification":
        return TaskSpec(
            task=task,
            text_columns=(),
            label_column="",
            problem="classification",
            label_names=names,
            num_outputs=_NUM_LABELS,
            loss="cross_entropy",
        )
    of_tokens = task == "token-classification"
    heads: dict[str, Any] = {"causal-lm": "causal-lm", "masked-lm": "masked-lm"}
    return TaskSpec(
        task=task,
        text_columns=(),
        label_column="",
        problem="tokens",
        label_names=names if of_tokens else (),
        num_outputs=_NUM_LABELS if of_tokens else 0,
        loss="token_cross_entropy",
        head=heads.get(task, "token-classification"),
    )
