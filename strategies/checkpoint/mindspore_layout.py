"""Where the weights of a MindSpore checkpoint lie, as runs of bytes, by what the files of all ranks say.

In data-parallel training every rank holds every parameter: those of rank 0 are taken, and the others'
are compared with them, byte by byte. What mindone's ZeRO has split is put together along axis 0.
Nothing is guessed: ranks that disagree are refused, with the first tensor that differs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.checkpoint.mindspore_file import MindsporeFile, read_ckpt
from ftlaunch.strategies.checkpoint.mindspore_folder import (
    INDEX_SUFFIX,
    MindsporeFiles,
    weight_map,
)
from ftlaunch.strategies.checkpoint.mindspore_names import (
    Shape,
    hugging_face_names,
    is_flat_convolution,
    optimizer_state,
    parts_of,
    shown,
)
from ftlaunch.strategies.checkpoint.mindspore_safetensors import read_safetensors
from ftlaunch.strategies.checkpoint.mindspore_split import FOLDER, SplitInfo, read_split_info
from ftlaunch.strategies.checkpoint.model_files import ModelShapes
from ftlaunch.strategies.checkpoint.protobuf_file import file_damaged
from ftlaunch.strategies.checkpoint.run_reader import RunReader
from ftlaunch.strategies.checkpoint.torch_zip import ITEM_BYTES
from ftlaunch.strategies.checkpoint.weights import Weight, cut

_SHOWN = 16
_MOMENTS = ("adam_m", "adam_v", "moment1", "moment2", "exp_avg", "exp_avg_sq", "moments")


@dataclass(frozen=True, slots=True, kw_only=True)
class MindsporeWeights:
    """What `mindspore_weights` found; notes are lines for the user."""

    num_ranks: int
    weights: tuple[Weight, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rank:
    """What one rank has written.

    state    entries that are no weights → what they are
    numbers  those of them that are counts and the like, such as global_step
    """

    files: tuple[MindsporeFile, ...]
    weights: Mapping[str, Weight]
    entries: Mapping[str, Shape]
    state: Mapping[str, str]
    numbers: Mapping[str, Weight]


def mindspore_weights(files: MindsporeFiles, known: ModelShapes) -> MindsporeWeights:
    """Reads headers; with several ranks all bytes, to compare them.

    known   shapes of the model's weights by their names in it, empty where it is not at hand
    UserError for files that are missing, damaged, not of one save, or not supported.
    """
    ranks = [_read_rank(paths, known) for paths in files.ranks.values()]
    # Whatever the files are called: a part alone would pass for the whole.
    info = read_split_info(files.folder)
    for number, rank in enumerate(ranks[1:], 1):
        _check_names(files, ranks[0], rank, number)
    split = _split_names(files, info, ranks, known)
    found = []
    with RunReader() as reader:
        for number, rank in enumerate(ranks[1:], 1):
            # Parts of two saves would differ nowhere else.
            for name, entry in ranks[0].numbers.items():
                if name in rank.numbers:
                    _check_same(files, reader, entry, rank.numbers[name], number)
        for name, weight in ranks[0].weights.items():
            if name in split:
                found.append(_together(files, [rank.weights[name] for rank in ranks]))
                continue
            for number, rank in enumerate(ranks[1:], 1):
                _check_same(files, reader, weight, rank.weights[name], number)
            found.append(weight)
    weights, num_renamed = hugging_face_names(found, known)
    notes = [
        *_notes_on_files(ranks[0]),
        *_notes_on_names(found, weights, num_renamed, known),
    ]
    if split:
        notes.append(f"{len(split):,} tensors are put together of {len(ranks)} ranks' parts")
    return MindsporeWeights(num_ranks=len(ranks), weights=weights, notes=tuple(notes))


def _read_rank(paths: Sequence[Path], known: ModelShapes) -> _Rank:
    files = tuple(read_ckpt(p) if p.suffix == ".ckpt" else read_safetensors(p) for p in paths)
    entries: dict[str, Weight] = {}
    for file in files:
        for entry in file.entries:
            if entry.name in entries:
                other = entries[entry.name].runs
                where = f" and {other[0].path.name}" if other else ""
                raise file_damaged(file.path, f"{entry.name!r} is in it{where}")
            entries[entry.name] = entry
    if len(files) > 1:
        _check_index(files)
    shapes = {name: entry.shape for name, entry in entries.items()}
    state = optimizer_state(shapes, known)
    weights = {name: entry for name, entry in entries.items() if name not in state}
    numbers = {name: entries[name] for name, kind in state.items() if kind == name}
    return _Rank(files=files, weights=weights, entries=shapes, state=state, numbers=numbers)


def _check_index(files: Sequence[MindsporeFile]) -> None:
    [index] = files[0].path.parent.glob(f"*{INDEX_SUFFIX}")
    there = {entry.name: file.path.name for file in files for entry in file.entries}
    named = weight_map(index)
    if there != named:
        names = [name for name in {**named, **there} if there.get(name) != named.get(name)]
        raise file_damaged(index, f"{shown(names)} are not in the files that it says")


def _check_names(files: MindsporeFiles, first: _Rank, other: _Rank, number: int) -> None:
    if first.weights.keys() != other.weights.keys():
        names = sorted(first.weights.keys() ^ other.weights.keys())
        owner = 0 if names[0] in first.weights else number
        raise _disagree(files, f"{names[0]!r} is on rank {owner} only", number)
    for name, weight in first.weights.items():
        own = other.weights[name]
        if own.dtype != weight.dtype or own.shape != weight.shape:
            what = f"{weight.shape} of {weight.dtype} on rank 0, {own.shape} of {own.dtype}"
            raise _disagree(files, f"{name!r} is {what} on rank {number}", number)


def _disagree(files: MindsporeFiles, what: str, number: int) -> UserError:
    return UserError(
        f"{files.folder}: the ranks 0 and {number} disagree: {what}. In data-parallel training all "
        f"hold the same. If mindone's ZeRO has split the parameters, its folder {FOLDER} has to be "
        "beside the files; model-parallel checkpoints cannot be merged."
    )


def _split_names(
    files: MindsporeFiles,
    info: SplitInfo | None,
    ranks: Sequence[_Rank],
    known: ModelShapes,
) -> set[str]:
    """Names of the weights of which each rank has a part."""
    if info is None or info.num_ranks == 1:
        return set()
    if missing := sorted(info.split.keys() - ranks[0].entries.keys()):
        raise UserError(
            f"{files.folder} does not hold {shown(missing)}, which {info.folder} names. The files are "
            f"cut off, or of another job: copy both anew, or move {info.folder} away."
        )
    names = [name for name, is_split in info.split.items() if is_split and name in ranks[0].weights]
    if not names or _are_whole(info, ranks, names, known):
        return set()
    if len(ranks) != info.num_ranks:
        raise UserError(
            f"{files.folder} has the files of {len(ranks)} rank(s), but by {info.folder} each of "
            f"{info.num_ranks} ranks holds a part of {shown(names)}. Put the files of all ranks into "
            "one folder, and pass that."
        )
    return set(names)


def _are_whole(
    info: SplitInfo, ranks: Sequence[_Rank], names: Sequence[str], known: ModelShapes
) -> bool:
    """Whether every rank has the whole of what is split: under ZeRO-1 and 2 only the optimizer has parts."""
    states: dict[str, list[str]] = {}
    for entry in ranks[0].state:
        states.setdefault(entry.partition(".")[2], []).append(entry)
    for name in names:
        shape = ranks[0].weights[name].shape
        there = known.shape(name)
        if there is not None and parts_of(shape, there) in (1, info.num_ranks):
            return there == shape
    sizes = [
        (ranks[0].state[state], parts_of(ranks[0].entries[state], ranks[0].weights[name].shape))
        for name in names
        for state in states.get(name, ())
    ]
    if any(parts == info.num_ranks for _, parts in sizes):
        return True
    # A moment as large as its weight was cut like it; an average or a sum may be whole all the same.
    if any(parts == 1 and kind in _MOMENTS for kind, parts in sizes):
        return False
    return len(ranks) > 1 and _are_copies(info, ranks, names)


def _are_copies(info: SplitInfo, ranks: Sequence[_Rank], names: Sequence[str]) -> bool:
    """Whether all ranks have the same bytes: parts of a trained tensor differ from one another.

    UserError where the bytes tell nothing, every tensor being one number over and over.
    """
    varies = False
    with RunReader() as reader:
        for name in names:
            first = ranks[0].weights[name]
            if not all(_same(reader, first, rank.weights[name]) for rank in ranks[1:]):
                return False
            item = ITEM_BYTES[first.dtype]
            for data in () if varies else reader.pieces(first, converts=True):
                varies = varies or bool((data.reshape(-1, item) != data[:item]).any())
    if not varies:
        raise UserError(
            f"{info.folder} says that {shown(names)} are split, but all ranks have the same numbers of "
            "them: parts or the whole. Pass --model with a folder that has weights, whose shapes say it."
        )
    return True


def _together(files: MindsporeFiles, parts: Sequence[Weight]) -> Weight:
    first = parts[0]
    if not first.shape:
        raise UserError(
            f"{files.folder}: {first.name!r} is one number, but {FOLDER} says that it is split along "
            "its first axis. Copy the files of one job."
        )
    return Weight(
        name=first.name,
        dtype=first.dtype,
        shape=(sum(part.shape[0] for part in parts), *first.shape[1:]),
        runs=tuple(run for part in parts for run in part.runs),
    )


def _check_same(
    files: MindsporeFiles, reader: RunReader, first: Weight, other: Weight, number: int
) -> None:
    if not _same(reader, first, other):
        raise _disagree(files, f"{first.name!r} has other bytes on rank {number}", number)


def _same(reader: RunReader, first: Weight, other: Weight) -> bool:
    position = 0
    for data in reader.pieces(first, converts=False):
        done = 0
        for run in cut(other.runs, position, data.nbytes):
            found = reader.read_beside(run.path, run.offset, run.nbytes)
            if not np.array_equal(data[done : done + run.nbytes], found):
                return False
            done += run.nbytes
        position += data.nbytes
    return True


def _notes_on_files(rank: _Rank) -> Iterable[str]:
    texts = [repr(name) for file in rank.files for name in file.texts]
    counts = Counter([*rank.state.values(), *texts])
    if counts:
        what = [f"{count:,} of {kind}" if count > 1 else kind for kind, count in counts.items()]
        more = f" and {len(what) - _SHOWN:,} more" if len(what) > _SHOWN else ""
        yield (
            f"left out, since no weights ({sum(counts.values()):,}): {', '.join(what[:_SHOWN])}{more}"
        )
    for file in rank.files:
        if not file.has_checksum:
            yield (
                f"{file.path.name} has no checksum (crc_check of save_checkpoint), so it could not be "
                "told whether entries are missing at its end"
            )


def _notes_on_names(
    before: Sequence[Weight],
    weights: Sequence[Weight],
    num_renamed: int,
    known: ModelShapes,
) -> Iterable[str]:
    if num_renamed:
        example = next(
            (b.name, w.name) for b, w in zip(before, weights, strict=True) if b.name != w.name
        )
        yield f"renamed as in torch ({num_renamed:,}), such as {example[1]!r} for {example[0]!r}"
    flat = [w.name for w in weights if is_flat_convolution(w) and w.shape[-1] > 1]
    if flat and not known:
        yield (
            f"{shown(flat)} may be of a Conv1d, whose weight has an axis less in torch: if so, merge "
            "with --model and a folder that has weights"
        )
    if known:
        there = {known.name(weight.name) for weight in weights}
        if missing := [name for name in known.exact if name not in there]:
            yield f"not in the checkpoint, but in --model ({len(missing):,}): {shown(missing)}"
