"""What travels between coordinator, agents and ranks: typed messages as JSON lines over pipes.

Three pipes: commands go down an agent's stdin, events come up its stdout behind a prefix (so that
what a login shell prints is not taken for one), and a rank tells its agent over a pipe of its own.
What a rank's payload means is not known here, but for "failed".
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

EVENT_PREFIX = b"\x1eftlaunch "
# A line that does not end is not kept for ever.
MAX_LINE_BYTES = 4 * 1024 * 1024
MAX_TRACEBACK_CHARS = 4000
EVENT_FD_VARIABLE = "FTLAUNCH_EVENT_FD"
LISTEN_FD_VARIABLE = "FTLAUNCH_LISTEN_FD"


# -- commands: coordinator → agent --------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Bind:
    """Hold a listening socket for the rendezvous; port 0 lets the agent choose."""

    kind: ClassVar[str] = "bind"
    address: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStart:
    """One rank to start: its command, what it adds to the environment, where its output goes."""

    rank: int
    argv: list[str]
    env: dict[str, str]
    log_path: str
    inherits_listener: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    kind: ClassVar[str] = "start"
    ranks: list[RankStart]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Ask every rank to stop at its next step boundary (SIGTERM)."""

    kind: ClassVar[str] = "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """End every rank and all that it started, now."""

    kind: ClassVar[str] = "kill"


# -- events: agent → coordinator ----------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    kind: ClassVar[str] = "hello"
    machine: dict[str, Any]
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    kind: ClassVar[str] = "bound"
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FromRank:
    """What a rank said."""

    kind: ClassVar[str] = "from_rank"
    rank: int
    payload: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exited:
    """A rank is gone: with an exit code, or by a signal."""

    kind: ClassVar[str] = "exited"
    rank: int
    code: int | None
    signal: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Killed:
    """Every rank that this agent had is gone."""

    kind: ClassVar[str] = "killed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The agent could not carry out a command; `user` when the user can mend it."""

    kind: ClassVar[str] = "refused"
    reason: str
    user: bool


Command = Bind | Start | Stop | Kill
Event = Hello | Bound | FromRank | Exited | Killed | Refused
_COMMANDS: dict[str, type[Any]] = {c.kind: c for c in (Bind, Start, Stop, Kill)}
_EVENTS: dict[str, type[Any]] = {
    e.kind: e for e in (Hello, Bound, FromRank, Exited, Killed, Refused)
}


def encode_command(command: Command) -> bytes:
    return _encode(command)


def encode_event(event: Event) -> bytes:
    return EVENT_PREFIX + _encode(event)


def decode_command(line: bytes) -> Command:
    """ValueError for anything malformed."""
    command = _decode(line, _COMMANDS)
    if isinstance(command, Start):
        return Start(ranks=[RankStart(**raw) for raw in command.ranks])  # type: ignore[arg-type]
    return command  # type: ignore[no-any-return]


def decode_event(line: bytes) -> Event | None:
    """None for a line that is not an event; ValueError for one that pretends to be."""
    if not line.startswith(EVENT_PREFIX):
        return None
    return _decode(line[len(EVENT_PREFIX) :], _EVENTS)  # type: ignore[no-any-return]


def _encode(message: Command | Event) -> bytes:
    return json.dumps({"kind": message.kind, **asdict(message)}).encode() + b"\n"


def _decode(line: bytes, kinds: Mapping[str, type[Any]]) -> Any:
    raw = json.loads(line)
    if not isinstance(raw, dict) or raw.get("kind") not in kinds:
        raise ValueError(f"unknown message: {line[:200]!r}")
    try:
        return kinds[raw.pop("kind")](**raw)
    except TypeError as error:
        raise ValueError(f"malformed message: {error}") from None


# -- rank → agent -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a rank failed, in its own words or in those of its exit.

    cause   "user" (a mistake in what was asked for), "exception", "exit" or "signal"
    """

    rank: int
    node: str
    cause: str
    title: str
    traceback: str
    log_path: str


def failure_payload(cause: str, title: str, traceback: str) -> dict[str, Any]:
    """The payload by which a rank says why it fails. The whole traceback is in the rank's log."""
    return {
        "kind": "failed",
        "cause": cause,
        "title": title[:MAX_TRACEBACK_CHARS],
        "traceback": traceback[-MAX_TRACEBACK_CHARS:],
    }


class RankPipe:
    """A rank's end of the pipe to its agent. Writes nowhere when there is no agent."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    @classmethod
    def from_environment(cls) -> RankPipe:
        value = os.environ.pop(EVENT_FD_VARIABLE, None)
        return cls(int(value) if value is not None else None)

    def send(self, payload: Mapping[str, Any]) -> None:
        """Blocks while the pipe is full. An agent that is gone kills us; nothing to handle here."""
        if self._descriptor is None:
            return
        line = json.dumps(payload).encode() + b"\n"
        view = memoryview(line)
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except BrokenPipeError:
            self._descriptor = None


# -- lines --------------------------------------------------------------------------------------


@dataclass(slots=True)
class LineBuffer:
    """Cuts what a descriptor gives into lines; drops a line that grows without end."""

    _pending: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> Iterator[bytes]:
        self._pending += data
        *lines, rest = self._pending.split(b"\n")
        self._pending = bytearray(rest if len(rest) <= MAX_LINE_BYTES else b"")
        for line in lines:
            yield bytes(line)
