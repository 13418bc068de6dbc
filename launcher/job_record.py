"""What a job's coordinator learns while the ranks work, and its summary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlaunch.cluster.attempt import Outcome
from ftlaunch.cluster.verdict import Verdict
from ftlaunch.launcher.ending import proof_to_json, verdict_json
from ftlaunch.launcher.plan import LaunchPlan
from ftlaunch.launcher.recorder import Totals
from ftlaunch.launcher.startup import StartupClock
from ftlaunch.strategies.checkpoint.manifest import step_of
from ftlaunch.strategies.checkpoint.retention import checkpoint_folders
from ftlaunch.strategies.progress import Finished, PhaseName, Proved


@dataclass(slots=True)
class JobRecord:
    """Steps and phases of all attempts; `started` and the other times are of the monotonic clock."""

    started: float
    startup: StartupClock
    first_step_at: float | None = None
    data_seconds: float | None = None
    finished: Finished | None = None
    progressed: bool = False
    last_saved_step: int = 0
    longest_sample: int = 0
    longest_eval_sample: int = 0
    phase: PhaseName = "data"
    proof: Proved | None = None
    disk_error: OSError | None = None
    stop_signal: str | None = None

    def saved_step(self, folder: Path) -> int:
        """Of the newest checkpoint in a job's folder; 0 for none. A rank that is lost just then keeps the
        others from saying that one is whole.
        """
        told = self.last_saved_step
        if self.first_step_at is None:
            return told
        found = [step_of(each) or 0 for each in checkpoint_folders(folder / "checkpoints")]
        return max(told, *found[:1], 0)

    def summary(
        self,
        plan: LaunchPlan,
        outcome: Outcome,
        totals: Totals,
        verdict: Verdict | None,
        code: int,
        predictions: Path | None,
    ) -> dict[str, Any]:
        """What summary.json holds. predictions: the file that an evaluation has written."""
        finished, first = self.finished, self.first_step_at
        return {
            "status": outcome.ending if self.disk_error is None else "failed",
            "exit_code": code,
            "stop_signal": self.stop_signal,
            "strategy": plan.strategy,
            "precision": plan.precision,
            "num_nodes": plan.num_nodes,
            "world_size": plan.world_size,
            "micro_batch": plan.micro_batch,
            "max_tokens_per_micro_batch": plan.max_tokens_per_micro_batch,
            "proof": proof_to_json(self.proof),
            "optimizer_steps": finished.step if finished else totals.optimizer_steps,
            "epochs": finished.epoch if finished else totals.epochs,
            "samples_seen": totals.samples_seen,
            "tokens_seen": totals.tokens_seen,
            "padding_fraction": totals.padding_fraction,
            "overflow_steps": totals.overflow_steps,
            "restarts": totals.restarts,
            "startup_seconds": None if first is None else first - self.started,
            "startup": self.startup.to_json(),
            "data_seconds": self.data_seconds,
            "train_seconds": totals.train_seconds,
            "samples_per_second": totals.samples_per_second,
            "tokens_per_second": totals.tokens_per_second,
            "peak_memory_bytes": finished.peak_memory_bytes if finished else None,
            "eval": dict(finished.metrics if finished else totals.eval),
            "model_dir": finished.model_dir if finished else None,
            "failure": verdict_json(verdict),
            "remarks": list(outcome.remarks),
            "predictions": None if predictions is None else str(predictions),
        }
