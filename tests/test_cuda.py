"""What only a GPU can show. Skipped where there is none; one is enough."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import (
    SCRIPT,
    assert_no_process_left,
    ftlaunch,
    metrics_of,
    read_lines,
    said,
    write_model,
)
from tests.training_jobs import Inputs, assert_same_training

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not Path("/dev/nvidia0").exists(), reason="there is no NVIDIA GPU here"),
]
# The tests' own environment hides GPUs.
GPU = {"CUDA_VISIBLE_DEVICES": "0"}
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return Inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fp16_overflow_is_skipped_counted_and_recovered_from(inputs, tmp_path, strategy):
    """A loss scale of 2^40 makes every gradient infinite until it was halved often enough."""
    out = tmp_path / "out"
    result = ftlaunch(
        *inputs.command(out, "--strategy", strategy, "--precision", "fp16", nodes=1),
        f"train.initial_loss_scale={2**40}",
        env=GPU,
    )
    assert result.returncode == 0, said(result)
    lines = metrics_of(out)
    first = next(i for i, line in enumerate(lines) if line["applied"])
    assert 10 < first < 40
    # Each halves the scale, as the plain arithmetic says, under every strategy.
    assert [line["loss_scale"] for line in lines[:first]] == [2.0 ** (40 - i) for i in range(first)]
    assert len({line["learning_rate"] for line in lines[: first + 1]}) == 1
    assert math.isfinite(lines[-1]["loss"])
    assert_no_process_left(out)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_losses_of_a_gpu_are_those_of_the_cpu(inputs, tmp_path, strategy):
    """fp32 on both, with other kernels: close, not equal."""
    losses = []
    for name, env in (("gpu", GPU), ("cpu", {})):
        out = tmp_path / name
        result = ftlaunch(*inputs.command(out, "--strategy", strategy, nodes=1), env=env)
        assert result.returncode == 0, said(result)
        losses.append([line["loss"] for line in metrics_of(out)[:30]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("method", ["exec", "fork"])
def test_a_script_reduces_over_nccl(tmp_path, method):
    (tmp_path / "script.py").write_text(
        "import torch, torch.distributed as dist\n"
        "torch.cuda.set_device(0)\n"
        "dist.init_process_group('nccl')\n"
        "one = torch.ones(1, device='cuda')\n"
        "dist.all_reduce(one)\n"
        "print('sum', one.item(), flush=True)\n"
        "dist.destroy_process_group()\n"
    )
    result = ftlaunch(
        *("--nodes", 1, "-o", tmp_path / "out", f"cluster.start_method={method}", "script.py"),
        cwd=tmp_path,
        command=SCRIPT,
        env=GPU,
    )
    assert result.returncode == 0, said(result)
    assert "sum 1.0" in result.stdout


# Takes all but 3.2 GiB of the device's memory when it is told to, until its input ends.
_BALLOON = """\
import sys, time
from pathlib import Path
import torch
wanted, held = Path(sys.argv[1]), Path(sys.argv[2])
torch.zeros(1, device="cuda")
print("ready", flush=True)
while not wanted.exists():
    time.sleep(0.01)
free, _ = torch.cuda.mem_get_info()
balloon = torch.empty(max(1, free - int(3.2 * 2**30)), dtype=torch.uint8, device="cuda")
held.touch()
sys.stdin.read()
"""
# Takes a gibibyte for each row and gives it back to the device. At its 26th training pass it waits for
# the balloon: one is the proof's, and each step of 16 has four of 4.
_WIDE = """\
import time
from pathlib import Path
import torch
from transformers import BertForSequenceClassification

WANTED, HELD = Path({wanted!r}), Path({held!r})


class Wide(BertForSequenceClassification):
    calls = 0

    def forward(self, *args, **kwargs):
        ids = kwargs.get("input_ids") if args == () else args[0]
        self.calls += self.training
        if self.calls == 26 and not WANTED.exists():
            WANTED.touch()
            deadline = time.monotonic() + 60
            while not HELD.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
        room = torch.empty(len(ids), 2**30, dtype=torch.uint8, device=ids.device)
        del room
        torch.cuda.empty_cache()
        return super().forward(*args, **kwargs)
"""


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_a_full_device_at_step_7_is_answered_with_half(inputs, tmp_path, strategy):
    steps = (
        *("train.max_steps=20", "checkpoint.save_steps=5", "model.trust_remote_code=true"),
        *("train.per_device_eval_batch_size=2", "checkpoint.async_save=false"),
    )
    lines = {}
    for name in ("undisturbed", "full"):
        model = write_model(
            tmp_path / name / "model", auto_map={"AutoModelForSequenceClassification": "wide.Wide"}
        )
        wanted, held = tmp_path / name / "wanted", tmp_path / name / "held"
        if name == "undisturbed":
            wanted.touch()
        (model / "wide.py").write_text(_WIDE.format(wanted=str(wanted), held=str(held)))
        out = tmp_path / name / "out"
        balloon = subprocess.Popen(
            [
                sys.executable,
                "-c",
                _BALLOON,
                wanted if name == "full" else tmp_path / "never",
                held,
            ],
            env={**os.environ, **GPU},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert balloon.stdout is not None
            assert balloon.stdout.readline() == b"ready\n"
            result = ftlaunch(
                *inputs.command(out, "--strategy", strategy, *steps, nodes=1, model=model), env=GPU
            )
        finally:
            balloon.kill()
            balloon.wait(30)
        assert result.returncode == 0, said(result)
        lines[name] = metrics_of(out)
        restarts = [e for e in read_lines(out / "events.jsonl") if e["kind"] == "restarted"]
        if name == "undisturbed":
            assert not restarts
            continue
        (restart,) = restarts
        assert "out of memory" in restart["reason"]
        assert (restart["before"]["micro_batch"], restart["after"]["micro_batch"]) == (4, 2)
        assert restart["after_step"] == 6
    assert_same_training(lines["full"], lines["undisturbed"])
