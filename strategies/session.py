"""One rank's work from the plan to the last message: tokens, then the model, then the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.world import World
from ftlaunch.strategies import registry
from ftlaunch.strategies.adapter import with_tokenizer
from ftlaunch.strategies.base import Strategy, StrategyRequest
from ftlaunch.strategies.checkpoint.agreement import all_or_none
from ftlaunch.strategies.checkpoint.identity import check_same_job, job_identity
from ftlaunch.strategies.checkpoint.resuming import newest_manifest
from ftlaunch.strategies.data.batches import EVALUATION_EPOCH, Collator
from ftlaunch.strategies.data.tasks import (
    UNSUPERVISED,
    ModelLabels,
    ModelProblem,
    RowTask,
    load_task,
)
from ftlaunch.strategies.data.token_batches import TokenCollator
from ftlaunch.strategies.data.token_cache import Tokens, prepare_tokens
from ftlaunch.strategies.data.token_samples import TokenSamples
from ftlaunch.strategies.data.token_table import TokenTable
from ftlaunch.strategies.data.tokenizer import TokenizerSource, locate_tokenizer, tokenizer_files
from ftlaunch.strategies.evaluation import Evaluator, RowEvaluator, write_predictions
from ftlaunch.strategies.job_data import (
    class_weights,
    make_collator,
    sample_order,
    total_steps,
)
from ftlaunch.strategies.metrics import load_metrics
from ftlaunch.strategies.model_config import labels_of, max_length_of, read_model_config
from ftlaunch.strategies.options import JobOptions, Precision
from ftlaunch.strategies.progress import (
    Alive,
    DataReady,
    Evaluated,
    Finished,
    Phase,
    Progress,
)
from ftlaunch.strategies.proof import longest_sample
from ftlaunch.strategies.startup import Stages
from ftlaunch.strategies.token_evaluation import TokenEvaluator, choose_metrics
from ftlaunch.strategies.training import RunSettings, TrainingRun

_ALIVE_SECONDS = 2.0


class Stop(Protocol):
    """A request to stop. While `ends_at_once` is set there is nothing to save."""

    ends_at_once: bool

    def requested(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRequest:
    """What a rank needs to know.

    micro_batch, max_tokens   samples and padded tokens that are computed at once, at most: `dealing`
    stages            of its start, the first of which is "imports"
    preload_seconds   what its fork server has spent on imports before it was forked
    """

    options: JobOptions
    output_dir: Path
    strategy: str
    precision: Precision
    accelerator: str
    device: int
    micro_batch: int
    eval_micro_batch: int
    num_threads: int
    timeout_seconds: float
    world: World
    listen_fd: int | None
    max_tokens: int | None = None
    eval_max_tokens: int | None = None
    stages: Stages = field(default_factory=Stages)
    preload_seconds: float = 0.0
    prove_micro_batch: bool = False


def train(request: SessionRequest, *, emit: Callable[[Progress], None], stop: Stop) -> bool:
    """Collective: train the job; True when it was stopped before its end."""
    started = time.perf_counter()
    request.stages.begin("tokens")
    options = request.options
    say = emit if request.world.is_main else lambda message: None
    alive = signs_of_life(emit)
    say(Phase(name="data"))
    tokens = prepare(request, alive)
    identity = job_identity(options, tokens)
    root = request.output_dir / "checkpoints"
    found = newest_manifest(root)
    if found is not None:
        check_same_job(found[1].identity, identity, found[0])
    # A mistake in the class weights or metrics is told before the model is loaded.
    weights = class_weights(options, tokens)
    evaluator = None
    if tokens.eval is not None and options.train.eval_strategy != "no":
        evaluator = _evaluator(request, tokens, tokens.eval, weights=weights, alive=alive)
    if request.world.is_main:
        emit(_data_ready(request, tokens, started))
    say(Phase(name="model"))
    request.stages.begin("model")
    strategy = create_strategy(request, tokens)
    settings = RunSettings(
        options=options,
        output_dir=request.output_dir,
        strategy_name=request.strategy,
        precision=request.precision,
        micro_batch=request.micro_batch,
        max_tokens=request.max_tokens,
        prove_micro_batch=request.prove_micro_batch,
        identity=identity,
        tokenizer_files=tokenizer_files(locate_tokenizer(_tokenizer_source(options))),
    )
    stop.ends_at_once = False
    run = TrainingRun(
        settings,
        strategy,
        tokens,
        evaluator,
        emit=emit,
        alive=alive,
        stop_requested=stop.requested,
        stages=request.stages,
        preload_seconds=request.preload_seconds,
    )
    finished = run.run()
    say(finished)
    strategy.close()
    return finished.stopped


def evaluate(request: SessionRequest, *, emit: Callable[[Progress], None], stop: Stop) -> bool:
    """Collective: evaluate a trained model; rank 0 writes predictions.jsonl. Never stopped halfway."""
    started = time.perf_counter()
    options = request.options
    config = read_model_config(options.model)
    names = labels_of(config)
    say = emit if request.world.is_main else lambda message: None
    alive = signs_of_life(emit)
    say(Phase(name="data"))
    tokens = prepare_tokens(
        options.task,
        options.data,
        _tokenizer_source(options),
        seed=options.train.seed,
        model_max_length=max_length_of(config),
        labels=ModelLabels(problem=_problem_of(config, names), label_names=names),
        rank=request.world.rank,
        world_size=request.world.size,
        alive=alive,
    )
    evaluator = _evaluator(request, tokens, tokens.train, weights=None, alive=alive)
    say(
        DataReady(
            num_train_samples=0,
            num_eval_samples=len(tokens.train),
            steps_per_epoch=0,
            total_steps=0,
            seconds=time.perf_counter() - started,
            notes=tokens.notes,
            longest_eval_sample=longest_sample(tokens.train),
        )
    )
    say(Phase(name="model"))
    strategy = create_strategy(request, tokens, trained_head=True)
    say(Phase(name="evaluate"))
    started = time.perf_counter()
    outputs = evaluator.run(strategy)
    seconds = time.perf_counter() - started
    metrics = evaluator.evaluate(outputs)
    path = request.output_dir / "predictions.jsonl"
    main = request.world.is_main
    all_or_none(
        strategy,
        (lambda: write_predictions(path, evaluator.records(outputs))) if main else (lambda: None),
        str(path),
    )
    say(
        Evaluated(
            step=0,
            epoch=0.0,
            metrics=metrics,
            num_samples=len(tokens.train),
            seconds=seconds,
            is_best=False,
        )
    )
    say(
        Finished(
            stopped=False,
            reason="evaluated",
            step=0,
            epoch=0.0,
            model_dir=None,
            metrics=metrics,
            train_seconds=0.0,
            peak_memory_bytes=strategy.peak_memory_bytes(),
        )
    )
    strategy.close()
    return False


def _problem_of(config: Mapping[str, Any], names: tuple[str, ...]) -> ModelProblem:
    """What the outputs of a trained model are, by its config.json."""
    if names and config.get("problem_type") == "multi_label_classification":
        return "several-labels"
    return "classification" if names else "regression"


def signs_of_life(emit: Callable[[Progress], None]) -> Callable[[], None]:
    """To be called as often as one likes; says every few seconds that work goes on."""
    said_at = time.monotonic()

    def alive() -> None:
        nonlocal said_at
        now = time.monotonic()
        if now - said_at > _ALIVE_SECONDS:
            said_at = now
            emit(Alive())

    return alive


def prepare(request: SessionRequest, alive: Callable[[], None]) -> Tokens:
    """The job's tokens, on the first run tokenized by all ranks. UserError when they do not fit."""
    options = request.options
    tokens = prepare_tokens(
        options.task,
        options.data,
        _tokenizer_source(options),
        seed=options.train.seed,
        model_max_length=max_length_of(read_model_config(options.model)),
        rank=request.world.rank,
        world_size=request.world.size,
        alive=alive,
    )
    if len(tokens.train) < request.world.size:
        raise UserError(
            f"there are {len(tokens.train)} training samples for {request.world.size} ranks: each "
            "needs at least one. Use fewer nodes or devices, or more data."
        )
    return tokens


def _tokenizer_source(options: JobOptions) -> TokenizerSource:
    own = options.model.tokenizer
    model = with_tokenizer(options.model)
    return TokenizerSource(
        name_or_path=own or str(model.name_or_path),
        revision=None if own else model.revision,
        trust_remote_code=options.model.trust_remote_code,
    )


def _evaluator(
    request: SessionRequest,
    tokens: Tokens,
    table: TokenTable | TokenSamples,
    *,
    weights: NDArray[np.float32] | None,
    alive: Callable[[], None],
) -> Evaluator:
    options, spec = request.options, tokens.spec
    task = load_task(options.task)
    batches = make_collator(options, tokens, table, class_weights=weights, alive=alive)
    if isinstance(batches, TokenCollator):
        _check_drawn(batches, options)
        return TokenEvaluator(
            collator=batches,
            task=batches.task,
            spec=spec,
            metrics=choose_metrics(batches.task, spec, options.train.metrics),
            micro_batch=request.eval_micro_batch,
            max_tokens=request.eval_max_tokens,
        )
    names = options.train.metrics
    if names is None:
        names = task.default_metrics(spec)
    return RowEvaluator(
        collator=cast(Collator, batches),
        task=cast(RowTask, task),
        spec=spec,
        metrics=load_metrics(names, spec),
        micro_batch=request.eval_micro_batch,
        max_tokens=request.eval_max_tokens,
    )


def _check_drawn(batches: TokenCollator, options: JobOptions) -> None:
    """UserError where evaluation has nothing to guess; that is so at every evaluation."""
    everything = range(len(batches.table))
    if batches.spec.drawn and not any(
        (batches.samples(np.array([i]), EVALUATION_EPOCH)[0].labels != UNSUPERVISED).any()
        for i in everything
    ):
        raise UserError(
            f"of the {len(everything)} samples to evaluate no token was drawn to be guessed "
            f"(data.mlm_probability is {options.data.mlm_probability:g}), so there is no loss. Evaluate "
            "on more text, raise data.mlm_probability, or train with train.eval_strategy=no."
        )


def _data_ready(request: SessionRequest, tokens: Tokens, started: float) -> DataReady:
    return DataReady(
        num_train_samples=len(tokens.train),
        num_eval_samples=len(tokens.eval) if tokens.eval is not None else 0,
        steps_per_epoch=sample_order(request.options, tokens).steps_per_epoch,
        total_steps=total_steps(request.options, tokens),
        seconds=time.perf_counter() - started,
        notes=tokens.notes,
        longest_sample=longest_sample(tokens.train),
        longest_eval_sample=longest_sample(tokens.eval) if tokens.eval is not None else 0,
    )


def create_strategy(
    request: SessionRequest, tokens: Tokens, *, trained_head: bool = False
) -> Strategy:
    """Collective: join the other ranks and load the model."""
    create: Callable[[StrategyRequest], Strategy] = registry.load(request.strategy)
    return create(strategy_request(request, tokens, trained_head=trained_head))


def strategy_request(
    request: SessionRequest, tokens: Tokens, *, trained_head: bool = False
) -> StrategyRequest:
    """What a strategy is created from, for these tokens."""
    return StrategyRequest(
        world=request.world,
        options=request.options,
        precision=request.precision,
        accelerator=request.accelerator,
        device=request.device,
        num_threads=request.num_threads,
        listen_fd=request.listen_fd,
        timeout_seconds=request.timeout_seconds,
        loss=tokens.spec.loss,
        num_outputs=tokens.spec.num_outputs,
        label_names=tokens.spec.label_names,
        max_token_id=tokens.max_token_id,
        pad_token_id=tokens.pad_token_id,
        trained_head=trained_head,
        head=tokens.spec.head,
        stages=request.stages,
    )
