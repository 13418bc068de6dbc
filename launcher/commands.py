"""What each command does with its arguments: configuration, then a job or its plan."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ftlaunch.cluster.errors import UserError
from ftlaunch.launcher.config import RunConfig, load_config
from ftlaunch.launcher.console import Console
from ftlaunch.launcher.job import run_job
from ftlaunch.launcher.output_folder import put_back_earlier
from ftlaunch.launcher.plan import LaunchPlan
from ftlaunch.launcher.plan_command import show_plan
from ftlaunch.launcher.rehearsal import KINDS, Fault, Rehearsal, parse_fault
from ftlaunch.launcher.script_job import run_script, show_script_plan
from ftlaunch.launcher.script_plan import Script
from ftlaunch.launcher.slurm_options import SlurmOptions
from ftlaunch.strategies.data.demo import DEMO_OPTIONS
from ftlaunch.strategies.model_config import absolute_path
from ftlaunch.strategies.options import BenchOptions

# Flags that say how to train.
_OF_TRAINING = ("model", "dataset", "task", "strategy", "precision")


def train(arguments: argparse.Namespace, flags: Mapping[str, Any]) -> int:
    return _train(arguments, flags, ())


def rehearse(arguments: argparse.Namespace, flags: Mapping[str, Any]) -> int:
    """A job with faults on purpose. UserError for a fault that is not understood."""
    if not arguments.fault:
        raise UserError(
            "rehearse without a --fault is a run like any other. Give one, for example "
            f"--fault kill-rank:0@step5. Kinds: {', '.join(KINDS)}."
        )
    return _train(arguments, flags, [parse_fault(text) for text in arguments.fault])


def _train(arguments: argparse.Namespace, flags: Mapping[str, Any], faults: Sequence[Fault]) -> int:
    script = script_of(arguments)
    config = script_config(arguments, flags) if script else config_of(arguments, flags)
    rehearsal = Rehearsal(faults)
    with Console(sys.stdout) as console:
        if config.bench != BenchOptions():
            console.say("bench.* is for ftlaunch bench: this run measures nothing")
        if config.slurm != SlurmOptions():
            console.say("slurm.* is for ftlaunch submit: this run does not ask SLURM for anything")
        if script is not None:
            if arguments.dry_run:
                return show_script_plan(config, script, console)
            return run_script(
                config, script, console, overwrite=arguments.overwrite, rehearsal=rehearsal
            )
        if arguments.dry_run:
            return show_plan(config, console)
        return run_job(config, console, overwrite=arguments.overwrite, rehearsal=rehearsal)


def script_of(arguments: argparse.Namespace) -> Script | None:
    if arguments.module is not None:
        return Script(kind="module", target=arguments.module, arguments=tuple(arguments.script))
    if not arguments.script:
        return None
    path, *rest = arguments.script
    return Script(kind="path", target=path, arguments=tuple(rest))


def script_config(arguments: argparse.Namespace, flags: Mapping[str, Any]) -> RunConfig:
    """UserError for what means nothing to a script."""
    strange = [f"--{name}" for name in flags if name in _OF_TRAINING]
    if not strange:
        file = Path(arguments.config) if arguments.config is not None else None
        config = load_config(file=file, flags=flags, overrides=arguments.overrides)
        nothing = RunConfig(
            output_dir=config.output_dir, cluster=config.cluster, slurm=config.slurm
        )
        names = [each.name for each in fields(config)]
        strange = [name for name in names if getattr(config, name) != getattr(nothing, name)]
    if strange:
        raise UserError(
            f"{', '.join(strange)} is set, but a script does its own training: only cluster.*, slurm.* "
            "and output_dir mean something to it. Put what is meant for the script behind its name."
        )
    return config


def config_of(arguments: argparse.Namespace, flags: Mapping[str, Any]) -> RunConfig:
    file = Path(arguments.config) if arguments.config is not None else None
    config = load_config(file=file, flags=flags, overrides=arguments.overrides)
    if not config.is_demo:
        return config
    # The demo's own recipe gives way to whatever the user sets.
    return load_config(file=file, flags=flags, overrides=arguments.overrides, defaults=DEMO_OPTIONS)


def evaluate(arguments: argparse.Namespace, flags: Mapping[str, Any]) -> int:
    """Evaluate a job's finished model, or any fine-tuned one, on the data that is named."""
    target = absolute_path(arguments.target)
    if not arguments.dry_run:
        put_back_earlier(target)
    model, defaults = _what_to_evaluate(target, arguments.target)
    file = Path(arguments.config) if arguments.config is not None else None
    config = load_config(
        file=file,
        flags={**flags, "model": model},
        overrides=arguments.overrides,
        defaults=defaults,
    )
    output_dir = None if config.output_dir is None else Path(config.output_dir)
    if output_dir is not None and not arguments.dry_run:
        put_back_earlier(output_dir)
    if output_dir is not None and (output_dir / "checkpoints").exists():
        raise UserError(
            f"the output folder {config.output_dir} holds a training job, whose plan and summary "
            "an evaluation would replace. Choose another with --output-dir, or leave it out."
        )
    with Console(sys.stdout) as console:
        if arguments.dry_run:
            return show_plan(config, console, mode="eval")
        return run_job(config, console, overwrite=False, mode="eval")


def _what_to_evaluate(target: Path, name: str) -> tuple[str, dict[str, Any]]:
    """(model, the settings that its job had); a hub name stays as it is."""
    from ftlaunch.strategies.data.entity_scores import TOKEN_METRICS  # they load numpy
    from ftlaunch.strategies.metrics import SHIPPED_METRICS

    if not (target / "plan.json").is_file():
        return (str(target) if target.exists() else name), {}
    if not (target / "model").is_dir():
        raise UserError(
            f"the job in {target} has no finished model yet. Run its command again to finish it, "
            "or name a model folder."
        )
    options = LaunchPlan.read(target / "plan.json").options
    # A folder may come from somebody else: any other metric is a script that would be run.
    names = options.train.metrics
    known = SHIPPED_METRICS if options.task == "text-classification" else TOKEN_METRICS
    metrics = None if names is None else tuple(n for n in names if n in known)
    defaults = {
        "output_dir": str(target / "eval"),
        "task": options.task,
        "data.text_columns": options.data.text_columns,
        "data.label_column": options.data.label_column,
        "data.label_columns": options.data.label_columns,
        "data.max_length": options.data.max_length,
        "data.packing": options.data.packing,
        "data.long_samples": options.data.long_samples,
        "data.mlm_probability": options.data.mlm_probability,
        "data.whole_word_masking": options.data.whole_word_masking,
        "train.metrics": metrics or None,
        # Of masked-lm it decides what is hidden.
        "train.seed": options.train.seed,
    }
    return str(target / "model"), defaults
