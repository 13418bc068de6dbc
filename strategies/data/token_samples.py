"""Samples with a label for each token: what is read of a table of them. Knows arrays, no files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSample:
    """One row of tokens.

    labels  (tokens,) what the output at each place is to be, `tasks.UNSUPERVISED` for nothing
    parts   lengths of the samples that were put into this row, which must not see each other;
            () for a row that is one sample
    """

    input_ids: NDArray[Any]
    token_type_ids: NDArray[Any] | None
    labels: NDArray[Any]
    parts: tuple[int, ...] = ()


class TokenSamples(Protocol):
    """Random access by sample number to a table, or to what was arranged from one."""

    def __len__(self) -> int: ...

    def lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of tokens of each sample."""

    def items(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of supervised tokens of each sample."""

    def samples(self, indices: NDArray[np.int64]) -> list[TokenSample]: ...

    def origins(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row of the data that each sample is; its own number where it is made of several."""
