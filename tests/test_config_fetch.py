"""A run and a benchmark know the model of a hub before they plan; a hub on this machine is asked."""

from __future__ import annotations

import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ftlaunch.cluster.errors import UserError
from ftlaunch.launcher import bench_command, job
from ftlaunch.launcher.cli import run as command
from ftlaunch.launcher.config import RunConfig, load_config
from ftlaunch.launcher.config_fetch import fetch_config
from ftlaunch.launcher.console import Console
from ftlaunch.launcher.job_memory import JobMemory, read_job_memory
from tests.jobs import write_data
from tests.model_configs import BERT_BASE

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_a-word-that-nobody-may-see"


class Hub:
    """Answers for two models: one that it has at the revision "v2", one that is gated."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.tokens: set[str] = set()
        hub, body = self, json.dumps(BERT_BASE).encode()

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.asked.append(self.path)
                hub.tokens.add(self.headers.get("Authorization", ""))
                if self.path == "/org/some/resolve/v2/config.json":
                    self.send_response(200)
                    self.send_header("X-Repo-Commit", COMMIT)
                    self.send_header("ETag", '"1"')
                    self.send_header("Content-Length", str(len(body)))
                elif self.path.startswith("/org/gated/"):
                    self.send_response(403)
                    self.send_header("X-Error-Code", "GatedRepo")
                    self.send_header("Content-Length", "0")
                else:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "RepoNotFound")
                    self.send_header("Content-Length", "0")
                self.end_headers()

            def do_GET(self) -> None:
                self.do_HEAD()
                if "/some/" in self.path:
                    self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(10)


@pytest.fixture
def reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """reach(address): the hub is there, and its cache is empty."""

    def to(address: str) -> None:
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HTTP_PROXY", "http_proxy"):
            monkeypatch.delenv(name, raising=False)
        # Read when the library is imported, which it has been.
        cache = str(tmp_path / "hf" / "hub")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", cache)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    return to


@pytest.fixture
def hub(reach: Callable[[str], None]) -> Iterator[Hub]:
    found = Hub()
    reach(found.address)
    yield found
    found.close()


def _config(model: str, folder: Path, *overrides: str) -> RunConfig:
    flags = {"model": model, "dataset": str(write_data(folder / "data", num_train=20))}
    flags |= {"output_dir": str(folder / "out")}
    return load_config(file=None, flags=flags, overrides=list(overrides))


def _memory_of_run(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[JobMemory, str]:
    """(what the run would plan by, what it says)."""
    found = []

    def plan(*_: Any, memory: JobMemory, **__: Any) -> Any:
        found.append(memory)
        raise UserError("far enough")

    monkeypatch.setattr(job, "make_plan", plan)
    stream = io.StringIO()
    with Console(stream) as console, pytest.raises(UserError, match="far enough"):
        job.run_job(config, console, overwrite=False)
    return found[0], stream.getvalue()


def test_a_run_plans_by_the_named_revision(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config("org/some", tmp_path, "model.revision=v2")
    # A plan by itself asks nobody.
    assert "is not in the hub's cache" in read_job_memory(config).why_not
    assert not hub.asked
    memory, said = _memory_of_run(config, monkeypatch)
    assert memory.architecture is not None
    assert memory.architecture.num_parameters > 100_000_000
    assert "fetching config.json of org/some from the hub" in said
    assert f"Bearer {TOKEN}" in hub.tokens
    assert TOKEN not in said
    # The next one has it.
    number = len(hub.asked)
    assert fetch_config(config.model, print) == ""
    assert len(hub.asked) == number


def test_what_the_hub_does_not_give(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, reason in (("org/gated", "403"), ("org/none", "404")):
        memory, said = _memory_of_run(_config(name, tmp_path / name[4:]), monkeypatch)
        assert memory.architecture is None
        assert f"{name!r} is neither a folder here nor could it be had" in memory.why_not
        assert reason in memory.why_not
        assert TOKEN not in said + memory.why_not
        assert "Traceback" not in memory.why_not


def test_a_hub_that_does_not_answer_is_not_waited_for(
    reach: Callable[[str], None], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        reach(f"http://127.0.0.1:{silent.getsockname()[1]}")
        config = _config("org/some", tmp_path)
        why = fetch_config(config.model, print, seconds=1.0)
    assert why == "config.json of the model 'org/some' could not be had from the hub within 1 s."


def test_nobody_is_asked_offline(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    memory, said = _memory_of_run(_config("org/some", tmp_path), monkeypatch)
    assert "is not in the hub's cache" in memory.why_not
    assert not said
    assert not hub.asked


def test_a_benchmark_fetches_and_its_dry_run_does_not(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: Any, stream: Any) -> int:
        known = read_job_memory(self._config)
        return 0 if known.architecture is not None else 1

    monkeypatch.setattr(bench_command._Benchmark, "run", run)
    data = str(write_data(tmp_path / "data", num_train=20))
    words = ["bench", "--nodes", "1", "--model", "org/some", "--dataset", data]
    words += ["-o", str(tmp_path / "out"), "model.revision=v2"]
    assert command([*words, "--dry-run"]) == 0
    assert not hub.asked
    assert command(words) == 0
    assert hub.asked
