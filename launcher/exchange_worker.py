"""One rank of the exchange test: what it was told on its command line, and how it tells its agent."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path

from ftlaunch.cluster.errors import EXIT_DONE, EXIT_FAILED, FtlaunchError
from ftlaunch.cluster.linux import name_process
from ftlaunch.cluster.rank_pipe import LISTEN_FD_VARIABLE, RankPipe, failure_payload
from ftlaunch.cluster.stacks import answer_stack_signal
from ftlaunch.cluster.world import World
from ftlaunch.strategies.exchange import ExchangeRequest, run_exchange


def main() -> int:
    """Never returns: teardown of a framework must not turn a good test into a failed one."""
    name_process(f"rank-{os.environ['RANK']}")
    faulthandler.enable()
    answer_stack_signal()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = RankPipe.from_environment()
    code = EXIT_FAILED
    try:
        _run(pipe, json.loads(sys.argv[1]))
        code = EXIT_DONE
    except FtlaunchError as error:
        pipe.send(failure_payload("job", str(error), ""))
    except BaseException as error:  # noqa: BLE001 - whatever ends a rank has to be told
        title = f"{type(error).__name__}: {error}".strip(": ")
        pipe.send(failure_payload("exception", title, traceback.format_exc()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(pipe: RankPipe, told: dict[str, object]) -> None:
    # Its agent reads on from what it has open; nothing is left on this node, however the test ends.
    with contextlib.suppress(OSError):
        Path(str(told["log_path"])).unlink()
    listen_fd = os.environ.pop(LISTEN_FD_VARIABLE, None)
    request = ExchangeRequest(
        world=World.from_environment(os.environ),
        accelerator=str(told["accelerator"]),
        device=int(str(told["device"])),
        num_threads=int(str(told["num_threads"])),
        timeout_seconds=float(str(told["timeout_seconds"])),
        listen_fd=int(listen_fd) if listen_fd is not None else None,
        sizes=tuple(told["sizes"]),  # type: ignore[arg-type]
    )
    module = importlib.import_module(str(told["module"]))
    run_exchange(request, module.open_exchange, pipe.send)
