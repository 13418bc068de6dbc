"""What a site's SLURM is asked for, and which values may stand in a batch file. Asks no SLURM."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge, Le

Words = str | int | None
_STRICT = {"extra": "forbid", "allow_inf_nan": False}
# SLURM may send a signal up to a minute early; a lead below that would not be worth a word.
DEFAULT_LEAD_SECONDS = 120
_MIN_LEAD_SECONDS = 60
_MAX_LEAD_SECONDS = 65_535
# minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_NO_LIMIT = ("UNLIMITED", "INFINITE")
_KEY = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*")
# Set by us, and what each is instead for the user.
_OURS = {
    "nodes": "--nodes",
    "ntasks": "--nodes and --devices",
    "ntasks-per-node": "--devices",
    "output": "OUT/logs",
    "error": "OUT/logs",
    "open-mode": "OUT/logs",
    "chdir": "the folder in which you submit",
    "signal": "slurm.signal_seconds",
    "no-requeue": "slurm.requeue",
    "clusters": "the variable SLURM_CLUSTERS",
    "array": "one submission for each job",
    "wrap": "",
    "parsable": "",
    "wait": "ftlaunch logs OUT --follow",
    "test-only": "--dry-run",
    "quiet": "",
    "hold-job": "slurm.hold",
}
# C0, C1 and what else ends a line or hides one; lone surrogates cannot be written at all.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmOptions:
    """Read by `ftlaunch submit` only. None: what the site's SLURM does by itself."""

    __pydantic_config__ = _STRICT

    partition: Words = None
    account: Words = None
    qos: Words = None
    constraint: Words = None
    gpus_per_node: Words = None
    time: Words = None
    mem: Words = None
    exclude: Words = None
    # Between the signal that announces the time limit and the limit; None: by how long a save takes.
    signal_seconds: Annotated[int, Ge(1), Le(_MAX_LEAD_SECONDS)] | None = None
    # Back into the queue, by ourselves, after the time limit or a preemption.
    requeue: bool = True
    # Any other long option of sbatch: {"cpus-per-task": 8, "exclusive": True}.
    additional: dict[str, str | int | float | bool] = field(default_factory=dict)

    def parameters(self) -> dict[str, str | bool]:
        """Long options of sbatch without their dashes; True: without a value."""
        named = ("partition", "account", "qos", "constraint", "gpus_per_node", "time", "mem")
        found: dict[str, str | bool] = {
            name.replace("_", "-"): str(getattr(self, name))
            for name in (*named, "exclude")
            if getattr(self, name) is not None
        }
        for key, value in self.additional.items():
            if value is not False:
                found[key.replace("_", "-")] = True if value is True else str(value)
        return found


def with_free_keys(section: Mapping[str, Any]) -> dict[str, Any]:
    """The section `slurm` with the keys that are none of ours below `additional`.

    What is nearly one of ours stays where it is, to be refused with its right name.
    """
    own = [each.name for each in dataclasses.fields(SlurmOptions)]
    known: dict[str, Any] = {}
    free: dict[str, Any] = {}
    for key, value in section.items():
        name = str(key).replace("-", "_")
        if name in own:
            known[name] = value
        elif difflib.get_close_matches(name, own, 1, 0.85):
            known[str(key)] = value
        else:
            free[str(key)] = value
    given = known.get("additional", {})
    if free and isinstance(given, Mapping):
        known["additional"] = {**given, **free}
    return known


def slurm_mistakes(options: SlurmOptions) -> list[str]:
    """What may not stand in a batch file, or cannot be meant; one line each."""
    lines = []
    for key, value in options.additional.items():
        name = key.replace("_", "-")
        if not _KEY.fullmatch(name):
            lines.append(
                f"slurm.{_shown(key)} is not an option of sbatch: one is written like cpus_per_task. "
                "Correct the key."
            )
        elif name in _OURS:
            instead = f" Use {_OURS[name]}." if _OURS[name] else ""
            lines.append(f"slurm.{key} is set by ftlaunch submit itself.{instead}")
        elif isinstance(value, float) and not math.isfinite(value):
            lines.append(f"slurm.{key} is {value}: it must be a number, a word, true or false.")
    for key, value in options.parameters().items():
        if isinstance(value, str) and (_UNPRINTABLE.search(value) or not value.strip()):
            lines.append(
                f"slurm.{key.replace('-', '_')} is {_shown(value)}: a value is one line of printable "
                "characters. It stands in the head of a batch file, where a line break would begin "
                "a command."
            )
    limit = math.inf if options.time is None else time_limit_seconds(options.time)
    if limit is not None and (options.signal_seconds or 0) >= (limit or math.inf):
        lines.append(
            f"slurm.signal_seconds is {options.signal_seconds}, and slurm.time only "
            f"{limit:.0f} s: the job would be told of its end before it begins. Set it lower."
        )
    if limit is None:
        lines.append(
            f"slurm.time is {_shown(str(options.time))}: SLURM reads minutes, H:MM:SS, D-HH or "
            "D-HH:MM:SS. Write for example --time 4:00:00 for four hours."
        )
    return lines


def time_limit_seconds(value: str | int) -> float | None:
    """Of a time as sbatch reads it; infinity for none; None when it is not a time."""
    text = str(value).strip()
    if text.upper() in _NO_LIMIT:
        return math.inf
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    days, *rest = match.groups()
    numbers = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(numbers) == 3:
        return (numbers[0] * 60 + numbers[1]) * 60 + numbers[2]
    minutes, seconds = (*numbers, 0)[:2]
    return minutes * 60 + seconds


def signal_lead(
    options: SlurmOptions, save_seconds: Iterable[float], step_seconds: float
) -> tuple[int, str]:
    """(seconds before the time limit at which the job is told of it, why so many).

    save_seconds   how long the saves of an earlier run of this job took
    step_seconds   how long its steps took: a stop waits for the end of one
    """
    longest = max(save_seconds, default=None)
    if options.signal_seconds is not None:
        lead, why = options.signal_seconds, "as asked for (slurm.signal_seconds)"
    elif longest is None:
        lead, why = DEFAULT_LEAD_SECONDS, "no save has been measured in this folder yet"
    else:
        lead = max(_MIN_LEAD_SECONDS, math.ceil(2 * (longest + step_seconds)) + 30)
        why = f"a save took {longest:.1f} s here: twice that and a step, and half a minute"
    limit = math.inf if options.time is None else time_limit_seconds(options.time)
    if options.signal_seconds is None and limit and lead > limit / 2:
        lead, why = max(1, int(limit / 2)), "half of the time limit, which leaves the rest to work"
    return min(lead, _MAX_LEAD_SECONDS), why


def printable(text: str) -> bool:
    return not _UNPRINTABLE.search(text)


def _shown(text: str) -> str:
    short = text if len(text) <= 80 else f"{text[:77]}…"
    return ascii(short) if not printable(short) else repr(short)
