"""`ftlaunch bench` with MindSpore's ranks: random samples, two nodes of this machine."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig

from ftlaunch.strategies.options import ModelOptions
from tests import tiny
from tests.jobs import assert_no_process_left, ftlaunch, said, write_model
from tests.mindspore.ranks import run_ranks


@pytest.mark.long
def test_two_nodes(tmp_path):
    out = tmp_path / "out"
    model = write_model(tmp_path / "model")
    few = ["--steps", "2", "--warmup-steps", "1", "--repeats", "1", "bench.lengths=10"]
    result = ftlaunch(
        "bench", "--nodes", "1,2", "--model", model, "model.random_weights=true", *few, "-o", out
    )
    assert result.returncode == 0, said(result)
    base, strong, weak = json.loads((out / "bench.json").read_text())["cells"]
    for cell in (base, strong, weak):
        assert cell["strategy"] == "mindspore"
        [run] = cell["repeats"]
        assert run["num_tokens"] == 2 * 10 * cell["global_batch_size"]
        # As torch's ranks count them: a token's 6 · 16,194 and 12 · 2 layers · 32 · 10.
        assert run["model_flops"] == run["num_tokens"] * (97_164 + 7_680)
        for rank in run["ranks"]:
            parts = [rank[name] for name in ("compute", "communication", "data", "idle")]
            assert sum(parts) == pytest.approx(1.0)
            assert rank["peak_flops_per_second"] > 1e8
    assert any(rank["communication"] > 0 for rank in strong["repeats"][0]["ranks"])
    assert_no_process_left(out)


def _kinds(world, tied):
    from ftlaunch.strategies.mindspore.cpu_kernels import replace_missing_kernels
    from ftlaunch.strategies.mindspore.instruments import model_weights
    from ftlaunch.strategies.mindspore.model import NamedModel, _build

    replace_missing_kernels()
    config = AutoConfig.for_model(**tiny.CONFIGS["qwen2"], tie_word_embeddings=tied)
    named = NamedModel(_build("causal-lm", config, ModelOptions(name_or_path="qwen2")))
    return {weight.name: weight.kind for weight in model_weights(named)}


@pytest.mark.parametrize("tied", [False, True])
def test_what_an_output_layer_costs(tied):
    """Where it is the embeddings' own matrix, too: that is looked up, and multiplied with."""
    [kinds] = run_ranks(1, _kinds, tied)
    heads = [name for name, kind in kinds.items() if kind == "head"]
    looked_up = [name for name, kind in kinds.items() if kind == "embedding"]
    embeddings = "model.embed_tokens.weight"
    assert (heads, looked_up) == (
        ([embeddings], []) if tied else (["lm_head.weight"], [embeddings])
    )
