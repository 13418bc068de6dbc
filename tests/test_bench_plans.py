"""What a benchmark plans of its cells: by the length of its random samples, on machines that nobody has."""

from __future__ import annotations

import pytest

from ftlaunch.cluster.errors import UserError
from ftlaunch.launcher.bench_cells import Cell, config_of, plan_cell
from ftlaunch.launcher.config import load_config
from ftlaunch.launcher.hardware import HARDWARE, assume
from tests.model_configs import LLAMA_1B, write_json


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
        cell = Cell(nodes=1, strategy=strategy, precision="auto", scaling="base")
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
