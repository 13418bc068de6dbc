"""What travels between coordinator, agents and fork servers: typed messages as JSON.

Commands go down an agent's stdin, events come up its stdout behind a prefix (so that what a login
shell prints is not taken for one). An agent hands commands about ranks on to the fork server of its
machine and the events of that back to the coordinator. What ranks say is `cluster.rank_pipe`'s.

All times are of the sender's CLOCK_MONOTONIC.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args

EVENT_PREFIX = b"\x1eftlaunch "
# A line that does not end is not kept for ever.
MAX_LINE_BYTES = 4 * 1024 * 1024
StartMethod = Literal["fork", "exec"]


# -- commands: coordinator → agent, and on to the fork server -----------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """A sign of life, to be answered by a Pong."""

    kind: ClassVar[str] = "ping"
    time: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspend:
    """The coordinator is being stopped by its user (Ctrl-Z): its silence means nothing until a Ping."""

    kind: ClassVar[str] = "suspend"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare:
    """Have a fork server ready for the ranks that will follow.

    env            what it and every rank have beside the agent's own environment
    preload        modules that it imports before it forks; none for the start method "exec"
    grace_seconds  between SIGTERM and SIGKILL when ranks are ended; 0: no SIGTERM
    """

    kind: ClassVar[str] = "prepare"
    start_method: StartMethod
    env: dict[str, str]
    preload: list[str]
    grace_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bind:
    """Hold a socket for the rendezvous; port 0 lets the agent choose.

    listens   it is inherited by who serves there; else it only keeps the port until then, for one
              that opens a socket of its own and lets an address be bound twice (SO_REUSEADDR)
    """

    kind: ClassVar[str] = "bind"
    address: str
    port: int
    listens: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """Try to connect to another node, which listens on every one of its addresses."""

    kind: ClassVar[str] = "reach"
    addresses: list[str]
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspect:
    """Look for what the job needs on this node.

    paths    files and folders that ranks will read
    folder   the output folder, in which a file `token` lies; another, named after it and `node`,
             is to be put beside it
    """

    kind: ClassVar[str] = "inspect"
    paths: list[str]
    folder: str
    token: str
    node: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStart:
    """One process to start: a rank, or below zero one that serves the ranks and ends with them.

    title          what a process that serves the ranks is called when it is told of; "" for a rank
    module         whose main() it runs; `arguments` become sys.argv[1:]
    env            what it has beside what was prepared
    working_dir    None: the agent's own
    shows_output   its output is sent to the coordinator, too
    """

    rank: int
    title: str
    module: str
    arguments: list[str]
    env: dict[str, str]
    working_dir: str | None
    log_path: str
    inherits_listener: bool
    shows_output: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    kind: ClassVar[str] = "start"
    ranks: list[RankStart]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spawn:
    """Agent → fork server, with descriptors: the log, the event pipe and, if inherited, the listener."""

    kind: ClassVar[str] = "spawn"
    rank: RankStart


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Ask every rank to stop: a signal that it may handle."""

    kind: ClassVar[str] = "stop"
    signal: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """End every rank and all that it started: after the time of grace, or `at_once`."""

    kind: ClassVar[str] = "kill"
    at_once: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave:
    """Agent → fork server: the job is over, nobody will take my place."""

    kind: ClassVar[str] = "leave"


@dataclass(frozen=True, slots=True, kw_only=True)
class AskStacks:
    """Ask every rank where it is."""

    kind: ClassVar[str] = "ask_stacks"


# -- events: fork server → agent → coordinator --------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """An agent is there.

    boot_id    machines with the same one are one, and have one clock
    network    nodes with the same one share their loopback interface
    addresses  under which other nodes may reach this one, the likeliest first, with interfaces
    """

    kind: ClassVar[str] = "hello"
    machine: dict[str, Any]
    pid: int
    boot_id: str
    network: str
    addresses: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Signalled:
    """The agent was sent a signal: the scheduler asks the job to stop."""

    kind: ClassVar[str] = "signalled"
    signal: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """How another node's addresses were reached: by address, why not ("": it was), the interface."""

    kind: ClassVar[str] = "reached"
    reasons: dict[str, str]
    interfaces: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspected:
    """What a node makes of what a job needs there (`Inspect`).

    time         of its wall clock
    missing      of the paths, those that are not there or cannot be read, with the reason
    sees_token   the coordinator's file in the output folder is there
    unwritable   why nothing can be written there; "": something was, beside the token
    free_bytes   that this user may fill; None where there is no such folder
    """

    kind: ClassVar[str] = "inspected"
    time: float
    missing: dict[str, str]
    sees_token: bool
    unwritable: str
    free_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    kind: ClassVar[str] = "pong"
    echo: float
    time: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    kind: ClassVar[str] = "bound"
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerReady:
    """The fork server has begun; it may still be importing."""

    kind: ClassVar[str] = "server_ready"
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerGone:
    """The fork server has ended, and its ranks with it. `how` in words, where its agent knows."""

    kind: ClassVar[str] = "server_gone"
    pid: int
    how: str
    time: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    kind: ClassVar[str] = "started"
    rank: int
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FromRank:
    """What a rank said."""

    kind: ClassVar[str] = "from_rank"
    rank: int
    payload: dict[str, Any]
    time: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What a rank wrote to its log."""

    kind: ClassVar[str] = "output"
    rank: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """Where a rank is. `text` is empty when it did not answer; `state` is the kernel's word for it."""

    kind: ClassVar[str] = "stack"
    rank: int
    text: str
    state: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Exited:
    """A rank is gone: with an exit code, or by a signal.

    out_of_memory   what the kernel says when it killed for want of memory; else empty
    left_behind     processes that outlived their rank; they end with the last one
    """

    kind: ClassVar[str] = "exited"
    rank: int
    code: int | None
    signal: int | None
    time: float
    out_of_memory: str = ""
    left_behind: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Killed:
    """Every rank of this agent is gone, but for processes that survive SIGKILL."""

    kind: ClassVar[str] = "killed"
    survivors: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A command could not be carried out; `user` when the user can mend it."""

    kind: ClassVar[str] = "refused"
    reason: str
    user: bool


Command = (
    Ping
    | Suspend
    | Reach
    | Inspect
    | Bind
    | Prepare
    | Start
    | Spawn
    | Stop
    | Kill
    | Leave
    | AskStacks
)
Event = (
    Hello
    | Signalled
    | Reached
    | Inspected
    | Pong
    | Bound
    | ServerReady
    | ServerGone
    | Started
    | FromRank
    | Output
    | Stack
    | Exited
    | Killed
    | Refused
)
_COMMANDS: dict[str, type[Any]] = {c.kind: c for c in get_args(Command)}
_EVENTS: dict[str, type[Any]] = {e.kind: e for e in get_args(Event)}


def encode_command(command: Command) -> bytes:
    return _encode(command)


def encode_event(event: Event) -> bytes:
    return EVENT_PREFIX + _encode(event)


def decode_command(line: bytes) -> Command:
    """ValueError for anything malformed."""
    command = _decode(line, _COMMANDS)
    try:
        if isinstance(command, Start):
            return Start(ranks=[RankStart(**raw) for raw in command.ranks])  # type: ignore[arg-type]
        if isinstance(command, Spawn):
            return Spawn(rank=RankStart(**command.rank))  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(f"malformed message: {error}") from None
    return command  # type: ignore[no-any-return]


def decode_event(line: bytes) -> Event | None:
    """None for a line that is not an event; ValueError for one that pretends to be."""
    # A prompt, say, has no line of its own; JSON never holds the prefix's first character.
    _, prefix, message = line.partition(EVENT_PREFIX)
    return _decode(message, _EVENTS) if prefix else None


def encode_server_event(event: Event) -> bytes:
    """Without a prefix: nobody else writes to that socket."""
    return _encode(event)


def decode_server_event(message: bytes) -> Event:
    """ValueError for anything malformed."""
    return _decode(message, _EVENTS)  # type: ignore[no-any-return]


def _encode(message: Command | Event) -> bytes:
    # What a rank says goes through here: asdict would copy all of it.
    values = {each.name: getattr(message, each.name) for each in fields(message)}
    return json.dumps({"kind": message.kind, **values}, default=asdict).encode() + b"\n"


def _decode(line: bytes, kinds: Mapping[str, type[Any]]) -> Any:
    try:
        raw = json.loads(line)
    except RecursionError:
        raise ValueError("malformed message: nested too deeply") from None
    kind = raw.pop("kind", None) if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"unknown message: {line[:200]!r}")
    try:
        message = kinds[kind](**raw)
    except TypeError as error:
        raise ValueError(f"malformed message: {error}") from None
    for each in fields(message):
        value = getattr(message, each.name)
        if not _FIELD_CHECKS[str(each.type)](value):
            raise ValueError(f"malformed message: {kind} with {each.name} of {value!r:.80}")
    return message


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list_of(value: object, kind: type[Any]) -> bool:
    return isinstance(value, list) and all(isinstance(each, kind) for each in value)


def _is_text_map(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())


# By annotation, so that a new message of known types needs nothing here. A rank's start is made of
# its dict later.
_FIELD_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "int": _is_number,
    "int | None": lambda value: value is None or _is_number(value),
    "float": lambda value: isinstance(value, float) or _is_number(value),
    "bool": lambda value: isinstance(value, bool),
    "list[str]": lambda value: _is_list_of(value, str),
    "list[int]": lambda value: _is_list_of(value, int),
    "dict[str, str]": _is_text_map,
    "dict[str, Any]": lambda value: isinstance(value, dict),
    "StartMethod": lambda value: value in get_args(StartMethod),
    "RankStart": lambda value: isinstance(value, dict),
    "list[RankStart]": lambda value: _is_list_of(value, dict),
}


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
