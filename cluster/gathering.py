"""The agents of a job before its ranks: who is there, how they reach each other, what they find.

Each function asks all nodes at once and waits for the last answer, within a limit.
"""

from __future__ import annotations

import contextlib
import ipaddress
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from ftlaunch.cluster import slurm, ssh
from ftlaunch.cluster.addresses import Address, choose_address
from ftlaunch.cluster.errors import JobError, UserError
from ftlaunch.cluster.events import (
    Bind,
    Bound,
    Command,
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


def gather(nodes: Nodes, seconds: float, note: OnEvent) -> dict[int, Hello]:
    """Wait until every agent that has not said hello does, is lost, or the time is over.

    It ends early when the user asks to stop.
    """
    found: dict[int, Hello] = {}
    awaited = {number for number, node in enumerate(nodes) if not node.greeted and not node.lost}
    for number, event in nodes.poll_until(seconds, lambda: bool(awaited)):
        if event is None:
            awaited.discard(number)
        elif isinstance(event, Hello):
            awaited.discard(number)
            found[number] = replace(event, addresses=_addresses_of(event))
        else:
            note(number, event)
        if nodes.signals.count:
            break
    return found


def _addresses_of(hello: Hello) -> dict[str, str]:
    """Those that are such: what another machine says is a claim."""
    found = {}
    for address, interface in hello.addresses.items():
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(address)
            found[address] = interface
    return found


def incomplete(
    nodes: Nodes, missing: Sequence[int], seconds: float, *, so: str = "nothing was started"
) -> UserError | JobError:
    """What to raise when agents are missing; every one of them is named, with what is known.

    so   what follows from it
    """
    absent = [nodes[number] for number in missing]
    here = [node for node in absent if node.kind == "local"]
    if here and here[0].lost is not None:
        return agent_lost(here[0])
    lines = [f"{len(absent)} of {len(nodes)} nodes cannot be used, so {so}:"]
    lines += [f"  {node.name}: {why_unreachable(node, seconds)}" for node in absent]
    return (JobError if here else UserError)("\n".join(lines))


def why_unreachable(node: Node, seconds: float) -> str:
    """Of a node whose agent has not said hello: the words of what should have led there."""
    words = _last_words(node.log_path)
    if node.lost is None:
        return f"no answer within {seconds:.0f} s{_quote(words)}"
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


def connect(nodes: Nodes, hellos: Mapping[int, Hello], note: OnEvent) -> Network:
    """Choose an address of the first node that the others reach. UserError when there is none."""
    if len({hello.network for hello in hellos.values()}) == 1:
        return Network(address=_LOOPBACK, interfaces=("lo",) * len(hellos))
    first, *others = sorted(hellos)
    # Every machine has a loopback: an answer there would be its own.
    own = [
        Address(interface=interface, address=address)
        for address, interface in hellos[first].addresses.items()
        if interface != "lo"
    ]
    port = hold_port_on(nodes, first, Bind(address=_ANY_ADDRESS, port=0, listens=True), note)
    command = Reach(addresses=[each.address for each in own], port=port)
    reached = _ask(nodes, dict.fromkeys(others, command), Reached, note)
    chosen = choose_address(
        own,
        [reached[number].reasons for number in others],
        [nodes.names[number] for number in others],
    )
    ways = [reached[number].interfaces.get(chosen.address, "") for number in others]
    return Network(address=chosen.address, interfaces=(chosen.interface, *ways))


def hold_port_on(nodes: Nodes, number: int, command: Bind, note: OnEvent) -> int:
    """Have a node hold a port; which one. UserError when it is taken."""
    if nodes[number].lost is not None:
        raise agent_lost(nodes[number])
    nodes[number].send(command)
    for teller, event in nodes.poll_until(_ANSWER_SECONDS, lambda: True):
        if event is None:
            raise agent_lost(nodes[teller])
        note(teller, event)
        if teller == number and isinstance(event, Bound):
            return event.port
        if teller == number and isinstance(event, Refused):
            raise (UserError if event.user else JobError)(event.reason)
    if nodes.signals.hurry:
        raise KeyboardInterrupt
    raise JobError(f"the agent on {nodes.names[number]} did not answer when asked for a port")


def inspect_nodes(
    nodes: Nodes, numbers: Sequence[int], folder: Path, paths: Sequence[str], note: OnEvent
) -> list[Inspection]:
    """Have every node look for what the job needs there."""
    with shared_token(folder) as token:
        commands = {
            number: Inspect(paths=list(paths), folder=str(folder), token=token, node=number)
            for number in numbers
        }
        asked = time.time()
        found = _ask(nodes, commands, Inspected, note)
        # They looked at their clocks somewhere between the question and the last answer.
        middle = (asked + time.time()) / 2
        return [
            Inspection(
                found=found[number],
                seconds_ahead=found[number].time - middle,
                is_seen=answers(folder, token, number),
            )
            for number in numbers
        ]


_Answer = TypeVar("_Answer", Reached, Inspected)


def _ask(
    nodes: Nodes, commands: Mapping[int, Command], kind: type[_Answer], note: OnEvent
) -> dict[int, _Answer]:
    """One command for each node, one answer of each."""
    found: dict[int, _Answer] = {}
    for number, command in commands.items():
        if nodes[number].lost is not None:
            # It is told once: nobody would hear of it again.
            raise agent_lost(nodes[number])
        nodes[number].send(command)
    for number, event in nodes.poll_until(_ANSWER_SECONDS, lambda: len(found) < len(commands)):
        if event is None:
            raise agent_lost(nodes[number])
        if isinstance(event, Refused):
            raise (UserError if event.user else JobError)(f"{nodes.names[number]}: {event.reason}")
        if isinstance(event, kind) and number in commands:
            found[number] = event
        else:
            note(number, event)
    silent = [nodes.names[number] for number in commands if number not in found]
    if silent and nodes.signals.hurry:
        raise KeyboardInterrupt
    if silent:
        raise JobError(
            f"no answer from the agent on {', '.join(silent)} within {_ANSWER_SECONDS:.0f} s"
        )
    return found
