"""`ftlaunch plan` as a user runs it: for machines that are not here, by a config.json alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ftlaunch.launcher.cli import parse
from ftlaunch.launcher.plan_file import PLAN
from tests.jobs import assert_mistake, ftlaunch, said, write_data, write_model
from tests.model_configs import BERT_BASE, LLAMA_70B, PARAMETERS_70B, write_json

ON_16 = ("plan", "--nodes", 2, "--devices", 8, "--hardware", "H100-80GB", "--task", "causal-lm")
# Runs the command in an interpreter that notes what it does to the world outside.
_WATCHED = """
import json, sys
done = []
WATCHED = ("socket.", "subprocess.", "os.fork", "os.posix_spawn", "os.exec", "os.system", "ctypes.dlopen")
sys.addaudithook(lambda event, arguments: event.startswith(WATCHED) and done.append(event))
from ftlaunch.launcher.__main__ import main
code = main()
print("\\n" + json.dumps({"code": code, "done": done, "modules": sorted(sys.modules)}), file=sys.stderr)
"""
_HEAVY = {"torch", "numpy", "transformers", "deepspeed", "mindspore", "mindone", "datasets", "peft"}


@pytest.fixture
def llama(tmp_path) -> Path:
    return write_json(tmp_path / "llama", LLAMA_70B)


def plan_of(*args: object) -> dict[str, Any]:
    """What --json prints."""
    result = ftlaunch(*args, "--json", timeout=60)
    assert result.returncode == 0, said(result)
    plan: dict[str, Any] = json.loads(result.stdout)
    return plan


def memory_of(*args: object) -> dict[str, Any]:
    memory: dict[str, Any] = plan_of(*args)["memory"]
    return memory


# -- machines that are not here -----------------------------------------------------------------


def test_a_model_of_70_billion_parameters_on_16_devices(llama):
    """By hand in `model_configs`: 70.55 billion. 16 bytes each are 1.1 TB, in 16 parts 65.7 GiB."""
    plan = plan_of(*ON_16, "--model", llama)
    assert (plan["strategy"], plan["precision"], plan["world_size"]) == ("zero3", "bf16", 16)
    memory = plan["memory"]
    assert memory["num_parameters"] == PARAMETERS_70B
    assert not memory["is_bound"]
    assert memory["capacity"] == 81559 * 2**20
    [chosen] = [row for row in memory["rows"] if row["chosen"]]
    assert (chosen["offload"], chosen["gradient_checkpointing"]) == (False, True)
    assert chosen["masters"] + chosen["optimizer"] == pytest.approx(
        12 * PARAMETERS_70B / 16, rel=1e-6
    )
    fitting = [row["strategy"] for row in memory["rows"] if not row["lacking"]]
    assert "ddp" not in fitting
    [ddp] = [row for row in memory["rows"] if row["strategy"] == "ddp"][:1]
    assert ddp["lacking"] == ddp["peak"] - memory["usable"] > 900 << 30


def test_it_is_planned_without_a_socket_a_process_or_a_framework(llama):
    words = [str(word) for word in (*ON_16, "--model", llama)]
    result = subprocess.run(
        [sys.executable, "-c", _WATCHED, *words], capture_output=True, text=True, timeout=60
    )
    report = json.loads(result.stderr.splitlines()[-1])
    assert report["code"] == 0, said(result)
    assert report["done"] == []
    assert _HEAVY.isdisjoint(report["modules"])


def test_the_table_says_what_fits_and_by_how_much_the_rest_does_not(llama):
    result = ftlaunch(*ON_16, "--model", llama, timeout=60)
    assert result.returncode == 0, said(result)
    lines = result.stdout.splitlines()
    assert lines[0] == "2 node(s) of 8 × NVIDIA H100 80GB HBM3  (assumed)"
    assert any(line.startswith("memory ") and "of 79.65 that a rank has" in line for line in lines)
    table = [line for line in lines if line.startswith("  ")]
    assert "weights  masters" in table[0]
    assert [line.split()[0] for line in table[1:5]] == ["ddp", "zero1", "zero2", "zero3"]
    # 4 bytes of 70,553,706,496 parameters are 262.83 GiB.
    assert table[1].split()[1:5] == ["1", "262.83", "0.00", "262.83"]
    assert table[1].endswith("too much")
    assert sum(line.endswith("chosen") for line in table) == 1
    assert "dry run" not in result.stdout


def test_the_readme_shows_lines_that_it_prints(llama):
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    _, _, after = readme.partition("ftlaunch plan --nodes 2 --devices 8 --hardware H100-80GB")
    shown = [line for line in after.split("```")[2].splitlines() if line]
    assert len(shown) >= 8
    result = ftlaunch(*ON_16, "--model", llama, timeout=60)
    printed = result.stdout.splitlines()
    assert [line for line in printed if line in shown] == shown


def test_the_folder_the_file_and_other_names_of_it_are_the_same(llama, tmp_path):
    by_file = memory_of(*ON_16, "--model", llama)
    assert memory_of(*ON_16, "--model", llama.parent) == by_file
    other = tmp_path / "seventy.json"
    other.write_bytes(llama.read_bytes())
    assert memory_of(*ON_16, "--model", other) == by_file


def test_the_json_is_that_of_plan_json(llama):
    plan = plan_of(*ON_16, "--model", llama)
    assert PLAN.dump_python(PLAN.validate_python(plan), mode="json") == plan


def test_npus_have_one_strategy(tmp_path):
    model = write_json(tmp_path / "bert", BERT_BASE)
    flags = ("plan", "--hardware", "Ascend-910B-64GB", "--task", "masked-lm")
    plan = plan_of(*flags, "--model", model)
    assert (plan["strategy"], plan["precision"], plan["world_size"]) == ("mindspore", "bf16", 8)
    assert [row["strategy"] for row in plan["memory"]["rows"]] == ["mindspore"]
    result = ftlaunch(*flags, "--model", model, "model.gradient_checkpointing=true")
    assert_mistake(result, "model.gradient_checkpointing", "mindspore")
    stage = 'deepspeed.config={"zero_optimization": {"stage": 2}}'
    ways = ((["--strategy", "zero2"], "--strategy"), ([stage], "deepspeed.config"))
    for named, left_out in ways:
        result = ftlaunch(*flags, "--model", model, *named, timeout=60)
        assert_mistake(result, "does not run on ascend", f"Leave {left_out} out")


def test_a_rank_table_of_this_machine_is_not_that_of_others(tmp_path):
    model = write_json(tmp_path / "bert", BERT_BASE)
    flags = ("plan", "--hardware", "Ascend-910B-64GB", "--task", "masked-lm", "--model", model)
    env = {"RANK_TABLE_FILE": str(tmp_path / "nothing.json")}
    result = ftlaunch(*flags, env=env, timeout=60)
    assert result.returncode == 0, said(result)


def test_a_plan_of_the_demo():
    memory = memory_of("plan", "--hardware", "T4-16GB")
    assert memory["length"] == 64  # the demo's own data.max_length
    assert 300_000 < memory["num_parameters"] < 500_000


# -- machines that are here ---------------------------------------------------------------------


def test_without_hardware_it_is_for_this_machine(tmp_path):
    model = write_json(tmp_path / "bert", BERT_BASE)
    plan = plan_of("plan", "--nodes", 2, "--task", "masked-lm", "--model", model)
    assert plan["world_size"] == 2
    assert plan["memory"]["capacity"] > 0
    assert not plan["hosts"][0]["assumed"]
    assert sorted(tmp_path.rglob("*")) == [model.parent, model]


def test_the_dry_run_has_the_table_too(tmp_path):
    model, data = write_model(tmp_path / "model"), write_data(tmp_path / "data", num_train=20)
    job = ("--model", model, "--dataset", data, "model.random_weights=true")
    result = ftlaunch("--nodes", 2, *job, "--dry-run", timeout=60)
    assert result.returncode == 0, said(result)
    assert "memory of each rank in GiB" in result.stdout
    assert "nothing was started" in result.stdout.splitlines()[-1]


def test_a_model_of_the_hub_is_not_asked_for_by_a_dry_run(tmp_path):
    data = write_data(tmp_path / "data", num_train=20)
    env = {"HF_HOME": str(tmp_path / "hf")}
    job = ("--model", "someone/some-model", "--dataset", data)
    result = ftlaunch("--nodes", 2, *job, "--dry-run", env=env, timeout=60)
    assert result.returncode == 0, said(result)
    assert "memory is not estimated: config.json of the model 'someone/some-model'" in result.stdout


def test_a_model_in_the_hubs_cache(tmp_path):
    home = tmp_path / "hf"
    folder = home / "hub" / "models--someone--some-model"
    commit = "0123456789abcdef0123456789abcdef01234567"
    write_json(folder / "snapshots" / commit, BERT_BASE)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    flags = ("plan", "--hardware", "T4-16GB", "--task", "masked-lm", "--json")
    env = {"HF_HOME": str(home)}
    result = ftlaunch(*flags, "--model", "someone/some-model", env=env, timeout=60)
    assert result.returncode == 0, said(result)
    memory = json.loads(result.stdout)["memory"]
    assert memory["num_parameters"] > 100_000_000


# -- mistakes -----------------------------------------------------------------------------------


def test_what_cannot_be_planned_is_said(llama, tmp_path):
    bert = write_json(tmp_path / "bert", BERT_BASE)
    (tmp_path / "broken.json").write_text("{")
    cases = [
        (
            ["--hardware", "H1000-80GB", "--model", llama],
            ["'H1000-80GB' is not known", "Did you mean H100-80GB", "T4-16GB"],
        ),
        (
            [*ON_16[1:], "--model", llama, "train.global_batch_size=8"],
            ["global batch of 8 cannot be spread over 16 ranks"],
        ),
        (
            [
                "--hardware",
                "T4-16GB",
                "--model",
                bert,
                "data.max_length=513",
                "--task",
                "masked-lm",
            ],
            ["Rows of up to 513 tokens", "takes 512 at most"],
        ),
        (
            ["--hardware", "T4-16GB", "--devices", 4, "--model", llama, "--task", "causal-lm"],
            ["do not fit on 4 × NVIDIA Tesla T4", "smallest cluster", "--nodes"],
        ),
        (
            ["--hardware", "T4-16GB", "--model", tmp_path / "broken.json"],
            ["broken.json cannot be read as JSON"],
        ),
        (["--hardware", "T4-16GB", "--model", tmp_path], ["config.json cannot be read"]),
        (
            ["--hardware", "T4-16GB", "--model", bert, "--task", "causal-lm"],
            ["is a 'bert' model, which reads in both directions"],
        ),
        (
            ["--model", "someone/some-model"],
            ["'someone/some-model' is not in the hub's cache", "Pass the path of a config.json"],
        ),
        (["--model", llama, "script.py", "--its-own"], ["a script does its own training"]),
        (["--hardware", "T4-16GB", "--dataset", tmp_path], ["--dataset is given without --model"]),
    ]
    env = {"HF_HOME": str(tmp_path / "hf")}
    for words, said_of_it in cases:
        assert_mistake(ftlaunch("plan", *words, env=env, timeout=60), *said_of_it)
    assert not (tmp_path / "hf").exists()


def test_an_unknown_family_is_marked_as_a_bound(tmp_path):
    model = write_json(tmp_path / "zebra", {**BERT_BASE, "model_type": "zebra"})
    flags = ("plan", "--hardware", "T4-16GB", "--task", "masked-lm", "--model", model)
    result = ftlaunch(*flags, timeout=60)
    assert result.returncode == 0, said(result)
    assert (
        "a bound: the family 'zebra' is not known: every number is an upper bound" in result.stdout
    )
    assert memory_of(*flags)["is_bound"]


def test_the_words_of_a_run_are_those_of_its_plan():
    """`ftlaunch plan` before a command's own words plans that command."""
    words = ["--nodes", "2", "-o", "out", "--overwrite", "--max-restarts", "0", "train.seed=1"]
    _, run = parse(words)
    command, plan = parse(["plan", *words])
    assert command == "plan"
    own = {"hardware": None, "json": False}
    assert vars(plan) == {k: v for k, v in vars(run).items() if k != "version"} | own


def test_nothing_is_written(llama, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    here = tmp_path / "here"
    here.mkdir()
    env = {
        "HOME": str(here),
        "XDG_CACHE_HOME": str(here),
        "FTLAUNCH_CACHE": str(here),
        "TMPDIR": str(here),
    }
    result = ftlaunch(*ON_16, "--model", llama, "-o", "out", cwd=here, env=env, timeout=60)
    assert result.returncode == 0, said(result)
    assert list(here.iterdir()) == []
    here.rmdir()
    assert sorted(tmp_path.rglob("*")) == before
