"""Jobs under the strategy `mindspore` as a user runs them: against ddp, disturbed, and with mistakes."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.jobs import (
    MODULE,
    assert_mistake,
    assert_no_process_left,
    checkpoint_steps,
    finish,
    ftlaunch,
    metrics_of,
    processes_of,
    rank_process,
    read_lines,
    said,
    start,
    summary_of,
    wait_until,
)
from tests.mindspore.torch_side import run_torch, torch_command
from tests.training_jobs import (
    Inputs,
    assert_every_checkpoint_whole,
    assert_same_training,
    wait_for_checkpoint,
    wait_for_step,
)

MINDSPORE = ("--strategy", "mindspore")
# 2 ranks × 3 micro-batches of at most 4.
THIRTY = ("train.max_steps=30", "train.global_batch_size=24", "train.eval_strategy=no")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return Inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def of_ddp(inputs):
    """The metrics of the same job under ddp on 2 ranks."""
    out = inputs.folder / "ddp"
    result = ftlaunch(*inputs.command(out, *THIRTY), command=torch_command())
    assert result.returncode == 0, said(result)
    return metrics_of(out)


@pytest.fixture(scope="module")
def trained(inputs):
    """The output folder of 30 undisturbed steps on 2 ranks."""
    out = inputs.folder / "mindspore"
    result = ftlaunch(*inputs.command(out, *THIRTY, *MINDSPORE))
    assert result.returncode == 0, said(result)
    return out


def assert_same_losses(lines, expected, tolerance):
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, other in zip(lines, expected, strict=True):
        assert line["samples_digest"] == other["samples_digest"]
        assert line["learning_rate"] == other["learning_rate"]
    worst = max(
        abs(line["loss"] / other["loss"] - 1) for line, other in zip(lines, expected, strict=True)
    )
    print(f"worst relative difference of the losses: {worst:.1e}")
    assert worst < tolerance


def test_thirty_steps_are_those_of_ddp(trained, of_ddp):
    assert_same_losses(metrics_of(trained), of_ddp, 1e-4)
    assert summary_of(trained)["strategy"] == "mindspore"


def test_the_model_loads_in_torch_and_predicts_the_same(trained, inputs, tmp_path):
    """`eval` writes what MindSpore's logits make of each sample; torch's are made from the same file."""
    model = trained / "model"
    result = ftlaunch("eval", model, "--dataset", inputs.data, *MINDSPORE, "-o", tmp_path / "ms")
    assert result.returncode == 0, said(result)
    result = ftlaunch(
        *("eval", model, "--dataset", inputs.data, "--strategy", "ddp", "-o", tmp_path / "pt"),
        *("--precision", "fp32"),
        command=torch_command(),
    )
    assert result.returncode == 0, said(result)
    ours, theirs = (read_lines(tmp_path / side / "predictions.jsonl") for side in ("ms", "pt"))
    assert len(ours) == len(theirs) == 40
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["label"] == other["label"]
        one, two = (np.array(list(each["scores"].values())) for each in (mine, other))
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-4)
    # Every weight that transformers looks for is there, and no other.
    np.save(tmp_path / "ids.npy", np.array([[2, 5, 9, 3], [2, 7, 3, 0]]))
    run_torch("logits", model, tmp_path / "ids.npy", tmp_path / "logits.npy")
    assert np.isfinite(np.load(tmp_path / "logits.npy")).all()


def test_what_mindspore_began_ddp_goes_on_with_and_back(inputs, tmp_path):
    """10 steps on 2 ranks, 10 under ddp on 3, the last 10 on 2 again: one run of 30."""
    # A schedule that does not depend on how many steps there are.
    constant = (*THIRTY, "train.lr_scheduler_type=constant")
    whole, out = tmp_path / "whole", tmp_path / "out"
    result = ftlaunch(*inputs.command(whole, *constant), command=torch_command())
    assert result.returncode == 0, said(result)
    stages = [(10, 2, MINDSPORE, MODULE), (20, 3, (), torch_command()), (30, 2, MINDSPORE, MODULE)]
    for steps, nodes, strategy, command in stages:
        changes = (*constant, f"train.max_steps={steps}", *strategy)
        result = ftlaunch(*inputs.command(out, *changes, nodes=nodes), command=command)
        assert result.returncode == 0, said(result)
        assert checkpoint_steps(out)[-1] == steps
    assert_same_losses(metrics_of(out), metrics_of(whole), 1e-4)
    assert_every_checkpoint_whole(out)


# -- ends ---------------------------------------------------------------------------------------


def scheduler_process(out: Path) -> int:
    """The process that serves the ranks is named so."""
    [pid] = [
        pid
        for pid in processes_of(out)
        if Path(f"/proc/{pid}/comm").read_text().strip() == "rank-helper"
    ]
    return pid


@pytest.mark.parametrize(
    ("victim", "culprit"),
    [
        pytest.param(
            lambda out: rank_process(out, 1),
            "rank 1 on node1: killed by SIGKILL",
            marks=pytest.mark.long,
        ),
        (scheduler_process, "MindSpore's scheduler on node0: killed by SIGKILL"),
    ],
    ids=["a rank", "the scheduler"],
)
def test_kill_without_restarts(inputs, tmp_path, victim, culprit):
    out = tmp_path / "out"
    with start(*inputs.endless(out, *MINDSPORE), "--max-restarts", 0) as process:
        wait_for_step(process, out, 3)
        os.kill(victim(out), signal.SIGKILL)
        killed = time.monotonic()
        wait_until(lambda: process.poll() is not None, 10, "the command has ended")
        wait_until(lambda: not processes_of(out), 5, "every process is gone")
        seconds = time.monotonic() - killed
        result = finish(process, 10)
    print(f"gone after {seconds:.1f} s")
    assert seconds < 5
    assert result.returncode == 1, said(result)
    assert culprit.partition(":")[0] in said(result)
    assert "SIGKILL" in said(result)


def test_a_killed_rank_is_started_again_from_the_last_checkpoint(inputs, trained, tmp_path):
    out = tmp_path / "out"
    with start(*inputs.command(out, *THIRTY, *MINDSPORE)) as process:
        wait_for_checkpoint(process, out, 12)
        os.kill(rank_process(out, 1), signal.SIGKILL)
        result = finish(process, 150)
    assert result.returncode == 0, said(result)
    assert "rank 1 on node1: killed by SIGKILL; restart 1 of 3" in result.stdout
    assert_same_training(metrics_of(out), metrics_of(trained))
    assert_no_process_left(out)


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_a_stop_saves_and_exits_75(inputs, tmp_path, number):
    out = tmp_path / "out"
    with start(*inputs.endless(out, *MINDSPORE)) as process:
        wait_for_step(process, out, 3)
        process.send_signal(number)
        result = finish(process, 60)
    assert result.returncode == 75, said(result)
    assert checkpoint_steps(out)[-1] >= 3
    assert_no_process_left(out)


def test_ctrl_c_twice_ends_at_once(inputs, tmp_path):
    out = tmp_path / "out"
    with start(*inputs.endless(out, *MINDSPORE)) as process:
        wait_for_step(process, out, 2)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        asked = time.monotonic()
        result = finish(process, 20)
        wait_until(lambda: not processes_of(out), 5, "every process is gone")
    assert time.monotonic() - asked < 5
    # One signal may be taken for the two: then it is a stop.
    assert result.returncode in (130, 75), said(result)


def test_a_rank_that_hangs_is_named(inputs, tmp_path):
    out = tmp_path / "out"
    options = ("cluster.stall_timeout_seconds=5", "--max-restarts", 0)
    with start(*inputs.endless(out, *MINDSPORE, *options)) as process:
        wait_for_step(process, out, 3)
        os.kill(rank_process(out, 1), signal.SIGSTOP)
        result = finish(process, 60)
    assert result.returncode == 1, said(result)
    assert "rank 1 on node1" in said(result)
    assert_no_process_left(out)


@pytest.mark.long
def test_ranks_that_are_executed_are_as_good(inputs, trained, tmp_path):
    out = tmp_path / "out"
    result = ftlaunch(*inputs.command(out, *THIRTY, *MINDSPORE, "cluster.start_method=exec"))
    assert result.returncode == 0, said(result)
    assert_same_training(metrics_of(out), metrics_of(trained))


# -- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("--precision", "fp16"), ("--precision fp16", "mindspore", "fp32")),
        (("--precision", "bf16"), ("--precision bf16", "mindspore", "fp32")),
        (("--strategy", "ddp"), ("lacks torch", "strategy ddp", "--strategy mindspore")),
        (("--strategy", "zero2"), ("lacks deepspeed", "zero2", "--strategy mindspore")),
    ],
    ids=["fp16", "bf16", "ddp without torch", "zero2 without DeepSpeed"],
)
def test_what_cannot_be_had(inputs, tmp_path, changes, words):
    out = tmp_path / "out"
    flags = inputs.command(out, *MINDSPORE)
    at = flags.index("--precision")
    del flags[at : at + 2]
    if "--strategy" in changes:
        at = flags.index("--strategy")
        del flags[at : at + 2]
    assert_mistake(ftlaunch(*flags, *changes), *words)
    assert not out.exists() or not any(out.iterdir())


def test_auto_takes_what_is_installed(inputs, tmp_path):
    result = ftlaunch(*inputs.command(tmp_path / "out"), "--dry-run")
    assert result.returncode == 0, said(result)
    assert "mindspore" in result.stdout
    assert "torch is not installed" in result.stdout


def test_a_model_that_mindone_does_not_have(inputs, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for path in inputs.model.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "deberta_v3"}))
    result = ftlaunch(*inputs.command(tmp_path / "out", *MINDSPORE, model=model))
    assert_mistake(result, "deberta_v3")
    # transformers has it; mindone's was never compared.
    (model / "config.json").write_text(json.dumps({**config, "model_type": "convbert"}))
    result = ftlaunch(*inputs.command(tmp_path / "out", *MINDSPORE, model=model))
    assert_mistake(result, "'convbert'", "mindone does not have", "never compared", "Nearest to it")


def test_a_rank_table_without_npus(inputs, tmp_path):
    table = tmp_path / "table.json"
    table.write_text("{}")
    flags = inputs.command(tmp_path / "out", *MINDSPORE, f"cluster.rank_table={table}")
    assert_mistake(ftlaunch(*flags), "cluster.rank_table", "no Ascend NPU")


def test_gradient_checkpointing_is_refused(inputs, tmp_path):
    flags = inputs.command(tmp_path / "out", *MINDSPORE, "model.gradient_checkpointing=true")
    assert_mistake(ftlaunch(*flags), "model.gradient_checkpointing", "mindspore")


def test_an_adapter_is_refused_by_the_plan(inputs, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    (base / "config.json").write_bytes((inputs.model / "config.json").read_bytes())
    (base / "model.safetensors").write_bytes(b"looked for, not read")
    adapter.mkdir()
    config = (
        f'{{"peft_type": "LORA", "base_model_name_or_path": "{base}", "r": 4, "lora_alpha": 8}}'
    )
    (adapter / "adapter_config.json").write_text(config)
    job = ("eval", adapter, "--dataset", inputs.data, *MINDSPORE, "-o", tmp_path / "out")
    for more in ((), ("--dry-run",)):
        assert_mistake(ftlaunch(*job, *more), "holds an adapter", "ftlaunch merge --adapter")
    assert not (tmp_path / "out").exists()
