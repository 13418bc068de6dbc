"""Scripts that were written for other launchers, unchanged: the losses are those that torchrun gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.jobs import SCRIPT, assert_no_process_left, ftlaunch, said, write_data, write_model

PLAIN_DDP = """
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    torch.manual_seed(1)
    model = DistributedDataParallel(torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for step in range(5):
        x = torch.randn(8, 4, generator=generator)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        if dist.get_rank() == 0:
            print(f"loss {total.item():.9f}", flush=True)
    dist.destroy_process_group()
"""

ACCELERATE = """
    import torch
    from accelerate import Accelerator
    from torch.utils.data import DataLoader, TensorDataset

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(1)
    x = torch.randn(64, 4)
    data = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4, shuffle=True)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    for inputs, targets in data:
        loss = (model(inputs) - targets).square().mean()
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        total = accelerator.reduce(loss.detach())
        accelerator.print(f"loss {total.item():.9f}", flush=True)
    accelerator.end_training()
"""

HF_TRAINER = """
    import sys

    from datasets import load_dataset
    from transformers import (
        AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding,
        Trainer, TrainerCallback, TrainingArguments, set_seed,
    )

    class Print(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if state.is_world_process_zero and "loss" in (logs or {}):
                print(f"loss {logs['loss']}", flush=True)

    model, data, out = sys.argv[1:]
    set_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    names = ["bad", "good"]

    def encode(row):
        return {**tokenizer(row["text"]), "labels": names.index(row["label"])}

    train = load_dataset("json", data_files=f"{data}/train.jsonl", split="train")
    train = train.map(encode, remove_columns=train.column_names)
    trainer = Trainer(
        model=AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(model)),
        args=TrainingArguments(
            out, max_steps=5, logging_steps=1, per_device_train_batch_size=4, report_to=[],
            save_strategy="no", use_cpu=True, seed=1, learning_rate=1e-3, disable_tqdm=True,
        ),
        train_dataset=train,
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[Print()],
    )
    trainer.train()
"""

SCRIPTS = {"plain DDP": PLAIN_DDP, "Accelerate": ACCELERATE, "HF Trainer": HF_TRAINER}


def losses(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("loss ")]


def torchrun(folder: Path, *words: str) -> list[str]:
    """What rank 0 prints. torch can abort while a finished rank is taken down, which fails torchrun."""
    for _ in range(5):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node=2",
                *words,
            ],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"},
            capture_output=True,
            text=True,
            timeout=180,
        )
        if done.returncode == 0 or "SIGABRT" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    return losses(done.stdout)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long if name == "Accelerate" else ())
        for name in SCRIPTS
    ],
)
def test_the_losses_are_torchruns(tmp_path, name):
    (tmp_path / "train.py").write_text(textwrap.dedent(SCRIPTS[name]))
    words = ["train.py"]
    if name == "HF Trainer":
        model = write_model(tmp_path / "model")
        words += [str(model), str(write_data(tmp_path / "data")), str(tmp_path / "trained")]
    expected = torchrun(tmp_path, *words)
    assert len(expected) >= 5
    for method in ("exec", "fork"):
        out = tmp_path / f"out-{method}"
        flags = ["--nodes", 2, "-o", out, f"cluster.start_method={method}"]
        result = ftlaunch(*flags, *words, cwd=tmp_path, command=SCRIPT)
        assert result.returncode == 0, said(result)
        assert losses(result.stdout) == expected, said(result)
        assert json.loads((out / "summary.json").read_text())["status"] == "done"
        assert_no_process_left(out)
