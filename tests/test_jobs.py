"""Whole jobs, run as a user runs them: what they leave, and what happens when they are disturbed."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ftlaunch.launcher import job
from ftlaunch.launcher.job_record import JobRecord
from ftlaunch.launcher.startup import StartupClock
from tests.jobs import (
    SCRIPT,
    agent_processes,
    assert_no_process_left,
    checkpoint_steps,
    contents,
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
    write_model,
)
from tests.training_jobs import (
    NUM_STEPS,
    START_SECONDS,
    Inputs,
    assert_every_checkpoint_whole,
    assert_same_training,
    wait_for_checkpoint,
    wait_for_step,
)

METRIC_KEYS = [
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "loss_scale",
    "applied",
    "samples_per_second",
    "tokens_per_second",
    "samples_digest",
]
SUMMARY_KEYS = {
    "status",
    "exit_code",
    "strategy",
    "precision",
    "num_nodes",
    "world_size",
    "optimizer_steps",
    "epochs",
    "samples_seen",
    "tokens_seen",
    "padding_fraction",
    "overflow_steps",
    "restarts",
    "startup_seconds",
    "startup",
    "train_seconds",
    "samples_per_second",
    "tokens_per_second",
    "peak_memory_bytes",
    "eval",
    "model_dir",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return Inputs(tmp_path_factory.mktemp("inputs"))


# -- a job that is left alone -------------------------------------------------------------------


class Done:
    """A job that nothing disturbed, and the same command again."""

    def __init__(self, inputs: Inputs) -> None:
        self.out = inputs.folder / "undisturbed"
        self.first = ftlaunch(*inputs.command(self.out))
        self.left = processes_of(self.out)
        self.startup = summary_of(self.out)["startup"]
        self.metrics = (self.out / "metrics.jsonl").read_bytes()
        self.weights = (self.out / "model" / "model.safetensors").read_bytes()
        self.checkpoints = contents(self.out / "checkpoints")
        self.second = ftlaunch(*inputs.command(self.out))


@pytest.fixture(scope="module")
def done(inputs):
    return Done(inputs)


def test_a_job_ends_well(done):
    assert done.first.returncode == 0, said(done.first)
    assert done.left == []
    assert "processes of this machine" in done.first.stdout
    assert f"step {NUM_STEPS}/{NUM_STEPS}" in done.first.stdout


def test_metrics_have_a_line_for_every_step(done):
    lines = [json.loads(line) for line in done.metrics.splitlines()]
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    assert all(list(line) == METRIC_KEYS for line in lines)
    # 240 samples, 16 a step: 15 steps are an epoch.
    assert lines[14]["epoch"] == 1.0
    # 6 steps of warm-up to 3e-3, then down to zero behind step 90.
    assert math.isclose(max(line["learning_rate"] for line in lines), 3e-3)
    assert lines[-1]["loss"] < 0.5 < lines[0]["loss"]
    assert all(line["applied"] is True for line in lines)
    assert len({line["samples_digest"] for line in lines}) == NUM_STEPS


def test_the_summary(done):
    summary = summary_of(done.out)
    assert set(summary) >= SUMMARY_KEYS
    expected = {
        "status": "done",
        "exit_code": 0,
        "strategy": "ddp",
        "precision": "fp32",
        "num_nodes": 2,
        "world_size": 2,
        "optimizer_steps": NUM_STEPS,
        "epochs": 6.0,
        "samples_seen": NUM_STEPS * 16,
        "overflow_steps": 0,
        "restarts": 0,
        "model_dir": str(done.out / "model"),
    }
    assert {key: summary[key] for key in expected} == expected
    assert 0 <= summary["padding_fraction"] < 0.5
    # A sentence of 4 to 13 words, [CLS] and [SEP].
    assert 6 < summary["tokens_seen"] / summary["samples_seen"] < 15
    assert summary["train_seconds"] > 0
    assert summary["peak_memory_bytes"] > 50e6
    assert {"loss", "accuracy"} <= set(summary["eval"])
    assert summary["eval"]["accuracy"] > 0.9
    # The same command again had no step left to do.
    assert summary["startup"] is None


def test_where_the_start_went(done):
    parts = done.startup["parts"]
    assert [part["name"] for part in parts] == [
        *("command line", "agents and plan", "ranks begin"),
        *("imports", "tokens", "model", "process group", "strategy"),
        *("resuming", "first batch", "first step"),
    ]
    assert all(part["seconds"] >= 0 for part in parts)
    # They follow one another: nothing is counted twice, nothing left out.
    total = done.startup["total_seconds"]
    assert math.isclose(sum(part["seconds"] for part in parts), total, abs_tol=0.01)
    assert done.startup["preload_seconds"] > 0


def test_the_plan_the_report_and_the_logs(done):
    plan = json.loads((done.out / "plan.json").read_text())
    assert (plan["strategy"], plan["world_size"], plan["micro_batch"]) == ("ddp", 2, 4)
    assert plan["accumulation"] == 2
    assert all(reason["why"] for reason in plan["reasons"])
    page = (done.out / "report.html").read_text()
    assert "<html" in page
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", page)
    assert {path.name for path in (done.out / "logs").iterdir()} >= {
        "rank-00000.log",
        "rank-00001.log",
    }
    (events,) = (done.out / "tensorboard").glob("events.out.tfevents.*")
    assert events.stat().st_size > 1000


def test_the_checkpoints_are_the_last_two_and_whole(done):
    assert assert_every_checkpoint_whole(done.out) == [NUM_STEPS - 10, NUM_STEPS]


def test_the_model_loads_with_transformers(done):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = done.out / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert model.config.label2id == {"bad": 0, "good": 1}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    texts = ["this film was lovely", "it was a dull story and the plot was weak"]
    with torch.inference_mode():
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    assert [model.config.id2label[i] for i in logits.argmax(-1).tolist()] == ["good", "bad"]


def test_the_same_command_again_trains_no_further(done):
    assert done.second.returncode == 0, said(done.second)
    assert f"resumed after step {NUM_STEPS}" in done.second.stdout
    assert (done.out / "metrics.jsonl").read_bytes() == done.metrics
    assert (done.out / "model" / "model.safetensors").read_bytes() == done.weights
    assert contents(done.out / "checkpoints") == done.checkpoints
    assert processes_of(done.out) == []


def test_the_finished_job_can_be_evaluated_alone(done, inputs):
    before = contents(done.out / "model")
    result = ftlaunch("eval", done.out, "--dataset", inputs.data, "--precision", "fp32")
    assert result.returncode == 0, said(result)
    trained, alone = summary_of(done.out)["eval"], summary_of(done.out / "eval")["eval"]
    assert trained.keys() == alone.keys()
    for name, value in trained.items():
        assert math.isclose(alone[name], value, rel_tol=1e-6), name
    predictions = read_lines(done.out / "eval" / "predictions.jsonl")
    assert len(predictions) == len(read_lines(inputs.data / "validation.jsonl"))
    assert contents(done.out / "model") == before


# -- a stop, a second job, another number of nodes ----------------------------------------------


def test_a_forked_rank_finds_everything_imported(inputs, done):
    """What a fork server leaves to its ranks is imported by each of them, at every start.

    Not what tokenizes: the tokens of `done` are in the cache.
    """
    out = inputs.folder / "imports"
    once = ("train.max_steps=2", "train.eval_strategy=no")
    # Every import is written to stderr, which is a rank's log.
    result = ftlaunch(*inputs.command(out, *once), env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert result.returncode == 0, said(result)
    logs = sorted((out / "logs").glob("rank-*.log"))
    assert len(logs) == summary_of(out)["world_size"]
    for path in logs:
        lines = re.findall(r"^import time: .*\|\s*([\w.]+)$", path.read_text(), re.MULTILINE)
        assert "xxhash" in lines, "the imports of ranks are not seen"
        assert len(lines) < 20, lines


class Interrupted:
    """A job that a second one wants to disturb, that is stopped and goes on with three nodes."""

    def __init__(self, inputs: Inputs) -> None:
        self.out = inputs.folder / "interrupted"
        owner = self.out / ".ftlaunch-owner"
        with start(*inputs.command(self.out)) as process:
            wait_until(
                lambda: owner.exists() and owner.read_text().endswith("}"), 30, "the owner file"
            )
            self.pid = process.pid
            self.intruder = ftlaunch(*inputs.command(self.out, "--overwrite"))
            wait_for_checkpoint(process, self.out, 13)
            process.send_signal(signal.SIGTERM)
            self.stopped = finish(process, 60)
        assert_no_process_left(self.out)
        self.steps = [line["step"] for line in metrics_of(self.out)]
        self.summary = summary_of(self.out)
        self.checkpoints = assert_every_checkpoint_whole(self.out)
        self.resumed = ftlaunch(*inputs.command(self.out, nodes=3))


@pytest.fixture(scope="module")
def interrupted(inputs):
    return Interrupted(inputs)


def test_a_second_job_keeps_out_of_the_same_folder(interrupted):
    output = said(interrupted.intruder)
    assert interrupted.intruder.returncode == 2, output
    assert f"process {interrupted.pid}" in output
    assert "in use by another job" in output
    assert "--output-dir" in output
    assert "Traceback" not in output


def test_sigterm_saves_and_ends_with_75(interrupted):
    assert interrupted.stopped.returncode == 75, said(interrupted.stopped)
    assert 13 <= len(interrupted.steps) < NUM_STEPS
    assert interrupted.checkpoints[-1] == interrupted.steps[-1]
    assert f"stopped after step {interrupted.steps[-1]}" in interrupted.stopped.stdout
    assert (interrupted.summary["status"], interrupted.summary["exit_code"]) == ("stopped", 75)


def test_another_number_of_nodes_goes_on_as_if_nothing_had_happened(interrupted, done):
    assert interrupted.resumed.returncode == 0, said(interrupted.resumed)
    assert f"resumed after step {interrupted.steps[-1]}" in interrupted.resumed.stdout
    expected = [json.loads(line) for line in done.metrics.splitlines()]
    assert_same_training(metrics_of(interrupted.out), expected)
    summary = summary_of(interrupted.out)
    assert (summary["status"], summary["num_nodes"], summary["world_size"]) == ("done", 3, 3)
    assert summary["samples_seen"] == NUM_STEPS * 16
    assert_no_process_left(interrupted.out)


@pytest.mark.parametrize("starting", ["agent-1.log", "rank-00001.log"], ids=["agents", "ranks"])
def test_a_stop_before_anything_has_begun(inputs, tmp_path, starting):
    out = tmp_path / "out"
    with start(*inputs.command(out)) as process:
        wait_until((out / "logs" / starting).exists, START_SECONDS, starting)
        process.terminate()
        result = finish(process, 60)
    assert result.returncode == 75, said(result)
    assert "Traceback" not in said(result)
    assert metrics_of(out) == []
    assert_no_process_left(out)


def test_a_second_interrupt_ends_at_once(inputs, tmp_path):
    out = tmp_path / "out"
    # Steps of a second and more: 480 micro-batches of one sample.
    slow = ("train.global_batch_size=480", "train.per_device_train_batch_size=1")
    with start(*inputs.endless(out, *slow)) as process:
        wait_for_step(process, out, 1)
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        result = finish(process, 30)
        seconds = time.monotonic() - started
    assert result.returncode == 130, said(result)
    assert seconds < 5
    assert "Traceback" not in said(result)
    assert summary_of(out)["status"] == "interrupted"
    assert_no_process_left(out)


# -- failures -----------------------------------------------------------------------------------

_BOOM = """\
import os

from transformers import BertForSequenceClassification


class Boom(BertForSequenceClassification):
    calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        if os.environ["RANK"] == "1" and self.calls == 3:
            raise ValueError("boom")
        return super().forward(*args, **kwargs)
"""


def test_an_exception_in_one_rank(inputs, tmp_path):
    out = tmp_path / "out"
    model = write_model(
        tmp_path / "model",
        auto_map={"AutoModelForSequenceClassification": "modeling_boom.Boom"},
    )
    (model / "modeling_boom.py").write_text(_BOOM)
    line = 1 + _BOOM.splitlines().index('            raise ValueError("boom")')
    result = ftlaunch(*inputs.command(out, "model.trust_remote_code=true", model=model))
    ended = time.monotonic()
    output = said(result)
    assert result.returncode == 1, output
    assert "rank 1 on node1 failed: ValueError: boom" in output
    assert re.search(rf'modeling_boom\.py", line {line}, in forward', output), output
    assert output.count("Traceback") == 1
    assert str(out / "logs" / "rank-00001.log") in output
    assert_no_process_left(out, 5 - (time.monotonic() - ended))
    summary = summary_of(out)
    assert (summary["status"], summary["exit_code"]) == ("failed", 1)
    assert (summary["failure"]["rank"], summary["failure"]["node"]) == (1, "node1")
    assert "boom" in summary["failure"]["title"]


def test_remote_code_is_not_run_unless_asked_for(inputs, tmp_path):
    model = write_model(
        tmp_path / "model",
        auto_map={"AutoModelForSequenceClassification": "modeling_boom.Boom"},
    )
    (model / "modeling_boom.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\n{_BOOM}")
    command = inputs.command(tmp_path / "out", "train.max_steps=2", nodes=1, model=model)
    result = ftlaunch(*command)
    assert "Traceback" not in said(result)
    assert not (tmp_path / "pwned").exists(), said(result)


def test_a_killed_rank_is_restarted_from_the_last_checkpoint(inputs, tmp_path, done):
    out = tmp_path / "out"
    with start(*inputs.command(out)) as process:
        wait_for_checkpoint(process, out, 13)
        os.kill(rank_process(out, 1), signal.SIGKILL)
        result = finish(process, 180)
    assert result.returncode == 0, said(result)
    assert re.search(r"rank 1 on node1: killed by SIGKILL.*; restart 1 of 3", result.stdout)
    summary = summary_of(out)
    assert (summary["status"], summary["restarts"]) == ("done", 1)
    assert summary["samples_seen"] == NUM_STEPS * 16
    resumed = [e for e in read_lines(out / "events.jsonl") if e["kind"] == "resumed"]
    assert len(resumed) == 1
    assert resumed[0]["after_step"] >= 10
    expected = [json.loads(line) for line in done.metrics.splitlines()]
    assert_same_training(metrics_of(out), expected)
    assert_no_process_left(out)


def test_a_killed_rank_without_restarts_ends_the_job(inputs, tmp_path):
    out = tmp_path / "out"
    with start(*inputs.endless(out, "--max-restarts", 0)) as process:
        wait_for_checkpoint(process, out, 13)
        os.kill(rank_process(out, 1), signal.SIGKILL)
        result = finish(process, 30)
    output = said(result)
    assert result.returncode == 1, output
    assert "rank 1 on node1 failed: killed by SIGKILL" in output
    summary = summary_of(out)
    assert (summary["status"], summary["exit_code"], summary["restarts"]) == ("failed", 1, 0)
    assert (summary["failure"]["rank"], summary["failure"]["cause"]) == (1, "signal")
    assert assert_every_checkpoint_whole(out)
    assert_no_process_left(out)


def test_a_stop_before_a_run_has_done_a_step_sends_nobody_back_to_the_beginning(inputs, tmp_path):
    out = tmp_path / "out"
    result = ftlaunch(*inputs.command(out, "train.max_steps=2"))
    assert result.returncode == 0, said(result)
    owner = out / ".ftlaunch-owner"
    with start(*inputs.endless(out)) as process:
        wait_until(lambda: owner.exists() and owner.read_text().endswith("}"), 30, "the owner file")
        process.send_signal(signal.SIGTERM)
        result = finish(process, 60)
    assert result.returncode == 75, said(result)
    assert "begin again" not in result.stdout
    assert re.search(
        r"stopped before (anything was started|the first step of this run)", result.stdout
    )
    assert checkpoint_steps(out) == [2]


def test_a_stop_while_the_ranks_of_a_failure_are_ended(inputs, tmp_path):
    out = tmp_path / "out"
    with start(*inputs.endless(out)) as process:
        wait_for_checkpoint(process, out, 13)
        # It does not end its rank before it goes on.
        agent = agent_processes(out)[0]
        os.kill(agent, signal.SIGSTOP)
        os.kill(rank_process(out, 1), signal.SIGKILL)
        time.sleep(1.5)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        os.kill(agent, signal.SIGCONT)
        result = finish(process, 30)
    assert result.returncode == 75, said(result)
    saved, done = assert_every_checkpoint_whole(out)[-1], metrics_of(out)[-1]["step"]
    # What it says is saved is what is there, whether or not a step came after it.
    after = f"stopped after step {saved}, saved in {out}; run the same command to go on\n"
    if saved < done:
        after = f"stopped after step {done}; step {saved} is saved in {out}; run the same command"
    assert after in result.stdout, said(result)
    remark = "rank 1 on node1: killed by SIGKILL; a stop was asked for, so it is not started again"
    assert f"warning: {remark}; log: {out}/logs/" in result.stdout
    summary = summary_of(out)
    assert (summary["status"], summary["stop_signal"]) == ("stopped", "SIGTERM")
    assert summary["remarks"][0].startswith(remark)
    assert_no_process_left(out)


def test_a_killed_agent_is_replaced(inputs, tmp_path, done):
    out = tmp_path / "out"
    with start(*inputs.command(out)) as process:
        wait_for_checkpoint(process, out, 13)
        os.kill(agent_processes(out)[1], signal.SIGKILL)
        result = finish(process, 120)
    assert result.returncode == 0, said(result)
    reason = "the agent on node1: killed by SIGKILL; rank 1 ended with it; restart 1 of 3"
    assert reason in result.stdout, said(result)
    assert summary_of(out)["restarts"] == 1
    expected = [json.loads(line) for line in done.metrics.splitlines()]
    assert_same_training(metrics_of(out), expected)
    assert_no_process_left(out)


def test_a_killed_agent_without_restarts_ends_the_job(inputs, tmp_path):
    out = tmp_path / "out"
    with start(*inputs.endless(out, "--max-restarts", 0)) as process:
        wait_for_checkpoint(process, out, 13)
        os.kill(agent_processes(out)[1], signal.SIGKILL)
        result = finish(process, 30)
    assert result.returncode == 1, said(result)
    assert "the agent on node1 failed: killed by SIGKILL" in said(result)
    assert "Traceback" not in said(result)
    failure = summary_of(out)["failure"]
    assert (failure["node"], failure["cause"]) == ("node1", "lost")
    assert assert_every_checkpoint_whole(out)
    assert_no_process_left(out)


def test_a_killed_coordinator_takes_everything_with_it(inputs, tmp_path):
    out = tmp_path / "out"
    with start(*inputs.endless(out)) as process:
        wait_for_checkpoint(process, out, 13)
        # The coordinator, two agents, two ranks.
        assert len(processes_of(out)) >= 5
        process.kill()
        process.communicate(timeout=30)
        assert_no_process_left(out)
    steps = assert_every_checkpoint_whole(out)
    assert steps
    # The lock died with its owner, and what is there can be gone on from.
    with open(out / ".ftlaunch-owner") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with start(*inputs.endless(out, nodes=1)) as process:
        wait_for_step(process, out, metrics_of(out)[-1]["step"] + 3)
        process.terminate()
        result = finish(process, 60)
    assert result.returncode == 75, said(result)
    assert f"resumed after step {steps[-1]}" in result.stdout
    numbers = [line["step"] for line in metrics_of(out)]
    assert numbers == list(range(1, len(numbers) + 1))


# -- a full disk --------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1,200 kB; growing it takes root, like making it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        timeout=30,
    )
    if mounted.returncode:
        reason = f"a small file system cannot be mounted here: {mounted.stderr.strip()}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=30)


def test_a_full_disk(inputs, small_disk, done):
    # A checkpoint has about 250 kB: some fit, all nine do not.
    out = small_disk / "out"
    command = inputs.command(out, "checkpoint.save_total_limit=100")
    result = ftlaunch(*command)
    output = said(result)
    assert result.returncode == 2, output
    assert "no space left" in output.lower()
    assert "checkpoint" in output
    assert "run the same command again" in output
    assert "Traceback" not in output
    assert_no_process_left(out)
    steps = assert_every_checkpoint_whole(out)
    assert steps
    assert steps[-1] < NUM_STEPS
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True, timeout=30)
    result = ftlaunch(*command)
    assert result.returncode == 0, said(result)
    assert f"resumed after step {steps[-1]}" in result.stdout
    expected = [json.loads(line) for line in done.metrics.splitlines()]
    assert_same_training(metrics_of(out), expected)
    assert summary_of(out)["status"] == "done"


# -- where it is run ----------------------------------------------------------------------------


def test_a_hostile_working_folder_odd_paths_and_flags_in_yaml(inputs, tmp_path):
    here = tmp_path / 'it\'s "here" $(no) ünï'
    here.mkdir()
    trap = 'raise SystemExit("the working folder was imported")\n'
    packages = ("ftlaunch", "cluster", "launcher", "strategies", "torch", "datasets")
    for name in packages:
        (here / name).mkdir()
        (here / name / "__init__.py").write_text(trap)
    modules = ("json", "numpy", "pydantic", "signal", "transformers", "typing", "yaml", "rich")
    for name in (*modules, "sitecustomize", "usercustomize", "tokenizers", "socket", "random"):
        (here / f"{name}.py").write_text(trap)
    out = here / "out put 'é' %s {x} ;#"
    words = [str(word) for word in inputs.command(out, "train.max_steps=5", nodes=1)]
    (here / "job.yaml").write_text(
        f"nodes: 2\nmax_restarts: 0\ncluster: local\nprecision: fp32\n"
        f"model: {json.dumps(str(inputs.model))}\ndataset: {json.dumps(str(inputs.data))}\n"
        f"output_dir: {json.dumps(out.name)}\n"
    )
    keys = [word for word in words if "=" in word and not word.startswith("/")]
    keys = [key for key in keys if re.match(r"[a-z]+\.[a-z_]+=", key)]
    result = ftlaunch("--config", "job.yaml", *keys, cwd=here, command=SCRIPT)
    assert result.returncode == 0, said(result)
    summary = summary_of(out)
    assert (summary["status"], summary["num_nodes"]) == ("done", 2)
    assert summary["model_dir"] == str(out / "model")
    plan = json.loads((out / "plan.json").read_text())
    assert plan["cluster"]["max_restarts"] == 0
    assert [line["step"] for line in metrics_of(out)] == [1, 2, 3, 4, 5]
    assert_no_process_left(out)


def test_the_demo(tmp_path):
    """The first command of the README: four ranks, no model, no data, no network."""
    result = ftlaunch("--nodes", 4, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, said(result)
    (out,) = (tmp_path / "ftlaunch-runs").iterdir()
    summary = summary_of(out)
    assert (summary["status"], summary["world_size"]) == ("done", 4)
    # Guessing the more frequent class would get 0.5 of the 500 held-out reviews right.
    assert summary["eval"]["accuracy"] >= 0.90
    assert (out / "model" / "model.safetensors").is_file()
    assert_no_process_left(out)


def test_a_checkpoint_that_nobody_could_tell_of_is_found(tmp_path):
    """A rank was lost when the manifest was there and the ranks had not met again."""
    ended: Any = object.__new__(job._Job)
    ended._folder = tmp_path
    ended._record = JobRecord(
        started=0.0, startup=StartupClock(opened=0.0), last_saved_step=10, first_step_at=1.0
    )
    for step, whole in ((10, True), (20, True), (30, False)):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        if whole:
            (folder / "manifest.json").write_text("{}")
    assert ended._how_to_go_on(26).startswith("stopped after step 26; step 20 is saved in ")
    # Before a step of this run they are those of an earlier one, which it may not have looked at yet.
    ended._record.last_saved_step, ended._record.first_step_at = 0, None
    assert "before the first step" in ended._how_to_go_on(0)
