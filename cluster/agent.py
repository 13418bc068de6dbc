"""One node's part of a job: detects the machine, holds the port, starts ranks, reports, kills.

Commands come by stdin, events leave by stdout. One thread, one selector, no framework. When stdin
closes, the coordinator is gone: every rank is ended and so is this process.
"""

from __future__ import annotations

import ctypes
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.events import (
    EVENT_FD_VARIABLE,
    LISTEN_FD_VARIABLE,
    Bind,
    Bound,
    Event,
    Exited,
    FromRank,
    Hello,
    Kill,
    Killed,
    LineBuffer,
    RankStart,
    Refused,
    Start,
    Stop,
    decode_command,
    encode_event,
)
from ftlaunch.cluster.machine import detect_machine
from ftlaunch.cluster.ports import hold_port

_PR_SET_PDEATHSIG = 1
_READ_BYTES = 1 << 16
# After SIGKILL a process can only be held up by the kernel (a dead file server, a driver).
_REAP_SECONDS = 5.0


@dataclass(slots=True)
class _Rank:
    rank: int
    process: subprocess.Popen[bytes]
    pipe: int
    pidfd: int
    lines: LineBuffer = field(default_factory=LineBuffer)


class Agent:
    """The ranks of one node."""

    def __init__(self, commands: int, events: int) -> None:
        self._commands = commands
        self._events = events
        self._selector = selectors.DefaultSelector()
        self._ranks: dict[int, _Rank] = {}
        self._listener: socket.socket | None = None
        self._command_lines = LineBuffer()

    def run(self) -> None:
        """Serve until the command pipe closes."""
        machine = detect_machine(os.environ)
        self._send(Hello(machine=machine.to_dict(), pid=os.getpid()))
        self._watch(self._commands, self._read_commands)
        try:
            while self._selector.get_map():
                for key, _ in self._selector.select():
                    # What came before it in this round may have closed it.
                    if self._selector.get_map().get(key.fd) is key and not key.data():
                        return
        finally:
            self._kill_all()

    def _watch(self, descriptor: int, on_ready: Callable[[], bool]) -> None:
        self._selector.register(descriptor, selectors.EVENT_READ, on_ready)

    def _send(self, event: Event) -> None:
        view = memoryview(encode_event(event))
        while view:
            view = view[os.write(self._events, view) :]

    # -- commands ---------------------------------------------------------------------------

    def _read_commands(self) -> bool:
        """False when there will be no more."""
        data = os.read(self._commands, _READ_BYTES)
        for line in self._command_lines.feed(data):
            self._obey(line)
        return bool(data)

    def _obey(self, line: bytes) -> None:
        try:
            command = decode_command(line)
            if isinstance(command, Bind):
                self._bind(command)
            elif isinstance(command, Start):
                for rank in command.ranks:
                    self._start(rank)
                self._close_listener()
            elif isinstance(command, Stop):
                for each in self._ranks.values():
                    each.process.send_signal(signal.SIGTERM)
            else:
                assert isinstance(command, Kill)
                self._kill_all()
                self._send(Killed())
        except UserError as error:
            self._send(Refused(reason=str(error), user=True))
        except (OSError, ValueError) as error:
            self._send(Refused(reason=f"{type(error).__name__}: {error}", user=False))

    def _bind(self, command: Bind) -> None:
        self._close_listener()
        self._listener = hold_port(command.address, command.port)
        self._send(Bound(port=self._listener.getsockname()[1]))

    def _close_listener(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _start(self, start: RankStart) -> None:
        """Start one rank in a session of its own, its output to its log, a pipe for its events."""
        reading, writing = os.pipe()
        inherited = [writing]
        env = {**os.environ, **start.env, EVENT_FD_VARIABLE: str(writing)}
        if start.inherits_listener and self._listener is not None:
            inherited.append(self._listener.fileno())
            env[LISTEN_FD_VARIABLE] = str(self._listener.fileno())
        try:
            with open(start.log_path, "ab") as log:
                process = subprocess.Popen(
                    start.argv,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=env,
                    pass_fds=inherited,
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )
        except OSError:
            os.close(reading)
            raise
        finally:
            # An inherited write end that stays open here would defeat end-of-file.
            os.close(writing)
        rank = _Rank(start.rank, process, reading, os.pidfd_open(process.pid))
        self._ranks[start.rank] = rank
        self._watch(rank.pipe, lambda: self._read_rank(rank))
        self._watch(rank.pidfd, lambda: self._reap(rank))

    # -- ranks ------------------------------------------------------------------------------

    def _read_rank(self, rank: _Rank) -> bool:
        data = os.read(rank.pipe, _READ_BYTES)
        if not data:
            self._selector.unregister(rank.pipe)
        for line in rank.lines.feed(data):
            try:
                payload = json.loads(line)
            except ValueError:
                continue
            if isinstance(payload, dict):
                self._send(FromRank(rank=rank.rank, payload=payload))
        return True

    def _reap(self, rank: _Rank) -> bool:
        """Report an exit, after everything that the rank had still said."""
        code = rank.process.wait()
        os.set_blocking(rank.pipe, False)
        try:
            while rank.pipe in self._selector.get_map():
                self._read_rank(rank)
        except BlockingIOError:
            # Something that the rank started still holds the pipe.
            self._selector.unregister(rank.pipe)
        self._forget(rank)
        _kill_group(rank.process.pid)
        gone_by_signal = code < 0
        self._send(
            Exited(
                rank=rank.rank,
                code=None if gone_by_signal else code,
                signal=-code if gone_by_signal else None,
            )
        )
        return True

    def _forget(self, rank: _Rank) -> None:
        for descriptor in (rank.pipe, rank.pidfd):
            if descriptor in self._selector.get_map():
                self._selector.unregister(descriptor)
            os.close(descriptor)
        del self._ranks[rank.rank]

    def _kill_all(self) -> None:
        """End every rank with all of its process group, and wait until they are gone."""
        for rank in self._ranks.values():
            _kill_group(rank.process.pid)
        deadline = time.monotonic() + _REAP_SECONDS
        for rank in list(self._ranks.values()):
            try:
                rank.process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                print(f"rank {rank.rank} survives SIGKILL", file=sys.stderr)
            self._forget(rank)


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _die_with_parent() -> None:
    """Between fork and exec: if the agent is killed, the kernel kills the rank."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        Agent(commands=sys.stdin.fileno(), events=sys.stdout.fileno()).run()
    except BrokenPipeError:
        return 1
    return 0
