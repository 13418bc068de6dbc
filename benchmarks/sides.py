"""The sides of a comparison: `ftlaunch` and the peers, each run as its own process.

Knows how to give all of them the same work and how to read what they did in the same terms; nothing
of what is compared or how often.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ftlaunch.cluster.errors import JobError
from ftlaunch.cluster.machine import detect_machine
from ftlaunch.launcher.bench_peers import run_program
from ftlaunch.launcher.config import load_config
from ftlaunch.launcher.peer_work import check_comparable, make_peer_work, plan_tokens
from ftlaunch.launcher.plan import make_plan
from ftlaunch.launcher.site import find_site

Padding = Literal["dynamic", "max_length"]
# "ours", or a peer's name.
Side = str
OURS = "ours"

_TAIL_CHARACTERS = 4000
_TIMEOUT_SECONDS = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a side is asked to do.

    data             a folder with train.jsonl and test.jsonl
    strategy         of ours
    python           of ours: the interpreter of the environment that has its framework
    precision        None: the side's own choice (ours only; a peer has fp32)
    micro_batch      at most so many rows at a time on a rank; None: the side's own choice
                     (a peer: the global batch over the ranks, without accumulation)
    threads          per rank; None: the side's own choice (a peer: the cores over the ranks)
    warmup_steps     optimizer steps at the start that are not measured
    padding          of the peer; ours pads each micro-batch to its longest row
    """

    model: Path
    data: Path
    text_columns: tuple[str, ...]
    max_length: int
    ranks: int
    learning_rate: float = 5e-5
    global_batch: int = 32
    micro_batch: int | None = None
    precision: Literal["fp32", "bf16"] | None = None
    threads: int | None = None
    seed: int = 1
    epochs: float = 3.0
    max_steps: int | None = None
    warmup_steps: int = 0
    padding: Padding = "dynamic"
    evaluate: bool = False
    strategy: str = "ddp"
    python: str = sys.executable


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What one run of one side did; the rates are those of `steps` alone.

    steps            optimizer steps after the warm-up
    train_seconds    of those steps
    padding_share    of the tokens that the model was fed
    wall_seconds     of the whole command, with imports, tokenizing, evaluation and saving
    details          what the side itself reports, for the reader of the JSON
    """

    steps: int
    train_seconds: float
    samples_per_second: float
    tokens_per_second: float
    padding_share: float
    wall_seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


def run_side(
    side: Side, work: Work, folder: Path, told: Mapping[str, Any] | None = None
) -> Measurement:
    """`told`: what a peer gets instead of the texts, by `same_batches`."""
    if side == OURS:
        return run_ours(work, folder)
    return run_peer(side, work, folder, told)


def same_batches(work: Work, folder: Path) -> dict[str, Any]:
    """The very micro-batches that ours computes, for any peer; the samples' file lies in `folder`."""
    flags, overrides = _our_settings(work, cache=folder / "token_cache")
    config = load_config(file=None, flags=flags, overrides=overrides)
    machine, site = detect_machine(os.environ), find_site(config.cluster, os.environ)
    plan = make_plan(config, [machine] * work.ranks, site, output_dir=str(folder))
    plan = replace(plan, threads_per_rank=work.threads or plan.threads_per_rank)
    check_comparable(plan, on_one_machine=True)
    if work.max_steps is None:
        raise SystemExit("the same batches are given for a number of steps: set max_steps")
    return make_peer_work(
        plan,
        plan_tokens(plan),
        folder,
        warmup_steps=work.warmup_steps,
        steps=work.max_steps - work.warmup_steps,
    )


def run_peer(
    name: str, work: Work, folder: Path, told: Mapping[str, Any] | None = None
) -> Measurement:
    """`folder` takes the files of this run; its parent keeps the peer's tokens between runs."""
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder.parent / "peer_datasets_cache"),
    }
    try:
        run = run_program(
            name,
            {**(told or _peer_work(work)), "started_at": time.time()},
            ranks=work.ranks,
            folder=folder,
            timeout_seconds=_TIMEOUT_SECONDS,
            environment=environment,
        )
    except JobError as error:
        raise SystemExit(str(error)) from None
    report = run.result
    return Measurement(
        steps=report["steps"],
        train_seconds=report["train_seconds"],
        samples_per_second=report["samples_per_second"],
        tokens_per_second=report["tokens_per_second"],
        padding_share=report["padding_share"],
        wall_seconds=run.wall_seconds,
        metrics=report["metrics"],
        details=report,
    )


def run_ours(work: Work, folder: Path) -> Measurement:
    """`folder` takes the files of this run; its parent keeps our tokens between runs.

    The output folder (weights, checkpoints) is removed once it is read.
    """
    out = folder / "out"
    command = _our_command(work, out, cache=folder.parent / "our_token_cache")
    wall_seconds = _run(command, folder, _thread_limit(work.threads))
    totals, events = _read_lines(out / "totals.jsonl"), _read_lines(out / "events.jsonl")
    summary = json.loads((out / "summary.json").read_text())
    shutil.rmtree(out)
    beside = _seconds_beside_steps(totals, events)
    done = _since(totals, work.warmup_steps)
    # The peer's clock runs on between two steps, ours stops: its share is added.
    seconds = done["seconds"] + beside * done["step"] / len(totals)
    return Measurement(
        steps=int(done["step"]),
        train_seconds=seconds,
        samples_per_second=done["samples"] / seconds,
        tokens_per_second=done["tokens"] / seconds,
        padding_share=1 - done["tokens"] / done["padded_tokens"],
        wall_seconds=wall_seconds,
        metrics=summary["eval"],
        details={**summary, "seconds_beside_steps": beside},
    )


def data_seconds(measurement: Measurement) -> float:
    """How long our side took to have its tokens ready."""
    return float(measurement.details["data_seconds"])


def _read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _since(totals: Sequence[Mapping[str, Any]], warmup_steps: int) -> dict[str, float]:
    """What was done after the warm-up. `totals`: a line per step, of running sums."""
    if len(totals) <= warmup_steps:
        raise SystemExit(f"{len(totals)} steps, {warmup_steps} of them warm-up: none to measure.")
    keys = ("step", "samples", "tokens", "padded_tokens", "seconds")
    before = totals[warmup_steps - 1] if warmup_steps else dict.fromkeys(keys, 0)
    return {key: totals[-1][key] - before[key] for key in keys}


def _seconds_beside_steps(
    totals: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]
) -> float:
    """What the training loop spent neither in steps nor waiting for a save nor in evaluation."""
    keys = {"saved": "blocked_seconds", "evaluated": "seconds"}
    loop = sum(event["train_seconds"] for event in events if event["kind"] == "finished")
    known = sum(event[keys[event["kind"]]] for event in events if event["kind"] in keys)
    return float(loop - known - totals[-1]["seconds"])


def _peer_threads(work: Work) -> int:
    return work.threads or max(1, len(os.sched_getaffinity(0)) // work.ranks)


def _peer_work(work: Work) -> dict[str, Any]:
    """WORK.json: the settings of `peers.work.Work`."""
    micro_batch = work.micro_batch or work.global_batch // work.ranks
    return {
        "model": str(work.model),
        "rows": str(work.data / "train.jsonl"),
        "eval_rows": str(work.data / "test.jsonl") if work.evaluate else None,
        "text_columns": work.text_columns,
        "max_length": work.max_length,
        "padding": work.padding,
        "micro_batch": micro_batch,
        "accumulation": work.global_batch // (work.ranks * micro_batch),
        "learning_rate": work.learning_rate,
        "epochs": work.epochs,
        "steps": work.max_steps,
        "warmup_steps": work.warmup_steps,
        "precision": work.precision or "fp32",
        "seed": work.seed,
        "threads": _peer_threads(work),
    }


def _our_command(work: Work, out: Path, *, cache: Path) -> list[str]:
    flags, overrides = _our_settings(work, cache=cache)
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [work.python, "-m", "ftlaunch.launcher", *words, "-o", str(out), *overrides]


def _our_settings(work: Work, *, cache: Path) -> tuple[dict[str, Any], list[str]]:
    """The flags and the settings of `ftlaunch`."""
    flags: dict[str, Any] = {
        "nodes": work.ranks,
        "model": str(work.model),
        "dataset": str(work.data),
        "strategy": work.strategy,
    }
    if work.precision is not None:
        flags["precision"] = work.precision
    settings: dict[str, object] = {
        "data.max_length": work.max_length,
        "data.cache_dir": cache,
        "train.global_batch_size": work.global_batch,
        "train.learning_rate": work.learning_rate,
        "train.seed": work.seed,
        "train.num_train_epochs": work.epochs,
    }
    if work.max_steps is not None:
        settings["train.max_steps"] = work.max_steps
    if work.micro_batch is not None:
        settings["train.per_device_train_batch_size"] = work.micro_batch
        # So many rows and no other bound.
        settings["train.max_tokens_per_micro_batch"] = 0
    if not work.evaluate:
        settings["train.eval_strategy"] = "no"
    return flags, [f"{key}={value}" for key, value in settings.items()]


def _thread_limit(threads: int | None) -> dict[str, str]:
    return {} if threads is None else {"OMP_NUM_THREADS": str(threads)}


def _run(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> float:
    """Run it in `folder`, which is made; its wall seconds. SystemExit with its last words."""
    folder.mkdir(parents=True)
    log = folder / "log.txt"
    started = time.perf_counter()
    with log.open("wb") as stream:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        tail = log.read_text(errors="replace")[-_TAIL_CHARACTERS:]
        raise SystemExit(f"{tail}\nexit status {done.returncode} from: {' '.join(command)}")
    return seconds
