"""How a job's end is shown and kept: the verdict in words, and as it stands in summary.json."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from ftlaunch.cluster.verdict import Failure, Verdict, ranks_in_words
from ftlaunch.launcher.console import Console
from ftlaunch.strategies.progress import Proved


def show_verdict(console: Console, verdict: Verdict) -> None:
    """Who was first and why, what followed from it, and where the log is: the last line."""
    first = verdict.first
    if first.cause == "user":
        console.failure(first.title, "", "")
        return
    lines = [f"{first.subject} failed: {first.title}"]
    if verdict.consequences:
        ranks = [failure.rank for failure in verdict.consequences if failure.rank >= 0]
        lines.append(f"as a consequence: {ranks_in_words(ranks)}" if ranks else "")
    body = first.traceback or log_tail(first.log_path)
    footer = "\n".join([*filter(None, lines[1:]), f"log: {first.log_path}"])
    console.failure(lines[0], body, footer)


def verdict_json(verdict: Verdict | None) -> dict[str, Any] | None:
    if verdict is None:
        return None
    return {
        **_failure_json(verdict.first),
        "consequences": [
            {key: value for key, value in _failure_json(each).items() if key != "traceback"}
            for each in verdict.consequences
        ],
    }


def proof_to_json(proof: Proved | None) -> dict[str, Any] | None:
    """The micro-batches that were computed before training, as they stand in summary.json."""
    return None if proof is None else asdict(proof)


def _failure_json(failure: Failure) -> dict[str, Any]:
    # A time of this machine's clock since it was started means nothing to a reader.
    return {key: value for key, value in asdict(failure).items() if key != "time"}


def log_tail(path: str, num_lines: int = 20, num_bytes: int = 1 << 14) -> str:
    """The end of a rank's log."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - num_bytes))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-num_lines:])
