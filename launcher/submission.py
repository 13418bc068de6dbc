"""The sealed submission of a job: `OUT/submission/`, from which a queued job runs. Asks no SLURM.

What is sealed: the whole configuration, our own code, the user's script, the revisions of what the
hub has. `job.json` says which job of SLURM it is, `runs.jsonl` each start and end of it. What stood
there before is in `earlier.py`'s hands until SLURM has the job.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import importlib.util
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.machine import code_fingerprint
from ftlaunch.cluster.slurm_queue import is_job_id
from ftlaunch.launcher import earlier
from ftlaunch.launcher.config import RunConfig
from ftlaunch.launcher.earlier import FOLDER, JOB, LOCK, RUNS
from ftlaunch.launcher.line_log import LineLog, read_lines
from ftlaunch.launcher.output_folder import MARK, OWN_NAMES
from ftlaunch.launcher.script_plan import Script
from ftlaunch.launcher.slurm_options import printable
from ftlaunch.strategies.checkpoint.manifest import write_json

CODE = "code"
_CONFIG = "config.json"
_PACKAGES = ("launcher", "strategies", "cluster")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """All that a queued job runs by. `script`: a user's own, whose text is sealed where it is a file."""

    config: RunConfig
    script: Script | None
    working_dir: str
    code_fingerprint: str
    lead_seconds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmittedJob:
    """What job.json says: which job SLURM has, and what it was asked for."""

    job_id: str
    name: str
    submitted: str
    host: str
    num_nodes: int
    lead_seconds: int
    parameters: Mapping[str, str | bool]
    fetched: Sequence[Mapping[str, str]] = ()


def submission_folder(output_dir: Path) -> Path:
    return output_dir / FOLDER


def check_folder_name(output_dir: Path) -> None:
    """UserError for a path that SLURM or an interpreter would read as something else."""
    text = str(output_dir)
    for character, why in (
        ("%", "SLURM and submitit read it as a pattern, such as %j for the job's number"),
        (":", "it divides the folders of PYTHONPATH, by which the job finds its sealed code"),
        ("\\", "SLURM takes it for the escape of the next character"),
    ):
        if character in text:
            raise UserError(
                f"the output folder {text} has {character!r} in its path: {why}. Choose another "
                "with --output-dir."
            )
    if not printable(text):
        raise UserError(
            f"the output folder {text!a} has characters that a batch file cannot hold. Choose "
            "another with --output-dir."
        )


@contextlib.contextmanager
def only_submission(output_dir: Path) -> Iterator[Path]:
    """The folder of the submission, which nobody else changes meanwhile."""
    folder = submission_folder(output_dir)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    with open(folder / LOCK, "a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another ftlaunch submit is working in {folder}. Wait for it, or choose another "
                "folder with --output-dir."
            ) from None
        # An earlier submission may have been killed in the middle.
        earlier.put_back(folder)
        earlier.settle(folder)
        earlier.remove_settled(folder)
        yield folder


def seal(folder: Path, sealed: Sealed) -> Sealed:
    """Write a submission; as it was written. An earlier one steps aside until `settle` or `withdraw`."""
    earlier.set_aside(folder)
    for package in _PACKAGES:
        spec = importlib.util.find_spec(f"ftlaunch.{package}")
        assert spec is not None and spec.submodule_search_locations is not None, package
        source = Path(next(iter(spec.submodule_search_locations)))
        shutil.copytree(
            source,
            folder / CODE / "ftlaunch" / package,
            ignore=shutil.ignore_patterns("__pycache__", "*.pyc"),
        )
    sealed = replace(sealed, script=_with_copy(folder, sealed.script))
    write_json(folder / _CONFIG, _to_json(sealed))
    return sealed


def read_sealed(folder: Path) -> Sealed:
    """UserError when it is not one of this code's."""
    import pydantic

    path = folder / _CONFIG
    try:
        raw = json.loads(path.read_bytes())
        return pydantic.TypeAdapter(Sealed).validate_python(raw)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a sealed submission of this ftlaunch: {error}") from None


def check_code(sealed: Sealed) -> None:
    """UserError when what runs is not what was sealed."""
    found = code_fingerprint()
    if found != sealed.code_fingerprint:
        raise UserError(
            f"the code that runs ({found}) is not the one that was sealed when the job was submitted "
            f"({sealed.code_fingerprint}): the copy below {FOLDER}/{CODE} was changed, or another "
            "comes before it on the path. Submit the job again."
        )


def submitted_job(output_dir: Path) -> SubmittedJob | None:
    """None where nothing was submitted, or job.json cannot be read."""
    import pydantic

    try:
        raw = json.loads((submission_folder(output_dir) / JOB).read_bytes())
        job = pydantic.TypeAdapter(SubmittedJob).validate_python(raw)
    except (OSError, ValueError, RecursionError):
        return None
    return job if is_job_id(job.job_id) else None


def settle(folder: Path, job: SubmittedJob) -> None:
    """SLURM has the job: what stood here before will not come back. Deleting it is left to do."""
    write_json(folder / JOB, asdict(job))
    with contextlib.suppress(OSError):
        # With job.json beside it, the next submission does the same.
        earlier.settle(folder)


def withdraw(folder: Path, *, was_there: bool) -> None:
    """SLURM has refused the job: everything is as it was.

    was_there   the output folder has been used before
    """
    earlier.put_back(folder)
    if {path.name for path in folder.iterdir()} <= {LOCK}:
        earlier.remove(folder)
    output_dir = folder.parent
    if not was_there and not any((output_dir / name).exists() for name in OWN_NAMES):
        (output_dir / MARK).unlink(missing_ok=True)


# -- runs ---------------------------------------------------------------------------------------


def note_run(folder: Path, kind: str, **fields: Any) -> None:
    """One line of runs.jsonl."""
    log = LineLog(folder / RUNS)
    try:
        log.append({"kind": kind, **fields, "time": round(time.time(), 3)})
    finally:
        log.close()


def runs_of(folder: Path, job_id: str) -> list[dict[str, Any]]:
    """The starts and ends of a job, in order."""
    return [line for line in read_lines(folder / RUNS) if line.get("job_id") == job_id]


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


# -- inside -------------------------------------------------------------------------------------


def _with_copy(folder: Path, script: Script | None) -> Script | None:
    """The user's file is copied; what it imports stays where it is."""
    if script is None or script.kind == "module":
        return script
    original = Path(script.target).absolute()
    copy = folder / "script" / (original.name if printable(original.name) else "script.py")
    copy.parent.mkdir()
    shutil.copyfile(original, copy)
    copy.chmod(0o600)
    return replace(script, copy=str(copy))


def _to_json(sealed: Sealed) -> Any:
    import pydantic

    return pydantic.TypeAdapter(Sealed).dump_python(sealed, mode="json")
