"""Addresses of this machine, and of two network namespaces that a veth joins."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ftlaunch.cluster.addresses import (
    Address,
    choose_address,
    network_name,
    own_addresses,
    reaches,
    way_to,
)
from ftlaunch.cluster.errors import UserError

# -- choosing -----------------------------------------------------------------------------------

OWN = tuple(
    Address(interface=interface, address=address)
    for interface, address in [
        ("eth0", "10.0.0.1"),
        ("ib0", "192.168.0.1"),
        ("ib0", "fd00::1"),
        ("lo", "127.0.0.1"),
    ]
)


@pytest.mark.parametrize(
    ("reached", "place"),
    [
        ([], 0),
        ([{"10.0.0.1": "", "fd00::1": ""}, {"10.0.0.1": ""}], 0),
        ([{"10.0.0.1": "refused", "192.168.0.1": ""}, {"10.0.0.1": "", "192.168.0.1": ""}], 1),
        # What nobody said of an address does not count as reached.
        ([{"10.0.0.1": "", "192.168.0.1": "", "fd00::1": ""}, {"fd00::1": ""}], 2),
        ([{"127.0.0.1": ""}], 3),
    ],
)
def test_the_first_address_that_all_reach(reached, place):
    hosts = [f"n{number}" for number in range(len(reached))]
    assert choose_address(OWN, reached, hosts) == OWN[place]


def test_no_address_that_all_reach():
    reached = [
        {"10.0.0.1": "no answer within 5 s", "192.168.0.1": ""},
        {"10.0.0.1": "", "192.168.0.1": "no \x1b[31mroute\n"},
    ]
    with pytest.raises(UserError) as caught:
        choose_address(OWN[:2], reached, ["b", "user@node-c"])
    assert str(caught.value).split("\n") == [
        "the first node has no address that every other node reaches; all ranks have to connect to it:",
        "  host         address      why not",
        "  b            10.0.0.1     no answer within 5 s",
        "  user@node-c  192.168.0.1  no ?[31mroute?",
        "Let these hosts connect to one of the addresses (firewall, routes, VLAN), or name another "
        "host first.",
    ]


def test_a_long_table_is_cut():
    own = [Address(interface="eth0", address=f"10.0.0.{number}") for number in range(9)]
    with pytest.raises(UserError) as caught:
        choose_address(own, [{}] * 100, [f"n{number}" for number in range(100)])
    lines = str(caught.value).split("\n")
    # Of 6 addresses 4 hosts and how many more; head, last line and the sentences around.
    assert len(lines) == 6 * 5 + 2 + 2
    assert lines[2] == "  n0         10.0.0.0  was not tried"
    assert lines[6] == "  (96 more)  10.0.0.0"
    assert lines[-2] == "             (3 more)"


def test_no_address_at_all():
    with pytest.raises(UserError, match=r"has no address: none of its .* is up\..*Set up"):
        choose_address([], [{}], ["b"])


# -- this machine -------------------------------------------------------------------------------


def test_own_addresses():
    own = own_addresses()
    assert own == own_addresses()
    assert Address(interface="lo", address="127.0.0.1") in own
    interfaces = [each.interface for each in own]
    first = interfaces.index("lo")
    assert set(interfaces[first:]) == {"lo"}
    assert set(interfaces) <= {name for _, name in socket.if_nameindex()}
    assert not any(each.address.startswith(("fe80:", "169.254.")) for each in own)
    assert len({each.address for each in own}) == len(own)


def test_the_way_to_an_address_of_this_machine():
    for own in own_addresses():
        assert way_to(own.address) == own
    loopback = Address(interface="lo", address="127.0.0.1")
    assert way_to("127.0.0.7") == way_to("::ffff:127.0.0.1") == loopback


def test_no_way():
    # Broadcast takes a permission, and no interface has this name.
    assert way_to("255.255.255.255") is None
    assert way_to("fe80::1%no-such") is None


@pytest.mark.parametrize("address", ["localhost", "", "10.1", "127.0.0.1:80", "[::1]", "a\0b"])
def test_a_name_is_no_address(address):
    with pytest.raises(ValueError, match="does not appear to be"):
        way_to(address)
    with pytest.raises(ValueError, match="does not appear to be"):
        reaches(address, 80, 1)


@pytest.mark.parametrize("address", ["127.0.0.1", "::ffff:127.0.0.1"])
def test_reaching_this_machine(address):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert reaches(address, port, 5) == ""
    assert reaches(address, port, 5) == "connection refused: nothing listens there"


def test_the_network_has_a_name():
    name = network_name()
    assert name == network_name()
    assert name.startswith(Path("/proc/sys/kernel/random/boot_id").read_text().strip() + "/")
    assert name.endswith("/" + str(Path("/proc/self/ns/net").stat().st_ino))


# -- two networks -------------------------------------------------------------------------------


def _ip(*words, check=True):
    return subprocess.run(
        ["ip", *words], capture_output=True, text=True, timeout=30, check=check
    ).returncode


class _Networks:
    """Two network namespaces, `first` and `second`; each sees the other through a veth of its name.

    first     10.77.0.1, 10.77.0.5 and fd77::1, and what must not be preferred: another veth, bridges
              with nothing in them, an interface that is down, a link-local address
    second    10.77.0.2 and fd77::2
    """

    def __init__(self, name):
        self.first, self.second = f"{name}a", f"{name}b"

    def build(self):
        first, second = self.first, self.second
        for namespace in (first, second):
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
        # Before the way to the second, so that their numbers are smaller.
        for name in ("br-empty", "br-left", "off"):
            _ip("-n", first, "link", "add", name, "type", "bridge")
        self._join("side", "side")
        _ip("-n", first, "addr", "add", "172.17.0.1/16", "dev", "br-empty")
        _ip("-n", first, "addr", "add", "172.18.0.1/16", "dev", "off")
        _ip("-n", first, "addr", "add", "172.19.0.1/16", "dev", "side")
        _ip("-n", first, "addr", "add", "172.20.0.1/16", "dev", "br-left")
        _ip("-n", first, "link", "set", "br-empty", "up")
        _ip("-n", first, "link", "set", "br-left", "up")
        # Only with a port that has left does the kernel say that there is no carrier.
        _ip("-n", first, "link", "set", "side", "master", "br-left")
        _ip("-n", first, "link", "set", "side", "nomaster")
        for namespace in (first, second):
            _ip("-n", namespace, "link", "set", "side", "up")
        self._join(first, second)
        for namespace, addresses in (
            (first, ["10.77.0.1/24", "10.77.0.5/24", "169.254.9.1/16", "fd77::1/64"]),
            (second, ["10.77.0.2/24", "fd77::2/64"]),
        ):
            for address in addresses:
                # Without waiting for others to object.
                no_check = ["nodad"] if ":" in address else []
                _ip("-n", namespace, "addr", "add", address, "dev", namespace, *no_check)
            _ip("-n", namespace, "link", "set", namespace, "up")
        _ip("-n", first, "route", "add", "default", "via", "10.77.0.2")

    def _join(self, one, other):
        _ip("link", "add", one, "netns", self.first, "type", "veth",
            "peer", "name", other, "netns", self.second)  # fmt: skip

    def remove(self):
        for namespace in (self.first, self.second):
            _ip("netns", "del", namespace, check=False)

    def ask(self, namespace, *calls):
        """What functions of the module return there, and how long each took."""
        code = (
            "import json, sys, time, dataclasses\n"
            "from ftlaunch.cluster import addresses\n"
            "for name, *arguments in json.loads(sys.argv[1]):\n"
            "    start = time.monotonic()\n"
            "    result = getattr(addresses, name)(*arguments)\n"
            "    seconds = time.monotonic() - start\n"
            "    plain = lambda each: [each.interface, each.address]\n"
            "    if isinstance(result, tuple): result = [plain(each) for each in result]\n"
            "    elif isinstance(result, addresses.Address): result = plain(result)\n"
            "    print(json.dumps([result, seconds]))\n"
        )
        done = subprocess.run(
            ["ip", "netns", "exec", namespace, sys.executable, "-c", code, json.dumps(calls)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        for (name, *arguments), (_, seconds) in zip(calls, answers, strict=True):
            assert name != "reaches" or seconds < arguments[2] + 1
        return [result for result, _ in answers]


@pytest.fixture(scope="module")
def networks():
    def give_up(reason):
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)

    if shutil.which("ip") is None:
        give_up("network namespaces take the program ip")
    if os.geteuid() != 0:
        give_up("network namespaces take root")
    # An interface has at most 15 characters.
    networks = _Networks(f"ft{os.getpid()}")
    try:
        if _ip("netns", "add", networks.first, check=False):
            give_up("network namespaces cannot be made here")
        networks.remove()
        networks.build()
        yield networks
    finally:
        networks.remove()


@pytest.fixture
def listener(networks):
    """A port of the second network on which a connection is accepted, by IPv4 and IPv6."""
    code = (
        "import socket, sys\n"
        "server = socket.create_server(('::', 0), family=socket.AF_INET6, dualstack_ipv6=True)\n"
        "print(server.getsockname()[1], flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        ["ip", "netns", "exec", networks.second, sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        yield int(process.stdout.readline())
        process.stdin.close()
        process.wait(timeout=30)


def test_the_order_of_interfaces(networks):
    veth = networks.first
    [own] = networks.ask(veth, ["own_addresses"])
    assert own == [
        [veth, "10.77.0.1"],
        [veth, "10.77.0.5"],
        [veth, "fd77::1"],
        ["side", "172.19.0.1"],
        ["br-empty", "172.17.0.1"],
        ["br-left", "172.20.0.1"],
        ["lo", "127.0.0.1"],
        ["lo", "::1"],
    ]


def test_the_way_through_a_veth(networks):
    veth = networks.first
    calls = [
        ["way_to", to] for to in ("10.77.0.2", "fd77::2", "8.8.8.8", "2001:db8::1", "172.19.0.9")
    ]
    assert networks.ask(veth, *calls) == [
        [veth, "10.77.0.1"],
        [veth, "fd77::1"],
        [veth, "10.77.0.1"],
        None,
        ["side", "172.19.0.1"],
    ]
    # The second has no default route.
    calls = [["way_to", to] for to in ("10.77.0.1", "8.8.8.8")]
    assert networks.ask(networks.second, *calls) == [[networks.second, "10.77.0.2"], None]


def test_the_way_over_the_link_alone(networks):
    """Link-local addresses are no addresses for others, but a way may begin at one."""
    veth = networks.first
    deadline = time.monotonic() + 10
    # The kernel first asks whether somebody else has it.
    while True:
        [answer] = networks.ask(veth, ["way_to", f"fe80::1%{veth}"])
        if answer is not None and answer[1].startswith("fe80::"):
            break
        assert time.monotonic() < deadline, answer
    assert answer[0] == veth


def test_a_port_in_another_network(networks, listener):
    answers = networks.ask(
        networks.first,
        ["reaches", "10.77.0.2", listener, 10],
        ["reaches", "fd77::2", listener, 10],
        ["reaches", "10.77.0.2", 9, 10],
        ["reaches", "127.0.0.1", listener, 10],
        ["reaches", "2001:db8::1", listener, 10],
    )
    refused = "connection refused: nothing listens there"
    assert answers == ["", "", refused, refused, "network is unreachable"]


def test_a_socket_does_not_reach_itself(networks):
    """With one ephemeral port to choose from, it is given the very one that it connects to."""
    ports = Path("/proc/sys/net/ipv4/ip_local_port_range")
    set_ports = ["netns", "exec", networks.second, "sh", "-c", f'echo "$0" > {ports}']
    before = ports.read_text().strip()
    try:
        _ip(*set_ports, "40000 40000")
        [answer] = networks.ask(networks.second, ["reaches", "127.0.0.1", 40000, 5])
    finally:
        _ip(*set_ports, before)
    assert answer == "connection refused: nothing listens there"


def test_a_link_that_is_down(networks, listener):
    veth = networks.first
    calls = [["reaches", "10.77.0.2", listener, 0.5], ["way_to", "10.77.0.2"]]
    try:
        _ip("-n", networks.second, "link", "set", networks.second, "down")
        timed_out, way = networks.ask(veth, *calls)
        assert timed_out == "no answer within 0.5 s"
        assert way == [veth, "10.77.0.1"]
        # Its own end: there is no route any more.
        _ip("-n", veth, "link", "set", veth, "down")
        assert networks.ask(veth, *calls) == ["network is unreachable", None]
    finally:
        for namespace in (networks.first, networks.second):
            _ip("-n", namespace, "link", "set", namespace, "up")
        _ip("-n", veth, "route", "replace", "default", "via", "10.77.0.2")


def test_each_network_has_its_name(networks):
    names = [networks.ask(each, ["network_name"])[0] for each in (networks.first, networks.second)]
    assert names[0] == networks.ask(networks.first, ["network_name"])[0]
    assert len({*names, network_name()}) == 3
    assert len({name.partition("/")[0] for name in names}) == 1
