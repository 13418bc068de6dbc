"""`ftlaunch bench` as a user runs it: what it writes, what it refuses, what is left when it is stopped."""

from __future__ import annotations

import json
import signal
import sys
import time

import pytest

from ftlaunch.launcher.bench_folder import make_folder, remove_folder
from tests.jobs import (
    assert_mistake,
    assert_no_process_left,
    ftlaunch,
    processes_of,
    said,
    start,
    wait_until,
    write_data,
    write_model,
)

FEW = ["--steps", "3", "--warmup-steps", "1", "--repeats", "1", "--precision", "fp32"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return write_model(folder / "model"), write_data(folder / "data", num_train=64)


def results_of(folder):
    return json.loads((folder / "bench.json").read_text())


def check_cell(cell, *, repeats, steps):
    assert cell["failure"] is None, cell
    assert len(cell["repeats"]) == repeats
    for run in cell["repeats"]:
        assert len(run["step_seconds"]) == steps
        assert run["num_samples"] == steps * cell["global_batch_size"]
        assert 0 < run["num_tokens"] <= run["num_padded_tokens"]
        assert sum(run["step_seconds"]) == pytest.approx(run["seconds"], rel=0.5)
        assert len(run["ranks"]) == cell["ranks"]
        assert 0 < run["model_flops_utilisation"] < 1
        for rank in run["ranks"]:
            parts = [rank[name] for name in ("compute", "communication", "data", "idle")]
            assert sum(parts) == pytest.approx(1.0)
            assert all(0 <= part <= 1 for part in parts)
            assert rank["peak_flops_per_second"] > 1e8
            assert rank["peak_memory_bytes"] > 0


def test_one_and_two_nodes(inputs, tmp_path):
    """Real ranks, on data: what is counted is what the steps have."""
    model, data = inputs
    out = tmp_path / "out"
    arguments = ["--model", model, "--dataset", data, "model.random_weights=true"]
    result = ftlaunch(
        "bench", "--nodes", "1,2", *arguments, *FEW, "train.global_batch_size=16", "-o", out
    )
    assert result.returncode == 0, said(result)
    content = results_of(out)
    base, strong, weak = content["cells"]
    for cell in (base, strong, weak):
        check_cell(cell, repeats=1, steps=3)
        assert cell["name"] in {path.name for path in (out / "cells").iterdir()}
    assert [cell["ranks"] for cell in (base, strong, weak)] == [1, 2, 2]
    assert [cell["global_batch_size"] for cell in (base, strong, weak)] == [16, 16, 32]
    # The same samples at the same steps, however many ranks there are.
    assert base["repeats"][0]["num_tokens"] == strong["repeats"][0]["num_tokens"]
    assert base["repeats"][0]["model_flops"] == strong["repeats"][0]["model_flops"]
    assert base["efficiency"] == 1.0
    alone = base["repeats"][0]["ranks"][0]
    assert alone["communication"] == alone["idle"] == 0
    assert any(rank["communication"] > 0 for rank in strong["repeats"][0]["ranks"])
    assert content["code"]["fingerprint"] == content["machine"]["code_fingerprint"]
    for word in ("samples/s", "efficiency", "strong", "weak", "processes of this machine"):
        assert word in result.stdout
    lines = [line for line in result.stdout.splitlines() if "/3  " in line]
    assert [line.split()[1].rstrip(":").split("-")[2] for line in lines] == [
        "base",
        "strong",
        "weak",
    ]
    assert not list(out.rglob("checkpoints"))


def test_a_cell_that_fails_and_others_that_go_on(inputs, tmp_path):
    """Random samples, which need no tokenizer; MindSpore is not installed beside torch."""
    model, _ = inputs
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((model / "config.json").read_bytes())
    out = tmp_path / "out"
    grid = ["--strategy", "mindspore,ddp", "--precision", "fp32", "bench.lengths=10"]
    few = ["--steps", "2", "--warmup-steps", "1", "--repeats", "1"]
    arguments = ["--model", tmp_path / "model", "model.random_weights=true", "-o", out, "--json"]
    result = ftlaunch("bench", *grid, *few, *arguments)
    assert result.returncode == 1, said(result)
    failed, done = json.loads(result.stdout)["cells"]
    assert json.loads(result.stdout) == results_of(out)
    assert "lacks mindspore" in failed["failure"]["why"]
    assert done["failure"] is None
    run = done["repeats"][0]
    assert (run["num_samples"], run["num_tokens"], run["num_padded_tokens"]) == (64, 640, 640)
    # A layer: 4 · (32² + 32) for attention, 2 · 32 · 48 + 48 + 32 for the MLP, 128 for the norms: 7,504.
    # Two of them, the norm of the embeddings 64, the pooler 1,056, the classifier 66: 16,194.
    # 6 · 16,194 · 640 tokens, and attention 12 · 2 layers · 32 · 64 · 10².
    assert run["model_flops"] == 62_184_960 + 4_915_200
    assert "mindspore-fp32-base-1 failed" in result.stderr


@pytest.mark.parametrize(
    ("nodes", "peers"),
    [
        pytest.param(1, ["torchrun"], id="torchrun"),
        pytest.param(2, ["hf", "accelerate", "torchrun", "deepspeed"], marks=pytest.mark.long),
    ],
)
def test_beside_peers(nodes, peers, inputs, tmp_path):
    """The same samples by both sides, in turn; a ratio for each round."""
    model, data = inputs
    out = tmp_path / "out"
    few = ["--steps", "3", "--warmup-steps", "1", "--repeats", "2", "--precision", "fp32"]
    arguments = ["--model", model, "--dataset", data, "model.random_weights=true"]
    result = ftlaunch(
        *["bench", "--nodes", nodes, "--compare", ",".join(peers), *few, *arguments, "-o", out],
        timeout=580,
    )
    assert result.returncode == 0, said(result)
    content = results_of(out)
    [ours] = content["cells"]
    assert [each["peer"] for each in content["peers"]] == peers
    for each in content["peers"]:
        assert each["failure"] is None
        assert each["cell"] == ours["name"]
        assert len(each["repeats"]) == 2
        ratios = [
            own["tokens_per_second"] / peer["tokens_per_second"]
            for own, peer in zip(ours["repeats"], each["repeats"], strict=True)
        ]
        assert each["ratio"]["median"] == pytest.approx(sum(ratios) / 2)
        for own, peer in zip(ours["repeats"], each["repeats"], strict=True):
            assert peer["samples"] == own["num_samples"]
            assert peer["tokens"] == own["num_tokens"]
            assert peer["steps"] == 3
    assert "ours / peer" in result.stdout
    assert_no_process_left(out)


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="the plot is drawn by matplotlib, an extra")
    from ftlaunch.launcher.bench_plot import write_plot
    from ftlaunch.launcher.bench_report import CellResult
    from tests.test_bench_numbers import cell, measured

    results = [
        CellResult(cell=cell(1), runs=[measured(100)]),
        CellResult(cell=cell(2, "strong"), runs=[measured(180, ranks=2)]),
        CellResult(cell=cell(2, "weak"), why="out of memory"),
    ]
    write_plot(tmp_path / "bench.png", results)
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "pyplot" not in "".join(name for name in sys.modules if name.startswith("matplotlib"))


def test_the_dry_run_starts_and_writes_nothing(inputs, tmp_path):
    model, data = inputs
    arguments = ["--model", model, "--dataset", data, "model.random_weights=true"]
    result = ftlaunch("bench", "--nodes", "2,1", *arguments, "--dry-run", cwd=tmp_path)
    assert result.returncode == 0, said(result)
    assert "base-1: 1 ranks on 1 nodes" in result.stdout
    assert "weak-2: 2 ranks on 2 nodes, ddp" in result.stdout
    assert "global batch 64" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_stop_keeps_what_is_done(inputs, tmp_path):
    model, data = inputs
    out = tmp_path / "out"
    arguments = ["--model", model, "--dataset", data, "model.random_weights=true", "-o", out]
    few = ["--steps", "2", "--warmup-steps", "0", "--repeats", "500"]
    with start("bench", *few, *arguments) as process:
        second = out / "cells" / "auto-auto-base-1" / "2" / "logs"
        wait_until(lambda: second.exists(), 120, "the second run")
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, f"{output}\n{errors}"
    assert "Traceback" not in errors
    content = results_of(out)
    assert content["stopped"]
    assert len(content["cells"][0]["repeats"]) >= 1
    assert_no_process_left(out)
    assert processes_of(out) == []


def test_a_stop_while_a_peer_runs(inputs, tmp_path):
    """As a scheduler ends it. What was measured before is kept, and torchrun's ranks are gone."""
    model, data = inputs
    out = tmp_path / "out"
    arguments = ["--model", model, "--dataset", data, "model.random_weights=true", "-o", out]
    with start("bench", "--nodes", 2, "--compare", "torchrun", *FEW, *arguments) as process:
        log = out / "peers" / "auto-fp32-base-2" / "torchrun" / "1" / "log.txt"
        wait_until(log.exists, 120, "the peer")
        wait_until(lambda: len(processes_of(out)) == 4, 60, "its ranks", every=0.002)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, f"{output}\n{errors}"
    assert "Traceback" not in errors
    assert processes_of(out) == []
    content = results_of(out)
    assert content["stopped"]
    assert len(content["cells"][0]["repeats"]) == 1


# -- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "1,two"], ["--nodes", "1,two", "whole number"]),
        (["--nodes", "0"], ["--nodes"]),
        (["--strategy", "ddp,zero7"], ["zero7", "This version has"]),
        (["--precision", "fp32,fp7"], ["fp7", "known are"]),
        (["--steps", "1"], ["bench.steps", "1"]),
        (["--warmup-steps", "-1"], ["bench.warmup_steps"]),
        (["--repeats", "0"], ["bench.repeats"]),
        (["--repeats", "often"], ["bench.repeats", "often"]),
        (["bench.lengths=20-10"], ["bench.lengths", "20-10", "lognormal"]),
        (["bench.lengths=lognormal:x"], ["bench.lengths"]),
        (["--model", "/nowhere"], ["/nowhere"]),
        (["--dataset", "/nowhere", "--model", "MODEL"], ["/nowhere", "does not exist"]),
        (
            ["--dataset", "DATA", "--model", "MODEL", "bench.lengths=8"],
            ["bench.lengths", "one of the two"],
        ),
        (["--dataset", "DATA"], ["--dataset is given without --model"]),
        (["--hostfile", "HOSTS", "--nodes", "1,3"], ["--nodes 3", "2 hosts"]),
        (["-o", "FILE"], ["is a file"]),
        (["-o", "FULL"], ["not empty"]),
        (["--compare", "hf,horovod"], ["horovod", "no peer", "torchrun"]),
        (["--compare", "hf,hf"], ["--compare", "twice"]),
        (["--compare", "hf", "--hostfile", "HOSTS"], ["--compare", "one machine"]),
        (
            [
                "--compare",
                "hf",
                "--model",
                "MODEL",
                "model.random_weights=true",
                "model.freeze=[bert]",
            ],
            ["--compare", "model.freeze"],
        ),
        (["--dry-run", "-o", "FILE"], ["is a file"]),
        (["--dry-run", "-o", "FULL"], ["not empty"]),
        (["bench.stepps=3"], ["bench.stepps is not a key", "bench.steps"]),
        (["script.py"], ["script.py"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(arguments, words, inputs, tmp_path):
    model, data = inputs
    (tmp_path / "hosts").write_text("a\nb\n")
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    paths = {"MODEL": model, "DATA": data, "HOSTS": tmp_path / "hosts"}
    paths |= {"FILE": tmp_path / "file", "FULL": tmp_path / "full"}
    given = [paths.get(word, word) for word in arguments]
    result = ftlaunch("bench", *given, cwd=tmp_path, timeout=60)
    assert_mistake(result, *words)
    assert {path.name for path in tmp_path.iterdir()} == {"hosts", "file", "full"}


@pytest.mark.parametrize(
    ("there", "mistake", "words"),
    [
        (False, "train.global_batch_size=1", "a global batch of 1 cannot be spread over 2 ranks"),
        # It is not installed beside torch.
        (True, "strategy=mindspore", "lacks mindspore"),
    ],
    ids=["new", "empty"],
)
def test_after_a_mistake_the_folder_is_as_it_was(there, mistake, words, inputs, tmp_path):
    model, _ = inputs
    out = tmp_path / "some" / "where"
    if there:
        out.mkdir(parents=True)
    arguments = ["--model", model, "model.random_weights=true", mistake, "-o", out]
    assert_mistake(ftlaunch("bench", "--nodes", "2", *arguments), words)
    found = {path.name for path in tmp_path.rglob("*")}
    assert found == ({"some", "where"} if there else set())


def test_what_others_have_put_into_the_folder_stays(tmp_path):
    out = tmp_path / "some" / "out"
    made = make_folder(out)
    assert made == [out, tmp_path / "some"]
    (out / "cells" / "ddp").mkdir(parents=True)
    (out / "bench.json").write_text("{}")
    (out / "mine").write_text("")
    remove_folder(out, made)
    assert [path.name for path in out.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["--dataset", "DATA", "train.global_batch_size=65"], ["64", "65", "global batch"]),
        pytest.param(
            ["bench.samples=8", "bench.lengths=8"],
            ["8", "32", "bench.samples"],
            marks=pytest.mark.long,
        ),
        pytest.param(
            ["bench.lengths=65"], ["65", "64 at most", "bench.lengths"], marks=pytest.mark.long
        ),
    ],
    ids=["data", "samples", "lengths"],
)
def test_mistakes_that_the_ranks_find(settings, words, inputs, tmp_path):
    model, data = inputs
    given = [data if word == "DATA" else word for word in settings]
    result = ftlaunch(
        "bench", "--model", model, "model.random_weights=true", *given, "-o", tmp_path / "out"
    )
    assert_mistake(result, *words)
    assert list(tmp_path.iterdir()) == []
