"""What only a GPU can show. Skipped where there is none; one is enough."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.jobs import SCRIPT, assert_no_process_left, ftlaunch, metrics_of, said
from tests.training_jobs import Inputs

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
