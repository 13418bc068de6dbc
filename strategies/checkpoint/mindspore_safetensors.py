"""What a safetensors file of MindSpore or mindone holds. Reads no tensor data but for the checksum.

They differ from those of the Hugging Face libraries in their metadata: `format` is "ms"
(`mindspore.save_checkpoint`) or "np" (mindone's `save_pretrained`), which transformers 4 refuses.
`crc_num` is the CRC-32 of the names and bytes of all tensors, in the order of their names;
`remove_redundancy` tells whether each rank has written a share of the tensors only.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.checkpoint.mindspore_file import MindsporeFile, check_is_file
from ftlaunch.strategies.checkpoint.protobuf_file import file_damaged
from ftlaunch.strategies.checkpoint.run_reader import RunReader
from ftlaunch.strategies.checkpoint.torch_zip import ITEM_BYTES
from ftlaunch.strategies.checkpoint.weights import Run, Weight
from ftlaunch.strategies.safetensors_file import FileDamaged, read_metadata, read_places

# Files of before MindSpore 2.4 and of the safetensors library alone have no metadata.
_FORMATS = ("ms", "np", None)
_PACKED = "Int4"
_MAX_ZERO_BYTES = 1 << 32


def read_safetensors(path: Path) -> MindsporeFile:
    """UserError for a file that is damaged, of another framework, or of which others have the rest."""
    check_is_file(path)
    try:
        metadata, places = read_metadata(path), read_places(path)
    except FileDamaged as error:
        raise file_damaged(path, error.reason) from None
    _check_format(path, metadata)
    entries = []
    for name, place in places.items():
        # Two numbers of 4 bits stand in a byte, and only the metadata says so.
        dtype = _PACKED if metadata.get(name) == _PACKED else place.dtype
        if dtype not in ITEM_BYTES:
            raise UserError(
                f"{path}: {name!r} is of type {dtype!r}, which cannot be merged. Save the checkpoint "
                "with floating-point numbers of 16 bits or more."
            )
        runs = (Run(path, place.offset, place.nbytes),) if place.nbytes else ()
        entries.append(Weight(name=name, dtype=place.dtype, shape=place.shape, runs=runs))
    if (checksum := metadata.get("crc_num")) is not None and checksum != str(_checksum(entries)):
        raise file_damaged(path, "its tensors have another checksum than it says")
    # Its header says what it has to hold, so nothing can be missing at its end.
    return MindsporeFile(path=path, entries=tuple(entries), texts=(), has_checksum=True)


def _check_format(path: Path, metadata: Mapping[str, str]) -> None:
    kind = metadata.get("format")
    if kind == "ftlaunch":
        raise UserError(
            f"{path} is a part of a checkpoint of ftlaunch, which needs its manifest.json. Pass the "
            "folder step-NNNNNNNN, or the output folder of the job."
        )
    if kind not in _FORMATS:
        raise UserError(
            f"{path} is no checkpoint of MindSpore: its metadata says format {kind!r}, which "
            "from_pretrained loads as it is. There is nothing to merge."
        )
    if metadata.get("remove_redundancy") == "True":
        raise UserError(
            f"{path} holds a share of the tensors only: it was saved with remove_redundancy, which "
            "does not say who has the others. Save with remove_redundancy=False, or put the files "
            "together with mindspore.unified_safetensors, and merge that."
        )


def _checksum(entries: list[Weight]) -> int:
    """As MindSpore computes it: `crc32(bytes(array), crc32(name))`, one tensor after the other."""
    checksum = 0
    with RunReader() as reader:
        for entry in sorted(entries, key=lambda each: each.name):
            checksum = zlib.crc32(entry.name.encode(), checksum)
            for data in reader.pieces(entry, converts=False):
                if entry.shape == () and entry.dtype[0] in "IU":
                    # Python makes n zeros of `bytes` of a whole number n without axes.
                    count = int.from_bytes(data.tobytes(), "little", signed=entry.dtype[0] == "I")
                    checksum = _crc_of_zeros(min(count, _MAX_ZERO_BYTES), checksum)
                else:
                    checksum = zlib.crc32(data.data, checksum)
    return checksum


def _crc_of_zeros(count: int, checksum: int) -> int:
    block = bytes(1 << 20)
    for start in range(0, count, len(block)):
        checksum = zlib.crc32(block[: min(len(block), count - start)], checksum)
    return checksum
