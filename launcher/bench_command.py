"""`ftlaunch bench`: what is asked for, the cells one after the other, and what they come to."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from ftlaunch.cluster.descriptors import need_descriptors
from ftlaunch.cluster.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    FtlaunchError,
    UserError,
)
from ftlaunch.cluster.machine import Machine, detect_machine
from ftlaunch.launcher.bench_cells import (
    Cell,
    config_of,
    make_cells,
    plan_cell,
    read_names,
    read_nodes,
    rounds,
)
from ftlaunch.launcher.bench_compare import ROUNDS, Comparison, peer_lines, read_peers
from ftlaunch.launcher.bench_folder import folder_of, make_folder, remove_folder
from ftlaunch.launcher.bench_plot import can_plot, write_plot
from ftlaunch.launcher.bench_report import (
    FORMAT_VERSION,
    CellResult,
    cell_json,
    result_lines,
    run_json,
    table_lines,
    way_of,
)
from ftlaunch.launcher.bench_run import CellRun, CellRunner
from ftlaunch.launcher.config import RunConfig, load_config
from ftlaunch.launcher.config_fetch import fetch_config
from ftlaunch.launcher.console import Console
from ftlaunch.launcher.job_input import check_input, prepare_demo
from ftlaunch.launcher.npus import with_rank_table
from ftlaunch.launcher.peer_work import check_comparable
from ftlaunch.launcher.plan import LaunchPlan
from ftlaunch.launcher.site import find_site
from ftlaunch.strategies.checkpoint.manifest import write_json
from ftlaunch.strategies.data.demo import DEMO_OPTIONS
from ftlaunch.strategies.model_config import looks_local

_REPEATS = 3
_GIT_SECONDS = 5.0
_PLOT_HINT = "no plot was drawn: matplotlib is missing (pip install 'ftlaunch[bench]')"


def bench(arguments: argparse.Namespace, flags: Mapping[str, Any]) -> int:
    """0: every cell was measured; 1: one has failed. UserError for a mistake in what was asked."""
    config, cells = _asked(arguments, flags)
    peers = read_peers(arguments.compare)
    if peers and not find_site(config.cluster, os.environ).is_one_machine:
        raise UserError(
            "--compare is for the nodes of one machine: peers are started here alone, not over ssh nor by "
            "SLURM. Run it with --cluster local, or leave --compare out."
        )
    default = ROUNDS if peers else _REPEATS
    repeats = config.bench.repeats or default
    config = replace(config, bench=replace(config.bench, repeats=repeats))
    here = detect_machine(os.environ)
    # With --json stdout is for the result alone.
    with Console(sys.stderr if arguments.json else sys.stdout) as console:
        if not arguments.dry_run and (why := fetch_config(config.model, console.say)):
            console.warn(f"memory is not planned: {why}")
        if peers:
            _check_peers(config, cells, here)
        folder = folder_of(config.output_dir)
        if arguments.dry_run:
            console.plan(_plan_lines(config, cells, here, peers))
            console.say("dry run: nothing was started")
            return EXIT_DONE
        need_descriptors(max(cell.nodes for cell in cells))
        if config.model.name_or_path is None:
            synthetic = config.bench.lengths is not None
            config = prepare_demo(config)
            if synthetic:
                config = replace(config, data=replace(config.data, name_or_path=None))
        benchmark = _Benchmark(config, cells, peers, folder, here, console)
        return benchmark.run(sys.stdout if arguments.json else None)


def _asked(arguments: argparse.Namespace, flags: Mapping[str, Any]) -> tuple[RunConfig, list[Cell]]:
    nodes = read_nodes(flags.get("nodes"))
    strategies = read_names("--strategy", flags.get("strategy"))
    precisions = read_names("--precision", flags.get("precision"))
    grid = ("nodes", "strategy", "precision")
    others = {name: value for name, value in flags.items() if name not in grid}
    file = Path(arguments.config) if arguments.config is not None else None

    def load(defaults: Mapping[str, Any] | None) -> RunConfig:
        return load_config(
            file=file,
            flags=others,
            overrides=arguments.overrides,
            defaults=defaults,
            data_optional=True,
        )

    config = load(None)
    if config.is_demo:
        config = load(DEMO_OPTIONS)
    if "strategy" not in flags:
        strategies = (config.strategy,)
    if "precision" not in flags:
        precisions = (config.precision,)
    if not nodes:
        nodes = (len(find_site(config.cluster, os.environ).hosts),)
    cells = make_cells(nodes, strategies, precisions)
    for number in nodes:
        find_site(replace(config.cluster, nodes=number), os.environ)
    _check_data(config)
    if config.model.name_or_path is not None:
        check_input(config)
    return config, cells


def _check_data(config: RunConfig) -> None:
    from ftlaunch.strategies.data.synthetic import read_lengths

    name = config.data.name_or_path
    if config.bench.lengths is not None:
        read_lengths(config.bench.lengths)
        if name is not None:
            raise UserError(
                f"bench.lengths is set, and so is --dataset {name}: lengths are of random samples, in place "
                "of data. Leave out one of the two."
            )
    if name is not None and looks_local(name) and not Path(name).expanduser().exists():
        raise UserError(
            f"the dataset {name} does not exist. Pass a file, a folder or the name of a data set on the "
            "hub, or leave --dataset out to measure with random samples."
        )


def _check_peers(config: RunConfig, cells: Sequence[Cell], here: Machine) -> None:
    """UserError for a cell whose work no peer can do; what cannot be run at all is told in its turn."""
    least = min(cell.nodes for cell in cells)
    for cell in cells:
        try:
            plan = _plan_here(config, cell, least, here)
        except UserError:
            continue
        check_comparable(plan, on_one_machine=True)


def _plan_here(config: RunConfig, cell: Cell, least: int, here: Machine) -> LaunchPlan:
    """As if every node were like this machine. UserError when the cell cannot be run."""
    own = config_of(config, cell)
    own = replace(own, cluster=with_rank_table(own.cluster, here, os.environ))
    site = find_site(own.cluster, os.environ)
    return plan_cell(
        own,
        cell,
        least,
        site,
        [here] * len(site.hosts),
        output_dir="/",
        assumed=not site.is_one_machine,
    )


def _plan_lines(
    config: RunConfig, cells: Sequence[Cell], here: Machine, peers: Sequence[str]
) -> list[str]:
    """A line for each cell. UserError when none of them can be run."""
    lines, mistakes = [], []
    least = min(cell.nodes for cell in cells)
    for cell in cells:
        try:
            plan = _plan_here(config, cell, least, here)
        except UserError as error:
            mistakes.append(str(error))
            lines.append(f"{cell.name}: cannot be run: {error}")
            continue
        lines.append(
            f"{cell.name}: {plan.world_size} ranks on {plan.num_nodes} nodes, {way_of(plan)} "
            f"{plan.precision}, global batch {plan.global_batch_size}, micro-batch {plan.micro_batch} × "
            f"{plan.accumulation}, {plan.threads_per_rank} threads a rank"
        )
    if len(mistakes) == len(cells):
        raise UserError("\n".join(dict.fromkeys(mistakes)))
    asked = config.bench
    lines.append(
        f"{len(cells)} cells, {asked.repeats} times each, in turn: {asked.warmup_steps} steps to warm up, "
        f"{asked.steps} that are measured"
    )
    if peers:
        lines.append(f"the same work by {', '.join(peers)} after each run")
    return lines


class _Benchmark:
    def __init__(
        self,
        config: RunConfig,
        cells: Sequence[Cell],
        peers: Sequence[str],
        folder: Path,
        here: Machine,
        console: Console,
    ) -> None:
        self._config = config
        self._results = {cell: CellResult(cell=cell) for cell in cells}
        self._folder = folder
        self._here = here
        self._console = console
        self._comparison = Comparison(peers, folder)
        self._least = min(cell.nodes for cell in cells)

    def run(self, json_stream: TextIO | None) -> int:
        """Run all cells; the exit code. What is done is kept, whatever ends it.

        UserError where nothing was measured by mistakes in what was asked; then the folder is as it was.
        """
        made = make_folder(self._folder)
        try:
            with _signals_as_ctrl_c():
                stopped = self._run_all()
        except KeyboardInterrupt:
            stopped = True
        results = list(self._results.values())
        if all(result.why and result.by_user and not result.runs for result in results):
            remove_folder(self._folder, made)
            raise UserError("\n".join(dict.fromkeys(result.why for result in results)))
        content = self._content(stopped)
        write_json(self._folder / "bench.json", content)
        peers = list(self._comparison.results.values())
        self._console.plan([*table_lines(results), *peer_lines(results, peers)])
        if stopped:
            self._console.say("stopped before all was measured")
        self._console.say(f"results: {self._folder / 'bench.json'}")
        self._plot(results)
        if json_stream is not None:
            print(json.dumps(content, indent=2), file=json_stream)
        if stopped:
            return EXIT_INTERRUPTED
        failed = [*(each.why for each in results), *(each.why for each in peers)]
        return EXIT_FAILED if any(failed) else EXIT_DONE

    def _run_all(self) -> bool:
        """True when it was stopped."""
        runner = CellRunner(self._config, self._least, self._here)
        order = rounds(list(self._results), self._config.bench.repeats or _REPEATS)
        site = find_site(self._config.cluster, os.environ)
        if site.is_one_machine and len({cell.nodes for cell in self._results}) > 1:
            self._console.say(
                "the nodes are processes of this machine and share what it has: efficiencies are not those "
                "of a cluster"
            )
        for place, (number, cell) in enumerate(order, start=1):
            result = self._results[cell]
            if result.why:
                continue
            folder = self._folder / "cells" / cell.name / str(number + 1)
            try:
                run = runner.run(cell, folder)
            except UserError as error:
                run = CellRun(why=" ".join(str(error).split()), by_user=True)
            except FtlaunchError as error:
                run = CellRun(why=" ".join(str(error).split()))
            result.take(run)
            if run.stopped:
                return True
            # Whatever ends the command, what is done is there.
            write_json(self._folder / "bench.json", self._content(stopped=True))
            said = result_lines(run_json(run.measured)) if run.measured else f"failed: {result.why}"
            self._console.say(f"{place}/{len(order)}  {cell.name}: {said}")
            if run.measured is not None and run.plan is not None:
                for line in self._comparison.run(cell, run.plan, run.measured, number):
                    self._console.say(f"  {line}")
        return False

    def _content(self, stopped: bool) -> dict[str, Any]:
        results = list(self._results.values())
        return {
            "format": FORMAT_VERSION,
            "stopped": stopped,
            "command": sys.argv[1:],
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "code": _code(self._here),
            "machine": self._here.to_dict(),
            "options": {
                name: dataclasses.asdict(getattr(self._config, name))
                for name in ("model", "data", "train", "deepspeed", "lora", "bench")
            }
            | {"task": self._config.task},
            "cells": [cell_json(results, result) for result in results],
            "peers": [peer.to_json() for peer in self._comparison.results.values()],
        }

    def _plot(self, results: Sequence[CellResult]) -> None:
        if not any(result.runs for result in results):
            return
        if not can_plot():
            self._console.say(_PLOT_HINT)
            return
        path = self._folder / "bench.png"
        write_plot(path, results)
        self._console.say(f"plot: {path}")


@contextlib.contextmanager
def _signals_as_ctrl_c() -> Iterator[None]:
    """Those of a scheduler, between runs and while a peer runs: nothing is left behind. A coordinator hears
    them in its own way.
    """

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _code(here: Machine) -> dict[str, Any]:
    """Which code was measured: the commit, where it runs from a working tree of git."""
    root = Path(__file__).resolve().parent.parent
    found: dict[str, Any] = {"fingerprint": here.code_fingerprint, "commit": None, "changed": None}
    if not (root / ".git").exists():
        return found

    def ask(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *words],
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            check=True,
        )
        return done.stdout.strip()

    try:
        found["commit"] = ask("rev-parse", "HEAD")
        found["changed"] = bool(ask("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        pass
    return found
