"""`ftlaunch bench --nodes 1,2,4` within an allocation of a real SLURM, and over ssh."""

from __future__ import annotations

import json

import pytest

from tests.cluster_jobs import Place
from tests.jobs import MODULE, said, write_data, write_model

pytestmark = pytest.mark.long


@pytest.fixture(params=["slurm", "ssh"])
def place(request):
    bed = request.getfixturevalue({"slurm": "slurm", "ssh": "ssh_hosts"}[request.param])
    place = Place(kind=request.param, bed=bed)
    yield place
    place.clear()


def test_one_two_and_four_nodes(place, tmp_path):
    """Each number of nodes is the first of the allocation's; nothing is left of any of them."""
    out = tmp_path / "out"
    model = write_model(tmp_path / "model")
    data = write_data(tmp_path / "data", num_train=200)
    result = place.run(
        *["--nodes", "1,2,4", "--model", model, "--dataset", data, "model.random_weights=true"],
        *["--precision", "fp32", "--steps", "5", "--warmup-steps", "2", "--repeats", "2"],
        *["train.global_batch_size=32", "-o", out],
        nodes=4,
        command=[*MODULE, "bench"],
        timeout=500,
    )
    assert result.returncode == 0, said(result)
    print(result.stdout)
    content = json.loads((out / "bench.json").read_text())
    cells = content["cells"]
    assert [cell["name"] for cell in cells] == [
        "auto-fp32-base-1",
        "auto-fp32-strong-2",
        "auto-fp32-weak-2",
        "auto-fp32-strong-4",
        "auto-fp32-weak-4",
    ]
    assert [cell["ranks"] for cell in cells] == [1, 2, 2, 4, 4]
    assert [cell["global_batch_size"] for cell in cells] == [32, 32, 64, 32, 128]
    for cell in cells:
        assert cell["failure"] is None
        assert len(cell["repeats"]) == 2
        assert cell["efficiency"] > 0
        hosts = [machine["hostname"] for machine in cell["machines"]]
        assert hosts == ["n1", "n2", "n3", "n4"][: cell["nodes"]]
        for run in cell["repeats"]:
            for rank in run["ranks"]:
                parts = [rank[name] for name in ("compute", "communication", "data", "idle")]
                assert sum(parts) == pytest.approx(1.0)
    assert "processes of this machine" not in result.stdout
    assert not place.left(out)


def test_more_nodes_than_there_are(place, tmp_path):
    arguments = ["--nodes", "1,2,9", "-o", tmp_path / "out"]
    result = place.run(*arguments, nodes=4, command=[*MODULE, "bench"])
    assert result.returncode == 2, said(result)
    assert "--nodes 9, but there are 4 hosts" in result.stderr
    assert not (tmp_path / "out").exists()
