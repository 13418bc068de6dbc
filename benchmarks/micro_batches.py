"""What the bounds of a micro-batch cost: processor seconds of an optimizer step, one rank, one thread.

    python -m benchmarks.micro_batches --model MODEL --data MRPC --data YELP

Bounds are tried in turn on the very same steps, round by round. Seconds are the processor's, so that
other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ftlaunch.cluster.world import World
from ftlaunch.strategies import registry
from ftlaunch.strategies.base import Strategy, StrategyRequest
from ftlaunch.strategies.data.token_cache import Tokens, prepare_tokens
from ftlaunch.strategies.data.tokenizer import TokenizerSource
from ftlaunch.strategies.job_data import make_collator, sample_order
from ftlaunch.strategies.loop import Windows
from ftlaunch.strategies.options import DataOptions, JobOptions, ModelOptions, TrainOptions

# (samples, padded tokens) at most; 0 tokens for no such bound.
BOUNDS = (
    (32, 0),
    (16, 0),
    (8, 0),
    (4, 0),
    (2, 0),
    (32, 2048),
    (32, 1024),
    (32, 512),
    (8, 2048),
    (8, 1024),
    (8, 512),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, action="append")
    parser.add_argument("--precision", action="append", choices=("fp32", "bf16"))
    parser.add_argument("--bound", action="append", type=_bound, help="SAMPLES,TOKENS")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    for data in args.data:
        for precision in args.precision or ["fp32", "bf16"]:
            options = _options(args.model, data, args.max_length)
            print(f"\n{Path(data).name}, {precision}, {args.steps} steps, {args.rounds} rounds\n")
            measure(options, precision, args.bound or BOUNDS, args.steps, args.rounds)


def _bound(text: str) -> tuple[int, int]:
    samples, tokens = text.split(",")
    return int(samples), int(tokens)


def _options(model: str, data: str, max_length: int) -> JobOptions:
    return JobOptions(
        model=ModelOptions(name_or_path=str(Path(model).absolute())),
        data=DataOptions(name_or_path=str(Path(data).absolute()), max_length=max_length),
        train=TrainOptions(global_batch_size=32, seed=1),
    )


def measure(
    options: JobOptions,
    precision: str,
    bounds: Sequence[tuple[int, int]],
    steps: int,
    rounds: int,
) -> None:
    """Print a table of markdown: bounds, seconds a step, against 8 samples, micro-batches, padding."""
    tokens = _tokens(options)
    strategy = _strategy(options, tokens, precision)
    view = Windows(
        order=sample_order(options, tokens),
        collator=make_collator(options, tokens, tokens.train, class_weights=None),
        rank=0,
        world_size=1,
        micro_batch=8,
    )
    views = {
        bound: replace(view, micro_batch=bound[0], max_tokens=bound[1] or None) for bound in bounds
    }
    _seconds(strategy, views[bounds[0]], 1)
    taken: dict[tuple[int, int], list[float]] = {bound: [] for bound in bounds}
    for _ in range(rounds):
        for bound, each in views.items():
            taken[bound].append(_seconds(strategy, each, steps))
    base = taken.get((8, 0)) or taken[bounds[0]]
    print("| samples | tokens | s a step | times 8 samples | micro-batches a step | padding |")
    print("|---|---|---|---|---|---|")
    for bound, seconds in taken.items():
        ratio = statistics.median(b / s for b, s in zip(base, seconds, strict=True))
        windows = [views[bound].window(step) for step in range(steps)]
        counts = statistics.mean(len(window.dealt[0]) for window in windows)
        real = sum(window.num_tokens for window in windows)
        padding = 1 - real / sum(window.padded_tokens for window in windows)
        print(
            f"| {bound[0]} | {bound[1] or '-'} | {statistics.median(seconds):.2f} | {ratio:.2f} | "
            f"{counts:.1f} | {padding:.1%} |",
            flush=True,
        )


def _tokens(options: JobOptions) -> Tokens:
    return prepare_tokens(
        options.task,
        options.data,
        TokenizerSource(
            name_or_path=str(options.model.name_or_path), revision=None, trust_remote_code=False
        ),
        seed=options.train.seed,
        model_max_length=options.data.max_length,
        rank=0,
        world_size=1,
    )


def _strategy(options: JobOptions, tokens: Tokens, precision: str) -> Strategy:
    made: Strategy = registry.load("ddp")(
        StrategyRequest(
            world=World.alone(),
            options=options,
            precision="bf16" if precision == "bf16" else "fp32",
            accelerator="cpu",
            device=0,
            num_threads=1,
            listen_fd=None,
            timeout_seconds=60.0,
            loss=tokens.spec.loss,
            num_outputs=tokens.spec.num_outputs,
            label_names=tokens.spec.label_names,
            max_token_id=tokens.max_token_id,
            pad_token_id=tokens.pad_token_id,
            head=tokens.spec.head,
        )
    )
    return made


def _seconds(strategy: Strategy, view: Windows, steps: int) -> float:
    """Processor seconds of one optimizer step, the mean of the first `steps`."""
    started = time.process_time()
    for step in range(steps):
        window = view.window(step)
        for batch, last in view.batches(window):
            strategy.accumulate(batch, window.total_items, last=last)
        strategy.apply(1e-5)
    return (time.process_time() - started) / steps


if __name__ == "__main__":
    main()
