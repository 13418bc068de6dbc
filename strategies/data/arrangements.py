"""What becomes of a table's rows before they are samples: left out where nothing is to be learned.

Pure views: nothing is copied, and every rank finds the same. Packing is in `packing`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ftlaunch.strategies.data.token_samples import TokenSample, TokenSamples


class Selection:
    """Some samples of another table, in an order of their own."""

    def __init__(self, table: TokenSamples, chosen: NDArray[np.int64]) -> None:
        self._table, self._chosen = table, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._table.lengths(self._chosen[indices])

    def items(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._table.items(self._chosen[indices])

    def samples(self, indices: NDArray[np.int64]) -> list[TokenSample]:
        return self._table.samples(self._chosen[indices])

    def origins(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._table.origins(self._chosen[indices])


def supervised_only(
    table: TokenSamples, split: str, *, num_too_long: int = 0
) -> tuple[TokenSamples, tuple[str, ...]]:
    """The samples that have a supervised token, and a note of how many have none.

    num_too_long   rows that were left empty for their length: told of by themselves
    """
    items = table.items(np.arange(len(table)))
    kept = np.flatnonzero(items > 0).astype(np.int64)
    without = len(table) - len(kept) - num_too_long
    notes = []
    if num_too_long:
        notes.append(
            f"{split}: {num_too_long} of {len(table)} samples are longer than data.max_length and "
            "were left out (data.long_samples=drop)"
        )
    if without:
        notes.append(
            f"{split}: {without} of {len(table)} samples have no token to be learned and were left out"
        )
    if len(kept) == len(table):
        return table, tuple(notes)
    return Selection(table, kept), tuple(notes)
