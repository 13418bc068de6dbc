"""Jobs for end-to-end tests: the command as a user runs it, on models and data made on the spot."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

MODULE = (sys.executable, "-m", "ftlaunch.launcher")
# Unlike `python -m`, the installed script does not look for modules in the working folder.
SCRIPT = (str(Path(sys.executable).with_name("ftlaunch")),)
# Inherited by every process of a job, so that its agents can be told from those of another.
_COMMAND_VARIABLE = "FTLAUNCH_TEST_COMMAND"
_POLL_SECONDS = 0.02

_GOOD = ("bright", "calm", "clever", "lovely", "warm")
_BAD = ("bleak", "dull", "harsh", "stale", "weak")
_NEUTRAL = ("a", "and", "film", "it", "plot", "scene", "story", "the", "this", "was", "with")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *_GOOD, *_BAD, *_NEUTRAL)


# -- running ------------------------------------------------------------------------------------


def ftlaunch(
    *args: object,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 180,
    command: Sequence[str] = MODULE,
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end. A job that outlives `timeout` is killed with all its ranks."""
    with start(*args, cwd=cwd, env=env, command=command) as process:
        return finish(process, timeout)


@contextlib.contextmanager
def start(
    *args: object,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    command: Sequence[str] = MODULE,
) -> Iterator[subprocess.Popen[str]]:
    """Start the command; whatever is left of it on leaving is killed (its agents follow)."""
    words = [str(arg) for arg in args]
    process = subprocess.Popen(
        [*command, *words],
        cwd=cwd,
        env={**os.environ, **(env or {}), _COMMAND_VARIABLE: " ".join(words)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate(timeout=30)


def finish(process: subprocess.Popen[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Wait for a started command."""
    stdout, stderr = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def said(result: subprocess.CompletedProcess[str]) -> str:
    """Everything that a command printed."""
    return f"{result.stdout}\n{result.stderr}"


def wait_until(
    condition: Callable[[], Any], seconds: float, what: str, *, every: float = _POLL_SECONDS
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(every)


# -- processes ----------------------------------------------------------------------------------


def processes_of(folder: Path) -> list[int]:
    """Live processes of a job in `folder`: coordinator, agents and ranks."""
    mark = os.fsencode(folder)
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return sorted(
        pid
        for pid in pids
        if pid != os.getpid() and mark in _read(pid, "cmdline") + _read(pid, "environ")
    )


def rank_process(folder: Path, rank: int) -> int:
    """The process of one rank of the job in `folder`, which is named after it."""
    name = f"rank-{rank}\n".encode()
    ranks = [pid for pid in processes_of(folder) if _read(pid, "comm") == name]
    assert ranks, f"rank {rank} has no process"
    # A child that was forked from it has its name, but came later.
    return ranks[0]


def agent_processes(folder: Path) -> list[int]:
    """The agents of the job in `folder`, in the order in which they were started."""
    return [
        pid for pid in processes_of(folder) if b"ftlaunch.cluster.agent" in _read(pid, "cmdline")
    ]


def _read(pid: int, name: str) -> bytes:
    """A file of /proc/PID; empty for a process that has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def assert_no_process_left(folder: Path, seconds: float = 5.0) -> None:
    wait_until(lambda: not processes_of(folder), seconds, f"processes of {folder} are gone")


# -- what a job leaves --------------------------------------------------------------------------


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a JSON lines file that may be growing."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "metrics.jsonl")


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that have a manifest, ascending."""
    manifests = (folder / "checkpoints").glob("step-*/manifest.json")
    return sorted(int(path.parent.name.removeprefix("step-")) for path in manifests)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file of a folder with its bytes, every folder with None: to see that nothing changed."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


# -- input --------------------------------------------------------------------------------------


def make_rows(num_rows: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Short sentences whose label follows from their one good or bad word."""
    generator = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        label = generator.choice(("bad", "good"))
        words = generator.choices(_NEUTRAL, k=generator.randint(3, 12))
        words.insert(
            generator.randint(0, len(words)), generator.choice(_GOOD if label == "good" else _BAD)
        )
        rows.append({"text": " ".join(words), "label": label})
    return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def write_data(folder: Path, *, num_train: int = 240, num_eval: int = 40) -> Path:
    """A data folder with a training and a validation split."""
    folder.mkdir(parents=True)
    write_rows(folder / "train.jsonl", make_rows(num_train, seed=1))
    write_rows(folder / "validation.jsonl", make_rows(num_eval, seed=2))
    return folder


def write_model(folder: Path, **config: Any) -> Path:
    """A BERT of width 32 with a tokenizer of whole words, without weights.

    It is to be used with model.random_weights=true.
    """
    folder.mkdir(parents=True)
    values = {
        "model_type": "bert",
        "architectures": ["BertForSequenceClassification"],
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        # Wide enough that so small a model learns within a few dozen steps.
        "initializer_range": 0.1,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(values))
    write_tokenizer(folder, WORDS)
    return folder


def write_tokenizer(folder: Path, words: Sequence[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    ids = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def assert_mistake(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2, every word said on stderr or stdout, and no traceback."""
    output = said(result)
    assert result.returncode == 2, output
    assert "Traceback" not in output
    assert "error: " in output
    for word in words:
        assert word in output, f"{word!r} is not in:\n{output}"


def process_name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()
