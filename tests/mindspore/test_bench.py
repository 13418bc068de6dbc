"""`ftlaunch bench` with MindSpore's ranks: random samples, two nodes of this machine."""

from __future__ import annotations

import json

import pytest

from tests.jobs import assert_no_process_left, ftlaunch, said, write_model


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
