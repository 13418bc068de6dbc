"""Whether every node reaches every other one by TCP. Asked once, before the ranks; chooses nothing."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ftlaunch.cluster.events import Bind, Bound, Hello, Reach, Reached, Refused
from ftlaunch.cluster.gathering import Network, OnEvent, agent_lost
from ftlaunch.cluster.nodes import Nodes

_BIND_SECONDS = 15.0
# Each try takes a second at most; nodes try at the same time, each the others one by one.
_SECONDS_EACH = 1.5
_MAX_SECONDS = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreached:
    """`node` does not reach the node `other` under these addresses; why not, in words."""

    node: str
    other: str
    addresses: tuple[str, ...]
    why: str


def find_unreached(
    nodes: Nodes, hellos: Mapping[int, Hello], network: Network | None, note: OnEvent
) -> list[Unreached]:
    """Which of the nodes that have said hello cannot connect to which; none on one machine.

    network   under the addresses of its interfaces nodes have to be reached; None: under any
    JobError when an agent is lost meanwhile.
    """
    if len({hello.network for hello in hellos.values()}) == 1:
        return []
    numbers = sorted(hellos)
    interfaces = dict(zip(numbers, network.interfaces, strict=True)) if network else {}
    version = ipaddress.ip_address(network.address).version if network else None
    addresses = {n: _addresses(hellos[n], interfaces.get(n, ""), version) for n in numbers}
    ports = _open_ports(nodes, numbers, note)
    # One question at a time to each node, so that it can say in between that it is there.
    waiting = {number: [other for other in numbers if other != number] for number in numbers}
    missed: list[Unreached] = []

    def ask(number: int) -> None:
        for other in waiting[number][:1]:
            # Port 9 is nobody's: of a node that can open none.
            command = Reach(addresses=list(addresses[other]), port=ports.get(other, 9))
            nodes[number].send(command)

    def miss(number: int, other: int, why: str) -> None:
        each = Unreached(
            node=nodes.names[number], other=nodes.names[other], addresses=addresses[other], why=why
        )
        missed.append(each)

    for number in numbers:
        ask(number)
    limit = min(_MAX_SECONDS, 5.0 + _SECONDS_EACH * len(numbers))
    for number, event in nodes.poll_until(limit, lambda: any(waiting.values())):
        if event is None:
            raise agent_lost(nodes[number])
        if not isinstance(event, Reached):
            note(number, event)
            continue
        if not waiting.get(number):
            # An answer too many, or a late one to somebody else's question.
            continue
        other = waiting[number].pop(0)
        if why := _why_not(event.reasons):
            miss(number, other, why)
        ask(number)
    if nodes.signals.hurry:
        raise KeyboardInterrupt
    for number, others in waiting.items():
        for other in others:
            miss(number, other, f"no answer within {limit:.0f} s")
    return sorted(missed, key=lambda each: nodes.names.index(each.node))


def _addresses(hello: Hello, interface: str, version: int | None) -> tuple[str, ...]:
    """Under which a node has to be reached: its interface's, of the kind that the ranks meet by."""
    if interface:
        return tuple(
            address
            for address, own in hello.addresses.items()
            if own == interface and ipaddress.ip_address(address).version == version
        )
    # Every machine has a loopback: an answer there would be its own.
    return tuple(address for address, own in hello.addresses.items() if own != "lo")


def _open_ports(nodes: Nodes, numbers: Sequence[int], note: OnEvent) -> dict[int, int]:
    """A port of each node that listens; none of one that cannot."""
    ports: dict[int, int] = {}
    waiting = set(numbers)
    for number in numbers:
        nodes[number].send(Bind(address="0.0.0.0", port=0, listens=True))
    for number, event in nodes.poll_until(_BIND_SECONDS, lambda: bool(waiting)):
        if event is None:
            raise agent_lost(nodes[number])
        note(number, event)
        if isinstance(event, Bound):
            ports[number] = event.port
        if isinstance(event, Bound | Refused):
            waiting.discard(number)
    return ports


def _why_not(reasons: Mapping[str, str]) -> str:
    """Empty where one of the addresses was reached."""
    if not reasons:
        return "it has no address in that network"
    return "" if "" in reasons.values() else "; ".join(dict.fromkeys(reasons.values()))
