"""Accuracy on MRPC after three epochs: `ftlaunch` and the HF Trainer, same settings.

    python -m benchmarks.mrpc_accuracy --model FOLDER --data FOLDER --out mrpc.json
    python -m benchmarks.mrpc_accuracy --strategies ddp zero2 zero3 --no-peer …
    python -m benchmarks.mrpc_accuracy --strategies ddp mindspore --no-peer --epochs 1 …

The data folder holds train.jsonl and test.jsonl with sentence1, sentence2 and label. Both sides:
2 ranks of 1 thread, global batch 32, learning rate 2e-4 falling to 0, at most 128 tokens, fp32.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from benchmarks.report import machine_line, markdown_table
from benchmarks.sides import OURS, Measurement, Work, run_side

PEER = "HF Trainer"
# By side and seed; our sides are strategies.
Results = Mapping[str, Mapping[int, Measurement]]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--max-steps", type=int, help="overrides --epochs, to try the script")
    parser.add_argument("--strategies", nargs="*", default=["ddp"], metavar="NAME", help="ours")
    parser.add_argument(
        "--mindspore-python",
        default=".venv-mindspore/bin/python",
        metavar="FILE",
        help="of the environment with MindSpore",
    )
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--our-precision",
        choices=("fp32", "auto"),
        default="fp32",
        help="auto: what our plan chooses; the peer has fp32",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    return parser.parse_args(argv)


def work_of(options: argparse.Namespace, side: str, seed: int) -> Work:
    return Work(
        strategy=side,
        model=options.model.resolve(),
        data=options.data.resolve(),
        text_columns=("sentence1", "sentence2"),
        max_length=128,
        ranks=2,
        threads=1,
        precision="fp32" if options.our_precision == "fp32" else None,
        learning_rate=2e-4,
        seed=seed,
        epochs=options.epochs,
        max_steps=options.max_steps,
        evaluate=True,
        python=str(Path(options.mindspore_python).absolute())
        if side == "mindspore"
        else sys.executable,
    )


def run_all(options: argparse.Namespace) -> Results:
    """Side after side within a seed; the JSON is written anew after each run."""
    sides = [*options.strategies, *([PEER] if options.peer else [])]
    results: dict[str, dict[int, Measurement]] = {side: {} for side in sides}
    with tempfile.TemporaryDirectory(prefix="mrpc_accuracy_") as folder:
        for seed in options.seeds:
            for side, by_seed in results.items():
                work = work_of(options, side, seed)
                place = Path(folder) / f"{side.replace(' ', '_')}_{seed}"
                by_seed[seed] = run_side("hf" if side == PEER else OURS, work, place)
                if options.out is not None:
                    save(results, options.out)
    return results


def save(results: Results, file: Path) -> None:
    runs = {
        side: {seed: asdict(run) for seed, run in by_seed.items()}
        for side, by_seed in results.items()
    }
    file.write_text(json.dumps({"machine": machine_line(), **runs}, indent=2) + "\n")


def table(results: Results) -> str:
    header = ("side", "seed", "accuracy", "F1", "training s", "samples/s", "whole command s")
    rows = []
    for side, by_seed in results.items():
        rows += [_row(side, str(seed), [run]) for seed, run in by_seed.items()]
        rows.append(_row(side, "mean", list(by_seed.values())))
    return markdown_table(header, rows)


def _row(side: str, seed: str, runs: Sequence[Measurement]) -> list[str]:
    return [
        side,
        seed,
        f"{fmean(run.metrics['accuracy'] for run in runs):.4f}",
        f"{fmean(run.metrics['f1'] for run in runs):.4f}",
        f"{fmean(run.train_seconds for run in runs):.1f}",
        f"{fmean(run.samples_per_second for run in runs):.1f}",
        f"{fmean(run.wall_seconds for run in runs):.1f}",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    results = run_all(options)
    print(machine_line(), end="\n\n")
    print(table(results))


if __name__ == "__main__":
    main()
