"""Which tokens of a text are hidden, and by what: the rule of BERT, drawn for one sample at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftlaunch.strategies.data.tasks import UNSUPERVISED

# Of the tokens that are to be guessed so many are hidden by the mask, and so many are replaced by a
# token drawn at random; the rest stays as it is.
_MASKED, _REPLACED = 0.8, 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskRule:
    """probability   that a token is to be guessed; with whole_words that a word is
    vocabulary       tokens drawn at random are 0 to vocabulary - 1
    """

    probability: float
    whole_words: bool
    mask_token_id: int
    vocabulary: int


def mask_tokens(
    input_ids: NDArray[Any], words: NDArray[Any], rule: MaskRule, generator: np.random.Generator
) -> tuple[NDArray[Any], NDArray[Any]]:
    """(what the model sees, what it is to guess), both like `input_ids`.

    words   for each token the number of its word, `UNSUPERVISED` at tokens that are never hidden
    """
    # Uniform numbers alone: how numpy makes others of them may change from release to release.
    chance, treatment, replacement = generator.random((3, len(input_ids)))
    hideable = words != UNSUPERVISED
    if rule.whole_words:
        _, first, word = np.unique(words, return_index=True, return_inverse=True)
        chance = chance[first][word]
    chosen = hideable & (chance < rule.probability)
    masked = chosen & (treatment < _MASKED)
    replaced = chosen & ~masked & (treatment < _MASKED + _REPLACED)
    seen = input_ids.copy()
    seen[masked] = rule.mask_token_id
    seen[replaced] = (replacement[replaced] * rule.vocabulary).astype(seen.dtype)
    wanted = np.where(chosen, input_ids, UNSUPERVISED).astype(words.dtype)
    return seen, wanted
