"""Writes checkpoints beside training: it waits for the copy to the host's memory, not for the disk.

No collective runs in the thread that writes. Ranks tell each other with each step (`base.Said`)
whether they still write; when nobody does, rank 0 writes the manifest.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ftlaunch.cluster.control_groups import available_memory
from ftlaunch.cluster.errors import JobError, UserError
from ftlaunch.strategies.base import Strategy, TensorSlice
from ftlaunch.strategies.checkpoint.agreement import all_or_none, any_rank, long_all_or_none
from ftlaunch.strategies.checkpoint.manifest import (
    MODEL_FOLDER,
    Manifest,
    folder_name,
    write_manifest,
)
from ftlaunch.strategies.checkpoint.retention import remove
from ftlaunch.strategies.checkpoint.store import shard_name, write_shard
from ftlaunch.strategies.files import replace_file, sync_folder

# What a rank says in the exchange of a step. A failure outweighs any number of ranks that write.
_WRITES, _FAILED = 1.0, float(1 << 20)
# Copies take at most that part of the host's free memory. Where they would take more there are none,
# and training waits for the disk.
_SHARE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """A checkpoint that is whole on disk.

    seconds   from the request until it was whole
    blocked   of these, those that training waited for
    """

    manifest: Manifest
    folder: Path
    seconds: float
    blocked: float


class Saver:
    """The checkpoints of one rank's run, one at a time.

    model_files   on rank 0: what a finished model has beside its weights, by name
    beside        write in a thread where memory allows it
    alive         called every few seconds while training waits for the disk
    on_saved      is told of every checkpoint that is whole, on every rank, between two steps
    """

    def __init__(
        self,
        strategy: Strategy,
        root: Path,
        *,
        model_files: Mapping[str, bytes] | None = None,
        beside: bool = False,
        alive: Callable[[], None] = lambda: None,
        on_saved: Callable[[Saving], None] = lambda saving: None,
    ) -> None:
        self._strategy = strategy
        self._root = root
        self._model_files = dict(model_files or {})
        self._beside = beside
        self._alive = alive
        self._on_saved = on_saved
        self._pending: _Pending | None = None

    def save(self, manifest: Manifest, *, now: bool = False) -> None:
        """Collective: begin to write the checkpoint of `manifest.step`; return when it is, if `now`.

        UserError on every rank when the disk is full on any, here or at a later step: what was there
        before stays whole.
        """
        self.finish()
        started = time.perf_counter()
        manifest = replace(manifest, aliases=self._strategy.aliases())
        folder = self._root / folder_name(manifest.step)
        beside = self._beside and not now
        copies = self._copies() if beside else None
        if beside and any_rank(self._strategy, copies is None):
            copies = None
        slices = _Slices(self._strategy) if copies is None else copies
        pending = _Pending(manifest, folder, started, lambda: self._write_own(folder, slices))
        self._pending = pending
        if copies is not None:
            pending.thread = threading.Thread(target=pending.run, name="checkpoint", daemon=True)
            pending.thread.start()
        pending.blocked = time.perf_counter() - started
        if copies is None:
            self.finish()

    def say(self) -> float:
        """What this rank has to tell the others with the next step."""
        if self._pending is None:
            return 0.0
        if self._pending.done.is_set():
            return _FAILED if self._pending.error is not None else 0.0
        return _WRITES

    def hear(self, total: float) -> None:
        """Collective, when nobody writes any more or one has failed: `total` is what all have said."""
        if self._pending is not None and (total == 0.0 or total >= _FAILED):
            self.finish()

    def finish(self) -> None:
        """Collective: wait until the checkpoint that is being written is whole."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        began = time.perf_counter()
        what = f"checkpoint {pending.folder}"
        is_main = self._strategy.world.is_main
        try:
            # What was not begun before is written now.
            long_all_or_none(self._strategy, pending.wait, what, alive=self._alive)
            all_or_none(
                self._strategy,
                (lambda: self._write_last(pending)) if is_main else (lambda: None),
                what,
            )
        except (UserError, JobError):
            if is_main:
                remove(pending.folder)
            raise
        now = time.perf_counter()
        self._on_saved(
            Saving(
                manifest=pending.manifest,
                folder=pending.folder,
                seconds=now - pending.started,
                blocked=pending.blocked + now - began,
            )
        )

    def _copies(self) -> list[TensorSlice] | None:
        """A copy of what this rank owns; None where there is no memory for it."""
        room = available_memory() * _SHARE / self._strategy.world.local_size
        copies = []
        for piece in self._strategy.state_slices():
            room -= piece.values.nbytes
            if room < 0:
                return None
            copies.append(replace(piece, values=np.array(piece.values)))
        return copies

    def _write_own(self, folder: Path, slices: Iterable[TensorSlice]) -> None:
        world = self._strategy.world
        folder.mkdir(parents=True, exist_ok=True)
        write_shard(folder / shard_name(world.rank, world.size), slices)
        for name, content in self._model_files.items():
            (folder / MODEL_FOLDER).mkdir(exist_ok=True)
            with replace_file(folder / MODEL_FOLDER / name) as file:
                file.write(content)

    def _write_last(self, pending: _Pending) -> None:
        size = self._strategy.world.size
        names = [shard_name(rank, size) for rank in range(size)]
        manifest = replace(
            pending.manifest,
            files={name: (pending.folder / name).stat().st_size for name in names},
            model_files={name: len(content) for name, content in self._model_files.items()},
        )
        write_manifest(pending.folder, manifest)
        sync_folder(self._root)


class _Slices:
    """What this rank owns, read anew from the strategy each time that one goes through it."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy

    def __iter__(self) -> Iterator[TensorSlice]:
        return iter(self._strategy.state_slices())


class _Pending:
    """A checkpoint of which this rank's part is being written, or has to be."""

    def __init__(
        self, manifest: Manifest, folder: Path, started: float, write: Callable[[], None]
    ) -> None:
        self.manifest = manifest
        self.folder = folder
        self.started = started
        self.blocked = 0.0
        self.thread: threading.Thread | None = None
        self.done = threading.Event()
        self.error: BaseException | None = None
        self._write = write

    def run(self) -> None:
        try:
            self._write()
        except BaseException as error:  # noqa: BLE001 - raised where the others hear of it
            self.error = error
        self.done.set()

    def wait(self) -> None:
        """Write it where no thread does. Raises what the writing raised."""
        if self.thread is None:
            self.run()
        else:
            self.thread.join()
        if self.error is not None:
            raise self.error
