"""Seconds from the command to the first optimizer step, and to a first reduction, beside torchrun.

    python -m benchmarks.startup --model FOLDER --data FOLDER --out startup.json

first_step   4 ranks, the same model and data: ours beside torchrun with an HF Trainer script. Each side
             computes in the precision that it takes by itself, ours in bf16 where the CPU has it, the
             Trainer in fp32; with --precision fp32 both in that
reduce       a script that reduces one number, on 2 and on 16 nodes of 1 rank: ours as it comes
             (on few cores the ranks share the script's import) and with an interpreter each,
             beside torchrun with as many ranks

Turn by turn, medians of rounds, warm file cache (a round before the first is not counted). `data`
holds train.jsonl and test.jsonl with the columns sentence1, sentence2 and label.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import machine_line, markdown_table
from ftlaunch.launcher.bench_peers import run_program

_TIMEOUT = 300.0
_FTLAUNCH = (sys.executable, "-m", "ftlaunch.launcher")
_TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
_FIRST_STEP = ("first_step, ftlaunch", "first_step, torchrun + HF Trainer")
_REDUCE = """\
import time
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
number = torch.ones(1)
dist.all_reduce(number)
assert number.item() == dist.get_world_size()
if dist.get_rank() == 0:
    print("reduced at", time.time(), flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def our_command(model: Path, data: Path, folder: Path, precision: str | None) -> list[str]:
    return [
        *_FTLAUNCH,
        *("--nodes", "4", "--model", str(model), "--dataset", str(data)),
        *("-o", str(folder / "out"), *(("--precision", precision) if precision else ())),
        *("data.text_columns=[sentence1,sentence2]", "data.max_length=128", "train.max_steps=1"),
        *("train.eval_strategy=no", f"data.cache_dir={folder.parent / 'our_cache'}"),
    ]


def trainer_work(model: Path, data: Path, precision: str | None) -> dict[str, Any]:
    work = {
        "model": str(model),
        "rows": str(data / "train.jsonl"),
        "text_columns": ("sentence1", "sentence2"),
        "max_length": 128,
        "micro_batch": 8,
        "steps": 1,
        "threads": 1,
    }
    return work | ({"precision": precision} if precision else {})


def ours_first_step(model: Path, data: Path, precision: str | None, folder: Path) -> float:
    """Seconds until the first step is on record."""
    command = our_command(model, data, folder, precision)
    started = time.time()
    with _running(command, folder) as process:
        metrics = folder / "out" / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size):
            _check(process, started)
            time.sleep(0.01)
        seconds = time.time() - started
        process.wait(timeout=_TIMEOUT)
    return seconds


def trainer_first_step(model: Path, data: Path, precision: str | None, folder: Path) -> float:
    """The same under torchrun: the script notes when its first step was done."""
    started = time.time()
    work = trainer_work(model, data, precision) | {"started_at": started}
    cache = {"HF_DATASETS_CACHE": str(folder.parent / "peer_cache"), "HF_HUB_OFFLINE": "1"}
    run = run_program(
        "hf",
        work,
        ranks=4,
        folder=folder / "peer",
        timeout_seconds=_TIMEOUT,
        environment=cache,
    )
    return float(run.result["first_step_at"]) - started


def reduce_seconds(command: Sequence[str], folder: Path) -> float:
    """Until the number is reduced, by the script's own word."""
    script = folder / "reduce.py"
    script.write_text(_REDUCE)
    started = time.time()
    with _running([*command, str(script)], folder, {"OMP_NUM_THREADS": "1"}) as process:
        output = process.communicate(timeout=_TIMEOUT)[0]
    line = next(line for line in output.splitlines() if line.startswith("reduced at"))
    return float(line.split()[-1]) - started


class _running:
    """A command in a folder of its own; ended if it is still there on leaving."""

    def __init__(
        self, command: Sequence[str], folder: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __enter__(self) -> subprocess.Popen[str]:
        return self._process

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()
        self._process.communicate(timeout=60)


def _check(process: subprocess.Popen[str], started: float) -> None:
    if process.poll() is not None or time.time() - started > _TIMEOUT:
        raise SystemExit(f"no first step:\n{process.communicate(timeout=60)[0][-4000:]}")


def sides_of(model: Path, data: Path, precision: str | None) -> dict[str, Callable[[Path], float]]:
    sides: dict[str, Callable[[Path], float]] = {
        _FIRST_STEP[0]: partial(ours_first_step, model, data, precision),
        _FIRST_STEP[1]: partial(trainer_first_step, model, data, precision),
    }
    for nodes in (2, 16):
        for name, keys in {"ftlaunch": (), "ftlaunch exec": ("cluster.start_method=exec",)}.items():
            command = [*_FTLAUNCH, "--nodes", str(nodes), "-o", "out", *keys]
            sides[f"reduce, {nodes} nodes, {name}"] = partial(reduce_seconds, command)
        command = [*_TORCHRUN, f"--nproc-per-node={nodes}"]
        sides[f"reduce, {nodes} ranks, torchrun"] = partial(reduce_seconds, command)
    return sides


def _pair_lines(seconds: Mapping[str, Sequence[float]], precision: str | None) -> list[str]:
    """How long ours takes of what torchrun takes, round by round."""
    ours, theirs = (seconds.get(name) for name in _FIRST_STEP)
    if not ours or not theirs:
        return []
    pairs = sorted(mine / their for mine, their in zip(ours, theirs, strict=True))
    ratio = f"{median(pairs):.2f} of the other ({pairs[0]:.2f} to {pairs[-1]:.2f})"
    both = f"both in {precision}" if precision else "each in the precision that it takes by itself"
    return ["", f"first_step: {ratio}, {both}"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="sides whose name holds this")
    parser.add_argument("--precision", choices=["fp32"], help="of both sides' first step")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args(argv)
    sides = sides_of(options.model.resolve(), options.data.resolve(), options.precision)
    sides = {name: side for name, side in sides.items() if options.only in name}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory(prefix="startup_") as root:
        for number in range(options.rounds + 1):
            order = list(sides) if number % 2 else list(sides)[::-1]
            for name in order:
                folder = Path(root) / f"{number} {name}".replace(" ", "_").replace(",", "")
                folder.mkdir()
                taken = sides[name](folder)
                # The first round fills the caches of files and tokens.
                if number:
                    seconds[name].append(taken)
    print(machine_line(), end="\n\n")
    rows = [
        [name, f"{median(all_):.2f}", f"{min(all_):.2f} to {max(all_):.2f}"]
        for name, all_ in seconds.items()
    ]
    print(markdown_table(("", "median s", "from to"), rows))
    print(*_pair_lines(seconds, options.precision), sep="\n")
    if options.out is not None:
        report = {
            "machine": machine_line(),
            "precision": options.precision,
            "seconds": seconds,
        }
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
