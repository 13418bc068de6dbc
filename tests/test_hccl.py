"""HCCL's variables: which, within whose bounds, and that the user's own win."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from ftlaunch.cluster import hccl
from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.hccl import (
    PORTS,
    chooses_ports,
    find_interface,
    hold_base_port,
    host_variables,
    rank_variables,
)
from ftlaunch.cluster.ports import HIGHEST, LOWEST
from ftlaunch.cluster.world import World

WORLD = World(
    rank=5,
    size=8,
    local_rank=1,
    local_size=4,
    node_rank=1,
    num_nodes=2,
    master_address="10.0.0.1",
    master_port=20001,
)


def _of_host(environ=None, **changes):
    given = {
        "base_port": 61024,
        "interface": "eth0",
        "timeout_seconds": 1800.0,
        "has_infinity": True,
    }
    return host_variables(environ or {}, **{**given, **changes})


# -- variables ----------------------------------------------------------------------------------


def test_variables_of_a_rank():
    expected = {"RANK_ID": "5", "RANK_SIZE": "8", "DEVICE_ID": "3"}
    assert rank_variables(WORLD, device=3, rank_table=None) == expected
    table = rank_variables(WORLD, device=3, rank_table="/x.json")
    assert table == {**expected, "RANK_TABLE_FILE": "/x.json"}


def test_variables_of_a_host():
    """1800 s are 26.5 steps of 68, so 27 of them: 1836, which is HCCL's own default."""
    assert _of_host() == {
        "HCCL_CONNECT_TIMEOUT": "1800",
        "HCCL_EXEC_TIMEOUT": "1836",
        "HCCL_IF_BASE_PORT": "61024",
        "HCCL_SOCKET_IFNAME": "=eth0",
        "MS_ASCEND_CHECK_OVERFLOW_MODE": "INFNAN_MODE",
    }


def test_what_is_not_known_is_not_set():
    assert set(_of_host(base_port=None, interface=None, has_infinity=False)) == {
        "HCCL_CONNECT_TIMEOUT",
        "HCCL_EXEC_TIMEOUT",
    }


@pytest.mark.parametrize(
    ("seconds", "connect", "execute"),
    [
        (0.5, 120, 68),
        (68, 120, 68),
        (68.1, 120, 136),
        (136, 136, 136),
        # 255 * 68 is 17340, the most that the first generation takes.
        (17340, 7200, 17340),
        (1e9, 7200, 17340),
    ],
)
def test_timeouts_are_within_their_bounds(seconds, connect, execute):
    found = _of_host(timeout_seconds=seconds)
    assert found["HCCL_CONNECT_TIMEOUT"] == str(connect)
    assert found["HCCL_EXEC_TIMEOUT"] == str(execute)


@pytest.mark.parametrize("name", list(_of_host()))
def test_what_the_user_sets_wins(name):
    assert set(_of_host({name: "own"})) == set(_of_host()) - {name}


@pytest.mark.parametrize(
    ("own", "ours"),
    [
        ("HCCL_IF_IP", "HCCL_SOCKET_IFNAME"),
        ("HCCL_HOST_SOCKET_PORT_RANGE", "HCCL_IF_BASE_PORT"),
    ],
)
def test_what_says_the_same_in_another_way_wins_too(own, ours):
    assert ours not in _of_host({own: "x"})
    assert chooses_ports({own: "x"}) is ("PORT" in own)


# -- the interface ------------------------------------------------------------------------------

# As the kernel prints it on a machine of little endian: 0100000A is 10.0.0.1.
ROUTES = """\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
wlan0\t00000000\t0100A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0
eth0\t00000000\t0100000A\t0003\t0\t0\t100\t00000000\t0\t0\t0
down0\t00000000\t0100000A\t0002\t0\t0\t0\t00000000\t0\t0\t0
eth0\t0000000A\t00000000\t0001\t0\t0\t100\t0000FFFF\t0\t0\t0
ib0\t0005000A\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0
docker0\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0
nonsense
"""
_ANY = "0" * 32
ROUTES_OF_6 = f"""\
fe80{"0" * 28} 40 {_ANY} 00 {_ANY} 00000100 00000001 00000000 00000001 eth1
fd00{"0" * 28} 08 {_ANY} 00 {_ANY} 00000100 00000001 00000000 00000001 ib6
{_ANY} 00 {_ANY} 00 fd00{"0" * 27}1 00000400 00000001 00000000 00000003 eth6
{_ANY} 00 {_ANY} 00 {_ANY} ffffffff 00000001 00000000 00200200 lo
"""


def _root(folder: Path, routes: str = "", routes_of_6: str = "") -> Path:
    (folder / "proc/net").mkdir(parents=True)
    (folder / "proc/net/route").write_text(routes)
    (folder / "proc/net/ipv6_route").write_text(routes_of_6)
    return folder


@pytest.mark.parametrize(
    ("peer", "interface"),
    [
        # The smaller metric, of what is up.
        (None, "eth0"),
        # 10.0.5.0/24 is narrower than 10.0.0.0/16.
        ("10.0.5.9", "ib0"),
        ("10.0.6.9", "eth0"),
        ("172.17.0.2", "docker0"),
        ("8.8.8.8", "eth0"),
        ("fd00::7", "ib6"),
        ("2001:db8::1", "eth6"),
    ],
)
def test_the_interface_on_the_way(tmp_path, peer, interface):
    assert find_interface(_root(tmp_path, ROUTES, ROUTES_OF_6), peer=peer) == interface


def test_the_default_route_of_version_6_when_there_is_no_other(tmp_path):
    assert find_interface(_root(tmp_path, "", ROUTES_OF_6)) == "eth6"


def test_never_the_loopback(tmp_path):
    only = ROUTES_OF_6.splitlines()[-1]
    assert find_interface(_root(tmp_path, "", only)) is None
    routes = "header\nlo\t0000007F\t00000000\t0001\t0\t0\t0\t000000FF\t0\t0\t0\n"
    assert find_interface(_root(tmp_path / "4", routes), peer="127.0.0.1") is None


def test_no_routes_at_all(tmp_path):
    assert find_interface(tmp_path) is None
    assert find_interface(tmp_path, peer="10.0.0.1") is None


# -- the ports ----------------------------------------------------------------------------------


def _ports(folder: Path, handed_out: str, reserved: str = "") -> Path:
    system = folder / "proc/sys/net/ipv4"
    system.mkdir(parents=True)
    (system / "ip_local_port_range").write_text(handed_out)
    (system / "ip_local_reserved_ports").write_text(reserved)
    return folder


def test_ports_of_nobody_else(tmp_path):
    root = _ports(tmp_path, "32768\t60999\n")
    for _ in range(20):
        base, lock = hold_base_port(root)
        lock.close()
        block = range(base, base + PORTS)
        assert 1024 <= base <= 65520 and block[-1] < 65536
        for first, last in ((LOWEST, HIGHEST), (32768, 61000)):
            assert last <= block[0] or block[-1] < first


def test_two_jobs_have_different_ports(tmp_path):
    """Room for two blocks: 61024 to 61055 and 61056 to 61087."""
    root = _ports(tmp_path, "1024\t65535", "61024-61087")
    first, lock = hold_base_port(root)
    second, other = hold_base_port(root)
    assert {first, second} == {61024, 61056}
    with pytest.raises(UserError, match=r"1024 to 65535.*ip_local_reserved_ports"):
        hold_base_port(root)
    lock.close()
    again, lock = hold_base_port(root)
    assert again == first
    lock.close()
    other.close()


def test_a_port_in_use_is_not_taken(tmp_path):
    root = _ports(tmp_path, "1024\t65535", "61024-61087,7")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 61030))
        listener.listen()
        base, lock = hold_base_port(root)
        lock.close()
    assert base == 61056


def test_another_port_of_the_job_is_avoided(tmp_path):
    root = _ports(tmp_path, "1024\t65535", "61024-61087")
    base, lock = hold_base_port(root, avoid=61060)
    lock.close()
    assert base == 61024


def test_this_host():
    base, lock = hold_base_port()
    lock.close()
    assert base % PORTS == hccl._LOWEST_BASE % PORTS
    assert find_interface() != "lo"
