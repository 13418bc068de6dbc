"""The plan: pure, with a reason for each choice, and back from JSON as it was."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.gathering import Network
from ftlaunch.cluster.machine import Machine
from ftlaunch.launcher.config import load_config
from ftlaunch.launcher.plan import LaunchPlan, make_plan
from ftlaunch.launcher.ranks import rank_starts
from ftlaunch.launcher.site import find_site
from ftlaunch.strategies.data.task_names import TASKS
from ftlaunch.strategies.mindspore_models import FAMILIES

CPU = Machine(
    hostname="here",
    accelerator="cpu",
    device_name="Some CPU",
    num_devices=1,
    device_memory_bytes=1 << 34,
    fast_bf16=False,
    cpu_cores=8,
    memory_bytes=1 << 34,
    versions={"torch": "2.13.0"},
    code_fingerprint="abc",
    notes=(),
)
GPU = replace(
    CPU,
    accelerator="cuda",
    device_name="Some GPU",
    num_devices=4,
    fast_bf16=True,
    versions={"torch": "2.13.0", "torch_cuda": "12.8"},
    device_ids=("GPU-7", "GPU-5", "GPU-3", "GPU-1"),
)


HERE = Network(address="127.0.0.1", interfaces=("lo", "lo"))


def _plan(*machines, family=None, is_adapter=False, mode="train", **flags):
    overrides = flags.pop("overrides", [])
    config = load_config(file=None, flags=flags, overrides=overrides)
    site = find_site(config.cluster, {})
    machines = machines or (CPU,) * len(site.hosts)
    known = {"family": family, "is_adapter": is_adapter}
    return make_plan(config, machines, site, output_dir="out", mode=mode, **known)


def test_four_nodes_on_one_cpu_machine():
    """32 samples over 4 ranks: 8 each, in one micro-batch of at most 8; 8 cores, 2 threads each."""
    plan = _plan(nodes=4)
    assert (plan.world_size, plan.micro_batch, plan.accumulation) == (4, 8, 1)
    assert plan.threads_per_rank == 2
    assert (plan.strategy, plan.precision) == ("ddp", "fp32")
    choices = {reason.choice for reason in plan.reasons}
    assert {"cluster", "devices", "strategy", "precision", "micro-batch", "accumulation"} <= choices
    assert all(reason.why for reason in plan.reasons)


def test_the_plan_says_what_is_trained_on_what():
    assert "task" not in {reason.choice for reason in _plan(nodes=1).reasons}
    lines = _plan(nodes=1, model="m", dataset="d", task="masked-lm").describe()
    assert any(line.split() == ["task", "masked-lm", "model", "m,", "data", "d"] for line in lines)


@pytest.mark.parametrize(
    ("nodes", "batch", "bound", "expected"),
    [
        (1, 32, 8, (8, 4)),
        (3, 32, 4, (4, 3)),  # 11 a rank at most, in 3 micro-batches of 4
        (5, 7, 8, (2, 1)),
        (7, 7, 1, (1, 1)),
        (2, 33, 16, (9, 2)),  # 17 a rank, in 2 micro-batches of 9 rather than 16 and 1
    ],
)
def test_micro_batch_and_accumulation(nodes, batch, bound, expected):
    overrides = [
        f"train.global_batch_size={batch}",
        f"train.per_device_train_batch_size={bound}",
    ]
    plan = _plan(nodes=nodes, overrides=overrides)
    assert (plan.micro_batch, plan.accumulation) == expected


def test_threads_never_exceed_the_cores():
    assert _plan(nodes=16, devices=2).threads_per_rank == 1


@pytest.mark.parametrize(
    ("machine", "precision"),
    [
        (CPU, "fp32"),
        (replace(CPU, fast_bf16=True), "bf16"),
        (GPU, "bf16"),
        (replace(GPU, fast_bf16=False), "fp16"),
    ],
)
def test_automatic_precision(machine, precision):
    assert _plan(machine).precision == precision


def test_nodes_share_the_gpus_by_name(tmp_path):
    plan = _plan(GPU, GPU, nodes=2)
    assert plan.world_size == 4
    starts = rank_starts(plan, HERE, 20000, tmp_path, {})
    seen = [[rank.env["CUDA_VISIBLE_DEVICES"] for rank in ranks] for ranks in starts]
    assert seen == [["GPU-7,GPU-5"] * 2, ["GPU-3,GPU-1"] * 2]
    assert [[rank.env["LOCAL_RANK"] for rank in ranks] for ranks in starts] == [["0", "1"]] * 2


def test_the_plan_of_an_earlier_version_is_read(tmp_path):
    """Finished jobs of it can be evaluated."""
    made = _plan(CPU, nodes=1)
    content = made.to_json()
    for name in ("max_tokens_per_micro_batch", "eval_max_tokens", "prove_micro_batch", "memory"):
        del content[name]
    del content["options"]["bench"]
    content["options"]["model"]["gradient_checkpointing"] = False
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    assert LaunchPlan.read(path).options.model.gradient_checkpointing is False


def test_the_plan_survives_json(tmp_path):
    plan = _plan(nodes=2, overrides=["model.freeze=[base_model]", "train.class_weights=[1, 2]"])
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_json()))
    assert LaunchPlan.read(path) == plan


@pytest.mark.parametrize(
    ("machines", "flags", "message"),
    [
        ((), {"nodes": 33}, "global batch of 32 cannot be spread over 33 ranks"),
        ((GPU,) * 5, {"nodes": 5}, "5 nodes on this machine would share 4"),
        ((GPU,), {"devices": 5}, "--devices 5 .* has 4"),
        ((replace(CPU, versions={}),), {}, "lacks torch"),
        ((replace(GPU, versions={"torch": "2.13.0"}),), {}, "CPU build"),
        ((replace(CPU, unusable="no driver"),), {}, "cannot use its accelerators: no driver"),
        ((replace(CPU, accelerator="ascend"),), {}, "mindspore is not installed"),
        ((CPU, GPU), {"nodes": 2}, "different accelerators"),
        ((), {"strategy": "dpp"}, "no strategy 'dpp'.*Did you mean 'ddp'"),
        ((), {"cluster": "slurm"}, "not inside an allocation"),
        ((), {"cluster": "ssh"}, "no hosts are named"),
        ((), {"hostfile": "hosts"}, "hostfile"),
        ((), {"task": "text-clasification"}, "text-classification"),
    ],
)
def test_what_cannot_be_done_is_said(machines, flags, message):
    with pytest.raises(UserError, match=message):
        _plan(*machines, **flags)


@pytest.mark.parametrize(
    ("task", "frozen"),
    [
        ("text-classification", "the model below its head is frozen"),
        ("causal-lm", "the model is frozen"),
    ],
)
def test_the_plan_says_what_an_adapter_leaves_frozen(task, frozen):
    machine = replace(CPU, versions={"torch": "2.13.0", "peft": "0.18.0"})
    plan = _plan(machine, overrides=[f"task={task}", "lora.r=8"])
    [reason] = [reason for reason in plan.reasons if reason.choice == "adapter"]
    assert (reason.value, reason.why) == ("LoRA, rank 8", f"all-linear; {frozen}")


MINDSPORE = replace(CPU, versions={"mindspore": "2.10.0", "mindone": "0.5.0"})


@pytest.mark.parametrize(
    ("task", "family", "message"),
    [
        (
            "text-classification",
            "deberta-v2",
            "'deberta-v2' model, which mindone does not have for text-cl",
        ),
        ("text-classification", "mobilebert", "neighbours of a token, at padding too"),
        ("causal-lm", "mobilebert", "would see the tokens that it is to predict"),
        ("token-classification", "qwen2", "keeps with the probability with which it should drop"),
        ("token-classification", "llama", "automatic classes do not have for token-classification"),
        ("causal-lm", "bert", "would see the tokens that it is to predict.*: falcon, gemma, llama"),
        ("causal-lm", "stablelm", "logits of the last token only"),
        ("masked-lm", "electra", "automatic classes do not have for masked-lm"),
        (
            "masked-lm",
            "modernbert",
            "compared with torch's.* Nearest to it: .*bert.*--strategy ddp",
        ),
    ],
)
def test_families_that_mindspore_does_not_train(task, family, message):
    with pytest.raises(UserError, match=message):
        _plan(MINDSPORE, task=task, family=family)


@pytest.mark.parametrize("task", TASKS)
def test_families_that_mindspore_trains(task):
    for family in FAMILIES[task]:
        assert _plan(MINDSPORE, task=task, family=family).strategy == "mindspore"
    # Of a model on the hub it is not known yet.
    assert _plan(MINDSPORE, task=task).strategy == "mindspore"


def test_mindspore_does_not_pack_samples():
    packed = {"task": "causal-lm", "overrides": ["data.packing=samples"]}
    with pytest.raises(
        UserError, match=r"packing is samples.*cannot keep the samples of a row apart"
    ):
        _plan(MINDSPORE, **packed)
    assert _plan(MINDSPORE, **packed, mode="eval").strategy == "mindspore"
    assert _plan(**packed).strategy == "ddp"
    joined = {"task": "causal-lm", "overrides": ["data.packing=concatenate"]}
    assert _plan(MINDSPORE, **joined).strategy == "mindspore"


def test_mindspore_does_not_evaluate_an_adapter():
    evaluation = {"model": "out/model", "dataset": "d", "mode": "eval", "is_adapter": True}
    with pytest.raises(
        UserError,
        match=r"out/model holds an adapter, which the strategy mindspore .*Merge it first",
    ):
        _plan(MINDSPORE, **evaluation)
    assert _plan(**evaluation).strategy == "ddp"
