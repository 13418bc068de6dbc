"""What a user gets wrong: exit code 2, a message that says how to mend it, and nothing is lost.

Mistakes in the data themselves are in test_sources.py and test_text_classification.py, and what ranks
make of a checkpoint in test_training_run.py; here is what the command makes of them.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import (
    WORDS,
    assert_mistake,
    assert_no_process_left,
    checkpoint_steps,
    contents,
    ftlaunch,
    make_rows,
    metrics_of,
    said,
    summary_of,
    write_data,
    write_model,
    write_rows,
    write_tokenizer,
)

RANDOM = "model.random_weights=true"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model and data that fit each other: what is wrong is then what a test adds."""
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "model")
    write_data(folder / "data")
    return folder


# -- what was typed -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(
            ["train.learning_rat=1"],
            ["train.learning_rat is not a key", "Did you mean train.learning_rate"],
            id="unknown key",
        ),
        pytest.param(
            ["trian.seed=1"],
            ["trian.seed is not a key", "Did you mean train.seed?"],
            id="unknown section",
        ),
        pytest.param(
            ["learning_rate=1"], ["Did you mean train.learning_rate"], id="key without its section"
        ),
        pytest.param(["--learning-rate", "1"], ["--learning-rate", "usage:"], id="unknown flag"),
        pytest.param(["--node", "3"], ["--node"], id="shortened flag"),
        pytest.param(["--nodes", "two"], ["--nodes", "'two'"], id="no number"),
        pytest.param(["--nodes", "0"], ["cluster.nodes is 0", "greater than 0"], id="no node"),
        pytest.param(["--devices", "0"], ["cluster.devices is 0"], id="no device"),
        pytest.param(["--max-restarts", "-1"], ["cluster.max_restarts is -1"], id="below zero"),
        pytest.param(["train"], ["'train'", "key=value"], id="a bare word"),
        pytest.param(["train=3"], ["train is a section", "train.KEY=VALUE"], id="a section"),
        pytest.param(["train.seed="], ["train.seed is None", "integer"], id="no value"),
        pytest.param(
            ["train.learning_rate=fast"], ["train.learning_rate is 'fast'"], id="no such number"
        ),
        pytest.param(
            ["train.lr_scheduler_type=polynomial"],
            ["'polynomial'", "'linear', 'cosine' or 'constant'"],
            id="no such choice",
        ),
        pytest.param(["data.eval_fraction=1.5"], ["1.5", "less than 1"], id="out of range"),
        pytest.param(
            ["train.learning_rate=nan"], ["train.learning_rate is 'nan'"], id="not a number"
        ),
        pytest.param(
            ["train.num_train_epochs=inf"],
            ["train.num_train_epochs is 'inf'", "finite"],
            id="infinity",
        ),
        pytest.param(["cluster.port=70000"], ["cluster.port is 70000", "65535"], id="no such port"),
        pytest.param(
            ["train.eval_strategy=steps"], ["train.eval_steps"], id="steps without how many"
        ),
        pytest.param(
            ["checkpoint.load_best_model_at_end=true", "train.eval_strategy=no"],
            ["checkpoint.load_best_model_at_end", "Set train.eval_strategy"],
            id="best of nothing",
        ),
        pytest.param(
            ["--strategy", "zero9"],
            ["'zero9'", "This version has: ddp", "--strategy"],
            id="unknown strategy",
        ),
        pytest.param(
            ["--strategy", "zero2", "--precision", "fp16"],
            ["--precision fp16 with --strategy zero2 does not run on cpu", "fp32 or bf16"],
            id="fp16 under ZeRO on a CPU",
            marks=pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed"),
        ),
        pytest.param(
            ["--task", "text-clasification"],
            ["'text-clasification'", "text-classification"],
            id="unknown task",
        ),
        pytest.param(
            ["--cluster", "slurm"], ["slurm", "--cluster local"], id="a cluster not there yet"
        ),
        pytest.param(["--cluster", "cloud"], ["'cloud'", "slurm"], id="unknown cluster"),
        pytest.param(["--hostfile", "hosts.txt"], ["hostfile", "hosts.txt"], id="no hostfile"),
        pytest.param(
            ["--nodes", "4", "train.global_batch_size=3"],
            ["global batch of 3", "4 ranks", "at least one sample", "train.global_batch_size to 4"],
            id="fewer samples than ranks",
        ),
    ],
)
def test_what_was_typed(inputs, tmp_path, arguments, words):
    model, data = inputs / "model", inputs / "data"
    result = ftlaunch(
        "--model", model, "--dataset", data, RANDOM, "-o", "out", *arguments, cwd=tmp_path
    )
    assert_mistake(result, *words)
    assert list(tmp_path.iterdir()) == []


def test_every_mistake_is_told_at_once(tmp_path):
    (tmp_path / "job.yaml").write_text("trian: {seed: 1}\ntrain: {max_steps: 0}\n")
    before = contents(tmp_path)
    result = ftlaunch(
        *("--config", "job.yaml", "--nodes", 0, "-o", "out"),
        *("model.frezee=a", "data.max_length=long", "oops"),
        cwd=tmp_path,
    )
    assert_mistake(
        result,
        "trian.seed is not a key",
        "train.max_steps is 0",
        "cluster.nodes is 0",
        "model.frezee is not a key",
        "data.max_length is 'long'",
        "'oops'",
    )
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 6, errors
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "{model}"], ["--model is given without --dataset"]),
        (["--dataset", "{data}"], ["--dataset is given without --model"]),
        (
            ["--model", "./nowhere", "--dataset", "{data}"],
            ["nowhere does not exist", "config.json"],
        ),
        (["--model", "{data}", "--dataset", "{data}"], ["has no config.json", "save_pretrained"]),
        (
            ["--model", "{model}", "--dataset", "{data}"],
            ["has no weights", "model.safetensors", "model.random_weights=true"],
        ),
        (
            ["--model", "{model}/config.json", "--dataset", "{data}"],
            ["is a file", "--model takes the folder"],
        ),
        (["eval"], ["OUT_OR_MODEL"]),
    ],
    ids=["no data", "no model", "missing", "no config", "no weights", "a file", "nothing to eval"],
)
def test_models_that_are_not_there(inputs, tmp_path, arguments, words):
    named = [a.format(model=inputs / "model", data=inputs / "data") for a in arguments]
    assert_mistake(ftlaunch(*named, cwd=tmp_path), *words)
    assert list(tmp_path.iterdir()) == []


# -- YAML ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(b"train: [1, 2\n", ["job.yaml is not valid YAML", "line 2"], id="not YAML"),
        pytest.param(b"- a\n- b\n", ["must hold `key: value` lines", "a list"], id="a list"),
        pytest.param(b"just words\n", ["must hold `key: value` lines", "a str"], id="words"),
        pytest.param(b"\xff\xfe\x00", ["job.yaml cannot be read", "utf-8"], id="not text"),
        pytest.param(
            b"train:\n  seed: 1\n  seed: 2\n", ["'seed' stands twice", "line 3"], id="twice"
        ),
        pytest.param(
            b"train:\n  sead: 1\n", ["train.sead is not a key", "train.seed"], id="unknown key"
        ),
        pytest.param(b"train: 3\n", ["train is a section", "3"], id="a section as a value"),
        pytest.param(b"a: &a [*a]\n", ["is not valid YAML", "recursive"], id="recursive"),
        pytest.param(
            b"x: !!python/object/apply:os.mkdir [pwned]\n", ["is not valid YAML"], id="code"
        ),
        pytest.param(
            b"train: {learning_rate: 2e-5, seed: 1.5}\n", ["train.seed is 1.5"], id="a fraction"
        ),
    ],
)
def test_yaml(tmp_path, content, words):
    (tmp_path / "job.yaml").write_bytes(content)
    assert_mistake(ftlaunch("--config", "job.yaml", cwd=tmp_path), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["job.yaml"]


def test_a_configuration_that_is_missing_or_a_folder(tmp_path):
    assert_mistake(ftlaunch("--config", tmp_path / "no.yaml"), "no.yaml", "cannot be read")
    assert_mistake(ftlaunch("--config", tmp_path), str(tmp_path), "cannot be read")


# -- the output folder, the port, the cache -----------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["model", "checkpoints", "summary.json"])
def test_foreign_files_in_the_output_folder_are_not_touched(inputs, tmp_path, name, overwrite):
    out = tmp_path / "out"
    if name == "summary.json":
        write_rows(tmp_path / name, make_rows(1))
        out.mkdir()
        shutil.move(tmp_path / name, out)
    else:
        write_model(out / name)
    before = contents(tmp_path)
    flags = ["--overwrite"] if overwrite else []
    result = ftlaunch(
        *("--model", inputs / "model", "--dataset", inputs / "data", RANDOM, "-o", out, *flags)
    )
    assert_mistake(result, str(out), name, "did not write", "--output-dir")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("place", ["file", "file/out"])
def test_a_file_where_the_output_folder_should_be(inputs, tmp_path, place):
    (tmp_path / "file").write_text("mine")
    result = ftlaunch(
        *("--model", inputs / "model", "--dataset", inputs / "data", RANDOM),
        *("-o", tmp_path / place),
    )
    assert_mistake(result, str(tmp_path / place), "--output-dir")
    assert contents(tmp_path) == {"file": b"mine"}


def test_an_output_folder_that_cannot_be_written(inputs, tmp_path):
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user may write anywhere")
    try:
        result = ftlaunch(
            *("--model", inputs / "model", "--dataset", inputs / "data", RANDOM),
            *("-o", tmp_path / "out"),
        )
    finally:
        tmp_path.chmod(0o700)
    assert_mistake(result, "Permission denied", "--output-dir")


def test_a_port_that_is_taken(inputs, tmp_path):
    out = tmp_path / "out"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = ftlaunch(
            *("--nodes", 2, "--model", inputs / "model", "--dataset", inputs / "data", RANDOM),
            *("-o", out, f"cluster.port={port}"),
        )
    assert_mistake(result, f"port {port}", "in use", "cluster.port")
    assert_no_process_left(out)


@pytest.mark.parametrize("demo", [False, True], ids=["job", "demo"])
def test_a_cache_folder_that_is_taken(inputs, tmp_path, demo):
    (tmp_path / "cache").write_text("mine")
    named = [] if demo else ["--model", inputs / "model", "--dataset", inputs / "data", RANDOM]
    result = ftlaunch(
        *named, "-o", tmp_path / "out", env={"FTLAUNCH_CACHE": str(tmp_path / "cache")}
    )
    assert_mistake(result, str(tmp_path / "cache"), "data.cache_dir", "FTLAUNCH_CACHE")
    assert (tmp_path / "cache").read_text() == "mine"


# -- what only the ranks can see ----------------------------------------------------------------


def run_mistake(out: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A job whose ranks find a mistake: told once, written down, and no process stays."""
    result = ftlaunch("-o", out, RANDOM, *arguments)
    assert said(result).count("error: ") == 1, said(result)
    assert (summary_of(out)["status"], summary_of(out)["exit_code"]) == ("failed", 2)
    assert_no_process_left(out)
    return result


def test_data_without_the_label_column(inputs, tmp_path):
    rows = [{"text": row["text"], "stars": row["label"]} for row in make_rows(20)]
    data = write_rows(tmp_path / "reviews.jsonl", rows)
    result = run_mistake(
        *(tmp_path / "out", "--model", inputs / "model", "--dataset", data),
        "data.label_column=label",
    )
    assert_mistake(result, "'label'", "'stars'", "data.label_column")


def test_data_that_cannot_be_parsed(inputs, tmp_path):
    data = tmp_path / "reviews.jsonl"
    data.write_text('{"text": "a film", "label": "good"}\n{"text": "the\n')
    result = run_mistake(tmp_path / "out", "--model", inputs / "model", "--dataset", data)
    assert_mistake(result, "reviews.jsonl")


def test_more_nodes_than_samples(inputs, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    write_rows(data / "train.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    write_rows(data / "validation.jsonl", [{"text": "a", "label": "x"}])
    result = run_mistake(
        *(tmp_path / "out", "--nodes", 3, "--model", inputs / "model", "--dataset", data)
    )
    assert_mistake(result, "2 training samples", "3 ranks", "Use fewer nodes")


def test_a_tokenizer_that_does_not_fit_the_model(inputs, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    # One more than the model has, and it is in every sentence.
    extra = ["film", *(f"word{number}" for number in range(10)), "the", "was"]
    write_tokenizer(tokenizer, [word for word in WORDS if word not in extra] + extra)
    result = run_mistake(
        *(tmp_path / "out", "--model", inputs / "model", "--dataset", inputs / "data"),
        f"model.tokenizer={tokenizer}",
    )
    assert_mistake(
        result, "tokenizer does not fit", f"vocabulary of {len(WORDS)}", "model.tokenizer"
    )


# -- checkpoints --------------------------------------------------------------------------------


class Finished:
    """A finished job of 20 steps with a checkpoint every 5, to be copied and damaged."""

    def __init__(self, inputs: Path) -> None:
        self.out = inputs / "finished"
        self.arguments = [
            *("--model", inputs / "model", "--dataset", inputs / "data", RANDOM),
            *("--precision", "fp32", "train.global_batch_size=8", "train.eval_strategy=no"),
            *("checkpoint.save_steps=5", "checkpoint.save_total_limit=10"),
        ]
        result = self.run(self.out)
        assert result.returncode == 0, said(result)
        assert checkpoint_steps(self.out) == [5, 10, 15, 20]

    def run(self, out: Path, *changes: object) -> subprocess.CompletedProcess[str]:
        return ftlaunch(*self.arguments, "train.max_steps=20", "-o", out, *changes)

    def copy(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.out, folder / "out"))


@pytest.fixture(scope="module")
def finished(inputs):
    return Finished(inputs)


def shard_of(out: Path, step: int) -> Path:
    (shard,) = (out / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")
    return shard


def kept(out: Path) -> dict[str, Any]:
    """All that a job has made, without what every start of ranks adds to the logs."""
    return {name: value for name, value in contents(out).items() if not name.startswith("logs")}


def test_another_jobs_checkpoints_are_not_overwritten(finished, tmp_path):
    out = finished.copy(tmp_path)
    before = contents(out / "checkpoints") | contents(out / "model")
    metrics = (out / "metrics.jsonl").read_bytes()
    result = finished.run(out, "train.seed=8")
    assert_mistake(result, str(out), "another job", "seed: 42 there, 8 now", "--overwrite")
    assert contents(out / "checkpoints") | contents(out / "model") == before
    assert (out / "metrics.jsonl").read_bytes() == metrics


def test_a_refused_job_leaves_the_folder_as_it_was(finished, tmp_path):
    out = finished.copy(tmp_path)
    before = kept(out)
    assert_mistake(finished.run(out, "train.seed=8"), "another job")
    after = kept(out)
    assert sorted(after) == sorted(before)
    assert [name for name in before if after[name] != before[name]] == []


def test_overwrite_removes_what_ftlaunch_wrote_and_nothing_else(finished, tmp_path):
    out = finished.copy(tmp_path)
    (out / "notes.txt").write_text("mine")
    (out / "checkpoints.bak").mkdir()
    result = finished.run(out, "--overwrite", "train.seed=8", "train.max_steps=5")
    assert result.returncode == 0, said(result)
    assert [line["step"] for line in metrics_of(out)] == [1, 2, 3, 4, 5]
    assert checkpoint_steps(out) == [5]
    assert summary_of(out)["samples_seen"] == 40
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "checkpoints.bak").is_dir()


def test_overwrite_does_not_delete_what_the_job_is_made_from(finished, tmp_path):
    out = finished.copy(tmp_path)
    before = contents(out)
    result = finished.run(out, "--model", out / "model", "--overwrite")
    assert_mistake(result, "--overwrite would delete", str(out / "model"), "--output-dir")
    assert contents(out) == before


def test_an_evaluation_does_not_replace_a_jobs_summary(finished, inputs, tmp_path):
    out = finished.copy(tmp_path)
    before = contents(out)
    result = ftlaunch("eval", out, "--dataset", inputs / "data", "-o", out)
    assert_mistake(result, str(out), "training job", "--output-dir")
    assert contents(out) == before


def test_a_checkpoint_of_another_format_version(finished, tmp_path):
    out = finished.copy(tmp_path)
    manifest = out / "checkpoints" / "step-00000020" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format_version": 99}))
    before = contents(out / "checkpoints")
    result = finished.run(out)
    assert_mistake(result, "step-00000020", "format version 99", "version 1", "another output")
    assert contents(out / "checkpoints") == before


def test_damaged_checkpoints_are_named_and_the_one_before_is_used(finished, tmp_path):
    out = finished.copy(tmp_path)
    undisturbed = [line["samples_digest"] for line in metrics_of(out)]
    flipped = shard_of(out, 20)
    content = bytearray(flipped.read_bytes())
    content[-100] ^= 0xFF
    flipped.write_bytes(content)
    os.truncate(shard_of(out, 15), 1000)
    (out / "checkpoints" / "step-00000010" / "manifest.json").unlink()
    result = finished.run(out)
    assert result.returncode == 0, said(result)
    warnings = [line for line in result.stdout.splitlines() if "is damaged" in line]
    assert len(warnings) == 2, result.stdout
    assert "step-00000020" in warnings[0]
    assert "the bytes of" in warnings[0]
    assert "step-00000015" in warnings[1]
    assert "1000 bytes" in warnings[1]
    assert "resumed after step 5" in result.stdout
    assert [line["samples_digest"] for line in metrics_of(out)] == undisturbed
    # What was damaged is whole again: nothing is left to do, and nothing to complain about.
    result = finished.run(out)
    assert result.returncode == 0, said(result)
    assert "is damaged" not in result.stdout
    assert "resumed after step 20" in result.stdout


def test_nothing_but_damaged_checkpoints(finished, tmp_path):
    out = finished.copy(tmp_path)
    for step in (5, 10, 15, 20):
        os.truncate(shard_of(out, step), 1000)
    before = contents(out / "checkpoints")
    assert_mistake(finished.run(out), "every checkpoint", "--overwrite", "--output-dir")
    assert contents(out / "checkpoints") == before


def test_fewer_steps_than_are_done(finished, tmp_path):
    out = finished.copy(tmp_path)
    before = contents(out / "checkpoints")
    result = finished.run(out, "train.max_steps=10")
    assert_mistake(result, "at step 20", "the 10 steps", "train.max_steps", "--output-dir")
    assert contents(out / "checkpoints") == before
