"""One node's part of a job: detects the machine, holds the port, hears its ranks, reports.

Commands come by stdin, events leave by stdout. One thread, one selector, no framework. The ranks
themselves are children of the machine's fork server. When stdin closes or nothing has been heard
for too long, the coordinator is gone: every rank is ended and so is this process.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from ftlaunch.cluster.addresses import network_name, own_addresses, reaches, way_to
from ftlaunch.cluster.errors import FtlaunchError, UserError
from ftlaunch.cluster.events import (
    AskStacks,
    Bind,
    Bound,
    Event,
    Exited,
    Hello,
    Inspect,
    Kill,
    Killed,
    Leave,
    LineBuffer,
    Ping,
    Pong,
    Prepare,
    RankStart,
    Reach,
    Reached,
    Refused,
    ServerGone,
    ServerReady,
    Signalled,
    Spawn,
    Start,
    Started,
    Stop,
    Suspend,
    decode_command,
    encode_command,
    encode_event,
)
from ftlaunch.cluster.fork_link import JOB_VARIABLE, MAX_SPAWN_BYTES, ForkLink
from ftlaunch.cluster.fork_server import SERVER_NAME
from ftlaunch.cluster.inspection import inspect
from ftlaunch.cluster.linux import (
    Process,
    adopt_orphans,
    command_line,
    kill_exactly,
    name_process,
    processes_with,
    read_process,
)
from ftlaunch.cluster.machine import detect_machine
from ftlaunch.cluster.ports import hold_port
from ftlaunch.cluster.rank_watch import RankWatch
from ftlaunch.cluster.signals import ANNOUNCEMENTS

AGENT_NAME = "ftlaunch-agent"
_READ_BYTES = 1 << 16
_TAIL_SECONDS = 0.1
# Beyond the time of grace; the fork server itself allows the kernel three.
_KILL_SECONDS = 4.0
_STACK_SECONDS = 1.0
# Well within a heartbeat: nothing else is done meanwhile.
_REACH_SECONDS = 1.0
# With so much unsent the ranks have to wait: nothing piles up here.
_MAX_UNSENT_BYTES = 1 << 20
# How soon what the fork server's socket did not take is tried again.
_FLUSH_SECONDS = 0.01


class Agent:
    """The ranks of one node.

    heartbeat_seconds   silence of the coordinator after which it is taken for gone
    """

    def __init__(self, commands: int, events: int, *, heartbeat_seconds: float) -> None:
        self._commands = commands
        self._events = events
        self._heartbeat_seconds = heartbeat_seconds
        self._heard_at: float | None = time.monotonic()
        self._round_at = time.monotonic()
        self._server_heard_at = 0.0
        self._server_pinged_at = 0.0
        self._selector = selectors.DefaultSelector()
        self._watch = RankWatch(
            self._selector, self._send, lambda: len(self._unsent) > _MAX_UNSENT_BYTES
        )
        self._listener: socket.socket | None = None
        self._listener_is_inherited = True
        self._link: ForkLink | None = None
        self._prepare: Prepare | None = None
        self._kill_by: float | None = None
        self._command_lines = LineBuffer()
        self._unsent = bytearray()
        self._signal_reading, self._signal_writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(events, False)

    def run(self) -> None:
        """Serve until the command pipe closes or the coordinator falls silent."""
        machine = detect_machine(os.environ)
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._send(
            Hello(
                machine=machine.to_dict(),
                pid=os.getpid(),
                boot_id=boot_id,
                network=network_name(),
                addresses={own.address: own.interface for own in own_addresses()},
            )
        )
        # Not before: a driver may take its time to answer.
        self._heard_at = self._round_at = time.monotonic()
        self._listen_to(self._commands, self._read_commands)
        self._listen_to(self._signal_reading, self._relay_signals)
        try:
            while not self._is_forsaken():
                for key, _ in self._selector.select(self._next_timeout()):
                    # What came before it in this round may have closed it.
                    if self._selector.get_map().get(key.fd) is key and not key.data():
                        return
                self._look_around()
        finally:
            self._leave()

    def _listen_to(self, descriptor: int, on_ready: Callable[[], bool]) -> None:
        self._selector.register(descriptor, selectors.EVENT_READ, on_ready)

    def _unwatch(self, descriptor: int) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(descriptor)

    def _is_forsaken(self) -> bool:
        now = time.monotonic()
        if now - self._round_at > self._heartbeat_seconds * 2 / 3:
            # This process itself was held up (frozen with all the others, or starved): it cannot
            # know what was said meanwhile.
            self._heard_at = now if self._heard_at is not None else None
            self._server_heard_at = now
        self._round_at = now
        if self._heard_at is None:
            return False
        silence = now - self._heard_at
        if silence <= self._heartbeat_seconds:
            return False
        print(f"nothing heard of the coordinator for {silence:.1f} s", file=sys.stderr)
        return True

    def _next_timeout(self) -> float:
        """Seconds until something is to be done without being asked."""
        now = time.monotonic()
        times = []
        times.append(self._heartbeat_seconds / 3)
        if self._kill_by is not None:
            times.append(self._kill_by - now)
        if (due := self._watch.due_at()) is not None:
            times.append(due - now)
        if self._link is not None and self._link.has_unsent:
            times.append(_FLUSH_SECONDS)
        return max(0.0, min(times))

    def _look_around(self) -> None:
        """What is due by time."""
        now = time.monotonic()
        self._watch.look()
        if self._link is not None:
            self._link.flush()
        self._watch_server(now)
        if self._kill_by is not None and now >= self._kill_by:
            self._kill_by = None
            self._end_server()

    # -- events -----------------------------------------------------------------------------

    def _send(self, event: Event) -> None:
        self._unsent += encode_event(event)
        self._flush()

    def _flush(self) -> bool:
        """Write what the pipe takes; the rest follows when there is room."""
        while self._unsent:
            try:
                del self._unsent[: os.write(self._events, self._unsent)]
            except BlockingIOError:
                if self._events not in self._selector.get_map():
                    self._selector.register(self._events, selectors.EVENT_WRITE, self._flush)
                return True
        self._unwatch(self._events)
        return True

    def note_signal(self, number: int, frame: FrameType | None) -> None:
        """A handler: the scheduler signals every process of a job's step, this one among them."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._signal_writing, bytes([number]))

    def _relay_signals(self) -> bool:
        for number in os.read(self._signal_reading, 64):
            self._send(Signalled(signal=number))
        return True

    # -- commands ---------------------------------------------------------------------------

    def _read_commands(self) -> bool:
        """False when there will be no more."""
        data = os.read(self._commands, _READ_BYTES)
        self._heard_at = time.monotonic()
        for line in self._command_lines.feed(data):
            self._obey(line)
        return bool(data)

    def _obey(self, line: bytes) -> None:
        try:
            command = decode_command(line)
            if isinstance(command, Ping):
                self._send(Pong(echo=command.time, time=time.monotonic()))
            elif isinstance(command, Suspend):
                self._heard_at = None
            elif isinstance(command, Reach):
                self._reach(command)
            elif isinstance(command, Inspect):
                self._send(inspect(command))
            elif isinstance(command, Bind):
                self._bind(command)
            elif isinstance(command, Prepare):
                self._prepare = command
                self._open_link()
            elif isinstance(command, Start):
                self._start(command)
            elif isinstance(command, AskStacks):
                self._watch.ask_stacks()
            elif isinstance(command, Kill):
                self._kill(command)
            elif isinstance(command, Stop) and self._link is not None:
                self._link.send(command)
        except UserError as error:
            self._send(Refused(reason=str(error), user=True))
        except (OSError, ValueError, FtlaunchError) as error:
            self._send(Refused(reason=f"{type(error).__name__}: {error}", user=False))

    def _reach(self, command: Reach) -> None:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(max_workers=max(1, len(command.addresses))) as pool:
            tries = pool.map(
                lambda address: reaches(address, command.port, _REACH_SECONDS), command.addresses
            )
            reasons = dict(zip(command.addresses, tries, strict=True))
        ways = {address: way_to(address) for address in command.addresses}
        interfaces = {address: way.interface for address, way in ways.items() if way is not None}
        self._send(Reached(reasons=reasons, interfaces=interfaces))

    def _bind(self, command: Bind) -> None:
        self._close_listener()
        self._listener = hold_port(command.address, command.port, listens=command.listens)
        self._listener_is_inherited = command.listens
        self._send(Bound(port=self._listener.getsockname()[1]))

    def _close_listener(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    # -- the fork server --------------------------------------------------------------------

    def _open_link(self) -> ForkLink:
        """The connection to a fork server as it was prepared; a new one where the last is gone."""
        if self._prepare is None:
            raise ValueError("ranks are to be started, but nothing was prepared")
        if self._link is not None and self._link.prepare == self._prepare:
            return self._link
        if self._link is not None:
            self._unwatch(self._link.fileno())
            self._link.close()
        self._link = ForkLink.open(self._prepare)
        self._server_heard_at = time.monotonic()
        self._listen_to(self._link.fileno(), self._read_server)
        return self._link

    def _watch_server(self, now: float) -> None:
        """A fork server that hangs neither closes its socket nor tells of ended ranks."""
        if self._link is None:
            return
        if now - self._server_pinged_at > self._heartbeat_seconds / 3:
            self._server_pinged_at = now
            if not self._link.has_unsent:
                self._link.send(Ping(time=now))
        silent = now - self._server_heard_at > self._heartbeat_seconds
        if silent and self._kill_by is None and not self._server_works():
            print(f"fork server silent for {now - self._server_heard_at:.1f} s", file=sys.stderr)
            self._end_server()

    def _server_works(self) -> bool:
        """It runs, or waits for a disk: a library that is loaded in one piece lets it say nothing."""
        if self._link is None or self._link.server_pid is None:
            return False
        process = read_process(self._link.server_pid)
        return process is not None and process.state in "RD"

    def _read_server(self) -> bool:
        assert self._link is not None
        event = self._link.receive()
        self._server_heard_at = time.monotonic()
        if isinstance(event, Pong):
            pass
        elif event is None:
            self._lose_server()
        elif isinstance(event, ServerReady):
            self._link.server_pid = event.pid
            self._send(event)
        elif isinstance(event, Started):
            self._watch.started(event)
            self._send(event)
        elif isinstance(event, Exited):
            self._send(self._watch.exited(event))
        elif isinstance(event, Killed):
            self._kill_by = None
            self._watch.forget_all()
            self._send(event)
        else:
            self._send(event)
        return True

    def _lose_server(self) -> None:
        """Its ranks have ended with it; what they had started is ended here."""
        assert self._link is not None
        now = time.monotonic()
        self._unwatch(self._link.fileno())
        how = self._link.how_it_ended()
        pid = self._link.server_pid or 0
        self._link.close()
        self._link = None
        sweep()
        self._watch.forget_all()
        self._send(ServerGone(pid=pid, how=how, time=now))
        if self._kill_by is not None:
            self._kill_by = None
            self._send(Killed(survivors=[]))

    def _end_server(self) -> None:
        """It does not do as it is told: SIGKILL, by which its ranks end, too."""
        if self._link is None or self._link.server_pid is None:
            return
        process = read_process(self._link.server_pid)
        if process is not None and process.name == SERVER_NAME:
            kill_exactly(process)
        self._kill_by = time.monotonic() + _KILL_SECONDS

    # -- ranks ------------------------------------------------------------------------------

    def _start(self, command: Start) -> None:
        link = self._open_link()
        for start in command.ranks:
            size = len(encode_command(Spawn(rank=start)))
            if size > MAX_SPAWN_BYTES:
                raise UserError(
                    f"the arguments of rank {start.rank} take {size:,} bytes, of which at most "
                    f"{MAX_SPAWN_BYTES:,} can be handed over. Put them into a file and name that."
                )
        for start in command.ranks:
            try:
                self._start_rank(link, start)
            except OSError as error:
                raise UserError(
                    f"{start.log_path}: {error.strerror}. The rank's output goes there: make it "
                    "writable, or choose another folder with --output-dir."
                ) from None
        if self._listener_is_inherited:
            self._close_listener()

    def _start_rank(self, link: ForkLink, start: RankStart) -> None:
        """Hand the fork server the rank's log, a pipe for its events, and the port."""
        log, pipe = self._watch.add(start)
        descriptors = [log, pipe]
        if start.inherits_listener and self._listener is not None:
            descriptors.append(self._listener.fileno())
        # An inherited write end that stays open here would defeat end-of-file.
        try:
            link.send(Spawn(rank=start), descriptors)
        finally:
            os.close(log)
            os.close(pipe)

    def _kill(self, command: Kill) -> None:
        if self._link is None:
            self._send(Killed(survivors=[]))
            return
        grace = 0.0 if command.at_once else self._link.prepare.grace_seconds
        self._kill_by = time.monotonic() + grace + _KILL_SECONDS
        self._link.send(command)

    # -- the end ----------------------------------------------------------------------------

    def _leave(self) -> None:
        """End every rank with all that it started, and wait until they are gone."""
        self._close_listener()
        if self._link is None:
            return
        grace = self._link.prepare.grace_seconds
        self._link.send(Kill(at_once=False))
        deadline = time.monotonic() + grace + _KILL_SECONDS
        gone = False
        while not gone and (left := deadline - time.monotonic()) > 0:
            self._link.flush()
            try:
                event = self._link.receive(_FLUSH_SECONDS if self._link.has_unsent else left)
            except TimeoutError:
                continue
            except ValueError:
                break
            gone = event is None or isinstance(event, Killed)
        if not gone:
            self._end_server()
        self._link.send(Leave())
        self._link.close()
        self._link.wait(2.0)


def sweep() -> None:
    """SIGKILL for everything that carries the job's mark, but for its agents and fork servers."""
    job = os.environ.get(JOB_VARIABLE)
    if job is None:
        return
    for process in list(processes_with(JOB_VARIABLE, job)):
        if process.pid != os.getpid() and not _serves_the_job(process):
            kill_exactly(process)


def _serves_the_job(process: Process) -> bool:
    """An agent or a fork server, also one that has not come to naming itself yet."""
    if process.name in (AGENT_NAME, SERVER_NAME):
        return True
    command = command_line(process.pid)
    if any("ftlaunch.cluster.agent" in word for word in command):
        return True
    # A forked rank has its fork server's command line, but a name of its own from its first moment.
    begins = process.name.startswith("python")
    return begins and any("ftlaunch.cluster.fork_server" in word for word in command)


def main() -> int:
    """Argument: seconds of the coordinator's silence after which it is taken for gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    name_process(AGENT_NAME)
    adopt_orphans()
    agent = Agent(
        commands=sys.stdin.fileno(),
        events=sys.stdout.fileno(),
        heartbeat_seconds=float(sys.argv[1]),
    )
    for number in ANNOUNCEMENTS:
        signal.signal(number, agent.note_signal)
    try:
        agent.run()
    except BrokenPipeError:
        return 1
    return 0
