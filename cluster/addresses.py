"""Under which addresses other nodes reach this one. Chooses no port, starts nothing, resolves no name.

Linux only: addresses come from the kernel by netlink, what state an interface is in by ioctl.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.hccl import find_interface

# Of linux/netlink.h, rtnetlink.h, if_addr.h, if.h and sockios.h.
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_NLMSG_ERROR, _NLMSG_DONE, _RTM_NEWADDR, _RTM_GETADDR = 2, 3, 20, 22
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_IFF_UP, _IFF_LOOPBACK, _IFF_RUNNING = 0x1, 0x8, 0x40
_SIOCGIFFLAGS = 0x8913
# Of IPv6: temporary, refused as somebody else's, deprecated, not yet checked.
_PASSING = 0x1 | 0x8 | 0x20 | 0x40
_NETLINK_SECONDS = 5.0
# What a table of failures shows: so many addresses, and of each so many hosts.
_MAX_ADDRESSES, _MAX_HOSTS = 6, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """interface    its name here
    address      IPv4, or IPv6 that is valid beyond its link; of the loopback any
    """

    interface: str
    address: str


def own_addresses() -> tuple[Address, ...]:
    """The addresses of the interfaces that are up, the best first; stable while nothing changes.

    The interface of the default route comes first, then those with a carrier, then those without
    (bridges of containers and virtual machines that nothing is plugged into), last the loopback; on
    each IPv4 before IPv6. Link-local and temporary addresses are left out.
    """
    return _found(lasting=True)


def way_to(address: str) -> Address | None:
    """From where the kernel would send to `address`; None when there is no route. Sends nothing.

    ValueError when `address` is no IPv4 or IPv6 address.
    """
    try:
        # The port is of no account.
        family, target = _target(address, 9)
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            source = str(probe.getsockname()[0]).partition("%")[0]
    except OSError:
        return None
    return next((own for own in _found(lasting=False) if own.address == source), None)


def reaches(address: str, port: int, timeout_seconds: float) -> str:
    """Empty when a TCP connection to `address` is accepted in that time, else why not, in words.

    That somebody accepts does not say who: the address may be another machine's, too.
    ValueError when `address` is no IPv4 or IPv6 address.
    """
    try:
        family, target = _target(address, port)
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.settimeout(max(timeout_seconds, 0.001))
            probe.connect(target)
            # On one machine a socket may be given the very port that it looks for, and meet itself.
            if probe.getsockname()[:2] != probe.getpeername()[:2]:
                return ""
            return "connection refused: nothing listens there"
    except TimeoutError:
        return f"no answer within {timeout_seconds:g} s"
    except ConnectionRefusedError:
        return "connection refused: nothing listens there"
    except OSError as error:
        return (error.strerror or type(error).__name__).lower()


def network_name() -> str:
    """Names the network that this process sees: those with equal names share the loopback."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    try:
        namespace = str(Path("/proc/self/ns/net").stat().st_ino)
    except FileNotFoundError:
        # A kernel without network namespaces: it has one network.
        namespace = "0"
    return f"{boot_id}/{namespace}"


def choose_address(
    own: Sequence[Address], reached: Sequence[Mapping[str, str]], hosts: Sequence[str]
) -> Address:
    """The first of node 0's addresses that every other node reaches.

    reached   of each other node: by address, empty when it was reached, else why not
    hosts     the names of these nodes, for the message
    UserError when there is none, with who does not reach which and why.
    """
    if not own:
        raise UserError(
            "the first node has no address: none of its network interfaces is up. Other nodes have to "
            "reach it. Set up its network, or name another host first."
        )
    failed: list[list[tuple[str, str, str]]] = []
    for each in own:
        missing = [
            (host, each.address, reason)
            for host, answers in zip(hosts, reached, strict=True)
            if (reason := answers.get(each.address, "was not tried"))
        ]
        if not missing:
            return each
        failed.append(missing)
    raise UserError(
        "the first node has no address that every other node reaches; all ranks have to connect to "
        f"it:\n{_table(failed)}\nLet these hosts connect to one of the addresses (firewall, routes, "
        "VLAN), or name another host first."
    )


# -- the kernel ---------------------------------------------------------------------------------

_IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


def _found(*, lasting: bool) -> tuple[Address, ...]:
    """All addresses, the best first; `lasting` ones are neither link-local nor temporary."""
    default = find_interface()
    found: list[tuple[tuple[int, int, int, int], Address]] = []
    for place, (index, address, flags) in enumerate(_dump_addresses()):
        passing = address.is_link_local or (address.version == 6 and flags & _PASSING)
        # An interface may go away between two questions.
        with contextlib.suppress(OSError):
            name = socket.if_indextoname(index)
            state = _interface_flags(name)
            if not state & _IFF_UP or (passing and lasting):
                continue
            if state & _IFF_LOOPBACK:
                rank = 3
            elif name == default:
                rank = 0
            else:
                rank = 1 if state & _IFF_RUNNING and not _is_empty_bridge(name) else 2
            own = Address(interface=name, address=str(address))
            found.append(((rank, index, address.version, place), own))
    return tuple(own for _, own in sorted(found, key=lambda each: each[0]))


def _dump_addresses() -> Iterator[tuple[int, _IpAddress, int]]:
    """Number of the interface, address and flags of each address of this network namespace."""
    # Header (length, type, flags, sequence, port), then an ifaddrmsg of any family.
    body = struct.pack("=BBBBi", socket.AF_UNSPEC, 0, 0, 0, 0)
    header = struct.pack("=IHHII", 24, _RTM_GETADDR, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
        kernel.settimeout(_NETLINK_SECONDS)
        kernel.sendto(header + body, (0, 0))
        while True:
            # The kernel fills at most 32 KiB at a time.
            for kind, message in _messages(kernel.recv(1 << 16)):
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR:
                    number = -struct.unpack_from("=i", message)[0]
                    raise OSError(number, os.strerror(number))
                if kind == _RTM_NEWADDR:
                    yield from _address(message)


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= 16:
        length, kind = struct.unpack_from("=IH", data)
        yield kind, data[16:length]
        data = data[_aligned(max(length, 16)) :]


def _address(message: bytes) -> Iterator[tuple[int, _IpAddress, int]]:
    family, _, flags, _, index = struct.unpack_from("=BBBBi", message)
    attributes: dict[int, bytes] = {}
    data = message[8:]
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        attributes[kind] = data[4:length]
        data = data[_aligned(max(length, 4)) :]
    if _IFA_FLAGS in attributes:
        [flags] = struct.unpack("=I", attributes[_IFA_FLAGS])
    # On a point-to-point link the other one is the peer's.
    packed = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS)
    if packed and family in (socket.AF_INET, socket.AF_INET6):
        yield index, ipaddress.ip_address(packed), flags


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def _interface_flags(name: str) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH14x", os.fsencode(name), 0)
        answer = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request)
    return int(struct.unpack_from("16sH", answer)[1])


def _is_empty_bridge(name: str) -> bool:
    """A bridge that never had a port has a carrier all the same."""
    try:
        return not any(Path("/sys/class/net", name, "brif").iterdir())
    except OSError:
        return False


def _target(address: str, port: int) -> tuple[int, tuple[object, ...]]:
    """Family and address as `connect` takes them. OSError: its scope names no interface here."""
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped:
        parsed = parsed.ipv4_mapped
    [found, *_] = socket.getaddrinfo(
        str(parsed), port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
    )
    return found[0], found[4]


# -- messages -----------------------------------------------------------------------------------


def _table(failed: Sequence[Sequence[tuple[str, str, str]]]) -> str:
    """Who does not reach which address and why; of each address, and in all, so many lines only.

    What other hosts said is shown without control characters.
    """
    rows = [("host", "address", "why not")]
    for missing in failed[:_MAX_ADDRESSES]:
        rows += missing[:_MAX_HOSTS]
        if more := len(missing[_MAX_HOSTS:]):
            rows.append((f"({more} more)", missing[0][1], ""))
    if more := len(failed[_MAX_ADDRESSES:]):
        rows.append(("", f"({more} more)", ""))
    cells = [[_clean(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in (0, 1)]
    return "\n".join(f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in cells)


def _clean(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:80])
