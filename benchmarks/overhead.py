"""The framework's own time in an optimizer step: all that is not forward, backward, reduce or step.

    python -m benchmarks.overhead --out overhead.json

Real jobs of the `ftlaunch` command (agents, ranks, events, records) train a model of one matrix, with
1 rank and with 2, with 1 micro-batch a step and with 4. In the same ranks two plain torch loops run the
same steps, turn by turn with ours in blocks: a copy of the model with a DDP and an optimizer of its own, the
same micro-batches, made to tensors before the clock runs. The one has

    forward, loss, loss.backward() (under no_sync() but for the last), optimizer.step(), zero_grad()

and the other what a loop has that clips its gradients and knows the loss of all ranks: besides

    clip_grad_norm_() before the step, all_reduce(loss), loss.item()

The overhead is what ours takes longer than the first, rank 0's seconds a step: what is not forward,
backward, reduce and step. Counted are the order of the samples, dealing and padding them, making
tensors, seeds, the norm of the gradients, what ranks tell each other,
reports and what the agent and the coordinator take from a rank's cores meanwhile. Not counted: DDP's own
reduction, and what DDP and autograd take for themselves in Python, which the plain loop pays as well;
nor the first block of the job and its last, with which it ends and saves. What ours
takes longer than the second is shown, too.

Beside the clock's time stands the processor time of rank 0's process, which other work on the machine
does not lengthen much.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks.report import machine_line, markdown_table
from ftlaunch.launcher import cli, job
from ftlaunch.launcher.ranks import rank_starts as ranks_of_a_job

_ROOT = Path(__file__).parent.parent
_ROWS_OF_A_MICRO_BATCH = 8
_WORDS = [f"w{number}" for number in range(200)]
_MODEL = """\
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class OneMatrixConfig(PretrainedConfig):
    model_type = "one_matrix"

    def __init__(self, vocab_size=256, **others):
        self.vocab_size = vocab_size
        super().__init__(**others)


class OneMatrix(PreTrainedModel):
    config_class = OneMatrixConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.words = torch.nn.Embedding(config.vocab_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids, attention_mask, **others):
        logits = (self.words(input_ids) * attention_mask.unsqueeze(-1)).sum(1)
        return SequenceClassifierOutput(logits=logits)
"""
# Ranks, and micro-batches of each in a step.
CASES = {"1x1": (1, 1), "1x4": (1, 4), "2x1": (2, 1), "2x4": (2, 4)}


def write_input(folder: Path) -> tuple[Path, Path]:
    """A model of one matrix and 4,096 rows of 4 to 24 words."""
    model, data = folder / "model", folder / "data"
    model.mkdir()
    data.mkdir()
    (model / "one_matrix.py").write_text(_MODEL)
    config = {
        "model_type": "one_matrix",
        "vocab_size": len(_WORDS) + 2,
        "pad_token_id": 0,
        "max_position_embeddings": 64,
        "auto_map": {
            "AutoConfig": "one_matrix.OneMatrixConfig",
            "AutoModelForSequenceClassification": "one_matrix.OneMatrix",
        },
    }
    (model / "config.json").write_text(json.dumps(config))
    weights = np.zeros((len(_WORDS) + 2, 2), dtype=np.float32)
    save_file(
        {"words.weight": weights}, str(model / "model.safetensors"), metadata={"format": "pt"}
    )
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *_WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(model / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "model_max_length": 64,
    }
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    rng = random.Random(0)
    rows = [
        {"text": " ".join(rng.choices(_WORDS, k=rng.randint(4, 24))), "label": number % 2}
        for number in range(4096)
    ]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return model, data


def run_case(
    ranks: int,
    micro_batches: int,
    model: Path,
    data: Path,
    folder: Path,
    *,
    blocks: int,
    steps: int,
) -> dict[str, Any]:
    """Run one job; what its rank 0 has measured (`overhead_rank`)."""
    result = folder / "result.json"

    def measuring(*arguments: Any) -> Any:
        return [
            [
                dataclasses.replace(
                    start,
                    module="benchmarks.overhead_rank",
                    arguments=[*start.arguments, str(result), str(blocks), str(steps)],
                )
                for start in starts
            ]
            for starts in ranks_of_a_job(*arguments)
        ]

    batch = ranks * micro_batches * _ROWS_OF_A_MICRO_BATCH
    arguments = [
        *("--nodes", str(ranks), "--model", str(model), "--dataset", str(data)),
        *("-o", str(folder / "out"), "--precision", "fp32", "--strategy", "ddp"),
        *("model.trust_remote_code=true", "data.text_columns=[text]"),
        *(f"data.cache_dir={folder.parent / 'cache'}", f"train.global_batch_size={batch}"),
        *(f"train.per_device_train_batch_size={_ROWS_OF_A_MICRO_BATCH}",),
        *(f"train.max_steps={(blocks + 2) * steps}", "train.eval_strategy=no"),
        "checkpoint.save_steps=1000000",
    ]
    path = os.pathsep.join([str(_ROOT / "typings"), str(_ROOT)])
    settings = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "code")}
    with mock.patch.dict(os.environ, settings), mock.patch.object(job, "rank_starts", measuring):
        code = cli.run(arguments)
    if code or not result.exists():
        raise SystemExit(f"the job of {ranks} x {micro_batches} ended with {code}")
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def row_of(name: str, found: dict[str, Any]) -> list[str]:
    ours, bare, agreeing = range(3)

    def longer(kind: str, than: int) -> list[float]:
        return [1e3 * (each[ours] - each[than]) for each in found[kind]]

    def shown(values: Sequence[float]) -> str:
        return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    medians = [f"{median(each[side] for each in found['wall']) * 1e3:.2f}" for side in range(3)]
    return [
        name,
        shown(longer("wall", bare)),
        f"{median(longer('processor', bare)):.2f}",
        shown(longer("wall", agreeing)),
        f"{median(longer('processor', agreeing)):.2f}",
        " / ".join(medians),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=21, help="of each loop, in turn")
    parser.add_argument("--steps", type=int, default=100, help="of a block")
    parser.add_argument("--case", choices=list(CASES), help="one of them")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args(argv)
    report: dict[str, Any] = {"machine": machine_line(), "cases": {}}
    rows = []
    with tempfile.TemporaryDirectory(prefix="overhead_") as root:
        model, data = write_input(Path(root))
        for name in [options.case] if options.case else CASES:
            ranks, micro_batches = CASES[name]
            folder = Path(root) / name
            folder.mkdir()
            found = run_case(
                ranks,
                micro_batches,
                model,
                data,
                folder,
                blocks=options.blocks,
                steps=options.steps,
            )
            report["cases"][name] = found
            rows.append(row_of(name, found))
    print(machine_line(), end="\n\n")
    header = (
        "ranks x micro-batches",
        "overhead, ms a step",
        "processor ms",
        "beside a loop that clips and sums",
        "processor ms",
        "ours / bare / clips and sums, ms",
    )
    print(markdown_table(header, rows))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
