"""The command line before anything runs: help, version, flags, the dry run and what they import."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time

import pytest
import yaml

from ftlaunch.launcher.cli import parse, settings_of
from ftlaunch.launcher.config import load_config
from ftlaunch.launcher.parsers import (
    build_bench_parser,
    build_cancel_parser,
    build_doctor_parser,
    build_eval_parser,
    build_logs_parser,
    build_merge_parser,
    build_parser,
    build_plan_parser,
    build_rehearse_parser,
    build_status_parser,
    build_submit_parser,
)
from tests.jobs import SCRIPT, ftlaunch, said, write_data, write_model

FLAGS = {
    "--nodes",
    "--devices",
    "--cluster",
    "--hostfile",
    "--strategy",
    "--precision",
    "--task",
    "--model",
    "--dataset",
    "--config",
    "-o",
    "--output-dir",
    "--dry-run",
    "--overwrite",
    "--max-restarts",
    "-m",
    "--version",
    "-h",
    "--help",
}
FRAMEWORKS = ("torch", "transformers", "datasets", "mindspore", "deepspeed")
# Runs the command in this interpreter, then says on stderr which modules it has imported.
_IMPORTED = """
import json, sys
from ftlaunch.launcher.__main__ import main
try:
    code = main()
except SystemExit as end:
    code = end.code
print("\\n" + json.dumps({"code": code, "modules": sorted(sys.modules)}), file=sys.stderr)
"""


def imported_by(*args: str) -> set[str]:
    """The modules that a successful command has imported."""
    result = subprocess.run(
        [sys.executable, "-c", _IMPORTED, *args], capture_output=True, text=True, timeout=60
    )
    report = json.loads(result.stderr.splitlines()[-1])
    assert report["code"] in (0, None), result.stderr
    return set(report["modules"])


# -- help and flags -----------------------------------------------------------------------------


BUILDERS = {
    (): build_parser,
    ("plan",): build_plan_parser,
    ("eval",): build_eval_parser,
    ("rehearse",): build_rehearse_parser,
    ("merge",): build_merge_parser,
    ("doctor",): build_doctor_parser,
    ("submit",): build_submit_parser,
    ("status",): build_status_parser,
    ("logs",): build_logs_parser,
    ("cancel",): build_cancel_parser,
    ("bench",): build_bench_parser,
}


@pytest.mark.parametrize("command", BUILDERS)
def test_help(command):
    result = ftlaunch(*command, "--help", timeout=60)
    assert result.returncode == 0
    assert result.stderr == ""
    parser = BUILDERS[command]()
    for action in parser._actions:
        for flag in action.option_strings:
            assert flag in result.stdout


@pytest.mark.parametrize(
    "command",
    [(), ("plan",), ("eval",), ("merge",), ("doctor",), ("submit",), ("status",), ("bench",)],
)
def test_help_imports_next_to_nothing(command):
    modules = imported_by(*command, "--help")
    assert modules.isdisjoint({"pydantic", "yaml", "numpy", "rich", *FRAMEWORKS})


def test_version():
    result = ftlaunch("--version", timeout=60)
    assert result.returncode == 0
    assert re.fullmatch(r"ftlaunch \d+\.\d+\.\d+\S*\n", result.stdout)


def test_the_flags_are_frozen():
    """Everything else is a key: another flag is to be argued for, not slipped in."""
    parser = build_parser()
    assert {flag for action in parser._actions for flag in action.option_strings} == FLAGS


def test_the_flags_of_the_plan_are_frozen():
    flags = {flag for action in build_plan_parser()._actions for flag in action.option_strings}
    assert flags == FLAGS - {"--version"} | {"--hardware", "--json"}


def test_the_flags_of_merge_are_frozen():
    flags = {flag for action in build_merge_parser()._actions for flag in action.option_strings}
    assert flags == {"--adapter", "--dtype", "--model", "--verify", "-h", "--help"}


def test_the_flags_of_submit_are_frozen():
    """Where the nodes are is SLURM's to say; what else it is asked for are keys."""
    flags = {flag for action in build_submit_parser()._actions for flag in action.option_strings}
    slurms = {"--partition", "--time", "--account", "--qos", "--gpus-per-node", "--mem"}
    assert flags == FLAGS - {"--cluster", "--hostfile", "--version"} | slurms


def test_the_flags_about_a_job_are_frozen():
    flags = {
        command: {f for action in BUILDERS[command,]()._actions for f in action.option_strings}
        for command in ("status", "logs", "cancel")
    }
    shared = {"-h", "--help"}
    assert flags == {
        "status": {"--json"} | shared,
        "logs": {"--follow", "--rank"} | shared,
        "cancel": shared,
    }


def test_the_flags_of_the_doctor_are_frozen():
    """Those that say what a job is and where it runs, and one of its own."""
    flags = {flag for action in build_doctor_parser()._actions for flag in action.option_strings}
    of_running = {"--dry-run", "--overwrite", "--max-restarts", "-m", "--version"}
    assert flags == (FLAGS - of_running) | {"--json"}


def test_the_flags_of_bench_are_frozen():
    """Those that say what a job is and where it runs, how often it is measured, and what is printed."""
    flags = {flag for action in build_bench_parser()._actions for flag in action.option_strings}
    of_running = {"--overwrite", "--max-restarts", "-m", "--version"}
    own = {"--steps", "--warmup-steps", "--repeats", "--json", "--compare"}
    assert flags == (FLAGS - of_running) | own


def test_a_strategy_that_is_left_out_is_what_fits_in_every_help():
    for words, build in BUILDERS.items():
        for action in build()._actions:
            if "--strategy" in action.option_strings:
                assert "(default: what fits)" in str(action.help), words


@pytest.mark.parametrize("build", BUILDERS.values())
def test_at_most_20_flags_a_command(build):
    assert len([action for action in build()._actions if action.option_strings]) <= 20


@pytest.mark.parametrize(
    ("flags", "content"),
    [
        (["--nodes", "3"], {"nodes": 3}),
        (["--devices", "2"], {"devices": 2}),
        (["--cluster", "local"], {"cluster": "local"}),
        (["--hostfile", "hosts.txt"], {"hostfile": "hosts.txt"}),
        (["--strategy", "ddp"], {"strategy": "ddp"}),
        (["--precision", "fp16"], {"precision": "fp16"}),
        (["--task", "another-task"], {"task": "another-task"}),
        (["--model", "m", "--dataset", "d"], {"model": "m", "dataset": "d"}),
        (["--output-dir", "out"], {"output_dir": "out"}),
        (["-o", "out"], {"output_dir": "out"}),
        (["--max-restarts", "0"], {"max_restarts": 0}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_may_stand_in_yaml(tmp_path, flags, content):
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(content))
    _, arguments = parse(flags)
    by_flags = load_config(file=None, flags=settings_of(arguments), overrides=[])
    _, arguments = parse(["--config", str(file)])
    by_yaml = load_config(file=file, flags=settings_of(arguments), overrides=arguments.overrides)
    assert by_yaml == by_flags
    assert by_yaml != load_config(file=None, flags={}, overrides=[])


def test_flags_give_way_to_nothing_but_overrides(tmp_path):
    """Defaults, then YAML, then flags, then key=value; sections are merged, not replaced."""
    file = tmp_path / "job.yaml"
    file.write_text("nodes: 2\nprecision: fp16\nmodel: m\ndata: d\ntrain: {seed: 1, max_steps: 5}")
    _, arguments = parse(
        [
            "--nodes",
            "3",
            "--config",
            str(file),
            "train.seed=7",
            "model.freeze=a,b",
            "--precision=bf16",
        ]
    )
    config = load_config(file=file, flags=settings_of(arguments), overrides=arguments.overrides)
    assert (config.cluster.nodes, config.precision) == (3, "bf16")
    assert (config.train.seed, config.train.max_steps) == (7, 5)
    assert (config.model.name_or_path, config.model.freeze) == ("m", ("a", "b"))


@pytest.mark.parametrize(
    ("text", "value"), [("2e-5", 2e-5), ("1E-4", 1e-4), ("3.", 3.0), (".5", 0.5)]
)
def test_numbers_as_people_write_them(tmp_path, text, value):
    """YAML 1.1 takes 2e-5 for a string."""
    file = tmp_path / "job.yaml"
    file.write_text(f"train:\n  learning_rate: {text}\n")
    config = load_config(file=file, flags={}, overrides=[])
    assert config.train.learning_rate == value
    config = load_config(file=None, flags={}, overrides=[f"train.learning_rate={text}"])
    assert config.train.learning_rate == value


# -- the dry run --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Arguments of a job that could run."""
    folder = tmp_path_factory.mktemp("inputs")
    model, data = write_model(folder / "model"), write_data(folder / "data", num_train=20)
    return ["--model", str(model), "--dataset", str(data), "model.random_weights=true"]


def reasons(output: str) -> dict[str, tuple[str, str]]:
    """What a printed plan says: choice → (value, reason)."""
    found = {}
    for line in output.splitlines():
        match = re.fullmatch(r"([a-z-]+) {2,}(\S+) {2,}(\S.+)", line)
        if match:
            found[match[1]] = (match[2], match[3])
    return found


def test_the_dry_run_says_what_would_happen_and_why(job):
    result = ftlaunch("--nodes", 3, *job, "--precision", "fp32", "--dry-run", timeout=60)
    assert result.returncode == 0, said(result)
    plan = reasons(result.stdout)
    assert plan["strategy"][0] == "ddp"
    assert plan["precision"][0] == "fp32"
    # 32 samples on 3 ranks: 11 a rank, at most 8 at once, so 2 micro-batches of 6.
    assert plan["micro-batch"][0] == "6"
    assert plan["accumulation"][0] == "2"
    assert all(len(why) > 5 for _, why in plan.values())
    assert "processes of this machine" in plan["cluster"][1]


def test_the_dry_run_of_the_demo():
    result = ftlaunch("--nodes", 4, "--dry-run", timeout=60)
    assert result.returncode == 0, said(result)
    assert {"strategy", "precision", "micro-batch", "accumulation"} <= set(reasons(result.stdout))


def test_the_dry_run_creates_nothing(job, tmp_path):
    here, home = tmp_path / "here", tmp_path / "home"
    here.mkdir()
    home.mkdir()
    env = {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "FTLAUNCH_CACHE": str(home / "tokens"),
        "HF_HOME": str(home / "hf"),
        "TMPDIR": str(home),
    }
    for arguments in (["--nodes", "2", *job, "-o", str(here / "out")], ["--nodes", "4"]):
        result = ftlaunch(*arguments, "--dry-run", cwd=here, env=env, timeout=60)
        assert result.returncode == 0, said(result)
        assert "nothing was started" in result.stdout
    assert sorted(tmp_path.rglob("*")) == [here, home]


def test_the_dry_run_imports_no_framework(job):
    modules = imported_by("--nodes", "2", *job, "--dry-run")
    assert modules.isdisjoint(FRAMEWORKS)


def test_how_long_help_and_dry_run_take(job):
    """Printed, not asserted: a busy machine is no reason to fail."""
    for name, arguments in (("--help", ["--help"]), ("--dry-run", [*job, "--dry-run"])):
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            result = ftlaunch(*arguments, command=SCRIPT, timeout=60)
            seconds.append(time.perf_counter() - started)
            assert result.returncode == 0
        print(f"ftlaunch {name}: median of 5 is {statistics.median(seconds) * 1000:.0f} ms")
