"""Seconds of `ftlaunch plan` for a model of 70 billion parameters on 16 accelerators that are not here.

    python -m benchmarks.planning --rounds 9

The whole process, from its start to its end, with warm files: a round before the first is not counted. The
model is a config.json of the shape of Llama-3.1-70B in a temporary folder. Prints a table and, with
--out, writes the seconds as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.report import machine_line, markdown_table

_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
_COMMAND = (sys.executable, "-m", "ftlaunch.launcher", "plan", "--task", "causal-lm")
_CASES = {
    "16 × H100-80GB": ("--nodes", "2", "--devices", "8", "--hardware", "H100-80GB"),
    "1,024 × H100-80GB": (
        *("--nodes", "128", "--devices", "8", "--hardware", "H100-80GB"),
        "train.global_batch_size=1024",
    ),
    "fits nowhere: 4 × T4-16GB": ("--devices", "4", "--hardware", "T4-16GB"),
}


def measure(words: tuple[str, ...], model: Path) -> tuple[float, float]:
    """(seconds on the clock, seconds of processor time) of one command."""
    before, started = os.times(), time.perf_counter()
    done = subprocess.run(
        [*_COMMAND, "--model", str(model), *words], capture_output=True, text=True, timeout=60
    )
    seconds, after = time.perf_counter() - started, os.times()
    if done.returncode not in (0, 2):
        raise SystemExit(done.stderr)
    used = after.children_user + after.children_system
    return seconds, used - before.children_user - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in _CASES}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "config.json"
        model.write_text(json.dumps(_CONFIG))
        for number in range(arguments.rounds + 1):
            for name, words in _CASES.items():
                seconds = measure(words, model)
                if number:
                    found[name].append(seconds)
    rows = []
    for name, pairs in found.items():
        clock, used = zip(*pairs, strict=True)
        rows.append(
            [
                name,
                f"{median(clock):.2f} ({min(clock):.2f}–{max(clock):.2f})",
                f"{median(used):.2f} ({min(used):.2f}–{max(used):.2f})",
            ]
        )
    print(machine_line())
    print(markdown_table(["plan", "seconds", "processor seconds"], rows))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
