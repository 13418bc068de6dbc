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
    nodes: Nodes, hellos: Sequence[Hello], network: Network | None, note: OnEvent
) -> list[Unreached]:
    """What cannot connect to what; none where all nodes are on one machine.

    network   under the addresses of its interfaces nodes have to be reached; None: under any
    JobError when an agent is lost meanwhile.
    """
    if len({hello.network for hello in hellos}) == 1:
        return []
    addresses = [_addresses(hello, network, number) for number, hello in enumerate(hellos)]
    ports = _open_ports(nodes, note)
    # One question at a time to each node, so that it can say in between that it is there.
    waiting = {
        number: [other for other in range(len(nodes)) if other != number]
        for number in range(len(nodes))
    }
    missed: list[Unreached] = []
    for number in range(len(nodes)):
        _ask(nodes, number, waiting[number], addresses, ports)
    limit = min(_MAX_SECONDS, 5.0 + _SECONDS_EACH * len(nodes))
    for number, event in nodes.poll_until(limit, lambda: any(waiting.values())):
        if event is None:
            raise agent_lost(nodes[number])
        if not isinstance(event, Reached):
            note(number, event)
            continue
        other = waiting[number].pop(0)
        why = _why_not(event.reasons)
        if why:
            missed.append(_unreached(nodes, number, other, addresses, why))
        _ask(nodes, number, waiting[number], addresses, ports)
    if nodes.signals.hurry:
        raise KeyboardInterrupt
    missed += [
        _unreached(nodes, number, other, addresses, f"no answer within {limit:.0f} s")
        for number, others in waiting.items()
        for other in others
    ]
    return sorted(missed, key=lambda each: (nodes.names.index(each.node), each.other))


def _addresses(hello: Hello, network: Network | None, number: int) -> tuple[str, ...]:
    """Under which a node has to be reached: its interface's, of the kind that the ranks meet by."""
    others = {a: i for a, i in hello.addresses.items() if i != "lo"}
    if network is None or not network.interfaces[number]:
        return tuple(others)
    version = ipaddress.ip_address(network.address).version
    return tuple(
        address
        for address, interface in others.items()
        if interface == network.interfaces[number]
        and ipaddress.ip_address(address).version == version
    )


def _open_ports(nodes: Nodes, note: OnEvent) -> dict[int, int]:
    """A port of each node that listens; none of one that cannot."""
    ports: dict[int, int] = {}
    refused: set[int] = set()
    nodes.tell(Bind(address="0.0.0.0", port=0, listens=True))
    for number, event in nodes.poll_until(
        _BIND_SECONDS, lambda: len(ports) + len(refused) < len(nodes)
    ):
        if event is None:
            raise agent_lost(nodes[number])
        if isinstance(event, Bound):
            ports[number] = event.port
        elif isinstance(event, Refused):
            refused.add(number)
        else:
            note(number, event)
    return ports


def _ask(
    nodes: Nodes,
    number: int,
    others: list[int],
    addresses: Sequence[tuple[str, ...]],
    ports: Mapping[int, int],
) -> None:
    if others:
        other = others[0]
        nodes[number].send(Reach(addresses=list(addresses[other]), port=ports.get(other, 9)))


def _why_not(reasons: Mapping[str, str]) -> str:
    """Empty where one of the addresses was reached."""
    if not reasons:
        return "it has no address in that network"
    return "" if "" in reasons.values() else "; ".join(dict.fromkeys(reasons.values()))


def _unreached(
    nodes: Nodes, number: int, other: int, addresses: Sequence[tuple[str, ...]], why: str
) -> Unreached:
    return Unreached(
        node=nodes.names[number], other=nodes.names[other], addresses=addresses[other], why=why
    )
