"""From spans to tags of words, and from tags of words to labels of tokens. Knows characters only."""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from ftlaunch.strategies.data.tasks import UNSUPERVISED, BadRow

# A run of letters and digits, or any other character that can be seen.
_WORD = re.compile(r"\w+|[^\w\s]")

Range = tuple[int, int]


def join_words(words: Sequence[str]) -> tuple[str, list[Range]]:
    """The words as one text, a space between them, and where each of them lies in it."""
    ranges, at = [], 0
    for word in words:
        ranges.append((at, at + len(word)))
        at += len(word) + 1
    return " ".join(words), ranges


def words_of_spans(
    index: int,
    text: str,
    spans: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    column: str,
) -> tuple[list[Range], list[str]]:
    """The words of a text, and the tag of each: O, or B- and I- of the span that it lies in.

    No word crosses the border of a span: it is cut there. BadRow for spans that do not fit.

    index   of the row, for BadRow
    names   of a ClassLabel's ids, () where labels stand for themselves
    """
    taken = sorted(_checked(index, span, len(text), names, column) for span in spans)
    for (start, end, label), (begin, stop, other) in itertools.pairwise(taken):
        if begin < end:
            raise BadRow(
                index,
                f"has spans in {column!r} that overlap, {start} to {end} ({label}) and {begin} to "
                f"{stop} ({other}): a word can have one tag only. Remove one of them.",
            )
    ranges: list[Range] = []
    tags: list[str] = []
    at = 0
    for start, end, label in taken:
        outside = _words(text, at, start)
        inside = _words(text, start, end)
        if not inside:
            raise BadRow(
                index,
                f"has a span in {column!r} that holds only blanks, {start} to {end} ({label}): it must "
                "hold a word. Remove it.",
            )
        ranges += outside + inside
        tags += ["O"] * len(outside) + [f"B-{label}"] + [f"I-{label}"] * (len(inside) - 1)
        at = end
    rest = _words(text, at, len(text))
    return ranges + rest, tags + ["O"] * len(rest)


def _checked(
    index: int, span: Mapping[str, Any], length: int, names: Sequence[str], column: str
) -> tuple[int, int, str]:
    start, end, label = span["start"], span["end"], span["label"]
    if start is None or end is None:
        raise BadRow(
            index, f"has a span in {column!r} without start or end: it needs both. Correct it."
        )
    if not 0 <= start < end <= length:
        raise BadRow(
            index,
            f"has a span in {column!r} from {start} to {end}, and its text has {length} characters: "
            "0 <= start < end <= characters must hold. Correct it.",
        )
    return int(start), int(end), names[label] if names else str(label)


def _words(text: str, start: int, end: int) -> list[Range]:
    return [match.span() for match in _WORD.finditer(text, start, end)]


def label_tokens(
    text: str, offsets: Sequence[Range], words: Sequence[Range], tags: Sequence[int]
) -> list[int]:
    """For each token the tag of the word of which it is the first, else `UNSUPERVISED`.

    offsets   of each token in the text; those of special tokens are empty
    """
    labels = [UNSUPERVISED] * len(offsets)
    starts = [start for start, _ in words]
    last = -1
    for place, (begin, end) in enumerate(offsets):
        # Many tokenizers count the blank before a word to its first token.
        while begin < end and text[begin].isspace():
            begin += 1
        if begin >= end:
            continue
        word = bisect_right(starts, begin) - 1
        if word > last and begin < words[word][1]:
            labels[place] = tags[word]
            last = word
    return labels
