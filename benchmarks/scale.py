"""What a coordinator costs with many nodes, and the sample order with many samples.

    python -m benchmarks.scale --out scale.json

The coordinator is the real one, with its recorder; its agents only speak the protocol, over pipes,
many of them in one process (`fake_agents`). One rank a node: met, prepared, started, 200 steps told of
by rank 0, all ended. Processor time and the memory that Python holds for it are of the coordinator's
process alone; memory is counted in a second run, since counting takes time. Figures per node show
whether it is linear.

The sample order is asked for the samples of steps from all over an epoch.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.fake_agents import fake_agents
from benchmarks.report import machine_line, markdown_table
from ftlaunch.cluster.coordinator import Coordinator
from ftlaunch.cluster.descriptors import need_descriptors
from ftlaunch.cluster.events import Prepare, RankStart
from ftlaunch.cluster.transport import Orders, Way
from ftlaunch.launcher.recorder import Recorder
from ftlaunch.strategies.data.sample_order import SampleOrder
from ftlaunch.strategies.progress import from_dict

NODES = (64, 256, 1024)
SAMPLES = (10**3, 10**6, 10**9)
STEPS = 200
_HEARTBEAT_SECONDS = 30.0


def start_of(node: int) -> RankStart:
    return RankStart(
        rank=node,
        title="",
        module="none",
        arguments=[],
        env={},
        working_dir=None,
        log_path="",
        inherits_listener=False,
        shows_output=False,
    )


def run_coordinator(
    nodes: int, folder: Path, *, steps: int, mark: Callable[[str], None] = lambda phase: None
) -> int:
    """One job on `nodes` fakes; the steps that were heard of. `mark` is called as a phase ends."""
    heard = 0
    ways = [Way(name=f"node{number}") for number in range(nodes)]
    orders = Orders(heartbeat_seconds=_HEARTBEAT_SECONDS)
    need_descriptors(nodes)
    with fake_agents(nodes, steps=steps), Recorder(folder / "out") as recorder:
        mark("")
        with Coordinator(ways, orders, log_dir=folder / "logs") as coordinator:

            def on_message(rank: int, payload: Mapping[str, Any]) -> None:
                nonlocal heard
                heard += 1
                recorder.handle(from_dict(payload))

            machines = coordinator.machines()
            assert len(machines) == nodes
            coordinator.connect()
            coordinator.prepare(Prepare(start_method="exec", env={}, preload=[], grace_seconds=0.0))
            mark("meet")
            outcome = coordinator.run(
                [[start_of(number)] for number in range(nodes)],
                on_message=on_message,
                on_output=lambda rank, text: None,
                on_stop=lambda: None,
                stop_seconds=10.0,
            )
            mark("run")
            assert outcome.ending == "done", outcome
    return heard


def measure_nodes(nodes: int) -> dict[str, float]:
    """Milliseconds of processor time and KiB, of a node."""
    found: dict[str, float] = {}
    at = 0.0

    def mark_time(phase: str) -> None:
        nonlocal at
        now = time.process_time()
        found[f"{phase}_ms"] = 1e3 * (now - at) / nodes
        at = now

    def mark_memory(phase: str) -> None:
        current, peak = tracemalloc.get_traced_memory()
        found[f"{phase}_kib"] = current / 1024 / nodes
        found["peak_kib"] = peak / 1024 / nodes

    with tempfile.TemporaryDirectory(prefix="scale_") as folder:
        run_coordinator(nodes, Path(folder), steps=STEPS, mark=mark_time)
    with tempfile.TemporaryDirectory(prefix="scale_") as folder:
        tracemalloc.start()
        run_coordinator(nodes, Path(folder), steps=STEPS, mark=mark_memory)
        tracemalloc.stop()
    return found


def measure_order(num_samples: int, *, steps: int = 2000) -> dict[str, float]:
    """Microseconds and bytes at the peak of asking for a step of 32 samples."""
    order = SampleOrder(num_samples=num_samples, global_batch_size=32, seed=1)
    every = max(1, order.steps_per_epoch // steps)
    order.global_batch(0)
    started = time.process_time()
    for step in range(steps):
        order.global_batch(step)
    in_order = time.process_time() - started
    started = time.process_time()
    for step in range(steps):
        order.global_batch(step * every)
    anywhere = time.process_time() - started
    tracemalloc.start()
    for step in range(steps):
        order.global_batch(step * every)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {
        "in_order_us": 1e6 * in_order / steps,
        "anywhere_us": 1e6 * anywhere / steps,
        "peak_bytes": float(peak),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, nargs="+", default=list(NODES))
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args(argv)
    nodes = {str(number): measure_nodes(number) for number in options.nodes}
    orders = {str(number): measure_order(number) for number in SAMPLES}
    print(machine_line(), end="\n\n")
    rows = [
        [name, *(f"{each[key]:.2f}" for key in ("meet_ms", "run_ms", "meet_kib", "peak_kib"))]
        for name, each in nodes.items()
    ]
    header = ("nodes", "to meet, ms a node", "to run, ms a node", "KiB a node", "at the peak")
    print(markdown_table(header, rows), end="\n\n")
    rows = [
        [
            f"{int(name):,}",
            f"{each['in_order_us']:.1f}",
            f"{each['anywhere_us']:.1f}",
            f"{each['peak_bytes'] / 1024:.0f}",
        ]
        for name, each in orders.items()
    ]
    columns = ("samples", "µs a step, one after the other", "anywhere", "KiB at the peak")
    print(markdown_table(columns, rows))
    if options.out is not None:
        report = {"machine": machine_line(), "nodes": nodes, "orders": orders}
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
