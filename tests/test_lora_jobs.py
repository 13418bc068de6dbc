"""Jobs with an adapter, as a user runs them: from the command to an evaluation; what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.machine import detect_machine
from ftlaunch.launcher.config import RunConfig, load_config
from ftlaunch.launcher.plan import make_plan
from ftlaunch.launcher.site import find_site
from ftlaunch.strategies.checkpoint.identity import check_same_job
from ftlaunch.strategies.checkpoint.manifest import read_manifest
from ftlaunch.strategies.options import LoraOptions, ModelOptions
from tests import lora_jobs
from tests.jobs import (
    WORDS,
    assert_mistake,
    ftlaunch,
    metrics_of,
    said,
    summary_of,
    write_data,
    write_tokenizer,
)

KEYS = ("lora.r=4", "lora.dropout=0.1", "lora.target_modules=query,value")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """(a model with weights, data); its own head is for two labels, which are called otherwise."""
    folder = tmp_path_factory.mktemp("inputs")
    model = lora_jobs.write_bert(folder / "model", vocab_size=len(WORDS))
    write_tokenizer(model, WORDS)
    return model, write_data(folder / "data", num_train=96, num_eval=40)


def _command(inputs, out, *changes):
    model, data = inputs
    return [
        *("--nodes", 2, "--model", model, "--dataset", data, "-o", out, "--precision", "fp32"),
        *("train.global_batch_size=16", "train.max_steps=12", "train.learning_rate=1e-2"),
        *("train.eval_strategy=steps", "train.eval_steps=4", "checkpoint.save_steps=4"),
        *("checkpoint.load_best_model_at_end=true", *KEYS, *changes),
    ]


@pytest.fixture(scope="module")
def done(inputs, tmp_path_factory):
    """The output folder of a job of 12 steps: 8 under ddp, the rest under zero3."""
    out = tmp_path_factory.mktemp("job") / "out"
    for words in (("train.max_steps=8",), ("--strategy", "zero3")):
        result = ftlaunch(*_command(inputs, out, *words), timeout=900)
        assert result.returncode == 0, said(result)
    return out


def test_what_a_job_leaves(done):
    assert [line["step"] for line in metrics_of(done)] == list(range(1, 13))
    assert sorted(path.name for path in (done / "model").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "model_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    weights = load_file(done / "model" / "adapter_model.safetensors")
    # Two matrices of two modules of two layers, and the head.
    assert len(weights) == 2 * 2 * 2 + 2
    assert all(np.abs(values).max() > 0 for values in weights.values())
    newest = max((done / "checkpoints").glob("step-*"))
    assert read_manifest(newest).identity["lora"]["r"] == 4


def test_its_adapter_and_its_merge_are_evaluated_as_the_job_did(inputs, done, tmp_path):
    model, data = inputs
    # checkpoint.load_best_model_at_end: the model is the best evaluation's.
    best = read_manifest(max((done / "checkpoints").glob("step-*"))).best
    assert best is not None
    result = ftlaunch("merge", "--adapter", done / "model", model, tmp_path / "merged")
    assert result.returncode == 0, said(result)
    for target in (done / "model", tmp_path / "merged"):
        out = tmp_path / f"eval-{target.name}"
        words = ("--dataset", data, "-o", out, "--precision", "fp32")
        result = ftlaunch("eval", target, *words, timeout=900)
        assert result.returncode == 0, said(result)
        found = summary_of(out)["eval"]
        assert math.isclose(found["loss"], best["metrics"]["loss"], rel_tol=1e-5), target
        assert found["accuracy"] == best["metrics"]["accuracy"], target


def test_an_adapter_of_a_checkpoint(inputs, done, tmp_path):
    model, _ = inputs
    newest = max((done / "checkpoints").glob("step-*"))
    result = ftlaunch("merge", newest, tmp_path / "adapter")
    assert result.returncode == 0, said(result)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert weights.keys() == load_file(done / "model" / "adapter_model.safetensors").keys()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model)
    assert config["modules_to_save"] == ["classifier"]
    # Straight into the base: the same as of its folder.
    for source, name in ((newest, "one"), (tmp_path / "adapter", "other")):
        result = ftlaunch("merge", "--adapter", source, model, tmp_path / name)
        assert result.returncode == 0, said(result)
    one, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "other"))
    assert one == other
    assert_mistake(
        ftlaunch("merge", newest, tmp_path / "third", "--model", model), "--model means nothing"
    )


@pytest.mark.parametrize("change", ["lora.r=8", "lora.r=null"])
def test_another_adapter_is_another_job(inputs, done, change):
    words = [word for word in _command(inputs, done) if not str(word).startswith("lora.")]
    others = ("lora.target_modules=query,value",) if "null" not in change else ()
    result = ftlaunch(*words, change, *others, timeout=900)
    assert_mistake(result, "holds the checkpoints of another job", "lora: ")


def test_another_base_is_another_job(tmp_path):
    """By the digest of its weights, which the manifest holds."""
    there = {"model": "one", "lora": {"r": 4}}
    with pytest.raises(UserError, match="the same one with other weights"):
        check_same_job(there, {"model": "two", "lora": {"r": 4}}, tmp_path)
    with pytest.raises(UserError, match="lora: "):
        check_same_job(there, {"model": "one"}, tmp_path)
    with pytest.raises(UserError, match="lora: "):
        check_same_job({"model": "one"}, there, tmp_path)
    check_same_job(there, dict(there), tmp_path)


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("lora.r=0",), ("lora.r is 0", "greater than 0")),
        (("lora.r=-3",), ("lora.r is -3", "greater than 0")),
        (("lora.r=4", "lora.alpha=0"), ("lora.alpha is 0",)),
        (("lora.r=4", "lora.dropout=1"), ("lora.dropout is 1",)),
        (("lora.alpha=16",), ("lora.alpha is set, but lora.r is not", "lora.r=16")),
        (("lora.use_dora=true",), ("lora.use_dora is set, but lora.r is not",)),
        (("lora.r=4", "lora.target_modules=[]"), ("lora.target_modules is empty",)),
        (("lora.r=4", "lora.target_modules=all-linear,query"), ("all-linear stands alone",)),
        (("lora.r=4", "model.random_weights=true"), ("model.random_weights is true",)),
        (("lora.r=4", "model.freeze=bert"), ("model.freeze is set",)),
        (("lora.rank=4",), ("lora.rank is not a key",)),
    ],
)
def test_settings_that_make_no_sense(overrides, words):
    flags = {"model": "m", "dataset": "d"}
    with pytest.raises(UserError) as caught:
        load_config(file=None, flags=flags, overrides=overrides)
    for word in words:
        assert word in str(caught.value)


def _plan(config, **versions):
    machine = detect_machine({"CUDA_VISIBLE_DEVICES": "", "ASCEND_RT_VISIBLE_DEVICES": ""})
    known = {"torch": "2.13.0", "deepspeed": "0.19.8", "mindspore": "2.10.0", "mindone": "0.5.0"}
    found = {k: v for k, v in {**machine.versions, **known, **versions}.items() if v is not None}
    site = find_site(config.cluster, {})
    return make_plan(config, [replace(machine, versions=found)], site, output_dir="out")


def test_the_plan_refuses_it_without_peft_and_under_mindspore():
    config = RunConfig(
        model=ModelOptions(name_or_path="m"), lora=LoraOptions(r=16), precision="fp32"
    )
    for strategy in ("ddp", "zero3"):
        plan = _plan(replace(config, strategy=strategy), peft="0.21.2")
        assert plan.options.lora.r == 16
        with pytest.raises(UserError, match=r"lacks peft.*pip install 'ftlaunch\[lora\]'"):
            _plan(replace(config, strategy=strategy), peft=None)
    with pytest.raises(UserError, match=r"mindspore has no adapters.*torch's modules only"):
        _plan(replace(config, strategy="mindspore"), peft="0.21.2")
