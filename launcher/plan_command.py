"""`ftlaunch plan` and `--dry-run`: how a job would run, and what memory it would need. Starts nothing."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ftlaunch.cluster.errors import EXIT_DONE, UserError
from ftlaunch.cluster.machine import Machine, detect_machine
from ftlaunch.launcher.config import RunConfig, load_config
from ftlaunch.launcher.console import Console
from ftlaunch.launcher.hardware import assume, find_hardware
from ftlaunch.launcher.job_memory import JobMemory, read_job_memory
from ftlaunch.launcher.npus import with_rank_table
from ftlaunch.launcher.plan import LaunchPlan, make_plan
from ftlaunch.launcher.site import Site, find_site
from ftlaunch.strategies.adapter import adapter_folder
from ftlaunch.strategies.data.demo import DEMO_OPTIONS
from ftlaunch.strategies.model_config import check_model_folder, family_of


def plan(arguments: argparse.Namespace, flags: Mapping[str, Any]) -> int:
    """Print the plan of a run. UserError where there can be none, or nobody knows the model."""
    if arguments.script or arguments.module is not None:
        raise UserError(
            "a script does its own training: what memory it needs, ftlaunch cannot know. Where its ranks "
            "would be is shown by ftlaunch --dry-run SCRIPT."
        )
    file = Path(arguments.config) if arguments.config is not None else None

    def load(defaults: Mapping[str, Any]) -> RunConfig:
        return load_config(
            file=file,
            flags=flags,
            overrides=arguments.overrides,
            defaults=defaults,
            data_optional=True,
        )

    config = load({})
    if config.is_demo:
        config = load(DEMO_OPTIONS)
    memory = read_job_memory(config)
    if memory.architecture is None:
        raise UserError(memory.why_not)
    if arguments.hardware is not None:
        site, machines = assume(config.cluster, find_hardware(arguments.hardware))
        made = _plan(config, site, machines, memory=memory)
    else:
        made, machines = _plan_here(config, memory=memory)
    if arguments.json:
        print(json.dumps(made.to_json(), indent=2, ensure_ascii=False))
        return EXIT_DONE
    with Console(sys.stdout) as console:
        console.plan([*machines[0].notes, *made.describe(), "", *made.memory_lines()])
    return EXIT_DONE


def show_plan(
    config: RunConfig, console: Console, *, mode: Literal["train", "eval"] = "train"
) -> int:
    """The dry run: print the plan, start nothing."""
    if not config.is_demo:
        check_model_folder(config.model, or_adapter=mode == "eval")
    memory = read_job_memory(config) if mode == "train" else None
    made, machines = _plan_here(config, memory=memory, mode=mode)
    lines = ["", *made.memory_lines(), ""] if memory is not None else []
    console.plan([*machines[0].notes, *made.describe(), *lines])
    console.say("dry run: nothing was started")
    return EXIT_DONE


def _plan_here(
    config: RunConfig, *, memory: JobMemory | None, mode: Literal["train", "eval"] = "train"
) -> tuple[LaunchPlan, Sequence[Machine]]:
    """For this machine, and others that are taken to be like it."""
    site = find_site(config.cluster, os.environ)
    machine = detect_machine(os.environ)
    machines = [machine] * len(site.hosts)
    made = _plan(config, site, machines, memory=memory, mode=mode, assumed=not site.is_one_machine)
    return made, machines


def _plan(
    config: RunConfig,
    site: Site,
    machines: Sequence[Machine],
    *,
    memory: JobMemory | None,
    mode: Literal["train", "eval"] = "train",
    assumed: bool = False,
) -> LaunchPlan:
    # What the environment says of ranks is said of this machine's.
    environ = {} if site.kind == "assumed" else os.environ
    table = with_rank_table(config.cluster, machines[0], environ)
    return make_plan(
        replace(config, cluster=table),
        machines,
        site,
        # It imports what locks folders.
        output_dir=config.output_dir or "",
        mode=mode,
        assumed=assumed,
        family=(memory.family if memory else None) or family_of(config.model),
        is_adapter=adapter_folder(config.model) is not None,
        memory=memory,
    )
