"""What `benchmarks.overhead` measures of a job, and what not: looked at, not timed."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import overhead, overhead_rank
from ftlaunch.strategies.loop import Cursor


def test_the_end_of_the_job_is_in_no_measured_block(tmp_path, monkeypatch):
    """Three blocks of four steps are measured; the job ends, and saves, with its last step."""
    total = 5 * 4
    timed, reached = [False], []

    def train(strategy, windows, schedule, cursor, *, total_steps):
        cursor.step = total_steps
        reached.append((total_steps, timed[0]))

    def measure(run):
        timed[0] = True
        run()
        timed[0] = False
        return 1.0, 1.0

    monkeypatch.setattr(overhead_rank, "train", train)
    monkeypatch.setattr(overhead_rank, "timed", measure)
    monkeypatch.setattr(overhead_rank, "make", lambda windows, step: ([], 1.0))
    monkeypatch.setattr(overhead_rank, "plain_copy", lambda strategy: (None, None))
    monkeypatch.setattr(overhead_rank, "plain", lambda model, optimizer, made, **others: None)
    result = tmp_path / "result.json"
    strategy = SimpleNamespace(
        world=SimpleNamespace(is_main=True), sum_across_ranks=lambda numbers: None
    )
    in_turn = overhead_rank.InTurn(str(result), blocks=3, steps=4)
    nothing: Any = None
    in_turn.run(strategy, nothing, nothing, Cursor(), total_steps=total)
    assert reached == [(4, False), (8, True), (12, True), (16, True), (20, False)]
    assert len(json.loads(result.read_text())["wall"]) == 3


@pytest.mark.long
def test_a_job_of_it(tmp_path):
    model, data = overhead.write_input(tmp_path)
    (tmp_path / "case").mkdir()
    found = overhead.run_case(1, 1, model, data, tmp_path / "case", blocks=3, steps=2)
    assert len(found["wall"]) == len(found["processor"]) == 3
    lines = (tmp_path / "case" / "out" / "metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line).get("step", 0) for line in lines) == 10
