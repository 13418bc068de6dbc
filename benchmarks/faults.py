"""What happens to a script on two nodes when something fails: ftlaunch beside torchrun.

    python -m benchmarks.faults --rounds 5 --out faults.json

blame      rank 1 fails 20 ms before rank 0: how often it is the one that is named
stubborn   rank 0 fails, rank 1 ignores SIGTERM: seconds until every process is gone
node       rank 1 on node 1 fails while rank 0 on node 0 sleeps: seconds until both launchers and
           ranks are gone, at most --limit
killed     the launcher is killed (SIGKILL): processes that are left 5 s later

Both with their defaults, but for ftlaunch --max-restarts 0, which is torchrun's default. torchrun
has one launcher for each node; two of them are started for `node`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from benchmarks.report import machine_line, markdown_table

_MARK = "FTLAUNCH_BENCHMARK_MARK"
_READY = """\
import os, signal, sys, time
import torch.distributed
rank = os.environ["RANK"]
open(f"ready-{rank}", "w").close()
while not os.path.exists("go"):
    time.sleep(0.005)
begun = float(open("go").read())
"""
_SCRIPTS = {
    "blame": "time.sleep(max(0, begun - time.time() + (0.02 if rank == '0' else 0)))\n"
    "raise ValueError('rank ' + rank)\n",
    "stubborn": "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "if rank == '0':\n    raise ValueError('boom')\ntime.sleep(600)\n",
    "node": "if rank == '1':\n    raise ValueError('boom')\ntime.sleep(600)\n",
    "killed": "time.sleep(600)\n",
}


class Run:
    """One command (or one for each node) on a script in a folder of its own."""

    def __init__(self, case: str, commands: Sequence[Sequence[str]], folder: Path) -> None:
        (folder / "script.py").write_text(_READY + _SCRIPTS[case])
        self.mark = secrets.token_hex(8)
        self.folder = folder
        self.output = folder / "output"
        with open(self.output, "wb") as output:
            self.launchers = [
                subprocess.Popen(
                    command,
                    cwd=folder,
                    env={**os.environ, _MARK: self.mark, "OMP_NUM_THREADS": "1"},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
                for command in commands
            ]
        self._wait(lambda: all((folder / f"ready-{rank}").exists() for rank in range(2)), 120)

    def go(self, delay: float) -> float:
        begun = time.time() + delay
        (self.folder / "going").write_text(str(begun))
        (self.folder / "going").rename(self.folder / "go")
        return begun

    def processes(self) -> list[int]:
        """Everything that was started, the launchers included."""
        wanted = f"{_MARK}={self.mark}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and wanted in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                pass
        return found

    def seconds_until_gone(self, begun: float, limit: float) -> float:
        while self._reap() and time.time() - begun < limit:
            time.sleep(0.02)
        return time.time() - begun

    def _reap(self) -> list[int]:
        for launcher in self.launchers:
            launcher.poll()
        return self.processes()

    def _wait(self, done: Callable[[], bool], seconds: float) -> None:
        deadline = time.time() + seconds
        while not done():
            if time.time() > deadline:
                raise SystemExit(f"the ranks did not start:\n{self.output.read_text()}")
            time.sleep(0.01)

    def end(self) -> None:
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        for launcher in self.launchers:
            launcher.wait(timeout=30)


def commands_of(side: str, case: str) -> list[list[str]]:
    if side == "ftlaunch":
        command = [sys.executable, "-m", "ftlaunch.launcher", "--nodes", "2", "-o", "out"]
        return [[*command, "--max-restarts", "0", "script.py"]]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    if case != "node":
        return [[*torchrun, "--standalone", "--nproc-per-node=2", "script.py"]]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = [
        "--nnodes=2",
        "--nproc-per-node=1",
        "--master-addr=127.0.0.1",
        f"--master-port={port}",
    ]
    return [[*torchrun, *shared, f"--node-rank={node}", "script.py"] for node in range(2)]


def measure(side: str, case: str, folder: Path, limit: float) -> float:
    run = Run(case, commands_of(side, case), folder)
    try:
        if case == "killed":
            run.launchers[0].kill()
            time.sleep(5)
            return len(run._reap())
        # Two failures 20 ms apart need a beginning that both ranks have still before them.
        begun = run.go(0.5 if case == "blame" else 0.0)
        seconds = run.seconds_until_gone(begun, limit)
        if case != "blame":
            return seconds
        return float(_named(run.output.read_text()) == 1)
    finally:
        run.end()


def _named(output: str) -> int | None:
    """The rank that the launcher calls the first."""
    ours = re.search(r"^error: rank (\d+) on", output, re.MULTILINE)
    theirs = re.search(r"Root Cause.*?rank\s*: (\d+)", output, re.DOTALL)
    found = ours or theirs
    return int(found[1]) if found else None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", nargs="+", choices=list(_SCRIPTS), default=list(_SCRIPTS))
    parser.add_argument("--limit", type=float, default=90.0)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args(argv)
    sides = ("ftlaunch", "torchrun")
    results: dict[str, list[float]] = {
        f"{case}, {side}": [] for case in options.case for side in sides
    }
    with tempfile.TemporaryDirectory(prefix="faults_") as root:
        for number in range(options.rounds):
            for case in options.case:
                for side in sides if number % 2 else sides[::-1]:
                    folder = Path(root) / f"{number}-{case}-{side}"
                    folder.mkdir()
                    result = measure(side, case, folder, options.limit)
                    results[f"{case}, {side}"].append(result)
    print(machine_line(), end="\n\n")
    rows = []
    for name, values in results.items():
        if name.startswith("blame"):
            rows.append([name, f"right {sum(values):.0f} of {len(values)}", ""])
        else:
            spread = f"{min(values):.1f} to {max(values):.1f}"
            rows.append([name, f"{median(values):.1f}", spread])
    print(markdown_table(("", "median", "from to"), rows))
    if options.out is not None:
        options.out.write_text(
            json.dumps({"machine": machine_line(), "results": results}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
