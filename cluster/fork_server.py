"""The parent of every rank of a machine: imports once, forks, reaps, and ends what it started.

It belongs to the agents that are connected to it, one for each node that is played here. When a
connection closes its ranks are ended; when the last one has, so is this process. It starts no
thread, calls no accelerator's driver and runs no parallel region, so that a fork of it is as good
as a fresh interpreter. With the start method "exec" it imports nothing, and a rank is one.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from ftlaunch.cluster.events import (
    Event,
    Exited,
    Kill,
    Killed,
    Leave,
    Ping,
    Pong,
    RankStart,
    Refused,
    ServerReady,
    Spawn,
    Started,
    StartMethod,
    Stop,
    decode_command,
    encode_server_event,
)
from ftlaunch.cluster.linux import (
    Process,
    adopt_orphans,
    name_process,
    process_table,
)
from ftlaunch.cluster.process_tree import end_families, end_processes
from ftlaunch.cluster.rank_pipe import PRELOAD_VARIABLE
from ftlaunch.cluster.rank_process import become_rank
from ftlaunch.cluster.signals import ANNOUNCEMENTS

SERVER_NAME = "ftlaunch-forks"
MAX_MESSAGE_BYTES = 1 << 18
# How long it waits for an agent that takes the place of the last one.
_LINGER_SECONDS = 2.0
# While it imports it looks up this often.
_BREATH_SECONDS = 0.25
# After SIGKILL a process can only be held up by the kernel (a dead file server, a driver).
_REAP_SECONDS = 3.0
_MAX_DESCRIPTORS = 3


@dataclass(slots=True)
class _Connection:
    """One agent, and the ranks that were started for it: pid → rank."""

    socket: socket.socket
    ranks: dict[int, int] = field(default_factory=dict)
    # When SIGTERM has been sent and patience ends.
    kill_at: float | None = None
    # The agent has closed its end; the connection stays until its ranks are gone.
    closed: bool = False

    def send(self, event: Event) -> None:
        """An agent that is gone is noticed where its messages are read."""
        with contextlib.suppress(OSError):
            self.socket.send(encode_server_event(event))


class ForkServer:
    """One process: a loop over its agents' messages and its children's ends."""

    def __init__(
        self, listener: socket.socket, *, method: StartMethod, grace_seconds: float
    ) -> None:
        self._listener = listener
        self._listener.setblocking(False)
        self._method: StartMethod = method
        self._grace_seconds = grace_seconds
        self._connections: list[_Connection] = []
        self._alone_since = time.monotonic()
        self._linger_seconds = _LINGER_SECONDS
        self._wake_reading, self._wake_writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    # -- importing --------------------------------------------------------------------------

    def preload(self, modules: Sequence[str]) -> None:
        """Import; what cannot be imported is told by the rank that needs it.

        A module that failed on the way leaves parts of itself behind, on which importing it again would
        fail for another reason: then every rank becomes a fresh interpreter.
        """
        # Objects that live for ever are not worth looking at, and looking would copy their pages. Nor is
        # what is unreachable by now: a few thousand small objects of 400,000, found in 0.4 s.
        started = time.monotonic()
        gc.disable()
        with self._looking_up():
            for module in modules:
                try:
                    importlib.import_module(module)
                except Exception as error:  # noqa: BLE001 - whatever a library does on import
                    print(f"preload {module}: {type(error).__name__}: {error}", file=sys.stderr)
                    if not _is_absent(module, error):
                        self._method = "exec"
        gc.freeze()
        gc.enable()
        if modules and self._method == "fork":
            os.environ[PRELOAD_VARIABLE] = f"{time.monotonic() - started:.4f}"
        threads = len(list(Path("/proc/self/task").iterdir()))
        if threads > 1:
            print(f"{threads} threads run before the first fork", file=sys.stderr)

    @contextlib.contextmanager
    def _looking_up(self) -> Iterator[None]:
        """Answer agents, and end with the last of them, between two lines of somebody's import."""

        def look_up(number: int, frame: FrameType | None) -> None:
            self._accept()
            for connection in list(self._connections):
                if _has_hung_up(connection.socket):
                    self._close(connection)
                else:
                    connection.send(Pong(echo=0.0, time=time.monotonic()))
            if self._is_over():
                os._exit(0)

        signal.signal(signal.SIGALRM, look_up)
        # A library's own system call is begun again, as if nothing had been.
        signal.siginterrupt(signal.SIGALRM, False)
        signal.setitimer(signal.ITIMER_REAL, 0.001, _BREATH_SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)

    # -- the loop ---------------------------------------------------------------------------

    def serve(self) -> Callable[[], int] | None:
        """None when the last agent has gone; in a forked child, what it has to call."""
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(self._wake_writing, warn_on_full_buffer=False)
        while not self._is_over():
            for descriptor in self._ready():
                if descriptor == self._wake_reading:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake_reading, 1 << 12)
                elif descriptor == self._listener.fileno():
                    self._accept()
                else:
                    child = self._read(self._connection_of(descriptor))
                    if child is not None:
                        return child
            self._reap()
            self._lose_patience()
            self._drop_closed()
        end_processes(self._adopted(process_table()))
        return None

    def _ready(self) -> list[int]:
        poll = select.poll()
        sockets = [each.socket for each in self._connections if not each.closed]
        poll.register(self._wake_reading, select.POLLIN)
        for each in (self._listener, *sockets):
            poll.register(each, select.POLLIN)
        return [descriptor for descriptor, _ in poll.poll(self._next_timeout())]

    def _next_timeout(self) -> float | None:
        """Milliseconds until something is to be done without being asked."""
        times = [c.kill_at for c in self._connections if c.kill_at is not None]
        if not self._connections:
            times.append(self._alone_since + self._linger_seconds)
        return max(0.0, min(times) - time.monotonic()) * 1000 + 1 if times else None

    def _is_over(self) -> bool:
        return not self._connections and time.monotonic() > self._alone_since + self._linger_seconds

    def _connection_of(self, descriptor: int) -> _Connection:
        return next(c for c in self._connections if c.socket.fileno() == descriptor)

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            # The name of the socket is no secret: anyone on the machine may try.
            if uid_of(peer) != os.getuid():
                peer.close()
                continue
            peer.setblocking(True)
            for left in [each for each in self._connections if each.closed]:
                # Somebody takes its agent's place: the next attempt is not to meet these ranks.
                self._kill(left)
            connection = _Connection(peer)
            self._connections.append(connection)
            connection.send(ServerReady(pid=os.getpid()))

    def _read(self, connection: _Connection) -> Callable[[], int] | None:
        try:
            data, descriptors, _, _ = socket.recv_fds(
                connection.socket, MAX_MESSAGE_BYTES, _MAX_DESCRIPTORS
            )
        except OSError:
            data, descriptors = b"", []
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        try:
            if not data:
                self._close(connection)
                return None
            return self._obey(connection, data, descriptors)
        except (OSError, ValueError) as error:
            connection.send(Refused(reason=f"{type(error).__name__}: {error}", user=False))
            return None
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _obey(
        self, connection: _Connection, data: bytes, descriptors: list[int]
    ) -> Callable[[], int] | None:
        command = decode_command(data)
        if isinstance(command, Spawn):
            return self._spawn(connection, command.rank, descriptors)
        if isinstance(command, Ping):
            connection.send(Pong(echo=command.time, time=time.monotonic()))
        elif isinstance(command, Stop):
            self._signal(connection, command.signal)
        elif isinstance(command, Kill):
            self._end(connection, 0.0 if command.at_once else self._grace_seconds)
        elif isinstance(command, Leave):
            self._linger_seconds = 0.0
        return None

    # -- ranks ------------------------------------------------------------------------------

    def _spawn(
        self, connection: _Connection, start: RankStart, descriptors: list[int]
    ) -> Callable[[], int] | None:
        server = os.getpid()
        pid = os.fork()
        if pid:
            connection.ranks[pid] = start.rank
            connection.send(Started(rank=start.rank, pid=pid))
            return None
        # Whatever goes wrong here must not climb back into the server's loop.
        try:
            log, pipe, *listener = (os.dup(descriptor) for descriptor in descriptors)
            self._leave_to_child()
            return become_rank(
                start,
                self._method,
                parent=server,
                log=log,
                pipe=pipe,
                listener=listener[0] if listener else None,
            )
        except BaseException as error:  # noqa: BLE001
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(127)

    def _leave_to_child(self) -> None:
        """Close what is the server's own: an inherited end would defeat end-of-file elsewhere."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for connection in self._connections:
            connection.socket.close()
        self._listener.close()
        os.close(self._wake_reading)
        os.close(self._wake_writing)

    def _reap(self) -> None:
        """Report every rank that has ended; orphans that were adopted only have to be waited for."""
        while True:
            try:
                # Not reaped yet: its number is what its session is known by.
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            pid, now = ended.si_pid, time.monotonic()
            connection = next((c for c in self._connections if pid in c.ranks), None)
            left = _end_session(pid) if connection is not None else 0
            _, status = os.waitpid(pid, 0)
            if connection is not None:
                self._report(connection, pid, status, now, left)

    def _report(
        self, connection: _Connection, pid: int, status: int, now: float, left: int
    ) -> None:
        """What the rank left in its session has ended; what has left that ends with the last rank."""
        rank = connection.ranks.pop(pid)
        adopted = [p for p in self._adopted(process_table()) if p.session != pid]
        if not any(each.ranks for each in self._connections):
            end_processes(adopted)
        by_signal = os.WIFSIGNALED(status)
        connection.send(
            Exited(
                rank=rank,
                code=None if by_signal else os.WEXITSTATUS(status),
                signal=os.WTERMSIG(status) if by_signal else None,
                time=now,
                left_behind=left + len(adopted),
            )
        )
        if not connection.ranks and connection.kill_at is not None:
            connection.kill_at = None
            connection.send(Killed(survivors=[]))

    def _adopted(self, table: dict[int, Process]) -> list[Process]:
        """Live children that are no rank: what ranks started and left behind."""
        ranks = {pid for each in self._connections for pid in each.ranks}
        mine = (p for p in table.values() if p.parent == os.getpid())
        return [p for p in mine if p.is_alive and p.pid not in ranks]

    def _signal(self, connection: _Connection, number: int) -> None:
        for pid, rank in connection.ranks.items():
            # Who serves the ranks is needed until they are gone.
            if rank >= 0:
                os.kill(pid, number)

    def _end(self, connection: _Connection, grace_seconds: float) -> None:
        """End the ranks of a connection: SIGTERM and patience first, where there is some."""
        if not connection.ranks:
            connection.send(Killed(survivors=[]))
        elif grace_seconds > 0:
            self._signal(connection, signal.SIGTERM)
            connection.kill_at = time.monotonic() + grace_seconds
        else:
            self._kill(connection)

    def _lose_patience(self) -> None:
        for connection in list(self._connections):
            if connection.kill_at is None:
                continue
            served = any(rank >= 0 for rank in connection.ranks.values())
            if time.monotonic() >= connection.kill_at or not served:
                self._kill(connection)

    def _kill(self, connection: _Connection) -> None:
        """SIGKILL for the ranks, all below them and all in their sessions; returns when they are gone."""
        connection.kill_at = None
        pids = set(connection.ranks)
        survivors = end_families(pids, seconds=_REAP_SECONDS)
        self._reap()
        for pid in pids & set(connection.ranks):
            del connection.ranks[pid]
        if not any(each.ranks for each in self._connections):
            end_processes(self._adopted(process_table()))
        connection.send(Killed(survivors=survivors))

    def _close(self, connection: _Connection) -> None:
        """Its agent is gone. A script may still clean up, within the time of grace."""
        connection.closed = True
        if _leads_elsewhere(sys.stderr.fileno()):
            # The one that takes its place will have another environment, and a server of its own;
            # and what has led to this one stays until nobody holds its end.
            self._linger_seconds = 0.0
        if connection.ranks and connection.kill_at is None:
            self._end(connection, self._grace_seconds)
        self._drop_closed()

    def _drop_closed(self) -> None:
        for connection in [c for c in self._connections if c.closed and not c.ranks]:
            connection.socket.close()
            self._connections.remove(connection)
            self._alone_since = time.monotonic()


def _end_session(leader: int) -> int:
    """End what a rank that has ended left in its session; how many processes that were."""
    left = [p for p in process_table().values() if p.session == leader and p.is_alive]
    end_processes(left)
    return len(left)


def _leads_elsewhere(descriptor: int) -> bool:
    """Not a file: the agent was started through sshd or slurmstepd."""
    mode = os.fstat(descriptor).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def uid_of(peer: socket.socket) -> int:
    """The user at the other end of a Unix socket, by the kernel's word."""
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return int(uid)


def _is_absent(module: str, error: Exception) -> bool:
    """There is no such module, so that nothing of it was begun."""
    return (
        isinstance(error, ModuleNotFoundError)
        and error.name is not None
        and f"{module}.".startswith(f"{error.name}.")
    )


def _has_hung_up(peer: socket.socket) -> bool:
    try:
        return peer.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def main() -> int:
    """Arguments: the listening descriptor, and what `Prepare` says, as JSON."""
    request = json.loads(sys.argv[1])
    # A scheduler signals every process of a job's step. What follows from that is the coordinator's
    # to say, and the ranks' to do.
    for number in (signal.SIGINT, *ANNOUNCEMENTS):
        signal.signal(number, signal.SIG_IGN)
    name_process(SERVER_NAME)
    adopt_orphans()
    server = ForkServer(
        socket.socket(fileno=request["listener"]),
        method=request["start_method"],
        grace_seconds=request["grace_seconds"],
    )
    server.preload(request["preload"])
    child = server.serve()
    if child is None:
        # To take down all that was imported takes a second or more, for which its agent would wait.
        sys.stderr.flush()
        os._exit(0)
    return child()
