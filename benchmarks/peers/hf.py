"""The HF `Trainer`, as its documentation has it, for classes of texts and of tokens and for LMs.

    python -m ftlaunch.peers.hf WORK.json RESULT.json

Defaults of the Trainer (5.23) that count here: fused AdamW, dynamic padding where a collator does
it, random order, gradients averaged by DDP without `gradient_as_bucket_view`, batches made by the
rank itself (`dataloader_num_workers=0`), pinned where there is a GPU. Not its default, and in its
favour: no search for unused parameters, no logging, no checkpoints, tokens made before the clock
starts.

One more default is worth knowing when losses are compared: on W ranks transformers 5.23 multiplies
the loss of models that take loss arguments by W (`average_tokens_across_devices`), which is right
for those that divide by the items of all ranks, and makes gradients of others W times as large.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments, set_seed

from ftlaunch.peers import program
from ftlaunch.peers.meter import Meter
from ftlaunch.peers.model import load_model
from ftlaunch.peers.tokens import MicroBatches, load_rows, take_whole
from ftlaunch.peers.work import Result, Work


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Tells the meter when training begins and steps end."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        self._meter.begin()

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self._meter.end_step()


class MeteredTrainer(Trainer):  # type: ignore[misc]
    """The Trainer, with a meter of what it computes; and in the order of the data where that is made."""

    def __init__(self, *, meter: Meter, in_order: bool, **arguments: Any) -> None:
        self._meter = meter
        self._in_order = in_order
        super().__init__(**arguments)

    def training_step(self, model: Any, inputs: dict[str, Any], *arguments: Any) -> torch.Tensor:
        self._meter.count(inputs)
        loss: torch.Tensor = super().training_step(model, inputs, *arguments)
        self._meter.add_loss(loss)
        return loss

    def _get_train_sampler(self, *arguments: Any) -> Any:
        if self._in_order:
            return SequentialSampler(self.train_dataset)
        return super()._get_train_sampler(*arguments)


def training_arguments(work: Work, output_dir: str) -> TrainingArguments:
    on_cpu = work.device == "cpu"
    settings: dict[str, Any] = {
        "output_dir": output_dir,
        # Of micro-batches that are made already each is one item.
        "per_device_train_batch_size": 1 if work.order is not None else work.micro_batch,
        "per_device_eval_batch_size": 32,
        "gradient_accumulation_steps": work.accumulation,
        "learning_rate": work.learning_rate,
        "lr_scheduler_type": work.lr_scheduler_type,
        "warmup_steps": work.lr_warmup_steps,
        "weight_decay": work.weight_decay,
        "adam_beta1": work.adam_beta1,
        "adam_beta2": work.adam_beta2,
        "adam_epsilon": work.adam_epsilon,
        "max_grad_norm": work.max_grad_norm,
        "num_train_epochs": work.epochs,
        "max_steps": -1 if work.steps is None else work.steps,
        "bf16": work.precision == "bf16",
        "fp16": work.precision == "fp16",
        "seed": work.seed,
        "use_cpu": on_cpu,
        "ddp_find_unused_parameters": False,
        "dataloader_num_workers": work.loader_workers,
        "dataloader_pin_memory": not on_cpu,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    # Without torchrun accelerate takes a named backend for a process group that exists.
    if on_cpu and "WORLD_SIZE" in os.environ:
        settings["ddp_backend"] = "gloo"
    return TrainingArguments(**settings)


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, F1 of class 1 (as GLUE has it for two classes) and the mean F1 of all classes."""
    from sklearn.metrics import accuracy_score, f1_score

    guesses = prediction.predictions.argmax(axis=-1)
    macro = float(f1_score(prediction.label_ids, guesses, average="macro"))
    two_classes = prediction.predictions.shape[-1] == 2
    return {
        "accuracy": float(accuracy_score(prediction.label_ids, guesses)),
        "f1": float(f1_score(prediction.label_ids, guesses)) if two_classes else macro,
        "f1_macro": macro,
    }


def train(work: Work) -> Result:
    """Collective."""
    meter = Meter(work)
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(work, folder)
        rows, collate = load_rows(work, first=arguments.main_process_first(desc="tokens"))
        evaluation = None
        if work.eval_rows is not None:
            first = arguments.main_process_first(desc="tokens to evaluate on")
            evaluation, _ = load_rows(work, work.eval_rows, first)
        made = work.order is not None
        trainer = MeteredTrainer(
            meter=meter,
            in_order=made,
            # The new head is drawn here, before the Trainer sets the seed again.
            model=load_model(work, rows),
            args=arguments,
            train_dataset=MicroBatches(rows, work) if made else rows,
            data_collator=take_whole(collate) if made else collate,
            eval_dataset=evaluation,
            compute_metrics=compute_metrics,
            callbacks=[StepClock(meter)],
        )
        set_seed(work.seed)
        trainer.train()
        metrics = _evaluate(trainer, collate) if evaluation is not None else {}
    return meter.result("hf", _settings(work, trainer), metrics)


def _evaluate(trainer: Trainer, collate: Any) -> Mapping[str, float]:
    """Collective."""
    trainer.data_collator = collate
    return {name.removeprefix("eval_"): float(value) for name, value in trainer.evaluate().items()}


def _settings(work: Work, trainer: Trainer) -> dict[str, Any]:
    defaults = {
        "optimizer": trainer.args.optim.value,
        "dataloader_num_workers": trainer.args.dataloader_num_workers,
        "dataloader_pin_memory": trainer.args.dataloader_pin_memory,
        "average_tokens_across_devices": trainer.args.average_tokens_across_devices,
    }
    chosen = {
        "ddp_find_unused_parameters": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "order": "given" if work.order is not None else "its own",
        "padding": work.padding,
    }
    return {"defaults": defaults, "chosen": chosen}


if __name__ == "__main__":
    program.run(train)
