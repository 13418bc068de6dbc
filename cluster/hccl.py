"""What HCCL, the collective library of Ascend NPUs, finds in a rank's environment, and why.

HCCL's variables are from CANN's "Environment Variables" reference (7.0 to 9.0); what MindSpore does
with its own is from collective_manager.cc and ascend_communication_group.cc of 2.7 and 2.10. Nothing
here was run on an NPU. What the user has set is left alone.
"""

from __future__ import annotations

import errno
import ipaddress
import math
import random
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from ftlaunch.cluster.control_groups import read_text
from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.ports import HIGHEST, LOWEST
from ftlaunch.cluster.world import World

# From HCCL_IF_BASE_PORT on HCCL takes 16 ports, since CANN 8.2 it takes 32.
PORTS = 32
# Blocks begin at multiples of PORTS, so two of them are the same or have no port in common.
_LOWEST_BASE, _HIGHEST_BASE = 10016, 65504
_UP, _LOOPBACK = 0x1, "lo"


def rank_variables(world: World, *, device: int, rank_table: str | None) -> dict[str, str]:
    """What differs between ranks.

    device       the place of the rank's NPU among those that ASCEND_RT_VISIBLE_DEVICES leaves: the
                 driver counts these from 0
    rank_table   the file; None: HCCL finds the ranks by itself

    With a rank table MindSpore takes DEVICE_ID for the device; without one it counts the ranks of each
    hostname, by rank, and overwrites the variable. A job of one rank has DEVICE_ID either way.
    """
    variables = {
        "RANK_ID": str(world.rank),
        "RANK_SIZE": str(world.size),
        "DEVICE_ID": str(device),
    }
    return variables if rank_table is None else {**variables, "RANK_TABLE_FILE": rank_table}


def host_variables(
    environ: Mapping[str, str],
    *,
    base_port: int | None,
    interface: str | None,
    timeout_seconds: float,
    has_infinity: bool,
) -> dict[str, str]:
    """What all ranks of a host have in common, without what `environ` sets already.

    base_port      from `hold_base_port`
    interface      from `find_interface`; None leaves the choice to HCCL: the first by name that is
                   neither of docker nor the loopback
    has_infinity   the NPUs can compute with infinities (from the second generation on, those with
                   bf16); the first has the saturation mode only, in which they become 65504
    """
    # 120 to 7200; the driver adds 20 s.
    connect = min(max(math.ceil(timeout_seconds), 120), 7200)
    # The first generation takes 68 to 17340, in steps of 68 downwards: never less than was asked for.
    execute = min(max(math.ceil(timeout_seconds / 68), 1), 255) * 68
    variables = {"HCCL_CONNECT_TIMEOUT": str(connect), "HCCL_EXEC_TIMEOUT": str(execute)}
    if base_port is not None and not chooses_ports(environ):
        variables["HCCL_IF_BASE_PORT"] = str(base_port)
    if interface is not None and "HCCL_IF_IP" not in environ:
        # Without the sign it would be the beginning of a name.
        variables["HCCL_SOCKET_IFNAME"] = f"={interface}"
    if has_infinity:
        variables["MS_ASCEND_CHECK_OVERFLOW_MODE"] = "INFNAN_MODE"
    return {name: value for name, value in variables.items() if name not in environ}


# -- the network interface ----------------------------------------------------------------------


def find_interface(root: Path = Path("/"), *, peer: str | None = None) -> str | None:
    """The interface on the way to `peer`, an address; None: the one of the default route.

    It is never the loopback, which no other host can reach: None, as where no route is known. `root`
    is where /proc/net is looked up.
    """
    wanted = None if peer is None else ipaddress.ip_address(peer)
    if wanted is not None and wanted.version == 6:
        return _best(_routes_of_6(root), wanted)
    return _best(_routes_of_4(root), wanted) or (
        None if wanted is not None else _best(_routes_of_6(root), None)
    )


_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
# (network, metric, interface)
_Route = tuple[_Network, int, str]


def _best(routes: list[_Route], wanted: _Address | None) -> str | None:
    """The narrowest network decides, then the smallest metric."""
    fitting = [
        (-network.prefixlen, metric, interface)
        for network, metric, interface in routes
        if (network.prefixlen == 0 if wanted is None else wanted in network)
    ]
    chosen = min(fitting)[2] if fitting else None
    return None if chosen == _LOOPBACK else chosen


def _routes_of_4(root: Path) -> list[_Route]:
    """/proc/net/route: numbers in hexadecimal; addresses as the machine has them in memory."""
    routes: list[_Route] = []
    for line in read_text(root / "proc/net/route").splitlines()[1:]:
        try:
            interface, target, _, flags, _, _, metric, mask = line.split()[:8]
            if not int(flags, 16) & _UP:
                continue
            address, bits = (bytes.fromhex(word)[::-1] for word in (target, mask))
            prefix = int.from_bytes(bits, "big").bit_count()
            routes.append((ipaddress.IPv4Network((address, prefix)), int(metric), interface))
        except ValueError:
            continue
    return routes


def _routes_of_6(root: Path) -> list[_Route]:
    """/proc/net/ipv6_route: target, its prefix, source, its prefix, next hop, metric, ..., interface."""
    routes: list[_Route] = []
    for line in read_text(root / "proc/net/ipv6_route").splitlines():
        try:
            target, prefix, _, _, _, metric, _, _, flags, interface = line.split()
            if not int(flags, 16) & _UP:
                continue
            network = ipaddress.IPv6Network((bytes.fromhex(target), int(prefix, 16)))
            routes.append((network, int(metric, 16), interface))
        except ValueError:
            continue
    return routes


# -- the ports ----------------------------------------------------------------------------------


def chooses_ports(environ: Mapping[str, str]) -> bool:
    """Whether the user has set HCCL's ports: then none are to be looked for."""
    return "HCCL_IF_BASE_PORT" in environ or "HCCL_HOST_SOCKET_PORT_RANGE" in environ


def hold_base_port(
    root: Path = Path("/"), *, num_ports: int = PORTS, avoid: int = 0
) -> tuple[int, socket.socket]:
    """A value for HCCL_IF_BASE_PORT, and what keeps other jobs of ftlaunch off its ports.

    HCCL binds the ports itself, so they cannot be held. They are free now; out of the ranges of the
    rendezvous and of ports that the kernel hands out, unless it is told not to
    (ip_local_reserved_ports); and the socket, which is to stay open while the job runs, holds their
    number in the abstract namespace. `avoid` is another port that the job uses. UserError when there
    are none.
    """
    assert 0 < num_ports <= PORTS
    system = root / "proc/sys/net/ipv4"
    handed_out = _ranges(read_text(system / "ip_local_port_range")) or [range(32768, 61000)]
    reserved = _ranges(read_text(system / "ip_local_reserved_ports"))

    def may_be_used(port: int) -> bool:
        if port == avoid or LOWEST <= port < HIGHEST:
            return False
        return any(port in each for each in reserved) or not any(port in r for r in handed_out)

    bases = [
        base
        for base in range(_LOWEST_BASE, _HIGHEST_BASE + 1, PORTS)
        if all(may_be_used(port) for port in range(base, base + num_ports))
    ]
    # Not seeded: two jobs that start together must not try the same ports.
    random.SystemRandom().shuffle(bases)
    for base in bases:
        if lock := _lock(base, num_ports):
            return base, lock
    raise UserError(
        f"HCCL needs {num_ports} free ports in a row, and none were found: the kernel hands out "
        f"{_in_words(handed_out)}, and {LOWEST} to {HIGHEST - 1} are for the rendezvous. Reserve "
        "some (sysctl -w net.ipv4.ip_local_reserved_ports=60000-60031), or set HCCL_IF_BASE_PORT."
    )


def _lock(base: int, num_ports: int) -> socket.socket | None:
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        lock.bind(f"\0ftlaunch-hccl-{base}")
        if all(_is_free(port) for port in range(base, base + num_ports)):
            return lock
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            lock.close()
            raise
    lock.close()
    return None


def _is_free(port: int) -> bool:
    """On every address of this host."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _ranges(text: str) -> list[range]:
    """Of "32768 60999", "60000-60015,61000"; ends are included."""
    found = re.findall(r"(\d{1,5})(?:\s*[-\s]\s*(\d{1,5}))?", text)
    return [range(int(first), int(last or first) + 1) for first, last in found]


def _in_words(ranges: list[range]) -> str:
    return ", ".join(f"{each.start} to {each.stop - 1}" for each in ranges) or "none"
