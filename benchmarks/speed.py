"""Training speed beside the peers: all sides in one run, turn by turn, medians of rounds.

    python -m benchmarks.speed --model FOLDER --mrpc FOLDER --yelp FOLDER --out speed.json
    python -m benchmarks.speed … --case mrpc_equal_2 --peers hf deepspeed --rounds 7

mrpc_equal_1 _2   1 or 2 ranks, fp32, global batch 32 in one micro-batch a rank, at most 128 tokens
yelp_equal_1 _2   the same with global batches of 8, at most 512 tokens
…_bf16            each of these in bf16 autocast
yelp_default      2 ranks, at most 512 tokens, what each side does by itself: ours with its defaults,
                  HF Trainer in fp32 with dynamic padding; and, as hf_max_length, with every row
                  padded to 512, as the tutorial has it. Global batch 16, the Trainer's default for 2
cache             ours twice on Yelp: seconds until the tokens are there, without and with the cache

At equal settings all sides have the same ranks, threads, precision, global batches and micro-batches:
ours divides them, and every peer is given the very division of ours, so that all compute the same
tokens and the same padding. By default each side draws its own order and divides it in its own way:
what it saves or wastes in padding is its own.

Every side is measured from the end of the last warm-up step to the end of the last one. An idle
machine, please. On two cores all cases take about 45 minutes; --rounds and --case take less.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from benchmarks.report import machine_line, markdown_table
from benchmarks.sides import (
    OURS,
    Measurement,
    Side,
    Work,
    data_seconds,
    run_ours,
    run_side,
    same_batches,
)
from ftlaunch.launcher.bench_peers import PEERS, check_peer

Round = Mapping[Side, Measurement]
_CACHE_CASE = "cache"
_DEFAULT_CASE = "yelp_default"
_DEFAULT_PEERS = ("hf", "accelerate", "torchrun")
# The Trainer once more, padding as the tutorial does.
_MAX_LENGTH = "hf_max_length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Folders:
    model: Path
    mrpc: Path
    yelp: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """works       what each side is asked to do
    same_batches   the peers are given the division of ours
    """

    works: Mapping[Side, Work]
    same_batches: bool


def equal_case(work: Work, precision: Literal["fp32", "bf16"], peers: Sequence[Side]) -> Case:
    work = replace(
        work,
        threads=max(1, len(os.sched_getaffinity(0)) // work.ranks),
        precision=precision,
        micro_batch=work.global_batch // work.ranks,
    )
    return Case(works={OURS: work, **dict.fromkeys(peers, work)}, same_batches=True)


def mrpc(folders: Folders, ranks: int) -> Work:
    return Work(
        model=folders.model,
        data=folders.mrpc,
        text_columns=("sentence1", "sentence2"),
        max_length=128,
        ranks=ranks,
        max_steps=8,
        warmup_steps=2,
    )


def yelp(folders: Folders, ranks: int) -> Work:
    return Work(
        model=folders.model,
        data=folders.yelp,
        text_columns=("text",),
        max_length=512,
        ranks=ranks,
        global_batch=8,
        max_steps=6,
        warmup_steps=2,
    )


def yelp_default(folders: Folders) -> Case:
    """What each side does when it is only told the model, the data and the ranks.

    Fewer steps for the slow sides.
    """
    ours = replace(yelp(folders, 2), global_batch=16, max_steps=10, warmup_steps=2)
    trainer = replace(ours, precision="fp32", max_steps=5, warmup_steps=1)
    padded = replace(trainer, padding="max_length", max_steps=3)
    return Case(works={OURS: ours, "hf": trainer, _MAX_LENGTH: padded}, same_batches=False)


def case_of(name: str, folders: Folders, peers: Sequence[Side]) -> Case:
    if name == _DEFAULT_CASE:
        return yelp_default(folders)
    data, _, ranks, *rest = name.split("_")
    make: Callable[[Folders, int], Work] = {"mrpc": mrpc, "yelp": yelp}[data]
    return equal_case(make(folders, int(ranks)), "bf16" if rest else "fp32", peers)


EQUAL_CASES = tuple(
    f"{data}_equal_{ranks}{precision}"
    for data in ("mrpc", "yelp")
    for precision in ("", "_bf16")
    for ranks in (1, 2)
)
CASES = (*EQUAL_CASES, _DEFAULT_CASE, _CACHE_CASE)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--mrpc", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--yelp", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--peers", nargs="*", choices=[*PEERS, "ddp"], default=list(_DEFAULT_PEERS),
        help="at equal settings; ddp is torchrun",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="to try the script: no warm-up")
    parser.add_argument("--ours", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    return parser.parse_args(argv)


def run_rounds(case: Case, rounds: int) -> list[Round]:
    """Turn by turn; who begins changes from round to round. Tokens are cached between rounds."""
    results: list[Round] = []
    with tempfile.TemporaryDirectory(prefix="speed_") as root:
        folder = Path(root)
        told = same_batches(next(iter(case.works.values())), folder) if case.same_batches else None
        sides = list(case.works)
        for number in range(rounds):
            # Every side is once the first, once the second, …
            turn = number % len(sides)
            runs: dict[Side, Measurement] = {}
            for side in sides[turn:] + sides[:turn]:
                program = "hf" if side == _MAX_LENGTH else side
                runs[side] = run_side(program, case.works[side], folder / f"{side}_{number}", told)
            results.append({side: runs[side] for side in sides})
    return results


def run_cache_rounds(folders: Folders, rounds: int) -> list[tuple[float, float]]:
    """Seconds until the tokens are there, with an empty cache and with the one it left."""
    work = replace(yelp(folders, 2), max_steps=1, warmup_steps=0)
    results = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="speed_") as folder:
            cold, warm = (run_ours(work, Path(folder) / name) for name in ("cold", "warm"))
        results.append((data_seconds(cold), data_seconds(warm)))
    return results


def summarize(rounds: Sequence[Round]) -> dict[str, Any]:
    """Per side and rate: median, min and max; per peer how much faster ours is."""
    rates = ("samples_per_second", "tokens_per_second")
    summary: dict[str, Any] = {
        side: {rate: _spread([getattr(runs[side], rate) for runs in rounds]) for rate in rates}
        for side in rounds[0]
    }
    if OURS in rounds[0]:
        summary["ours_over"] = {
            side: {rate: _ratios(rounds, side, rate) for rate in rates}
            for side in rounds[0]
            if side != OURS
        }
    return summary


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def _ratios(rounds: Sequence[Round], side: Side, rate: str) -> dict[str, float]:
    ours = [getattr(runs[OURS], rate) for runs in rounds]
    peer = [getattr(runs[side], rate) for runs in rounds]
    pairs = [mine / theirs for mine, theirs in zip(ours, peer, strict=True)]
    return {
        "of_medians": median(ours) / median(peer),
        "median_of_pairs": median(pairs),
        "min": min(pairs),
        "max": max(pairs),
    }


def speed_rows(rounds: Sequence[Round]) -> list[list[str]]:
    summary = summarize(rounds)
    rows = []
    for side in rounds[0]:
        runs = [each[side] for each in rounds]
        ratio = summary.get("ours_over", {}).get(side)
        rows.append(
            [
                side,
                _spread_text(summary[side]["samples_per_second"], 1),
                _spread_text(summary[side]["tokens_per_second"], 0),
                f"{100 * median(run.padding_share for run in runs):.1f} %",
                "" if ratio is None else _ratio_text(ratio["tokens_per_second"]),
                f"{median(run.wall_seconds for run in runs):.1f}",
            ]
        )
    return rows


def _spread_text(spread: Mapping[str, float], digits: int) -> str:
    middle, low, high = (f"{spread[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{middle} ({low} to {high})"


def _ratio_text(ratio: Mapping[str, float]) -> str:
    return (
        f"{ratio['of_medians']:.3f}, pairs {ratio['median_of_pairs']:.3f} "
        f"({ratio['min']:.3f} to {ratio['max']:.3f})"
    )


def speed_table(case: str, rounds: Sequence[Round]) -> str:
    header = (case, "samples/s", "tokens/s", "padding", "ours / it, tokens", "whole command s")
    return markdown_table(header, speed_rows(rounds))


def cache_table(rounds: Sequence[tuple[float, float]]) -> str:
    cold, warm = zip(*rounds, strict=True)
    rows = [
        ["empty cache", _spread_text(_spread(cold), 2)],
        ["cache of the run before", _spread_text(_spread(warm), 2)],
    ]
    return markdown_table(("tokens of Yelp", "seconds until they are there"), rows)


def chosen_case(name: str, folders: Folders, options: argparse.Namespace) -> Case:
    """As the options have it."""
    peers = list(dict.fromkeys("torchrun" if p == "ddp" else p for p in options.peers))
    for peer in peers:
        check_peer(peer)
    case = case_of(name, folders, peers)
    works = {side: work for side, work in case.works.items() if options.ours or side != OURS}
    if options.steps is not None:
        works = {
            side: replace(work, max_steps=options.steps, warmup_steps=0)
            for side, work in works.items()
        }
    return replace(case, works=works)


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
    for name in options.case:
        started = time.perf_counter()
        if name == _CACHE_CASE:
            seconds = run_cache_rounds(folders, options.rounds)
            report[name] = {"rounds": [{"cold": cold, "warm": warm} for cold, warm in seconds]}
            print(cache_table(seconds), end="\n\n", flush=True)
        else:
            rounds = run_rounds(chosen_case(name, folders, options), options.rounds)
            report[name] = speed_json(rounds)
            print(speed_table(name, rounds), end="\n\n", flush=True)
        report[name]["seconds"] = time.perf_counter() - started
        print(f"{name}: {report[name]['seconds']:.0f} s in all", end="\n\n", flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
