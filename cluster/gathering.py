"""The agents of a job before its ranks: who is there, how they reach each other, what they find.

Each function asks all nodes at once and waits for the last answer, within a limit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ftlaunch.cluster import slurm, ssh
from ftlaunch.cluster.addresses import Address, choose_address
from ftlaunch.cluster.errors import JobError, UserError
from ftlaunch.cluster.events import (
    Bind,
    Bound,
    Event,
    Hello,
    Inspect,
    Inspected,
    Reach,
    Reached,
    Refused,
)
from ftlaunch.cluster.inspection import answers, shared_token
from ftlaunch.cluster.nodes import Nodes
from ftlaunch.cluster.transport import Node

_HELLO_SECONDS = 60.0
_ANSWER_SECONDS = 15.0
_LOOPBACK = "127.0.0.1"
_ANY_ADDRESS = "0.0.0.0"
_WORDS = 5

OnEvent = Callable[[int, Event], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Where the ranks meet, and the interface by which each node gets there. "lo": one machine."""

    address: str
    interfaces: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What one node has found; the clock's difference to ours, and whether we see what it wrote."""

    found: Inspected
    seconds_ahead: float
    is_seen: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Whose agents have said hello, and the nodes whose agents were lost before; by number."""

    hellos: Mapping[int, Hello]
    lost: frozenset[int]


def meet(nodes: Nodes, note: OnEvent) -> Meeting | None:
    """Wait until every agent has said hello or is lost; None when the user has asked to stop."""
    found: dict[int, Hello] = {}
    missing: set[int] = set()
    for number, event in nodes.poll_until(
        _HELLO_SECONDS, lambda: len(found) + len(missing) < len(nodes)
    ):
        if event is None:
            missing.add(number)
            found.pop(number, None)
        elif isinstance(event, Hello):
            found[number] = event
        else:
            note(number, event)
    if nodes.signals.count:
        return None
    return Meeting(hellos=dict(sorted(found.items())), lost=frozenset(missing))


def gather(nodes: Nodes, note: OnEvent) -> list[Hello] | None:
    """Wait until every agent has said hello; None when the user has asked to stop meanwhile.

    UserError that names every node that cannot be reached, JobError for a lost agent of this machine.
    """
    met = meet(nodes, note)
    if met is None:
        return None
    if len(met.hellos) < len(nodes):
        raise _incomplete(nodes, met)
    return list(met.hellos.values())


def _incomplete(nodes: Nodes, met: Meeting) -> Exception:
    lost = [nodes[number] for number in sorted(met.lost)]
    here = [node for node in lost if node.kind == "local"]
    if here:
        return agent_lost(here[0])
    silent = [node for number, node in enumerate(nodes) if number not in met.hellos]
    lines = [f"{len(silent)} of {len(nodes)} nodes cannot be used, so nothing was started:"]
    lines += [f"  {node.name}: {why_unreachable(node)}" for node in silent]
    return (UserError if lost else JobError)("\n".join(lines))


def why_unreachable(node: Node) -> str:
    """Of a node whose agent has not said hello: the words of what should have led there."""
    words = _last_words(node.log_path)
    if node.lost is None:
        return f"no answer within {_HELLO_SECONDS:.0f} s{_quote(words)}"
    advise = {"ssh": ssh.advice, "slurm": slurm.advice}.get(node.kind)
    remedy = (advise(node.name, words) if advise else "") or _python_advice(node.name, words)
    if not remedy and node.kind == "ssh" and "exit code 255" not in node.lost:
        remedy = (
            f"the login shell ended before anything of ours: does `ssh {node.name} true` work? Look "
            "at its start-up files there"
        )
    return f"{node.lost}{_quote(words)}{f' - {remedy}' if remedy else ''}"


def agent_lost(node: Node) -> JobError:
    return JobError(
        f"the agent on {node.name} is lost: {node.lost}; its last words are in {node.log_path}"
    )


def _python_advice(host: str, words: str) -> str:
    lowered = words.lower()
    if "no module named" in lowered and "ftlaunch" in lowered:
        return (
            f"ftlaunch is not installed for that Python on {host}: install it there, or name the "
            "right interpreter with cluster.python"
        )
    if "no such file" in lowered or "not found" in lowered:
        return (
            f"there is no such Python on {host}: have the same environment there (a shared folder), "
            "or name the one to use with cluster.python, what sets it up with cluster.prologue"
        )
    return ""


def _last_words(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    kept = ["".join(c for c in line if c.isprintable()).strip() for line in lines]
    return " / ".join([line for line in kept if line][-_WORDS:])[-600:]


def _quote(words: str) -> str:
    return f": {words}" if words else ""


def connect(nodes: Nodes, hellos: Sequence[Hello], note: OnEvent) -> Network:
    """Choose an address of node 0 that all nodes reach. UserError when there is none."""
    if len({hello.network for hello in hellos}) == 1:
        return Network(address=_LOOPBACK, interfaces=("lo",) * len(hellos))
    own = [Address(interface=i, address=a) for a, i in hellos[0].addresses.items()]
    nodes[0].send(Bind(address=_ANY_ADDRESS, port=0, listens=True))
    port = _await_bound(nodes, note)
    answers: dict[int, Reached] = {}
    for node in nodes:
        node.send(Reach(addresses=[each.address for each in own], port=port))
    for number, event in nodes.poll_until(_ANSWER_SECONDS, lambda: len(answers) < len(nodes)):
        if event is None:
            raise agent_lost(nodes[number])
        if isinstance(event, Reached):
            answers[number] = event
        else:
            note(number, event)
    _need_all(nodes, answers, "when asked which addresses it reaches")
    ordered = [answers[number] for number in range(len(nodes))]
    chosen = choose_address(own, [answer.reasons for answer in ordered[1:]], nodes.names[1:])
    others = [answer.interfaces.get(chosen.address, "") for answer in ordered[1:]]
    return Network(address=chosen.address, interfaces=(chosen.interface, *others))


def _await_bound(nodes: Nodes, note: OnEvent) -> int:
    for number, event in nodes.poll_until(_ANSWER_SECONDS, lambda: True):
        if event is None:
            raise agent_lost(nodes[number])
        if isinstance(event, Bound):
            return event.port
        if isinstance(event, Refused):
            raise (UserError if event.user else JobError)(event.reason)
        note(number, event)
    if nodes.signals.hurry:
        raise KeyboardInterrupt
    raise JobError(f"the agent of {nodes.names[0]} did not answer when asked for a port")


def inspect_nodes(
    nodes: Nodes, folder: Path, paths: Sequence[str], note: OnEvent
) -> list[Inspection]:
    """Have every node look for what the job needs there."""
    found: dict[int, Inspection] = {}
    with shared_token(folder) as token:
        asked = time.time()
        for number, node in enumerate(nodes):
            node.send(Inspect(paths=list(paths), folder=str(folder), token=token, node=number))
        for number, event in nodes.poll_until(_ANSWER_SECONDS, lambda: len(found) < len(nodes)):
            if event is None:
                raise agent_lost(nodes[number])
            if not isinstance(event, Inspected):
                note(number, event)
                continue
            found[number] = Inspection(
                found=event,
                # It looked at its clock somewhere between our question and its answer.
                seconds_ahead=event.time - (asked + time.time()) / 2,
                is_seen=answers(folder, token, number),
            )
        _need_all(nodes, found, "when asked what it sees of the job's files")
    return [found[number] for number in range(len(nodes))]


def _need_all(nodes: Nodes, answers: dict[int, Reached] | dict[int, Inspection], when: str) -> None:
    silent = [name for number, name in enumerate(nodes.names) if number not in answers]
    if silent and nodes.signals.hurry:
        raise KeyboardInterrupt
    if silent:
        raise JobError(
            f"no answer from the agent on {', '.join(silent)} within {_ANSWER_SECONDS:.0f} s {when}"
        )
