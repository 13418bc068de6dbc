"""Some samples of a job as one file, for programs that know nothing of ours. Writes, never reads.

The file is of safetensors; its tensors are

    offsets          (samples + 1,) int64: sample i has the tokens offsets[i] to offsets[i + 1]
    input_ids        (tokens,) int32
    token_type_ids   (tokens,) int32, where the tokenizer has them
    labels           (samples,) int64 or float32; (samples, outputs) float32; or (tokens,) int64 with
                     -100 where there is none, and the label of a token the token itself
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.data.batches import Batches, SampleTable
from ftlaunch.strategies.data.tasks import UNSUPERVISED
from ftlaunch.strategies.data.token_batches import TokenCollator


def write_samples(
    file: Path, batches: Batches, numbers: Sequence[int], *, labels_are_next: bool
) -> None:
    """Samples of a job, in this order; what is drawn is that of the first epoch.

    labels_are_next   the label of a token is the one that follows, as a causal model's is
    UserError for rows that hold several samples: no other program would keep them apart.
    """
    from safetensors.numpy import save_file

    chosen = np.array(numbers, dtype=np.int64)
    rows: list[tuple[NDArray[Any], NDArray[Any] | None]]
    if isinstance(batches, TokenCollator):
        samples = batches.samples(chosen, epoch=0)
        if any(sample.parts for sample in samples):
            raise UserError(
                "data.packing is samples, which the peers do not have: they would let the samples of a row "
                "see each other. Compare with data.packing=none or concatenate."
            )
        rows = [(sample.input_ids, sample.token_type_ids) for sample in samples]
        labels = np.concatenate(
            [_own(sample.labels) if labels_are_next else sample.labels for sample in samples]
        ).astype(np.int64)
    else:
        table = cast(SampleTable, batches.table)
        rows = list(table.rows(chosen))
        labels = table.labels(chosen)
    lengths = [len(ids) for ids, _ in rows]
    tensors: dict[str, NDArray[Any]] = {
        "offsets": np.cumsum([0, *lengths], dtype=np.int64),
        "input_ids": np.concatenate([ids for ids, _ in rows]).astype(np.int32),
        "labels": np.ascontiguousarray(labels),
    }
    if rows[0][1] is not None:
        types = [types for _, types in rows if types is not None]
        tensors["token_type_ids"] = np.concatenate(types).astype(np.int32)
    save_file(tensors, file)


def _own(following: NDArray[Any]) -> NDArray[Any]:
    """Labels that are the next token's as labels that are the token's own; the first has none."""
    return np.concatenate([[UNSUPERVISED], following[:-1]])
