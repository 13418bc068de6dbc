"""Training speed beside the HF Trainer: both sides in one run, turn by turn, medians of rounds.

    python -m benchmarks.speed --model FOLDER --mrpc FOLDER --yelp FOLDER --out speed.json

mrpc_equal_1     1 rank, every core a thread, fp32, batch 32, at most 128 tokens: equal settings
mrpc_equal_2     the same on 2 ranks, global batch 32
yelp_default     2 ranks, at most 512 tokens: ours with its defaults, the peer fp32, dynamic padding
yelp_max_length  the same, the peer padding every row to 512
cache            ours twice on Yelp: seconds until the tokens are there, without and with the cache

Both sides are measured from the end of the last warm-up step to the end of the last step. Each
draws its own order from the seed, so look at tokens per second too. An idle machine, please.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import machine_line, markdown_table
from benchmarks.sides import Measurement, Side, Work, data_seconds, run_ours, run_peer

Round = Mapping[Side, Measurement]
_CACHE_CASE = "cache"


@dataclass(frozen=True, slots=True, kw_only=True)
class Folders:
    model: Path
    mrpc: Path
    yelp: Path


def mrpc_equal(folders: Folders, ranks: int) -> dict[Side, Work]:
    """The same samples per step, micro-batch, dtype and threads on both sides."""
    work = Work(
        model=folders.model,
        data=folders.mrpc,
        text_columns=("sentence1", "sentence2"),
        max_length=128,
        ranks=ranks,
        threads=max(1, len(os.sched_getaffinity(0)) // ranks),
        precision="fp32",
        micro_batch=32 // ranks,
        max_steps=15,
        warmup_steps=3,
    )
    return {"ours": work, "peer": work}


def yelp_default(folders: Folders) -> dict[Side, Work]:
    """What each side does when it is only told the model, the data and the ranks."""
    ours = Work(
        model=folders.model,
        data=folders.yelp,
        text_columns=("text",),
        max_length=512,
        ranks=2,
        max_steps=15,
        warmup_steps=3,
    )
    return {"ours": ours, "peer": replace(ours, precision="fp32")}


def yelp_max_length(folders: Folders) -> dict[Side, Work]:
    """Fewer steps for the slow side: its rows are all alike, so its steps are too."""
    works = yelp_default(folders)
    padded = replace(works["peer"], padding="max_length", max_steps=2, warmup_steps=1)
    return {"ours": replace(works["ours"], max_steps=6, warmup_steps=2), "peer": padded}


CASES: dict[str, Callable[[Folders], dict[Side, Work]]] = {
    "mrpc_equal_1": lambda folders: mrpc_equal(folders, 1),
    "mrpc_equal_2": lambda folders: mrpc_equal(folders, 2),
    "yelp_default": yelp_default,
    "yelp_max_length": yelp_max_length,
}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cases = (*CASES, _CACHE_CASE)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--mrpc", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--yelp", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--case", nargs="+", choices=cases, default=list(cases))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="to try the script: both sides, no warm-up")
    parser.add_argument("--ours", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    return parser.parse_args(argv)


def run_rounds(works: Mapping[Side, Work], rounds: int) -> list[Round]:
    """Turn by turn; who begins changes from round to round. Tokens are cached between rounds."""
    results: list[Round] = []
    with tempfile.TemporaryDirectory(prefix="speed_") as folder:
        for number in range(rounds):
            order = list(works) if number % 2 == 0 else list(works)[::-1]
            runs: dict[Side, Measurement] = {}
            for side in order:
                run = run_ours if side == "ours" else run_peer
                runs[side] = run(works[side], Path(folder) / f"{side}_{number}")
            results.append(runs)
    return results


def run_cache_rounds(folders: Folders, rounds: int) -> list[tuple[float, float]]:
    """Seconds until the tokens are there, with an empty cache and with the one it left."""
    work = replace(yelp_default(folders)["ours"], max_steps=1, warmup_steps=0)
    results = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="speed_") as folder:
            cold, warm = (run_ours(work, Path(folder) / name) for name in ("cold", "warm"))
        results.append((data_seconds(cold), data_seconds(warm)))
    return results


def summarize(rounds: Sequence[Round]) -> dict[str, Any]:
    """Per side and rate: median, min and max; with both sides, how much faster ours is."""
    rates = ("samples_per_second", "tokens_per_second")
    summary: dict[str, Any] = {
        side: {rate: _spread([getattr(runs[side], rate) for runs in rounds]) for rate in rates}
        for side in rounds[0]
    }
    if len(rounds[0]) == 2:
        summary["ratio"] = {rate: _ratios(rounds, rate) for rate in rates}
    return summary


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def _ratios(rounds: Sequence[Round], rate: str) -> dict[str, float]:
    ours = [getattr(runs["ours"], rate) for runs in rounds]
    peer = [getattr(runs["peer"], rate) for runs in rounds]
    pairs = [mine / theirs for mine, theirs in zip(ours, peer, strict=True)]
    return {"of_medians": median(ours) / median(peer), "median_of_pairs": median(pairs)}


def speed_rows(rounds: Sequence[Round]) -> list[list[str]]:
    summary = summarize(rounds)
    rows = []
    for side in rounds[0]:
        runs = [each[side] for each in rounds]
        rows.append(
            [
                side,
                _spread_text(summary[side]["samples_per_second"], 1),
                _spread_text(summary[side]["tokens_per_second"], 0),
                f"{100 * median(run.padding_share for run in runs):.1f} %",
                f"{median(run.wall_seconds for run in runs):.1f}",
            ]
        )
    if "ratio" in summary:
        rows.append(["ours / peer", *_ratio_texts(summary["ratio"]), "", ""])
    return rows


def _spread_text(spread: Mapping[str, float], digits: int) -> str:
    middle, low, high = (f"{spread[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{middle} ({low} to {high})"


def _ratio_texts(ratio: Mapping[str, Mapping[str, float]]) -> list[str]:
    return [
        f"{values['of_medians']:.2f} (pairs {values['median_of_pairs']:.2f})"
        for values in (ratio["samples_per_second"], ratio["tokens_per_second"])
    ]


def speed_table(case: str, rounds: Sequence[Round]) -> str:
    header = (case, "samples/s", "tokens/s", "padding", "whole command s")
    return markdown_table(header, speed_rows(rounds))


def cache_table(rounds: Sequence[tuple[float, float]]) -> str:
    cold, warm = zip(*rounds, strict=True)
    rows = [
        ["empty cache", _spread_text(_spread(cold), 2)],
        ["cache of the run before", _spread_text(_spread(warm), 2)],
    ]
    return markdown_table(("tokens of Yelp", "seconds until they are there"), rows)


def works_of(case: str, folders: Folders, options: argparse.Namespace) -> dict[Side, Work]:
    chosen: dict[Side, bool] = {"ours": options.ours, "peer": options.peer}
    works = {side: work for side, work in CASES[case](folders).items() if chosen[side]}
    if options.steps is None:
        return works
    return {
        side: replace(work, max_steps=options.steps, warmup_steps=0) for side, work in works.items()
    }


def speed_json(rounds: Sequence[Round]) -> dict[str, Any]:
    runs = [{side: asdict(run) for side, run in each.items()} for each in rounds]
    return {"summary": summarize(rounds), "rounds": runs}


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    folders = Folders(
        model=options.model.resolve(), mrpc=options.mrpc.resolve(), yelp=options.yelp.resolve()
    )
    report: dict[str, Any] = {"machine": machine_line()}
    print(machine_line(), end="\n\n", flush=True)
    for case in options.case:
        if case == _CACHE_CASE:
            seconds = run_cache_rounds(folders, options.rounds)
            report[case] = [{"cold": cold, "warm": warm} for cold, warm in seconds]
            print(cache_table(seconds), end="\n\n", flush=True)
        else:
            rounds = run_rounds(works_of(case, folders, options), options.rounds)
            report[case] = speed_json(rounds)
            print(speed_table(case, rounds), end="\n\n", flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
