"""What a process does between its fork from the fork server and the first line of its own work."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable

from ftlaunch.cluster.events import RankStart, StartMethod
from ftlaunch.cluster.linux import die_with_parent, name_process
from ftlaunch.cluster.rank_pipe import EVENT_FD_VARIABLE, LISTEN_FD_VARIABLE
from ftlaunch.cluster.transport import python_command

# Python ignores these two; what it starts should not.
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)


def become_rank(
    start: RankStart, method: StartMethod, *, parent: int, log: int, pipe: int, listener: int | None
) -> Callable[[], int]:
    """Turn the forked child into a rank; returns what it has to call, or does not return ("exec").

    log, pipe, listener   descriptors that it was given; it holds no other but those of its preload
    """
    os.setsid()
    die_with_parent(parent)
    if start.rank >= 0:
        # What serves the ranks goes on ignoring it: it is ended when they have stopped.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    name_process(f"rank-{start.rank}" if start.rank >= 0 else "rank-helper")
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    for descriptor in {null, log} - {0, 1, 2}:
        os.close(descriptor)
    if start.working_dir is not None:
        os.chdir(start.working_dir)
    os.environ.update(start.env)
    os.environ[EVENT_FD_VARIABLE] = str(pipe)
    if listener is not None:
        os.environ[LISTEN_FD_VARIABLE] = str(listener)
    if method == "exec":
        os.set_inheritable(pipe, True)
        if listener is not None:
            os.set_inheritable(listener, True)
        for number in (*_IGNORED_BY_PYTHON, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        command = python_command(start.module, *start.arguments)
        os.execv(command[0], command)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # What a fresh interpreter with PYTHONUNBUFFERED does to its streams.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, write_through=True)  # type: ignore[union-attr]
    sys.argv = [start.module, *start.arguments]
    main: Callable[[], int] = importlib.import_module(start.module).main
    return main
