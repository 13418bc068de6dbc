"""Merging a ZeRO checkpoint beside DeepSpeed's zero_to_fp32: time and peak memory, turn by turn.

    python -m benchmarks.merge
    python -m benchmarks.merge --parameters 2e9 --no-moments --no-peer --rounds 1

For stages 2 and 3 it writes a checkpoint of 4 ranks in DeepSpeed's layout, then each side makes the
same safetensors file of it, in a process of its own, and every byte of the tensors is compared.
Peak memory is what the process says of itself at its end (VmHWM). A checkpoint of 5e8 parameters
takes 7 GB (without AdamW's moments 3 GB), and each side's result 2 GB; all of it is removed. Without
the peer, which needs 16 GiB of memory for 2e9 parameters, ours is compared by `ftlaunch merge --verify`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import machine_line, markdown_table

_PEAK = "\nprint('PEAK', open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
_BARE = "pass"
_OURS = (
    "import sys; from ftlaunch.launcher.cli import run; "
    "assert run(['merge', sys.argv[1], sys.argv[2]]) == 0"
)
_VERIFY = _OURS.replace("['merge',", "['merge', '--verify',")
# As `python zero_to_fp32.py FOLDER TARGET --safe_serialization` runs it.
_PEER = (
    "import runpy, sys; import importlib.util as u; "
    "sys.argv[3:] = ['--safe_serialization']; sys.argv[0] = 'zero_to_fp32.py'; "
    "root = u.find_spec('deepspeed').submodule_search_locations[0]; "
    "runpy.run_path(root + '/utils/zero_to_fp32.py', run_name='__main__')"
)
_SIDES = {"ours": _OURS, "zero_to_fp32": _PEER}


@dataclass(frozen=True, slots=True)
class Measurement:
    seconds: float
    peak_mib: float


def run_side(code: str, *arguments: Path) -> Measurement:
    """A fresh interpreter from its start to its end."""
    words = [sys.executable, "-c", code + _PEAK, *map(str, arguments)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    started = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout}{done.stderr}")
    return Measurement(seconds, int(done.stdout.rpartition("PEAK ")[2]) / 1024)


def run_stage(
    folder: Path, stage: int, options: argparse.Namespace
) -> tuple[int, dict[str, list[Measurement]]]:
    """(number of parameters, measurements by side); everything written is gone at the end."""
    source = folder / f"zero{stage}"
    words = [str(source), "--stage", str(stage), "--parameters", str(options.parameters)]
    words.append("--moments" if options.moments else "--no-moments")
    command = [sys.executable, "-m", "benchmarks.zero_files", *words]
    written = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    sides = list(_SIDES) if options.peer else ["ours"]
    runs: dict[str, list[Measurement]] = {side: [] for side in sides}
    for number in range(options.rounds):
        targets = {side: folder / f"{side}-{number}" for side in sides}
        for side in sides if number % 2 == 0 else sides[::-1]:
            runs[side].append(run_side(_SIDES[side], source, targets[side]))
        if number == 0 and options.peer:
            compare(targets["zero_to_fp32"], targets["ours"])
        elif number == 0:
            run_side(_VERIFY, source, targets["ours"])
        for target in targets.values():
            shutil.rmtree(target)
    shutil.rmtree(source)
    return int(written.stdout.split()[-1]), runs


def compare(one: Path, other: Path) -> None:
    """AssertionError unless both folders have the same tensors, bit by bit."""
    places = [_places(folder) for folder in (one, other)]
    assert places[0].keys() == places[1].keys(), places[0].keys() ^ places[1].keys()
    for name in places[0]:
        (path, offset, *kind), (path2, offset2, *kind2) = (each[name] for each in places)
        assert kind == kind2, name
        with open(path, "rb") as file, open(path2, "rb") as file2:
            file.seek(offset)
            file2.seek(offset2)
            left = kind[0]
            while left:
                data = file.read(min(left, 8 << 20))
                assert data == file2.read(len(data)), name
                left -= len(data)


def _places(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Name → file, first byte, number of bytes, dtype, shape. A reader of its own, not the one on trial."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            found[name] = path, 8 + length + begin, end - begin, entry["dtype"], entry["shape"]
    return found


def table(stage: int, count: int, runs: dict[str, list[Measurement]], bare_mib: float) -> str:
    rows = []
    for side, measured in runs.items():
        seconds, peaks = [m.seconds for m in measured], [m.peak_mib for m in measured]
        rows.append(
            [
                side,
                f"{median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})",
                f"{median(peaks):.0f}",
                f"{median(peaks) - bare_mib:.0f}",
            ]
        )
    title = f"ZeRO-{stage}, {count / 1e9:.2f} B parameters"
    return markdown_table((title, "seconds", "peak MiB", "above a bare interpreter"), rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=float, default=5e8)
    parser.add_argument("--stage", type=int, nargs="+", choices=(2, 3), default=[2, 3])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--moments", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--folder", type=Path, help="where to work (default: the temporary folder)")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args(argv)
    bare = median(run_side(_BARE).peak_mib for _ in range(5))
    print(f"{machine_line()}\nbare interpreter: {bare:.1f} MiB", end="\n\n", flush=True)
    report: dict[str, Any] = {"machine": machine_line(), "bare_mib": bare}
    with tempfile.TemporaryDirectory(prefix="merge_", dir=options.folder) as folder:
        free = shutil.disk_usage(folder).free
        needed = (
            options.parameters
            * ((14 if options.moments else 6) + (8 if options.peer else 4))
            * 1.02
        )
        if free < needed:
            raise SystemExit(f"{needed:,.0f} bytes of disk are needed, {free:,} are free")
        for stage in options.stage:
            count, runs = run_stage(Path(folder), stage, options)
            print(table(stage, count, runs, bare), end="\n\n", flush=True)
            report[f"zero{stage}"] = {
                side: [asdict(m) for m in each] for side, each in runs.items()
            }
            report["parameters"] = count
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
