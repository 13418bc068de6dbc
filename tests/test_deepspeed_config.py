"""A user's own DeepSpeed configuration: merged where it is DeepSpeed's, refused where it contradicts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ftlaunch.cluster.errors import UserError
from ftlaunch.launcher.config import load_config
from ftlaunch.launcher.plan import make_plan
from ftlaunch.launcher.site import find_site
from ftlaunch.strategies.deepspeed_config import make_deepspeed_config
from ftlaunch.strategies.options import DeepSpeedOptions, TrainOptions
from tests.jobs import assert_mistake, ftlaunch
from tests.test_plan import CPU as TORCH_ONLY
from tests.test_plan import GPU as TORCH_GPU

CPU = replace(TORCH_ONLY, versions={"torch": "2.13.0", "deepspeed": "0.19.8"})
GPU = replace(
    TORCH_GPU, versions={"torch": "2.13.0", "torch_cuda": "12.8", "deepspeed": "0.19.8+cu128"}
)

# What HF's documentation gives its users for ZeRO-3, with everything left to the trainer.
FOR_THE_TRAINER = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "hysteresis": 2, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_max_live_parameters": 1e9,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def _plan(config, *overrides, machine=CPU, strategy="auto", precision="fp32", nodes=2):
    flags = {"nodes": nodes, "strategy": strategy, "precision": precision}
    loaded = load_config(file=None, flags=flags, overrides=list(overrides))
    deepspeed = replace(loaded.deepspeed, config=config)
    machines = (machine,) * nodes
    site = find_site(loaded.cluster, {})
    return make_plan(replace(loaded, deepspeed=deepspeed), machines, site, output_dir="out")


def test_a_configuration_for_the_trainer_is_taken_as_it_is():
    plan = _plan(FOR_THE_TRAINER)
    assert plan.strategy == "zero3"
    reasons = {reason.choice: reason for reason in plan.reasons}
    assert reasons["strategy"].why == "by deepspeed.config"
    assert reasons["offload"].why == "optimizer state and weights in the host's memory"


def test_what_the_engine_is_given():
    """Ours where the loop decides, the user's where it is DeepSpeed's, nothing that is "auto"."""
    config = make_deepspeed_config(
        DeepSpeedOptions(config=FOR_THE_TRAINER),
        TrainOptions(max_grad_norm=0.5),
        stage=3,
        precision="bf16",
        accelerator="cpu",
        world_size=2,
    )
    assert config == {
        "train_batch_size": 2,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
        "bf16": {"enabled": True, "check_grad_overflow": True},
        "fp16": {
            "enabled": False,
            "loss_scale": 0,
            "hysteresis": 2,
            "initial_scale_power": 16,
        },
        "zero_optimization": {
            "stage": 3,
            "contiguous_gradients": True,
            "overlap_comm": True,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "cpu", "pin_memory": True},
            "sub_group_size": 1e9,
            "stage3_max_live_parameters": 1e9,
        },
    }


def test_fp16_scales_as_ddp_does():
    """Half at the first overflow, double after the window, never below 1."""
    config = make_deepspeed_config(
        DeepSpeedOptions(),
        TrainOptions(initial_loss_scale=4096.0, loss_scale_window=77),
        stage=2,
        precision="fp16",
        accelerator="cuda",
        world_size=1,
    )
    assert config["fp16"] == {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 12,
        "loss_scale_window": 77,
        "hysteresis": 1,
        "min_loss_scale": 1,
    }
    assert "offload_optimizer" not in config["zero_optimization"]


@pytest.mark.parametrize(
    ("config", "overrides", "words"),
    [
        ({"train_batch_size": 64}, [], ["train_batch_size is 64", "plan's is 32"]),
        ({"train_micro_batch_size_per_gpu": 3}, [], ["is 3", "plan's is 8"]),
        ({"gradient_accumulation_steps": 7}, [], ["is 7", "plan's is 2"]),
        ({"gradient_clipping": 0.5}, [], ["is 0.5", "plan's is 1.0", "train.max_grad_norm"]),
        ({"zero_optimization": {"stage": 3}}, [], ["stage is 3", "plan's is 2", "--strategy"]),
        ({"bf16": {"enabled": True}}, [], ["bf16.enabled is true", "plan's is false"]),
        ({"fp16": {"enabled": True}}, [], ["fp16.enabled is true", "--precision"]),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            ["deepspeed.offload=none"],
            ['offload_optimizer.device is "cpu"', 'plan\'s is "none"', "deepspeed.offload"],
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            [],
            ["offload_optimizer.device is 'nvme'", "'cpu' or not at all"],
        ),
        ({"optimizer": {"type": "Lamb"}}, [], ['type is "Lamb"', '"AdamW"']),
        ({"optimizer": {"params": {"lr": 1e-3}}}, [], ["0.001", "5e-05", "train.learning_rate"]),
        ({"scheduler": {"type": "WarmupCosineLR"}}, [], ["WarmupCosineLR", "WarmupDecayLR"]),
        ({"scheduler": {"params": {"warmup_num_steps": 5}}}, [], ["warmup_num_steps is 5"]),
        ({"elasticity": {"enabled": True}}, [], ["'elasticity' is not for ftlaunch"]),
        ({"zero_optimization": {"mics_shard_size": 2}}, [], ["mics_shard_size is 2"]),
    ],
)
def test_a_contradiction_is_refused_with_both_values(config, overrides, words):
    with pytest.raises(UserError) as caught:
        _plan(config, *overrides, strategy="zero2")
    for word in words:
        assert word in str(caught.value)


def test_every_contradiction_is_told_at_once():
    with pytest.raises(UserError) as caught:
        _plan({"train_batch_size": 64, "gradient_clipping": 0.5}, strategy="zero2")
    assert len(str(caught.value).splitlines()) == 2


def test_a_hysteresis_of_two_is_refused_where_it_would_count():
    plan = _plan(FOR_THE_TRAINER, machine=GPU, precision="bf16", nodes=1)
    assert plan.precision == "bf16"
    with pytest.raises(UserError, match=r"fp16.hysteresis is 2, the plan's is 1"):
        _plan(FOR_THE_TRAINER, machine=GPU, precision="fp16", nodes=1)


def test_offload_puts_there_what_the_stage_has():
    for strategy, why in (
        ("zero1", "optimizer state in the host's memory"),
        ("zero3", "optimizer state and weights in the host's memory"),
    ):
        plan = _plan(None, "deepspeed.offload=cpu", strategy=strategy)
        assert why in [reason.why for reason in plan.reasons]


@pytest.mark.parametrize("version", ["0.16.4", "0.18"])
def test_a_deepspeed_that_is_too_old(version):
    machine = replace(CPU, versions={"torch": "2.13.0", "deepspeed": version})
    with pytest.raises(UserError, match=rf"has deepspeed {version}.*needs 0.19 or newer"):
        _plan(None, machine=machine, strategy="zero3")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["ds.json is not valid JSON"]),
        ("[1]", ["must hold a JSON object"]),
        ('{"a": 1, "a": 2}', ["the key 'a' stands twice"]),
        ('{"zero_optimization": {"stage": 4}}', ["stage is 4", "plan's is 2"]),
    ],
)
def test_files_that_are_none(tmp_path, text, words):
    (tmp_path / "ds.json").write_text(text)
    result = ftlaunch("--strategy", "zero2", "deepspeed.config=ds.json", "-o", "out", cwd=tmp_path)
    assert_mistake(result, *words)
    assert not (tmp_path / "out").exists()


def test_what_deepspeed_itself_does_not_take(tmp_path):
    """A misspelt key is told by its own check of its configuration, without a traceback."""
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"overlap_com": true}}')
    result = ftlaunch("--strategy", "zero2", "deepspeed.config=ds.json", "-o", "out", cwd=tmp_path)
    assert_mistake(result, "DeepSpeed does not take this deepspeed.config", "overlap_com")


def test_a_file_that_is_not_there(tmp_path):
    result = ftlaunch("--strategy", "zero2", "deepspeed.config=no.json", cwd=tmp_path)
    assert_mistake(result, "no.json cannot be read", "No such file")


@pytest.mark.parametrize("override", ["deepspeed.offload=cpu", "deepspeed.config=ds.json"])
def test_deepspeeds_keys_need_its_strategies(tmp_path, override):
    (tmp_path / "ds.json").write_text("{}")
    result = ftlaunch("--strategy", "ddp", override, cwd=tmp_path)
    assert_mistake(result, override.partition("=")[0], "--strategy zero1, zero2 or zero3")


def test_what_was_in_the_file_is_in_the_plan(tmp_path):
    """A later edit of the file changes nothing of a job that was begun."""
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    config = load_config(
        file=None, flags={}, overrides=[f"deepspeed.config={tmp_path / 'ds.json'}"]
    )
    assert config.deepspeed.config == {"zero_optimization": {"stage": 1}}
