"""The bounds of a micro-batch in the plan: chosen, lowered by the memory, halved."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ftlaunch.launcher.config import load_config
from ftlaunch.launcher.micro_batch import (
    Fits,
    SizeLimit,
    can_halve,
    choose_micro_batch,
    halve_micro_batch,
    keep_within,
    limit_after,
    size_in_words,
    without_memory,
)
from tests.test_plan import GPU, _plan


def _chosen(*overrides, accelerator="cpu", ranks=1, fits=None):
    config = load_config(file=None, flags={}, overrides=list(overrides))
    chosen = choose_micro_batch(config, ranks, accelerator, fits)
    return chosen.samples, chosen.tokens


@pytest.mark.parametrize(
    ("accelerator", "overrides", "expected"),
    [
        ("cpu", (), (8, 1024)),
        ("cuda", (), (32, None)),
        ("ascend", (), (32, None)),
        ("cpu", ("train.max_tokens_per_micro_batch=0",), (8, None)),
        # Filled up to the tokens, however many samples that is.
        ("cpu", ("train.max_tokens_per_micro_batch=4096",), (32, 4096)),
        ("cuda", ("train.max_tokens_per_micro_batch=4096",), (32, 4096)),
        # Samples that were asked for are a bound beside it.
        ("cpu", ("train.per_device_train_batch_size=4",), (4, 1024)),
        (
            "cuda",
            ("train.per_device_train_batch_size=4", "train.max_tokens_per_micro_batch=512"),
            (4, 512),
        ),
    ],
)
def test_bounds(accelerator, overrides, expected):
    assert _chosen(*overrides, accelerator=accelerator) == expected


def test_memory_lowers_what_nobody_asked_for():
    """Six samples of 512 tokens fit: 3,072 tokens, which may be 32 short samples."""
    fits = Fits(samples=6, length=512)
    assert _chosen(accelerator="cuda", fits=fits) == (32, 3072)
    assert _chosen(accelerator="cpu", fits=Fits(samples=1, length=512)) == (8, 512)
    asked = "train.per_device_train_batch_size=16"
    assert _chosen(asked, accelerator="cuda", fits=fits) == (16, None)
    # Without a bound in tokens, of samples as long as the longest.
    none = "train.max_tokens_per_micro_batch=0"
    assert _chosen(none, accelerator="cuda", fits=fits) == (6, None)
    assert _chosen(none, "train.per_device_train_batch_size=16", accelerator="cuda", fits=fits) == (
        16,
        None,
    )
    asked = "train.max_tokens_per_micro_batch=8192"
    assert _chosen(asked, accelerator="cuda", fits=fits) == (32, 8192)


def test_evaluation_has_twice_as_much():
    plan = _plan(nodes=2)
    assert (plan.eval_micro_batch, plan.eval_max_tokens) == (16, 2048)
    lines = _plan(nodes=2, mode="eval").describe()
    assert any(line.split()[:2] == ["tokens", "2,048"] for line in lines)


def test_the_plan_says_how_many_tokens_and_that_it_is_proven():
    lines = _plan(nodes=2).describe()
    assert any(line.split()[:2] == ["tokens", "1,024"] for line in lines)
    assert not any(line.startswith("proof") for line in lines)
    assert not any(line.startswith("tokens") for line in _plan(GPU).describe())
    assert any(line.startswith("proof") for line in _plan(GPU).describe())
    assert _plan(GPU).prove_micro_batch
    assert not _plan(nodes=1).prove_micro_batch


def test_half_of_both_bounds_down_to_one_sample():
    """8 samples and 1,024 tokens, 4 and 512, 2 and 256, 1 and 128; 32 samples a step each time."""
    plan = _plan(nodes=1)
    seen = []
    while plan is not None:
        seen.append((plan.micro_batch, plan.max_tokens_per_micro_batch, plan.accumulation))
        last, plan = plan, halve_micro_batch(plan)
    assert seen == [(8, 1024, 4), (4, 512, 8), (2, 256, 16), (1, 128, 32)]
    assert (last.eval_micro_batch, last.eval_max_tokens) == (2, 256)
    values = {reason.choice: reason.value for reason in last.reasons}
    assert (values["micro-batch"], values["tokens"], values["accumulation"]) == ("1", "128", "32")


def test_an_evaluation_is_halved_by_itself():
    half = halve_micro_batch(_plan(nodes=1), "evaluate")
    assert half is not None
    assert (half.micro_batch, half.max_tokens_per_micro_batch) == (8, 1024)
    assert (half.eval_micro_batch, half.eval_max_tokens) == (8, 1024)
    assert size_in_words(half, "evaluate") == "8 samples, 1,024 padded tokens"
    alone = halve_micro_batch(_plan(nodes=1, mode="eval"))
    assert alone is not None
    assert {r.choice: r.value for r in alone.reasons}["micro-batch"] == "8"


def test_when_half_would_help():
    plan = _plan(nodes=1)
    assert can_halve(plan, phase="train", longest_sample=100)
    assert can_halve(plan, phase="prove", longest_sample=0)
    # The longest sample is alone, and more than all that may share a micro-batch.
    assert not can_halve(plan, phase="train", longest_sample=1024)
    for phase in ("data", "model"):
        assert not can_halve(plan, phase=phase, longest_sample=100)
    one = _plan(nodes=1, overrides=["train.per_device_train_batch_size=1"])
    assert not can_halve(one, phase="train", longest_sample=100)
    assert can_halve(one, phase="evaluate", longest_sample=100)
    # An evaluation costs all that was not saved since: it is not tried again for nothing.
    assert (plan.eval_micro_batch, plan.eval_max_tokens) == (16, 2048)
    assert can_halve(plan, phase="evaluate", longest_sample=2047)
    assert can_halve(plan, phase="evaluate", longest_sample=0)
    assert not can_halve(plan, phase="evaluate", longest_sample=2048)


def _sizes(plan):
    return (
        *(plan.micro_batch, plan.max_tokens_per_micro_batch),
        *(plan.eval_micro_batch, plan.eval_max_tokens),
    )


def _why(plan, choice):
    [reason] = [reason for reason in plan.reasons if reason.choice == choice]
    return f"{reason.value} {reason.why}"


def test_other_nodes_lower_nothing_that_memory_has_not():
    """A rank of more nodes had a smaller share, which says nothing of memory."""
    for mode in ("train", "eval"):
        for nodes in (1, 2, 3, 4):
            plan = _plan(nodes=nodes, mode=mode)
            assert keep_within(plan, SizeLimit()) == plan


def test_what_did_not_fit_does_not_fit_with_other_nodes():
    """8 samples did not fit on 4 nodes, 4 do: 4 nodes of 8 samples a step each, one of 32."""
    before = _plan(nodes=4)
    assert _sizes(before) == (8, 1024, 16, 2048)
    half = halve_micro_batch(before)
    assert half is not None
    limit = limit_after(SizeLimit(), half, "train")
    assert keep_within(before, limit).accumulation == 2
    plan = keep_within(_plan(nodes=1), limit)
    assert _sizes(plan) == (4, 512, 8, 1024)
    assert plan.accumulation == 8
    assert _why(plan, "micro-batch") == "4 instead of 8: memory ran out with twice as many before"
    assert _why(plan, "accumulation").startswith("8 ")
    # Of a smaller share nothing is taken.
    assert keep_within(_plan(nodes=16), limit).micro_batch == 2


def test_a_bound_in_tokens_stays_where_the_new_plan_has_none():
    roomy = _plan(GPU)
    assert _sizes(roomy) == (8, None, 16, None)
    limit = SizeLimit(samples=4, tokens=1536, eval_samples=8, eval_tokens=3072)
    plan = keep_within(roomy, limit)
    assert _sizes(plan) == (4, 1536, 8, 3072)
    assert _why(plan, "tokens") == "1,536 memory ran out with twice as many before"
    choices = [reason.choice for reason in plan.reasons]
    assert choices.index("tokens") == choices.index("micro-batch") + 1
    assert _sizes(keep_within(roomy, SizeLimit(samples=4))) == (4, None, 16, None)


def test_an_evaluation_that_was_halved_stays_so():
    half = halve_micro_batch(_plan(nodes=2), "evaluate")
    assert half is not None
    limit = limit_after(SizeLimit(), half, "evaluate")
    plan = keep_within(_plan(nodes=1), limit)
    assert _sizes(plan) == (8, 1024, 8, 1024)
    assert _why(plan, "micro-batch") == _why(_plan(nodes=1), "micro-batch")
    alone = halve_micro_batch(_plan(nodes=2, mode="eval"))
    assert alone is not None
    limit = limit_after(SizeLimit(), alone, "evaluate")
    plan = keep_within(_plan(nodes=1, mode="eval"), limit)
    assert _sizes(plan) == (8, 1024, 8, 1024)
    assert _why(plan, "micro-batch").startswith("8 instead of 16")


def test_what_to_do_without_memory():
    text = without_memory(_plan(nodes=2), "train")
    for way in ("data.max_length", "gradient_checkpointing", "zero3", "lora.r"):
        assert way in text
    # From a CPU there is nowhere to offload to.
    assert "offload" not in text
    assert "deepspeed.offload=cpu" in without_memory(_plan(GPU), "train")
    overrides = ["model.gradient_checkpointing=true", "deepspeed.offload=cpu", "lora.r=8"]
    options = load_config(file=None, flags={}, overrides=overrides).job_options()
    plan = replace(_plan(nodes=2), strategy="zero3", options=options)
    assert without_memory(plan, "train") == (
        "One sample at a time does not fit into the memory: lower data.max_length or take a smaller "
        "model or devices with more memory."
    )
    assert without_memory(plan, "model").startswith("The model by itself does not fit")
    assert "lora" not in without_memory(_plan(nodes=1, mode="eval"), "evaluate")
