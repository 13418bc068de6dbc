"""What a submission sets aside until SLURM has its job, and how that comes back. Reads none of it.

Below OUT/submission. Each state says by itself what is to be done, whoever was killed in it:

    earlier.part/   being filled or emptied: all that is outside is as old as what is inside
    earlier/        whole. Beside it stands a new submission: undone, unless it has a job.json
    settled-.../    of a submission whose job SLURM has: waits to be deleted
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ftlaunch.cluster.errors import UserError

FOLDER = "submission"
JOB = "job.json"
RUNS = "runs.jsonl"
LOCK = "lock"
_ASIDE = "earlier"
_PART = "earlier.part"
_SETTLED = "settled-"
_OUTPUT = "output"
# The one folder of the output that a submission makes by itself, and a mark: it was not there before.
_LOGS = "logs"
_NO_LOGS = "no-logs"


def set_aside(folder: Path) -> None:
    """The earlier submission; its runs stay."""
    part = folder / _PART
    part.mkdir()
    for path in list(_submission(folder)):
        path.rename(part / path.name)
    part.rename(folder / _ASIDE)


def set_output_aside(folder: Path, names: Sequence[str]) -> None:
    """What an earlier job has written under `names`, and its runs."""
    place = folder / _ASIDE / _OUTPUT
    place.mkdir()
    for name in names:
        path = folder.parent / name
        if name != FOLDER and os.path.lexists(path):
            path.rename(place / name)
    if (folder / RUNS).exists():
        (folder / RUNS).rename(folder / _ASIDE / RUNS)


def make_logs(folder: Path) -> None:
    """Where SLURM writes the job's log. Goes again with the submission, unless it was there before."""
    logs = folder.parent / _LOGS
    if not os.path.lexists(logs):
        (folder / _ASIDE / _NO_LOGS).touch()
    logs.mkdir(exist_ok=True)


def settle(folder: Path) -> None:
    """Job.json is written: nothing of what was set aside comes back."""
    aside = folder / _ASIDE
    if aside.exists():
        aside.rename(folder / f"{_SETTLED}{time.time_ns()}")


def remove_settled(folder: Path) -> None:
    """As far as it can be removed; the next submission tries again."""
    for path in folder.glob(f"{_SETTLED}*"):
        shutil.rmtree(path, ignore_errors=True)


def interrupted(output_dir: Path) -> Path | None:
    """Where the earlier results are while a submission has no answer, or after it was killed then."""
    folder = output_dir / FOLDER
    try:
        if (folder / _PART).exists():
            return folder / _PART
        is_open = (folder / _ASIDE).exists() and not (folder / JOB).exists()
    except PermissionError:
        # Somebody else's: only they put it back.
        return None
    return folder / _ASIDE if is_open else None


def put_back(folder: Path) -> None:
    """Undo a submission without an answer. For whoever has the output folder.

    UserError when something else has taken the place of earlier results; then all stays where it is.
    """
    part, aside = folder / _PART, folder / _ASIDE
    if part.exists():
        _move_back(part, folder)
    if not aside.exists() or (folder / JOB).exists():
        return
    if (aside / _NO_LOGS).exists():
        # Its own one, which a job may have written to.
        with contextlib.suppress(OSError):
            (folder.parent / _LOGS).rmdir()
    _check_free(aside, [*_outputs(aside, folder)])
    for path in list(_submission(folder)):
        remove(path)
    (aside / _NO_LOGS).unlink(missing_ok=True)
    aside.rename(part)
    _move_back(part, folder)


def remove(path: Path) -> None:
    if _is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _move_back(part: Path, folder: Path) -> None:
    """Deletes nothing, so it can be ended anywhere and begun again."""
    own = [(path, folder / path.name) for path in part.iterdir() if path.name != _OUTPUT]
    moves = [*own, *_outputs(part, folder)]
    _check_free(part, moves)
    for path, place in moves:
        path.rename(place)
    for emptied in (part / _OUTPUT / _LOGS, part / _OUTPUT, part):
        if _is_folder(emptied):
            emptied.rmdir()


def _outputs(aside: Path, folder: Path) -> Iterator[tuple[Path, Path]]:
    """What of the output was set aside, and where it belongs."""
    output = aside / _OUTPUT
    for path in output.iterdir() if output.is_dir() else ():
        place = folder.parent / path.name
        # A job that nobody has waited for may have written a log of its own there.
        if path.name == _LOGS and _is_folder(path) and _is_folder(place):
            yield from ((log, place / log.name) for log in path.iterdir())
        else:
            yield path, place


def _check_free(aside: Path, moves: Sequence[tuple[Path, Path]]) -> None:
    # The runs of a job that nobody has waited for say nothing.
    taken = [place for _, place in moves if os.path.lexists(place) and place.name != RUNS]
    if not taken:
        return
    output_dir = aside.parent.parent
    names = ", ".join(sorted(str(place.relative_to(output_dir)) for place in taken))
    raise UserError(
        f"the output folder {output_dir} holds {names}, and so does {aside}, where an ftlaunch submit "
        f"that was killed had set aside the earlier results. Nothing is deleted: remove {aside} to go "
        f"on with what {output_dir} holds, or move {names} out of it to have the earlier ones put "
        "back, and try again."
    )


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _submission(folder: Path) -> Iterator[Path]:
    """The files and folders of the submission that stands there."""
    for path in folder.iterdir():
        is_aside = path.name in (_ASIDE, _PART) or path.name.startswith(_SETTLED)
        if not is_aside and path.name not in (LOCK, RUNS):
            yield path
