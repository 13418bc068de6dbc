"""One CUDA device: ours beside the HF Trainer and a plain loop, in bf16, turn by turn.

    python -m benchmarks.gpu --out gpu.json
    python -m benchmarks.gpu --smoke             small models on the CPU, to try the script

bert_128, bert_512   a BERT-base classifier, 110 M parameters, global batches of 64 and 32
decoder_1024         a causal language model of 0.49 B parameters (Qwen2's shape), global batches of 16

Weights and tokens are random. Each is measured with samples that all have that length, and, as
…_mixed, with lengths as uneven as those of texts, that length the longest. Sides:

ours           `ftlaunch bench` with what the plan chooses
torchrun, hf   a plain loop and the HF Trainer with our samples in equal micro-batches; where memory
               bounds ours in tokens, of as many samples as that bound lets be of the longest
hf_default     the HF Trainer with the same samples in its own order: with mixed lengths it pads more

Tokens a second are those without padding. Utilisation (MFU) of ours is what `ftlaunch bench` says:
what the model needs over what a product of matrices reaches in the same run. All sides train the
same model on samples of the same lengths, so a peer's is ours times its tokens a second over ours.

HAS NOT BEEN RUN ON A GPU: it was written where there is none.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import machine_line, markdown_table
from ftlaunch.cluster.errors import JobError
from ftlaunch.cluster.machine import detect_machine
from ftlaunch.launcher.bench_peers import run_program
from ftlaunch.launcher.config import load_config
from ftlaunch.launcher.job_memory import read_job_memory
from ftlaunch.launcher.peer_work import check_comparable, make_peer_work
from ftlaunch.launcher.plan import LaunchPlan, make_plan
from ftlaunch.launcher.site import find_site
from ftlaunch.strategies.data.synthetic import synthetic_tokens

_TIMEOUT_SECONDS = 1800.0
_TAIL_CHARACTERS = 4000
SIDES = ("ours", "torchrun", "hf", "hf_default")

_BERT_BASE = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
_DECODER = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
# A multiple of the heads of both.
_SMALL = {"hidden_size": 168, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 500}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """lengths   of the samples, as `bench.lengths` has them; `longest` is what they are cut to"""

    model: Mapping[str, Any]
    task: str
    longest: int
    lengths: str
    global_batch: int


CASES = {
    "bert_128": Case(
        model=_BERT_BASE,
        task="text-classification",
        longest=128,
        lengths="128",
        global_batch=64,
    ),
    "bert_128_mixed": Case(
        model=_BERT_BASE,
        task="text-classification",
        longest=128,
        lengths="lognormal:48:0.5",
        global_batch=64,
    ),
    "bert_512": Case(
        model=_BERT_BASE,
        task="text-classification",
        longest=512,
        lengths="512",
        global_batch=32,
    ),
    "bert_512_mixed": Case(
        model=_BERT_BASE,
        task="text-classification",
        longest=512,
        lengths="lognormal:150:0.7",
        global_batch=32,
    ),
    "decoder_1024": Case(
        model=_DECODER, task="causal-lm", longest=1024, lengths="1024", global_batch=16
    ),
    "decoder_1024_mixed": Case(
        model=_DECODER, task="causal-lm", longest=1024, lengths="lognormal:300:0.7", global_batch=16
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """utilisation   of ours; None where the model's shape is not known, and of peers"""

    samples_per_second: float
    tokens_per_second: float
    padding_share: float
    utilisation: float | None = None


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup-steps", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--smoke", action="store_true", help="small models on the CPU, 2 steps")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    return parser.parse_args(argv)


class Bench:
    """One case: its folder with config.json, the plan, and what the peers are told."""

    def __init__(self, case: Case, folder: Path, options: argparse.Namespace) -> None:
        self._folder = folder
        self._warmup_steps, self._steps = options.warmup_steps, options.steps
        model = {**case.model, **(_SMALL if options.smoke else {})}
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text(json.dumps(model))
        self._flags = {
            "model": str(folder / "model"),
            "task": case.task,
            "nodes": 1,
            "devices": 1,
            "precision": "fp32" if options.smoke else "bf16",
            "strategy": "ddp",
        }
        num_samples = (options.warmup_steps + options.steps) * case.global_batch
        self._overrides = [
            "model.random_weights=true",
            f"train.global_batch_size={case.global_batch}",
            f"data.max_length={case.longest}",
            f"bench.lengths={case.lengths}",
            f"bench.samples={num_samples}",
        ]
        plan = self._plan(on_cuda=not options.smoke)
        tokens = synthetic_tokens(plan.options)
        check_comparable(plan, on_one_machine=True)
        self._told = make_peer_work(
            plan, tokens, folder, warmup_steps=self._warmup_steps, steps=self._steps
        )

    def _plan(self, *, on_cuda: bool) -> LaunchPlan:
        config = load_config(
            file=None, flags=self._flags, overrides=self._overrides, data_optional=True
        )
        site = find_site(config.cluster, os.environ)
        machine = detect_machine(os.environ)
        plan = make_plan(
            config, [machine], site, output_dir=str(self._folder), memory=read_job_memory(config)
        )
        if on_cuda and plan.accelerator != "cuda":
            raise SystemExit(f"the plan chooses {plan.accelerator}, not CUDA: nothing is measured")
        return plan

    def run(self, side: str, number: int) -> Run:
        folder = self._folder / f"{side}_{number}"
        return self._ours(folder) if side == "ours" else self._peer(side, folder)

    def _ours(self, folder: Path) -> Run:
        words = [word for name, value in self._flags.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "ftlaunch.launcher", "bench", *words, "--json"]
        command += ["--repeats", "1", "--steps", str(self._steps), "-o", str(folder)]
        command += ["--warmup-steps", str(self._warmup_steps), *self._overrides]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_SECONDS
        )
        if done.returncode != 0:
            raise SystemExit(f"{done.stderr[-_TAIL_CHARACTERS:]}\nfrom: {' '.join(command)}")
        [cell] = json.loads(done.stdout)["cells"]
        [repeat] = cell["repeats"]
        return Run(
            samples_per_second=repeat["samples_per_second"],
            tokens_per_second=repeat["tokens_per_second"],
            padding_share=1 - repeat["num_tokens"] / repeat["num_padded_tokens"],
            utilisation=repeat["model_flops_utilisation"],
        )

    def _peer(self, side: str, folder: Path) -> Run:
        told = self._told
        if side == "hf_default":
            told = in_its_own_order(told)
        try:
            result = run_program(
                "hf" if side == "hf_default" else side,
                {**told, "started_at": time.time()},
                ranks=1,
                folder=folder,
                timeout_seconds=_TIMEOUT_SECONDS,
                environment={"HF_HUB_OFFLINE": "1"},
            ).result
        except JobError as error:
            raise SystemExit(str(error)) from None
        return Run(
            samples_per_second=result["samples_per_second"],
            tokens_per_second=result["tokens_per_second"],
            padding_share=result["padding_share"],
        )


def in_its_own_order(told: Mapping[str, Any]) -> dict[str, Any]:
    """For one rank that draws its samples itself: global batches as large, of micro-batches all as large."""
    size = sum(len(run) for run in told["order"][0][0])
    rows = next(rows for rows in range(told["micro_batch"], 0, -1) if size % rows == 0)
    return {**told, "order": None, "micro_batch": rows, "accumulation": size // rows}


def run_rounds(case: Case, options: argparse.Namespace) -> list[dict[str, Run]]:
    """Turn by turn; who begins changes from round to round."""
    with tempfile.TemporaryDirectory(prefix="gpu_") as folder:
        bench = Bench(case, Path(folder), options)
        results = []
        for number in range(options.rounds):
            turn = number % len(options.sides)
            order = options.sides[turn:] + options.sides[:turn]
            runs = {side: bench.run(side, number) for side in order}
            results.append({side: runs[side] for side in options.sides})
        return results


def case_table(name: str, rounds: Sequence[Mapping[str, Run]]) -> str:
    header = (name, "samples/s", "tokens/s", "padding", "MFU", "ours / it, pairs")
    return markdown_table(header, [_row(side, rounds) for side in rounds[0]])


def _row(side: str, rounds: Sequence[Mapping[str, Run]]) -> list[str]:
    runs = [each[side] for each in rounds]
    tokens = sorted(run.tokens_per_second for run in runs)
    ratio, used = "", ""
    if "ours" in rounds[0]:
        pairs = [r["ours"].tokens_per_second / r[side].tokens_per_second for r in rounds]
        ratio = f"{median(pairs):.3f} ({min(pairs):.3f} to {max(pairs):.3f})"
        ours = [each["ours"].utilisation for each in rounds]
        known = [value for value in ours if value is not None]
        if len(known) == len(pairs):
            used = f"{100 * median(v / p for v, p in zip(known, pairs, strict=True)):.1f} %"
    return [
        side,
        f"{median(run.samples_per_second for run in runs):.1f}",
        f"{median(tokens):.0f} ({tokens[0]:.0f} to {tokens[-1]:.0f})",
        f"{100 * median(run.padding_share for run in runs):.1f} %",
        used,
        "" if side == "ours" else ratio,
    ]


def check_device() -> None:
    """SystemExit in words where there is no CUDA device."""
    try:
        import torch
    except ImportError:
        raise SystemExit("torch is not installed: pip install torch") from None
    if not torch.cuda.is_available():
        raise SystemExit(
            "There is no CUDA device here (torch.cuda.is_available() is False), and this benchmark is "
            "of one. Run it on a machine with an NVIDIA GPU and a CUDA build of torch; --smoke tries "
            "the script on the CPU."
        )


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    if options.smoke:
        options.warmup_steps, options.steps, options.rounds = 1, 2, min(options.rounds, 1)
    else:
        check_device()
    report: dict[str, Any] = {"machine": machine_line(), "cases": {}}
    print(machine_line(), end="\n\n", flush=True)
    for name in options.case:
        rounds = run_rounds(CASES[name], options)
        report["cases"][name] = [
            {side: asdict(run) for side, run in each.items()} for each in rounds
        ]
        print(case_table(name, rounds), end="\n\n", flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
