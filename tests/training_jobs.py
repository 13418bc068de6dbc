"""Training jobs that tests disturb, and what has to be true of them afterwards."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path
from typing import Any

from ftlaunch.strategies.checkpoint.manifest import Manifest, read_manifest
from ftlaunch.strategies.checkpoint.store import CheckpointReader
from tests.jobs import (
    checkpoint_steps,
    finish,
    metrics_of,
    said,
    wait_until,
    write_data,
    write_model,
)

NUM_STEPS = 90
START_SECONDS = 240.0


class Inputs:
    """A model and data, and the command that trains the one on the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = write_model(folder / "model")
        self.data = write_data(folder / "data")

    def command(
        self, out: Path, *changes: object, nodes: int = 2, model: Path | None = None
    ) -> list[object]:
        """90 steps of 16 samples, 15 an epoch, fp32 without dropout, a checkpoint every 10."""
        return [
            *("--nodes", nodes, "--model", model or self.model, "--dataset", self.data, "-o", out),
            *("--precision", "fp32", "model.random_weights=true", "model.dropout=0"),
            *("train.global_batch_size=16", "train.per_device_train_batch_size=4"),
            *(f"train.max_steps={NUM_STEPS}", "train.learning_rate=3e-3", "train.warmup_steps=6"),
            *("checkpoint.save_steps=10", *changes),
        ]

    def endless(self, out: Path, *changes: object, nodes: int = 2) -> list[object]:
        """One that never comes to its end by itself."""
        return self.command(out, "train.max_steps=1000000", *changes, nodes=nodes)


def wait_for_step(process: subprocess.Popen[str], out: Path, step: int) -> None:
    """Until the job has recorded a step; AssertionError if it ends before."""

    def reached() -> bool:
        if process.poll() is not None:
            raise AssertionError(f"the job has ended:\n{said(finish(process, 30))}")
        return bool(metrics_of(out)) and metrics_of(out)[-1]["step"] >= step

    wait_until(reached, START_SECONDS, f"step {step}")


def wait_for_checkpoint(process: subprocess.Popen[str], out: Path, step: int) -> None:
    """Until the job has recorded a step and a checkpoint is whole, which takes a moment longer."""
    wait_for_step(process, out, step)
    wait_until(lambda: bool(checkpoint_steps(out)), START_SECONDS, "a checkpoint")


def assert_every_checkpoint_whole(out: Path) -> list[int]:
    """Read every tensor of every checkpoint, checksums verified; their steps."""
    steps = checkpoint_steps(out)
    for step in steps:
        folder = out / "checkpoints" / f"step-{step:08d}"
        manifest = read_manifest(folder)
        assert isinstance(manifest, Manifest)
        assert manifest.step == step
        reader = CheckpointReader(folder, manifest)
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            assert reader.names(kind)
            for name in reader.names(kind):
                reader.read_whole(kind, name)
    return steps


def assert_same_training(lines: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Every step once, on the same samples, with the same losses and learning rates."""
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, other in zip(lines, expected, strict=True):
        assert line["samples_digest"] == other["samples_digest"]
        assert line["learning_rate"] == other["learning_rate"]
        assert math.isclose(line["loss"], other["loss"], rel_tol=1e-5), (line, other)
