"""What the peers are told: the samples, the division and the settings of a plan."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks import gpu
from ftlaunch.cluster.errors import JobError, UserError
from ftlaunch.cluster.machine import detect_machine
from ftlaunch.launcher import bench_compare, bench_peers
from ftlaunch.launcher.bench_peers import PEERS, check_peer, run_program
from ftlaunch.launcher.config import load_config
from ftlaunch.launcher.hardware import assumed_machine, find_hardware
from ftlaunch.launcher.peer_work import check_comparable, make_peer_work, plan_tokens
from ftlaunch.launcher.plan import make_plan
from ftlaunch.launcher.site import find_site
from ftlaunch.peers import work as peers_work
from ftlaunch.strategies.data.sample_file import write_samples
from ftlaunch.strategies.data.token_batches import TokenCollator
from ftlaunch.strategies.data.token_samples import TokenSample
from ftlaunch.strategies.job_data import make_collator
from ftlaunch.strategies.loop import Windows
from tests.jobs import (
    assert_no_process_left,
    ftlaunch,
    metrics_of,
    processes_of,
    said,
    wait_until,
    write_data,
    write_model,
)
from tests.test_bench_numbers import cell, measured


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("input")
    return write_model(root / "model"), write_data(root / "data")


def plan_of(folders, *overrides, nodes=2, **flags):
    model, data = folders
    return plan_of_settings(
        {"model": str(model), "dataset": str(data), "nodes": nodes, **flags},
        ("train.global_batch_size=12", "model.random_weights=true", *overrides),
    )


def plan_of_settings(flags, overrides):
    config = load_config(file=None, flags=flags, overrides=overrides)
    machines = [detect_machine(os.environ)] * flags["nodes"]
    return make_plan(config, machines, find_site(config.cluster, {}), output_dir="/")


# -- the same work ------------------------------------------------------------------------------


def test_the_batches_are_those_of_the_plan(folders, tmp_path):
    plan = plan_of(
        folders,
        "train.per_device_train_batch_size=3",
        "train.max_tokens_per_micro_batch=0",
        precision="fp32",
    )
    tokens = plan_tokens(plan)
    work = make_peer_work(plan, tokens, tmp_path, warmup_steps=1, steps=4)
    told = peers_work.Work(**work)  # every setting is one that the peers know
    assert (told.steps, told.warmup_steps, told.accumulation) == (5, 1, 2)
    rows, order = load_file(str(told.tokens)), told.order or ()
    collator = make_collator(plan.options, tokens, tokens.train, class_weights=None)
    for rank in range(2):
        windows = Windows(
            # 240 samples, of which global batches of 12 leave nothing.
            order=peer_order(240, 12, plan.options.train.seed),
            collator=collator,
            rank=rank,
            world_size=2,
            micro_batch=plan.micro_batch,
        )
        for step in range(5):
            window = windows.window(step)
            for (batch, _), samples in zip(windows.batches(window), order[step][rank], strict=True):
                for row, sample in enumerate(samples):
                    begin, end = rows["offsets"][sample : sample + 2]
                    ids = batch.inputs["input_ids"][row]
                    assert ids[batch.inputs["attention_mask"][row] == 1].tolist() == (
                        rows["input_ids"][begin:end].tolist()
                    )
                    assert rows["labels"][sample] == batch.labels[row]


def test_a_peer_has_no_more_at_once_than_the_memory_of_ours_allows(tmp_path, monkeypatch):
    """0.49 B parameters on 24 GB: of 16 samples of 1,024 tokens that a step has, 7 fit, so 6, 5 and 5."""
    machine = assumed_machine(find_hardware("RTX-4090"), 1)
    monkeypatch.setattr(gpu, "detect_machine", lambda environment: machine)
    options = Namespace(smoke=False, warmup_steps=0, steps=1)
    told = gpu.Bench(gpu.CASES["decoder_1024"], tmp_path, options)._told
    assert (told["micro_batch"], told["accumulation"]) == (7, 3)
    assert [len(run) for share in told["order"][0] for run in share] == [6, 5, 5]
    # In an order of its own every micro-batch is as large as the others: 4 times 4.
    own = gpu.in_its_own_order(told)
    assert (own["order"], own["micro_batch"], own["accumulation"]) == (None, 4, 4)


def test_a_bound_that_is_there_for_speed_is_not_laid_on_a_peer(tmp_path):
    """A CPU's 1,024 tokens would leave 2 of 8 samples of 512."""
    options = Namespace(smoke=True, warmup_steps=0, steps=1)
    told = gpu.Bench(gpu.CASES["bert_512"], tmp_path, options)._told
    assert (told["device"], told["micro_batch"], told["accumulation"]) == ("cpu", 8, 4)


def test_a_bound_that_somebody_sets_holds_for_a_peer(folders, tmp_path):
    plan = plan_of(folders, "train.max_tokens_per_micro_batch=45")
    work = make_peer_work(plan, plan_tokens(plan), tmp_path, warmup_steps=0, steps=10)
    longest = int(np.diff(load_file(work["tokens"])["offsets"]).max())
    assert 1 < work["micro_batch"] == 45 // longest < plan.micro_batch
    runs = [run for step in work["order"] for share in step for run in share]
    assert max(len(run) for run in runs) <= work["micro_batch"]


@pytest.mark.parametrize(("mode", "num_samples"), [("train", 240), ("bench", 231)])
def test_the_order_is_that_of_the_mode(folders, tmp_path, mode, num_samples):
    """240 samples in global batches of 11 leave 9, which a benchmark leaves out."""
    plan = replace(plan_of(folders, "train.global_batch_size=11"), mode=mode)
    work = make_peer_work(plan, plan_tokens(plan), tmp_path, warmup_steps=0, steps=2)
    order = peer_order(num_samples, 11, plan.options.train.seed)
    told = [sorted(n for share in step for run in share for n in run) for step in work["order"]]
    # Numbers of the file: samples in ascending order.
    chosen = sorted({int(n) for step in range(2) for n in order.global_batch(step)})
    expected = [sorted(chosen.index(int(n)) for n in order.global_batch(s)) for s in range(2)]
    assert told == expected
    rows, table = load_file(str(work["tokens"])), plan_tokens(plan).train
    lengths = np.diff(rows["offsets"]).tolist()
    assert lengths == table.lengths(np.array(chosen)).tolist()


def test_more_steps_than_a_job_has_whole_batches(folders, tmp_path):
    plan = plan_of(folders)
    with pytest.raises(UserError, match="20 whole global batches of 12"):
        make_peer_work(plan, plan_tokens(plan), tmp_path, warmup_steps=1, steps=20)


def test_a_peer_is_given_no_empty_micro_batch(folders, tmp_path):
    """5 samples on 4 ranks, one at a time: 8 places."""
    plan = plan_of(
        folders,
        "train.global_batch_size=5",
        "train.per_device_train_batch_size=1",
        nodes=4,
    )
    with pytest.raises(UserError, match=r"a global batch of 5 leaves some of 8 .* multiple of 4"):
        make_peer_work(plan, plan_tokens(plan), tmp_path, warmup_steps=0, steps=1)
    assert not list(tmp_path.iterdir())


def peer_order(num_samples, size, seed):
    from ftlaunch.strategies.data.sample_order import SampleOrder

    return SampleOrder(num_samples=num_samples, global_batch_size=size, seed=seed)


def test_settings_go_along(folders, tmp_path):
    plan = plan_of(
        folders,
        "train.learning_rate=3e-4",
        "train.weight_decay=0.1",
        "train.warmup_steps=0.5",
        "train.lr_scheduler_type=cosine",
        "model.dropout=0.2",
        precision="bf16",
        strategy="zero2",
    )
    work = make_peer_work(plan, plan_tokens(plan), tmp_path, warmup_steps=0, steps=4)
    told = peers_work.Work(**work)
    assert (told.learning_rate, told.weight_decay, told.dropout) == (3e-4, 0.1, 0.2)
    # Half of 4 steps.
    assert (told.lr_scheduler_type, told.lr_warmup_steps) == ("cosine", 2)
    assert (told.precision, told.zero_stage, told.device) == ("bf16", 2, plan.accelerator)
    assert (told.num_labels, told.threads) == (2, plan.threads_per_rank)


def test_labels_of_a_causal_model_are_the_tokens_own(tmp_path):
    """Ours say what comes next; transformers shifts labels itself. 9 is what follows 8, and so on."""
    sample = TokenSample(
        input_ids=np.array([7, 8, 9]), token_type_ids=None, labels=np.array([-100, 9, 2])
    )
    for shifted, labels in ((True, [-100, -100, 9]), (False, [-100, 9, 2])):
        file = tmp_path / f"{shifted}.safetensors"
        write_samples(file, collator_of(sample), [0], labels_are_next=shifted)
        assert load_file(file)["labels"].tolist() == labels


def collator_of(*samples) -> Any:
    class Rows:
        def samples(self, numbers):
            return [samples[number] for number in numbers]

    class Spec:
        drawn = False

    parts: dict[str, Any] = {"table": Rows(), "task": None, "spec": Spec()}
    return TokenCollator(**parts, pad_token_id=0, seed=1)


def test_rows_of_several_samples_are_refused(tmp_path):
    packed = TokenSample(
        input_ids=np.arange(4), token_type_ids=None, labels=np.arange(4), parts=(2, 2)
    )
    with pytest.raises(UserError, match="the peers do not have"):
        write_samples(tmp_path / "x", collator_of(packed), [0], labels_are_next=True)
    assert not (tmp_path / "x").exists()


_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_key_value_heads": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


@pytest.mark.long
@pytest.mark.parametrize("task", ["text-classification", "causal-lm"])
def test_a_peer_told_by_a_plan_has_the_losses_of_its_job(tmp_path, task):
    """One rank and one micro-batch: there a mean over the micro-batch is the mean over the step."""
    causal = task == "causal-lm"
    model = write_model(tmp_path / "model", **(_LLAMA if causal else {}))
    save_weights(model, causal)
    data = write_data(tmp_path / "data")
    settings = [
        "train.global_batch_size=12",
        "train.per_device_train_batch_size=12",
        "train.max_steps=4",
        "train.learning_rate=1e-3",
        "train.eval_strategy=no",
        "model.dropout=0.0",
    ]
    flags = {"model": str(model), "dataset": str(data), "nodes": 1, "precision": "fp32"}
    flags["task"] = task
    out = tmp_path / "out"
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    job = ftlaunch(*words, "-o", out, *settings)
    assert job.returncode == 0, said(job)
    expected = np.array([line["loss"] for line in metrics_of(out) if "loss" in line])
    assert len(expected) == 4
    plan = plan_of_settings(flags, settings)
    work = make_peer_work(plan, plan_tokens(plan), tmp_path, warmup_steps=0, steps=4)
    run = run_program("torchrun", work, ranks=1, folder=tmp_path / "peer", timeout_seconds=180)
    assert np.abs(np.array(run.result["losses"]) / expected - 1).max() < 1e-5


def save_weights(folder, causal):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.manual_seed(5)
    config = AutoConfig.from_pretrained(folder)
    kind = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    kind.from_config(config).save_pretrained(folder)


# -- what cannot be compared --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"strategy": "mindspore"}, "mindspore"),
        ({"accelerator": "ascend"}, "ascend"),
        ({"lora.r": 4}, "adapter"),
        ({"model.freeze": ("embeddings",)}, "model.freeze"),
        ({"train.class_weights": "balanced"}, "class_weights"),
        ({"deepspeed.offload": "cpu"}, "offload"),
        ({"data.packing": "samples"}, "packing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_job_that_no_peer_can_do(folders, change, word):
    [(key, value)] = change.items()
    plan = plan_of(folders)
    part, _, name = key.partition(".")
    if name:
        options = getattr(plan.options, part)
        value = replace(plan.options, **{part: replace(options, **{name: value})})
        part = "options"
    with pytest.raises(UserError, match=word):
        check_comparable(replace(plan, **{part: value}), on_one_machine=True)


def test_several_machines_cannot_be_compared(folders):
    check_comparable(plan_of(folders), on_one_machine=True)
    with pytest.raises(UserError, match="several machines"):
        check_comparable(plan_of(folders), on_one_machine=False)


def test_work_that_cannot_be_made_is_told_of_every_peer(folders, tmp_path, monkeypatch):
    def refuse(*arguments, **settings):
        raise UserError("no such rows")

    monkeypatch.setattr(bench_compare, "make_peer_work", refuse)
    comparison = bench_compare.Comparison(["hf", "torchrun"], tmp_path)
    lines = comparison.run(cell(2), plan_of(folders), measured(10), 0)
    assert [line.split("failed: ")[1] for line in lines] == ["no such rows"] * 2
    assert comparison.run(cell(2), plan_of(folders), measured(10), 1) == []


def test_a_peer_that_does_not_exist():
    with pytest.raises(UserError, match="hf, accelerate, torchrun, deepspeed"):
        check_peer("lightning")


def test_a_peer_whose_package_is_missing(monkeypatch):
    monkeypatch.setattr(bench_peers, "find_spec", lambda name: None if name == "deepspeed" else 1)
    check_peer("hf")
    with pytest.raises(UserError, match="pip install deepspeed"):
        check_peer("deepspeed")


def test_the_launcher_knows_all_peers():
    assert tuple(PEERS) == peers_work.PEERS


# -- processes ----------------------------------------------------------------------------------


@pytest.mark.long
def test_a_peer_that_fails_is_told_with_its_words(tmp_path):
    with pytest.raises(JobError, match="no such model") as caught:
        work = {"model": "no such model", "rows": "x", "micro_batch": 1, "steps": 1}
        run_program("torchrun", work, ranks=1, folder=tmp_path / "peer", timeout_seconds=120)
    assert str(tmp_path / "peer" / "log.txt") in str(caught.value)


def test_a_peer_that_takes_too_long_is_ended_with_its_ranks(tmp_path):
    work = {"model": "x", "rows": "x", "micro_batch": 1, "steps": 1}
    with pytest.raises(JobError, match="more than 3 s"):
        run_program("hf", work, ranks=2, folder=tmp_path / "peer", timeout_seconds=3)
    assert not processes_of(tmp_path / "peer")


COMPARES = """
import json, sys
from pathlib import Path
from ftlaunch.launcher.bench_peers import run_program

work = {"model": "x", "rows": "x", "micro_batch": 1, "steps": 1}
run_program("hf", work, ranks=int(sys.argv[2]), folder=Path(sys.argv[1]), timeout_seconds=120)
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_peer_ends_with_whoever_compares(tmp_path, ranks):
    """Killed, it could clean up nothing: its ranks, which torchrun gives sessions of their own, see it."""
    folder = tmp_path / "peer"
    command = [sys.executable, "-c", COMPARES, str(folder), str(ranks)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        all_of_them = 2 if ranks == 1 else 4
        wait_until(lambda: len(processes_of(folder)) == all_of_them, 60, "its ranks", every=0.002)
        process.kill()
        process.wait()
    assert_no_process_left(folder)


def test_a_peer_has_its_place_from_us(tmp_path, monkeypatch):
    """A pod or a job step may say that this process is one of many ranks."""
    for name, value in {"WORLD_SIZE": "9", "RANK": "3", "MASTER_ADDR": "192.0.2.1"}.items():
        monkeypatch.setenv(name, value)
    work = {"model": "no such model", "rows": "x", "micro_batch": 1, "steps": 1}
    with pytest.raises(JobError, match="ended with 1"):
        run_program("torchrun", work, ranks=1, folder=tmp_path / "peer", timeout_seconds=60)


@pytest.mark.parametrize(
    ("given", "found"), [(None, "0,1"), ("GPU-a,GPU-b,GPU-c", "GPU-a,GPU-b"), ("5", "5")]
)
def test_a_peer_sees_as_many_gpus_as_it_has_ranks(given, found, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert bench_peers._devices({"device": "cuda"}, 2) == {"CUDA_VISIBLE_DEVICES": found}
    assert bench_peers._devices({"device": "cpu"}, 2) == {}
