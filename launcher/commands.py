"""What each command does with its arguments: configuration, then a job or its plan."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftlaunch.launcher.config import RunConfig, load_config
from ftlaunch.launcher.console import Console
from ftlaunch.launcher.job import run_job, show_plan
from ftlaunch.strategies.data.demo import DEMO_OPTIONS


def train(arguments: argparse.Namespace, flags: Mapping[str, Any]) -> int:
    config = _config(arguments, flags)
    with Console(sys.stdout) as console:
        if arguments.dry_run:
            return show_plan(config, console)
        return run_job(config, console, overwrite=arguments.overwrite)


def _config(arguments: argparse.Namespace, flags: Mapping[str, Any]) -> RunConfig:
    file = Path(arguments.config) if arguments.config is not None else None
    config = load_config(file=file, flags=flags, overrides=arguments.overrides)
    if not config.is_demo:
        return config
    # The demo's own recipe gives way to whatever the user sets.
    return load_config(file=file, flags=flags, overrides=arguments.overrides, defaults=DEMO_OPTIONS)


def evaluate(arguments: argparse.Namespace, flags: Mapping[str, Any]) -> int:
    raise AssertionError("written with the evaluation session")
