"""What a benchmark plans of its cells, on machines that nobody has, and what it tells and keeps of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ftlaunch.cluster.errors import UserError
from ftlaunch.launcher import cli
from ftlaunch.launcher.bench_cells import Cell, config_of, plan_cell
from ftlaunch.launcher.bench_report import CellResult, cell_json, table_lines
from ftlaunch.launcher.bench_run import CellRun, CellRunner
from ftlaunch.launcher.config import load_config
from ftlaunch.launcher.hardware import HARDWARE, assume
from tests.model_configs import LLAMA_1B, write_json
from tests.test_bench_numbers import measured

CELL = Cell(nodes=1, strategy="auto", precision="auto", scaling="base")


@pytest.fixture
def plan(tmp_path):
    """plan(overrides…, limit=…) of Llama-1B on one H100."""

    def make(*overrides, limit=131_072, strategy="auto"):
        write_json(tmp_path, {**LLAMA_1B, "max_position_embeddings": limit})
        config = load_config(
            file=None,
            flags={"model": str(tmp_path), "task": "causal-lm", "devices": 1, "nodes": 1},
            overrides=overrides,
            data_optional=True,
        )
        cell = replace(CELL, strategy=strategy)
        site, machines = assume(config.cluster, HARDWARE["H100-80GB"])
        return plan_cell(config_of(config, cell), cell, 1, site, machines, output_dir="/")

    return make


def test_memory_is_that_of_the_longest_random_sample(plan):
    long = plan("bench.lengths=2048")
    told = plan("bench.lengths=2048", "data.max_length=2048")
    assert long.memory.length == 2048
    assert long.memory == told.memory
    assert long.micro_batch == told.micro_batch
    assert long.max_tokens_per_micro_batch == told.max_tokens_per_micro_batch


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ([], 512),
        (["bench.lengths=64"], 512),
        (["bench.lengths=16-700"], 700),
        # Above the median all are cut to 512.
        (["bench.lengths=lognormal:64:2"], 512),
        (["bench.lengths=lognormal:900:0.5"], 900),
        (["bench.lengths=2048", "data.max_length=1024"], 1024),
        # Of data nothing was read.
        (["data.name_or_path=d.jsonl"], 512),
    ],
)
def test_the_longest_row(plan, settings, length):
    assert plan(*settings).memory.length == length


def test_samples_that_the_model_does_not_take_are_refused_before_memory_is(plan):
    """As the ranks would; the memory of such rows is nobody's."""
    with pytest.raises(UserError, match=r"9000000 tokens.*2048 at most.*bench\.lengths"):
        plan("bench.lengths=9000000", limit=2048)


@pytest.mark.parametrize(
    ("strategy", "settings", "way", "keys"),
    [
        ("ddp", [], "ddp", (False, "none")),
        ("ddp", ["model.gradient_checkpointing=false"], "ddp", (False, "none")),
        ("ddp", ["model.gradient_checkpointing=true"], "ddp + checkpointing", (True, "none")),
        ("zero2", ["deepspeed.offload=none"], "zero2", (False, "none")),
        ("zero2", ["deepspeed.offload=cpu"], "zero2 + offload", (False, "cpu")),
        (
            "zero3",
            [
                "model.gradient_checkpointing=true",
                'deepspeed.config={"zero_optimization": {"offload_param": {"device": "cpu"}}}',
            ],
            "zero3 + checkpointing + offload",
            (True, "cpu"),
        ),
    ],
)
def test_how_a_cell_saved_memory_is_told(plan, strategy, settings, way, keys):
    result = CellResult(cell=CELL, plan=plan(*settings, strategy=strategy))
    content = cell_json([result], result)
    assert (content["gradient_checkpointing"], content["offload"]) == keys
    assert table_lines([result])[0] == f"{way}, bf16"


def test_memory_that_auto_saves_is_told(plan):
    """One row of 131,072 tokens is too much without."""
    chosen = plan("bench.lengths=131072")
    assert cell_json([], CellResult(cell=CELL, plan=chosen))["gradient_checkpointing"]


def test_what_was_measured_stays_when_a_later_repeat_fails(tmp_path, monkeypatch):
    """By a mistake that was none before: data that is gone, say."""
    runs = iter([CellRun(measured=measured(100)), CellRun(why="it is gone", by_user=True)])
    monkeypatch.setattr(CellRunner, "run", lambda self, cell, folder: next(runs))
    out = tmp_path / "out"
    words = ["--repeats", "2", "-o", str(out), f"data.cache_dir={tmp_path / 'cache'}"]
    assert cli.run(["bench", *words]) == 1
    [told] = json.loads((out / "bench.json").read_text())["cells"]
    assert told["failure"]["why"] == "it is gone"
    assert len(told["repeats"]) == 1
