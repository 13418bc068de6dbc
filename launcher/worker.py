"""One rank of a job: reads the plan, does the work, tells its agent how it went."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftlaunch.cluster.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_USER_MISTAKE,
    FtlaunchError,
    UserError,
)
from ftlaunch.cluster.linux import name_process
from ftlaunch.cluster.rank_pipe import LISTEN_FD_VARIABLE, RankPipe, cause_of, failure_payload
from ftlaunch.cluster.stacks import answer_stack_signal
from ftlaunch.cluster.world import World
from ftlaunch.launcher.plan import LaunchPlan
from ftlaunch.strategies.progress import Progress, to_dict
from ftlaunch.strategies.startup import Stages


class StopFlag:
    """SIGTERM as a flag that the loop reads; before there is anything to save, it ends the rank."""

    def __init__(self) -> None:
        self._requested = False
        self.ends_at_once = True
        signal.signal(signal.SIGTERM, self._request)
        # A scheduler's announcement: the coordinator hears of it, and asks all ranks to stop.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        # Ctrl-C at the terminal is the coordinator's to handle.
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def requested(self) -> bool:
        return self._requested

    def _request(self, number: int, frame: Any) -> None:
        self._requested = True
        if self.ends_at_once:
            os._exit(EXIT_STOPPED)


def main() -> int:
    """Never returns: teardown of a framework must not turn a finished job into a failed one."""
    name_process(f"rank-{os.environ['RANK']}")
    faulthandler.enable()
    answer_stack_signal()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    pipe = RankPipe.from_environment()
    code = EXIT_FAILED
    try:
        code = _run(pipe, Path(sys.argv[1]))
    except UserError as error:
        pipe.send(failure_payload("user", str(error), ""))
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_USER_MISTAKE
    except FtlaunchError as error:
        pipe.send(failure_payload("job", str(error), ""))
        traceback.print_exc()
    except BaseException as error:  # noqa: BLE001 - whatever ends a rank has to be told
        if cause_of(error) == "memory":
            # Telling takes memory, too: what the frames hold is given back first.
            traceback.clear_frames(error.__traceback__)
        text = traceback.format_exc()
        title = f"{type(error).__name__}: {error}".strip(": ")
        pipe.send(failure_payload(cause_of(error), title, text))
        print(text, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(pipe: RankPipe, plan_path: Path) -> int:
    stages = Stages("imports")
    stop = StopFlag()
    plan = LaunchPlan.read(plan_path)
    world = World.from_environment(os.environ)
    listen_fd = os.environ.pop(LISTEN_FD_VARIABLE, None)

    def emit(message: Progress) -> None:
        pipe.send(to_dict(message))

    from ftlaunch.strategies import session

    started = time.perf_counter()
    run: Callable[..., bool] = session.train if plan.mode == "train" else session.evaluate
    if plan.mode == "bench":
        from ftlaunch.strategies.measurement import measure

        run = measure
    stopped = run(
        session.SessionRequest(
            options=plan.options,
            output_dir=Path(plan.output_dir),
            strategy=plan.strategy,
            precision=plan.precision,
            accelerator=plan.accelerator,
            device=_device(plan, world),
            micro_batch=plan.micro_batch,
            max_tokens=plan.max_tokens_per_micro_batch,
            eval_micro_batch=plan.eval_micro_batch,
            eval_max_tokens=plan.eval_max_tokens,
            prove_micro_batch=plan.prove_micro_batch,
            num_threads=plan.threads_per_rank,
            timeout_seconds=plan.cluster.collective_timeout_seconds,
            world=world,
            listen_fd=int(listen_fd) if listen_fd is not None else None,
            stages=stages,
            preload_seconds=pipe.preload_seconds,
        ),
        emit=emit,
        stop=stop,
    )
    logging.getLogger(__name__).info(
        "rank %d is done after %.1f s", world.rank, time.perf_counter() - started
    )
    return EXIT_STOPPED if stopped else EXIT_DONE


def _device(plan: LaunchPlan, world: World) -> int:
    npus = plan.hosts[world.node_rank].npus
    return npus[world.local_rank] if npus else world.local_rank
