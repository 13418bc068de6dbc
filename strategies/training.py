"""One rank's training run: what happens before, between and after the steps of the loop.

When to evaluate, save and end; what is told to the user. The steps themselves are in `loop`, the
numbers behind `Strategy`. Every rank runs this with the same decisions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftlaunch.cluster.errors import JobError, UserError
from ftlaunch.strategies.base import Said, Strategy
from ftlaunch.strategies.best import BestTracker
from ftlaunch.strategies.checkpoint.agreement import any_rank, of_all_ranks
from ftlaunch.strategies.checkpoint.manifest import (
    CheckpointDamaged,
    Manifest,
    folder_name,
    read_manifest,
)
from ftlaunch.strategies.checkpoint.resuming import load_newest
from ftlaunch.strategies.checkpoint.retention import prune, remove_unfinished, set_aside_newer
from ftlaunch.strategies.checkpoint.saver import Saver, Saving
from ftlaunch.strategies.data.sample_order import samples_digest
from ftlaunch.strategies.data.token_cache import Tokens
from ftlaunch.strategies.evaluation import Evaluator
from ftlaunch.strategies.job_data import (
    class_weights,
    make_collator,
    sample_order,
    total_steps,
)
from ftlaunch.strategies.loop import Cursor, StepReport, Windows, train
from ftlaunch.strategies.model_folder import write_model_folder
from ftlaunch.strategies.options import JobOptions
from ftlaunch.strategies.progress import (
    Evaluated,
    Finished,
    Note,
    Phase,
    Progress,
    Proved,
    Resumed,
    Saved,
    Startup,
    StepDone,
)
from ftlaunch.strategies.proof import prove
from ftlaunch.strategies.schedule import make_schedule
from ftlaunch.strategies.startup import Stages

# Ranks that a message names each.
_MOST_COUNTS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """What the plan decided for this run."""

    options: JobOptions
    output_dir: Path
    strategy_name: str
    precision: str
    micro_batch: int
    identity: dict[str, Any]
    tokenizer_files: tuple[Path, ...]
    max_tokens: int | None = None
    prove_micro_batch: bool = False


class TrainingRun:
    """Trains one job from where its output folder stands to its end."""

    def __init__(
        self,
        settings: RunSettings,
        strategy: Strategy,
        tokens: Tokens,
        evaluator: Evaluator | None,
        *,
        emit: Callable[[Progress], None],
        alive: Callable[[], None] = lambda: None,
        stop_requested: Callable[[], bool],
        stages: Stages | None = None,
        preload_seconds: float = 0.0,
    ) -> None:
        """stages            of the start, which goes on here; None: nobody asks
        preload_seconds   what is told with them
        """
        options = settings.options
        self._settings = settings
        self._strategy = strategy
        self._tokens = tokens
        self._evaluator = evaluator
        self._emit = emit if strategy.world.is_main else _say_nothing
        self._stop_requested = stop_requested
        self._stages = stages or Stages("resuming")
        self._is_starting = True
        self._preload_seconds = preload_seconds
        self._windows = Windows(
            order=sample_order(options, tokens),
            collator=make_collator(
                options,
                tokens,
                tokens.train,
                class_weights=class_weights(options, tokens),
                alive=alive,
            ),
            rank=strategy.world.rank,
            world_size=strategy.world.size,
            micro_batch=settings.micro_batch,
            max_tokens=settings.max_tokens,
        )
        self._total_steps = total_steps(options, tokens)
        self._schedule = make_schedule(options.train, self._total_steps)
        self._cursor = Cursor()
        self._best = BestTracker(
            options.checkpoint,
            patience=options.train.early_stopping_patience,
            threshold=options.train.early_stopping_threshold,
        )
        if evaluator is not None:
            self._best.check(("loss", *evaluator.metric_names))
        self._last_evaluation: dict[str, Any] | None = None
        self._skipped_in_a_row = 0
        self._ended_by: str | None = None
        self._root = settings.output_dir / "checkpoints"
        self._alive = alive
        self._files = self._model_files() if strategy.world.is_main else {}
        self._saver = Saver(
            strategy,
            self._root,
            model_files=self._files,
            beside=options.checkpoint.async_save,
            alive=alive,
            on_saved=self._on_saved,
        )

    def run(self) -> Finished:
        """Collective: train to the end or to a stop; the job's last message."""
        self._stages.begin("resuming")
        self._resume()
        proves = self._settings.prove_micro_batch and not self._is_over
        self._emit(Phase(name="prove" if proves else "train"))
        # Rank 0 may have had more to do until here. Should another rank run out of memory now, it has
        # to be known that it was no longer the model by itself.
        any_rank(self._strategy, False)
        if proves:
            self._prove()
            self._emit(Phase(name="train"))
        self._stages.begin("first batch")
        started = time.perf_counter()
        if not self._best.exhausted:
            train(
                self._strategy,
                self._windows,
                self._schedule,
                self._cursor,
                total_steps=self._total_steps,
                say=self._say,
                ready_to_begin=lambda: self._stages.begin("first step"),
                after_step=self._after_step,
            )
        seconds = time.perf_counter() - started
        if self._ended_by == "stop":
            return self._finished(
                seconds, stopped=True, reason="stopped on request", model_dir=None
            )
        if self._best.exhausted:
            reason = f"early stopping: {self._best.without_gain} evaluations without a better one"
        else:
            reason = "all steps done"
        self._emit(Phase(name="save"))
        model_dir = self._write_model()
        return self._finished(seconds, stopped=False, reason=reason, model_dir=model_dir)

    @property
    def _is_over(self) -> bool:
        return self._best.exhausted or self._cursor.step >= self._total_steps

    def _prove(self) -> None:
        """Collective: see whether the largest micro-batch fits, while nothing is lost if it does not."""
        self._stages.begin("proof")
        settings, windows = self._settings, self._windows
        share = math.ceil(windows.order.global_batch_size / windows.world_size)
        proof = prove(
            self._strategy,
            windows.collator,
            micro_batch=settings.micro_batch,
            max_tokens=settings.max_tokens,
            accumulates=share > settings.micro_batch or settings.max_tokens is not None,
        )
        self._emit(
            Proved(
                shapes=proof.shapes,
                seconds=proof.seconds,
                peak_memory_bytes=proof.peak_memory_bytes,
            )
        )

    # -- between steps ----------------------------------------------------------------------

    def _say(self) -> Said:
        return Said(stop=self._stop_requested(), saving=self._saver.say())

    def _after_step(self, report: StepReport) -> bool:
        """True to leave the loop."""
        if self._is_starting:
            self._tell_startup()
        self._report(report)
        self._saver.hear(report.outcome.saving)
        self._count_skips(report)
        stop = report.outcome.stop
        if self._evaluation_due() and not stop:
            self._evaluate()
        is_best = self._best.best is not None and self._best.best["step"] == self._cursor.step
        wanted = self._settings.options.checkpoint.load_best_model_at_end and is_best
        end = self._best.exhausted or self._cursor.step == self._total_steps
        if stop or end or wanted or self._save_due():
            self._save(now=stop or end)
        if stop:
            self._ended_by = "stop"
        return stop or end

    def _tell_startup(self) -> None:
        self._is_starting = False
        self._stages.stop()
        self._emit(Startup(seconds=self._stages.seconds, preload_seconds=self._preload_seconds))

    def _evaluation_due(self) -> bool:
        train_options = self._settings.options.train
        if self._evaluator is None or train_options.eval_strategy == "no":
            return False
        step = self._cursor.step
        every = self._steps_per_epoch
        if train_options.eval_strategy == "steps":
            every = train_options.eval_steps or every
        return step % every == 0 or step == self._total_steps

    def _save_due(self) -> bool:
        every = self._settings.options.checkpoint.save_steps or self._steps_per_epoch
        return self._cursor.step % every == 0

    @property
    def _steps_per_epoch(self) -> int:
        return self._windows.order.steps_per_epoch

    @property
    def _epoch(self) -> float:
        return self._windows.order.epochs_after(self._cursor.step)

    def _report(self, report: StepReport) -> None:
        if not self._strategy.world.is_main:
            return
        outcome, indices = report.outcome, report.window.indices
        num_tokens = report.window.num_tokens
        self._emit(
            StepDone(
                step=self._cursor.step,
                epoch=self._epoch,
                loss=outcome.loss,
                learning_rate=report.learning_rate,
                grad_norm=outcome.grad_norm,
                loss_scale=outcome.loss_scale,
                applied=outcome.applied,
                samples_per_second=len(indices) / report.seconds,
                tokens_per_second=num_tokens / report.seconds,
                samples_digest=samples_digest(indices),
                num_samples=len(indices),
                num_tokens=num_tokens,
                num_padded_tokens=report.window.padded_tokens,
                culprit=outcome.culprit,
            )
        )

    def _count_skips(self, report: StepReport) -> None:
        self._skipped_in_a_row = 0 if report.outcome.applied else self._skipped_in_a_row + 1
        limit = self._settings.options.train.max_skipped_steps
        if self._skipped_in_a_row >= limit:
            self._saver.finish()
            raise JobError(
                f"{limit} optimizer steps in a row were skipped because gradients were not finite, "
                f"the last at step {self._cursor.step} (first in {report.outcome.culprit}, loss "
                f"scale {report.outcome.loss_scale:g}, loss {report.outcome.loss:g}). Training "
                "has diverged or a weight is broken: lower train.learning_rate, use --precision "
                "bf16 or fp32, or go on from an earlier checkpoint (train.max_skipped_steps)."
            )

    # -- evaluation, saving, resuming -------------------------------------------------------

    def _evaluate(self) -> None:
        assert self._evaluator is not None
        self._emit(Phase(name="evaluate"))
        started = time.perf_counter()
        metrics = self._evaluator.evaluate(self._evaluator.run(self._strategy))
        is_best = self._best.observe(self._cursor.step, metrics)
        self._last_evaluation = {"step": self._cursor.step, "metrics": metrics}
        self._emit(
            Evaluated(
                step=self._cursor.step,
                epoch=self._epoch,
                metrics=metrics,
                num_samples=self._evaluator.num_samples,
                seconds=time.perf_counter() - started,
                is_best=is_best,
            )
        )

    def _save(self, *, now: bool) -> None:
        """`now`: nothing follows that it could be written beside."""
        self._emit(Phase(name="save"))
        applied = of_all_ranks(self._strategy, self._cursor.applied)
        if (applied != applied[0]).any():
            counts = ", ".join(f"{count:.0f}" for count in applied[:_MOST_COUNTS])
            raise JobError(
                f"nothing is saved after step {self._cursor.step}: of its steps the ranks have applied "
                f"{counts}{', …' if len(applied) > _MOST_COUNTS else ''}, which should be equal. They "
                "had not the same gradients: the network, a device or a library gives ranks other "
                "numbers. The checkpoints before are whole."
            )
        self._saver.save(self._manifest(), now=now)

    def _on_saved(self, saving: Saving) -> None:
        if self._strategy.world.is_main:
            checkpoint = self._settings.options.checkpoint
            # A better one may have been found meanwhile, and not be saved yet.
            bests = (saving.manifest.best, self._best.best) if self._best_is_kept() else ()
            keep = [best["step"] for best in bests if best is not None]
            prune(self._root, keep_newest=checkpoint.save_total_limit, keep_steps=keep)
        self._emit(
            Saved(
                step=saving.manifest.step,
                path=str(saving.folder),
                seconds=saving.seconds,
                blocked_seconds=saving.blocked,
            )
        )

    def _model_files(self) -> dict[str, bytes]:
        """Everything that a finished model has beside its weights."""
        tokenizer = {path.name: path.read_bytes() for path in self._settings.tokenizer_files}
        return {**self._strategy.model_files(), **tokenizer}

    def _best_is_kept(self) -> bool:
        return self._settings.options.checkpoint.load_best_model_at_end

    def _manifest(self) -> Manifest:
        settings = self._settings
        return Manifest(
            identity=settings.identity,
            step=self._cursor.step,
            applied_steps=self._cursor.applied,
            epoch=self._epoch,
            world_size=self._strategy.world.size,
            strategy=settings.strategy_name,
            precision=settings.precision,
            loss_scale=self._strategy.loss_scale_state(),
            best=self._best.best,
            evaluation=self._last_evaluation,
            evaluations_without_gain=self._best.without_gain,
            schedule=asdict(self._schedule),
            files={},
        )

    def _resume(self) -> None:
        def on_damaged(text: str) -> None:
            self._emit(Note(text=f"{text}; the one before it is used", warning=True))

        found = load_newest(self._strategy, self._root, on_damaged=on_damaged)
        if self._strategy.world.is_main:
            remove_unfinished(self._root)
            if found is not None:
                set_aside_newer(self._root, found[1].step)
        if found is None:
            return
        folder, manifest = found
        self._cursor.step = manifest.step
        self._cursor.applied = manifest.applied_steps
        self._best.load(manifest.best, manifest.evaluations_without_gain)
        self._check_best_is_there(manifest.step)
        self._last_evaluation = dict(manifest.evaluation) if manifest.evaluation else None
        self._emit(Resumed(step=manifest.step, epoch=self._epoch, checkpoint=str(folder)))
        if manifest.schedule != asdict(self._schedule):
            before, now = dict(manifest.schedule), asdict(self._schedule)
            changed = [f"{k} {before.get(k)} → {v}" for k, v in now.items() if before.get(k) != v]
            self._emit(Note(text=f"the schedule has changed: {', '.join(changed)}", warning=True))
        if manifest.step > self._total_steps:
            raise UserError(
                f"{folder} is at step {manifest.step}, beyond the {self._total_steps} steps asked "
                "for. Raise train.num_train_epochs or train.max_steps, or choose another "
                "--output-dir."
            )
        evaluated = (self._last_evaluation or {}).get("step") == manifest.step
        if self._evaluation_due() and not evaluated:
            self._evaluate()

    def _check_best_is_there(self, step: int) -> None:
        """Forget a best step whose checkpoint an earlier run, with other settings, did not keep."""
        best = self._best.best
        if best is None or not self._best_is_kept() or best["step"] == step:
            return
        damaged = False
        try:
            read_manifest(self._root / folder_name(int(best["step"])))
        except CheckpointDamaged:
            damaged = True
        if any_rank(self._strategy, damaged):
            self._best.best = None
            text = (
                f"the best step so far, {best['step']}, was not kept: the best from here on counts"
            )
            self._emit(Note(text=text, warning=True))

    # -- the end ----------------------------------------------------------------------------

    def _write_model(self) -> str:
        """The best step's model where asked for, else the last step's."""
        best = self._best.best
        step = self._cursor.step
        if self._best_is_kept() and best is not None:
            step = int(best["step"])
        try:
            folder, overflowed = write_model_folder(
                self._strategy,
                self._root / folder_name(step),
                self._settings.output_dir / "model",
                model_files=self._files,
                dtype=self._settings.options.model.save_dtype,
                alive=self._alive,
            )
        except CheckpointDamaged as error:
            hint = "Run the same command again: it goes on from the checkpoint before it."
            if step != self._cursor.step:
                hint = (
                    "Set checkpoint.load_best_model_at_end=false and run the same command again to "
                    "get the last step's model."
                )
            raise JobError(
                f"training is done, but its model cannot be written: {error}. {hint}"
            ) from None
        if overflowed is not None:
            text = (
                f"{overflowed} has numbers too large for model.save_dtype=fp16, which are infinite in "
                f"{folder}: merge the checkpoint again, in bf16 or fp32"
            )
            self._emit(Note(text=text, warning=True))
        return str(folder)

    def _finished(
        self, seconds: float, *, stopped: bool, reason: str, model_dir: str | None
    ) -> Finished:
        shown = self._best.best if self._best_is_kept() else None
        shown = shown or self._last_evaluation or {"metrics": {}}
        peak = np.zeros(self._strategy.world.size, dtype=np.float64)
        peak[self._strategy.world.rank] = self._strategy.peak_memory_bytes()
        peaks = self._strategy.sum_across_ranks(peak)
        return Finished(
            stopped=stopped,
            reason=reason,
            step=self._cursor.step,
            epoch=self._epoch,
            model_dir=model_dir,
            metrics=shown["metrics"],
            train_seconds=seconds,
            peak_memory_bytes=int(peaks.max()),
        )


def _say_nothing(message: Progress) -> None:
    """What ranks other than 0 say."""
