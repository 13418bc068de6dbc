"""`ftlaunch merge`: a checkpoint, or an adapter and its base, becomes a folder that `from_pretrained` loads;
or is compared with one.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

from ftlaunch.cluster.errors import EXIT_DONE, EXIT_FAILED, UserError
from ftlaunch.launcher.merge_target import new_folder
from ftlaunch.launcher.wording import one_line
from ftlaunch.strategies.checkpoint.adapter_source import (
    copy_adapted_files,
    open_adapted,
    open_adapter,
)
from ftlaunch.strategies.checkpoint.conversion import SaveDtype
from ftlaunch.strategies.checkpoint.manifest import CheckpointDamaged
from ftlaunch.strategies.checkpoint.merge import (
    Written,
    compare_weights,
    write_adapter,
    write_weights,
    written_bytes,
)
from ftlaunch.strategies.checkpoint.model_files import (
    CONFIG_NAME,
    ModelShapes,
    check_shapes,
    copy_model_files,
    model_files,
    model_folder,
    model_shapes,
)
from ftlaunch.strategies.checkpoint.sources import Source, open_source
from ftlaunch.strategies.checkpoint.weights import Weight
from ftlaunch.strategies.model_config import absolute_path
from ftlaunch.strategies.safetensors_file import FileDamaged

# Headers, configuration, tokenizer and what the file system itself needs.
_BESIDE_WEIGHTS_BYTES = 1 << 20
_SHOWN_DIFFERENCES = 10
_BAR_INTERVAL_SECONDS = 0.2
_BAR_WIDTH = 30


def merge(arguments: argparse.Namespace, flags: Mapping[str, Any]) -> int:
    """Exit code 0; with --verify 1 when something differs. UserError for what cannot be merged."""
    target = absolute_path(arguments.target)
    try:
        with _sigterm_as_ctrl_c():
            if arguments.verify and not any(target.glob("*.safetensors")):
                raise UserError(
                    f"{target} has no safetensors files. Pass the folder that a merge made."
                )
            if arguments.adapter is not None:
                adapter = absolute_path(arguments.adapter)
                return _merge_adapter(adapter, arguments, target)
            source_path = absolute_path(arguments.source)
            if arguments.verify:
                return _verify(open_source(source_path, _shapes_of(target)), target)
            _merge(source_path, target, arguments.dtype or "fp32", arguments.model)
            return EXIT_DONE
    except CheckpointDamaged as error:
        raise UserError(f"{error}. Copy it anew, or merge another checkpoint.") from None


def _merge(source_path: Path, target: Path, dtype: SaveDtype, model: str | None) -> None:
    started = time.monotonic()
    given = None if model is None else model_folder(model)
    source = open_source(source_path, None if given is None else model_shapes(given))
    for line in (source.what, *source.notes):
        print(one_line(line))
    if not source.weights:
        raise UserError(f"{source_path} has no weights. Merge another checkpoint.")
    if source.adapter and model is not None:
        raise UserError(
            f"{source_path} holds an adapter, which has no config.json: --model means nothing to it. To put "
            f"it into its base: ftlaunch merge --adapter {source_path} BASE TARGET."
        )
    # --model goes before what is there.
    beside = source.model if given is None else (given, model_files(given))
    if beside is not None and not source.adapter and (given is not None or not source.beside):
        check_shapes(source.weights, beside[0])
    write = write_adapter if source.adapter else write_weights
    with new_folder(target) as folder:
        _check_space(source.weights, folder, target, dtype)
        with _Bar(sys.stderr) as bar:
            written = write(source.weights, folder, dtype=dtype, on_progress=bar.show)
        if beside is not None:
            copy_model_files(*beside, folder, dtype=dtype)
    for line in _end(written, target, dtype, beside, time.monotonic() - started):
        print(one_line(line))


def _merge_adapter(adapter: Path, arguments: argparse.Namespace, target: Path) -> int:
    """An adapter into its base's weights. The exit code."""
    started = time.monotonic()
    opened = open_adapter(adapter)
    # Another model's revisions are others.
    revision = opened.config.revision if arguments.source == opened.config.base else None
    base = model_folder(arguments.source, of="BASE", weights=True, revision=revision).absolute()
    given = None if arguments.model is None else model_folder(arguments.model)
    model = open_adapted(opened, base)
    if given is not None:
        check_shapes(model.weights, given)
    if arguments.verify:
        return _verify(Source(what=model.what, weights=model.weights, model=None, notes=()), target)
    for line in (model.what, *model.notes):
        print(one_line(line))
    dtype = arguments.dtype or model.dtype
    with new_folder(target) as folder:
        _check_space(model.weights, folder, target, dtype)
        with _Bar(sys.stderr) as bar:
            written = write_weights(model.weights, folder, dtype=dtype, on_progress=bar.show)
        copy_adapted_files(model, folder, given=given, dtype=dtype or model.main_dtype)
        beside = (folder, (CONFIG_NAME,)) if (folder / CONFIG_NAME).is_file() else None
    said = dtype or "each in the base's dtype"
    for line in _end(written, target, said, beside, time.monotonic() - started):
        print(one_line(line))
    return EXIT_DONE


def _check_space(
    weights: Sequence[Weight], folder: Path, target: Path, dtype: SaveDtype | None
) -> None:
    needed = written_bytes(weights, dtype) + _BESIDE_WEIGHTS_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the disk has no space for {target}: {needed:,} bytes are needed, {free:,} are free. Free "
            "some space, or choose another place or a smaller dtype."
        )


def _end(
    written: Written,
    target: Path,
    dtype: str,
    beside: tuple[Path, tuple[str, ...]] | None,
    seconds: float,
) -> Iterator[str]:
    if written.overflowed is not None:
        yield f"{written.overflowed} has numbers too large for fp16, which are infinite now: use bf16 or fp32"
    if beside is None:
        yield (
            "config.json is missing, since the checkpoint has none: merge again with --model, or "
            f"copy config.json and the tokenizer into {target}"
        )
    yield (
        f"wrote {target}: {written.num_tensors:,} tensors, {written.num_parameters:,} parameters, "
        f"{written.num_bytes:,} bytes, {dtype}, {seconds:.1f} s"
    )


def _verify(source: Source, target: Path) -> int:
    started = time.monotonic()
    print(one_line(source.what))
    differences: list[str] = []
    try:
        with _Bar(sys.stderr) as bar:
            for line in compare_weights(source.weights, target, on_progress=bar.show):
                differences.append(line)
    except FileDamaged as error:
        raise UserError(f"{error}. Merge again.") from None
    for line in differences[:_SHOWN_DIFFERENCES]:
        print(one_line(line))
    if len(differences) > _SHOWN_DIFFERENCES:
        print(f"and {len(differences) - _SHOWN_DIFFERENCES:,} more")
    seconds = time.monotonic() - started
    if differences:
        print(f"{one_line(str(target))} differs in {len(differences):,} tensors, {seconds:.1f} s")
        return EXIT_FAILED
    print(
        f"{one_line(str(target))} is the same: {len(source.weights):,} tensors compared, {seconds:.1f} s"
    )
    return EXIT_DONE


def _shapes_of(target: Path) -> ModelShapes | None:
    """What the names and shapes of the model are that was merged, where --model had said so."""
    try:
        return model_shapes(target)
    except UserError:
        return None  # told when they are compared


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """So that both remove what is unfinished."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Bar:
    """One line on a terminal, nothing elsewhere. Not rich: it would take half of the memory."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._on = stream.isatty()
        self._shown_at = 0.0
        self._started = time.monotonic()

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._on and self._shown_at:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def show(self, done: int, total: int) -> None:
        now = time.monotonic()
        if not self._on or now - self._shown_at < _BAR_INTERVAL_SECONDS:
            return
        self._shown_at = now
        filled = _BAR_WIDTH * done // max(1, total)
        rate = done / max(1e-9, now - self._started)
        bar = "━" * filled + " " * (_BAR_WIDTH - filled)
        self._stream.write(
            f"\r\x1b[K{bar} {done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s"
        )
        self._stream.flush()
