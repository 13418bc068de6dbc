"""One rank of a user's own script: runs it as `python script.py` would, and tells why it failed.

Nothing is asked of the script. What it prints goes to its log, its exit code is its own.
"""

from __future__ import annotations

import atexit
import builtins
import faulthandler
import importlib.machinery
import os
import runpy
import signal
import sys
import traceback
import types
from pathlib import Path

from ftlaunch.cluster.linux import name_process
from ftlaunch.cluster.rank_pipe import RankPipe, cause_of, ending_payload, failure_payload
from ftlaunch.cluster.stacks import answer_stack_signal

# Whose frames stand above the script's in a traceback, and tell its reader nothing.
_OUTSIDE = (__file__, runpy.__file__, "<frozen runpy>", "<string>")


def main() -> int:
    """Arguments: "path" or "module", which one, and the script's own; "copy" has a sealed copy first."""
    kind, target, *arguments = sys.argv[1:]
    name_process(f"rank-{os.environ['RANK']}")
    faulthandler.enable()
    answer_stack_signal()
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        # Ignored by what has started it. A script may expect them to be as in a shell.
        signal.signal(number, signal.SIG_DFL)
    pipe = RankPipe.from_environment()
    ending = _Ending(pipe)
    _draw_anew()
    try:
        if kind == "module":
            _run_module(target, arguments)
        elif kind == "copy":
            _run_path(arguments[0], arguments[1:], text_path=target)
        else:
            _run_path(target, arguments, text_path=target)
    except SystemExit as leave:
        ending.code = _exit_code(leave.code)
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - whatever ends a rank has to be told
        shown = _from_script(error.__traceback__)
        text = "".join(traceback.format_exception(type(error), error, shown))
        title = f"{type(error).__name__}: {error}".strip(": ")
        pipe.send(failure_payload(cause_of(error), title, text))
        # Whatever hook the script or its libraries have put there.
        sys.excepthook(type(error), error.with_traceback(shown), shown)
        ending.code = 1
        return 1
    ending.code = 0
    return 0


def _draw_anew() -> None:
    """Forked ranks would all draw the numbers that were drawn when their libraries were imported; Python's
    own generator sees to it itself.
    """
    if (numpy_random := sys.modules.get("numpy.random")) is not None:
        numpy_random.seed()
    if (torch := sys.modules.get("torch")) is not None:
        torch.default_generator.seed()
    if (processes := sys.modules.get("multiprocessing.process")) is not None:
        processes.current_process().authkey = os.urandom(32)


class _Ending:
    """Says with which exit code the rank leaves, when nothing is left to do but to take it down.

    Libraries can abort while the interpreter is taken down, long after the script has done its work
    (torch's process groups do, now and then): the code that it had by then is the true one.
    """

    def __init__(self, pipe: RankPipe) -> None:
        self.code: int | None = None
        self._pipe = pipe
        self._pid = os.getpid()
        # The first to be registered is the last to be called.
        atexit.register(self._tell)

    def _tell(self) -> None:
        # A process that the script has forked has this function, too.
        if self.code is not None and os.getpid() == self._pid:
            self._pipe.send(ending_payload(self.code))


def _exit_code(code: object) -> int:
    """Of a SystemExit, as the interpreter takes it."""
    if code is None:
        return 0
    return code & 0xFF if isinstance(code, int) else 1


def _run_path(path: str, arguments: list[str], *, text_path: str) -> None:
    """As `python PATH` would, with the text of another file: its names and folder are those of `path`."""
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).resolve().parent))
    module = types.ModuleType("__main__")
    file = str(Path(path).absolute())
    module.__file__ = file
    module.__spec__ = None
    module.__loader__ = importlib.machinery.SourceFileLoader("__main__", file)
    vars(module).update(__builtins__=builtins, __cached__=None, __package__=None)
    # The script is what multiprocessing and pickle have to find under this name.
    sys.modules["__main__"] = module
    # Named after the file that was read: a traceback shows its lines.
    name = file if text_path == path else str(Path(text_path).absolute())
    code = compile(Path(text_path).read_bytes(), name, "exec", dont_inherit=True)
    exec(code, vars(module))


def _run_module(name: str, arguments: list[str]) -> None:
    sys.argv = [name, *arguments]
    sys.path.insert(0, str(Path.cwd()))
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _from_script(trace: types.TracebackType | None) -> types.TracebackType | None:
    """A traceback without the frames of whoever ran the script."""
    shown = trace
    while shown is not None and _is_outside(shown):
        shown = shown.tb_next
    return shown if shown is not None else trace


def _is_outside(trace: types.TracebackType) -> bool:
    name = trace.tb_frame.f_code.co_filename
    return name in _OUTSIDE or name.endswith((f"cluster{os.sep}fork_server.py",))
