"""The peer: an ordinary HF `Trainer` script for sequence classification on CPU. Nothing of ours.

One rank, two threads:

    HF_HUB_OFFLINE=1 python benchmarks/peers/hf_trainer.py --model FOLDER --train train.jsonl \
        --text-columns sentence1,sentence2 --max-steps 40 --threads 2 --out peer.json

Two ranks: the same after `python -m torch.distributed.run --standalone --nproc_per_node 2`.

It is meant to be as fast as a good user makes it: fused AdamW (the Trainer's default), tokens
made before the clock starts, no search for unused parameters, no checkpoints, no logging.
Everything else is the Trainer's default. One default is worth knowing when the losses of both
sides are compared: on W ranks transformers 5.23 multiplies the loss of a BERT classifier by W
(`average_tokens_across_devices`); AdamW and the clipping hide most of that.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from sklearn.metrics import accuracy_score, f1_score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BatchEncoding,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
    set_seed,
)


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Counts what the model is fed, and notes the time and the counts at the end of each step."""

    def __init__(self) -> None:
        self.counts = torch.zeros(3, dtype=torch.int64)
        # Entry 0 is the beginning of training, entry n the end of optimizer step n.
        self.seconds: list[float] = []
        self.marks: list[torch.Tensor] = []
        self.first_step_at = 0.0

    def count(self, module: torch.nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        """A forward pre-hook: samples, tokens without padding, tokens with padding."""
        if module.training:
            mask = inputs["attention_mask"]
            self.counts += torch.tensor([mask.shape[0], int(mask.sum()), mask.numel()])

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        self._mark()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        if state.global_step == 1:
            self.first_step_at = time.time()
        self._mark()

    def _mark(self) -> None:
        self.seconds.append(time.perf_counter())
        self.marks.append(self.counts.clone())


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True, metavar="FOLDER")
    parser.add_argument("--train", required=True, metavar="FILE.jsonl")
    parser.add_argument("--eval", metavar="FILE.jsonl", help="omit it for no evaluation")
    parser.add_argument("--text-columns", default="text", metavar="A[,B]")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--padding", choices=("dynamic", "max_length"), default="dynamic")
    parser.add_argument("--per-device-batch", type=int, default=32)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--max-steps", type=int, default=-1, help="overrides --epochs")
    parser.add_argument("--warmup-steps", type=int, default=0, help="left out of the measurement")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, help="of each rank")
    parser.add_argument("--started-at", type=float, help="Unix time at which the command was given")
    parser.add_argument("--out", required=True, metavar="FILE.json")
    return parser.parse_args(argv)


def process_start() -> float:
    """Unix time at which this process was started, to 10 ms, from /proc (Linux)."""
    # The command's name may hold blanks; after its ")" the start time is field 22 of 52.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)


def training_arguments(options: argparse.Namespace, output_dir: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=options.per_device_batch,
        per_device_eval_batch_size=32,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        bf16=options.precision == "bf16",
        seed=options.seed,
        use_cpu=True,
        # Without torchrun accelerate takes a named backend for a process group that exists.
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def load_tokens(
    file: str,
    tokenizer: PreTrainedTokenizerBase,
    options: argparse.Namespace,
    arguments: TrainingArguments,
) -> Dataset:
    """Rank 0 tokenizes, the others take what it left in the cache of `datasets`."""
    columns = options.text_columns.split(",")
    padding = "max_length" if options.padding == "max_length" else False
    # `datasets` hashes what the function closes over: `options` holds the name of --out.
    max_length = options.max_length

    def tokenize(rows: Mapping[str, list[str]]) -> BatchEncoding:
        texts = [rows[column] for column in columns]
        return tokenizer(*texts, truncation=True, max_length=max_length, padding=padding)

    with arguments.main_process_first(desc="tokenizing"):
        raw = load_dataset("json", data_files=file, split="train")
        drop = [name for name in raw.column_names if name != options.label_column]
        tokens = raw.map(tokenize, batched=True, remove_columns=drop)
    if options.label_column != "labels":
        tokens = tokens.rename_column(options.label_column, "labels")
    return tokens


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, F1 of class 1 (as GLUE has it for two classes) and the mean F1 of all classes."""
    guesses = prediction.predictions.argmax(axis=-1)
    macro = float(f1_score(prediction.label_ids, guesses, average="macro"))
    two_classes = prediction.predictions.shape[-1] == 2
    return {
        "accuracy": float(accuracy_score(prediction.label_ids, guesses)),
        "f1": float(f1_score(prediction.label_ids, guesses)) if two_classes else macro,
        "f1_macro": macro,
    }


def build_trainer(
    options: argparse.Namespace, arguments: TrainingArguments, clock: StepClock
) -> Trainer:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    train = load_tokens(options.train, tokenizer, options, arguments)
    evaluation = load_tokens(options.eval, tokenizer, options, arguments) if options.eval else None
    # The new head is drawn here, before the Trainer sets the seed again.
    set_seed(options.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        options.model, num_labels=len(set(train["labels"])), dtype=torch.float32
    )
    model.register_forward_pre_hook(clock.count, with_kwargs=True)
    padded = options.padding == "max_length"
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        data_collator=default_data_collator if padded else DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics,
        callbacks=[clock],
    )


def measure(trainer: Trainer, clock: StepClock, warmup_steps: int) -> dict[str, float]:
    """Collective: what all ranks did between the ends of step `warmup_steps` and of the last."""
    steps = len(clock.seconds) - 1 - warmup_steps
    if steps < 1:
        raise SystemExit(f"{warmup_steps} warm-up steps leave none to measure: raise --max-steps.")
    seconds = clock.seconds[-1] - clock.seconds[warmup_steps]
    mine = clock.marks[-1] - clock.marks[warmup_steps]
    samples, tokens, padded = trainer.accelerator.reduce(mine, reduction="sum").tolist()
    return {
        "steps": steps,
        "train_seconds": seconds,
        "samples": samples,
        "tokens": tokens,
        "padded_tokens": padded,
        "samples_per_second": samples / seconds,
        "tokens_per_second": tokens / seconds,
    }


def evaluate(trainer: Trainer) -> dict[str, float]:
    """Collective."""
    return {name.removeprefix("eval_"): float(value) for name, value in trainer.evaluate().items()}


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    started_at = process_start() if options.started_at is None else options.started_at
    if options.threads:
        torch.set_num_threads(options.threads)
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(options, training_arguments(options, folder), clock)
        trainer.train()
    result: dict[str, Any] = measure(trainer, clock, options.warmup_steps)
    result["eval"] = evaluate(trainer) if options.eval else {}
    result["startup_seconds"] = clock.first_step_at - started_at
    result["wall_seconds"] = time.time() - started_at
    result["num_ranks"] = trainer.args.world_size
    result["num_threads"] = torch.get_num_threads()
    result["optimizer"] = str(trainer.args.optim.value)
    if trainer.is_world_process_zero():
        Path(options.out).write_text(json.dumps(result, indent=2) + "\n")
    # Taking the reducer apart can wait for ever: it holds the interpreter's lock and joins gloo's
    # thread, which may want that lock to let go of the last tensor (torch 2.13).
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
