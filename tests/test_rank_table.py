"""Rank tables: the two versions as CANN's documents show them, and what is refused."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.rank_table import TableServer, device_places, read_rank_table
from tests.test_machine import MACHINE

HOST = replace(
    MACHINE, hostname="atlas", accelerator="ascend", num_devices=4, device_numbers=(0, 1, 2, 3)
)


def _server(name: str, first_rank: int, *devices: int, **more: str) -> dict[str, Any]:
    return {
        "server_id": name,
        "device": [
            {"device_id": str(device), "device_ip": f"192.168.1.{device}", "rank_id": str(rank)}
            for rank, device in enumerate(devices, first_rank)
        ],
        **more,
    }


ONE: dict[str, Any] = {
    "version": "1.0",
    "status": "completed",
    "server_count": "2",
    "server_list": [_server("node_0", 0, 0, 1), _server("node_1", 2, 2, 3)],
}
# With super pods, and with keys that are not for us.
TWO: dict[str, Any] = {
    **copy.deepcopy(ONE),
    "version": "1.2",
    "super_pod_list": [
        {"super_pod_id": "0", "server_list": [{"server_id": "node_0"}]},
        {"super_pod_id": "1", "server_list": [{"server_id": "node_1"}]},
    ],
}
TWO["server_list"][0]["host_ip"] = "172.16.0.100"
TWO["server_list"][0]["device"][0]["super_device_id"] = "37748736"


def _read(folder: Path, content: object) -> Any:
    path = folder / "table.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_rank_table(str(path))


@pytest.mark.parametrize("content", [ONE, TWO], ids=["1.0", "1.2"])
def test_a_table_is_read(tmp_path, content):
    table = _read(tmp_path, content)
    assert table.version == content["version"]
    assert table.num_ranks == 4
    assert table.servers == (
        TableServer(server_id="node_0", first_rank=0, devices=(0, 1)),
        TableServer(server_id="node_1", first_rank=2, devices=(2, 3)),
    )


def test_servers_are_ordered_by_their_ranks(tmp_path):
    content = {**ONE, "server_list": ONE["server_list"][::-1]}
    assert [each.server_id for each in _read(tmp_path, content).servers] == ["node_0", "node_1"]


def test_what_may_be_missing(tmp_path):
    """server_count is optional in 1.2, device_ip on one host; a number may be one."""
    server = {"server_id": "a", "device": [{"device_id": 3, "rank_id": 0, "device_ip": ""}]}
    content = {"version": "1.2", "status": "completed", "server_list": [server]}
    assert _read(tmp_path, content).servers[0].devices == (3,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "2.0"}, "version is '2.0'; this ftlaunch reads 1.0 and 1.2"),
        ({"version": None}, "version is None"),
        ({"status": "initializing"}, "status is 'initializing'.*Wait until"),
        ({"server_count": "3"}, "server_count is 3, but server_list has 2"),
        ({"server_count": "two"}, "server_count is 'two'; it is a whole number"),
        ({"server_list": []}, r"server_list is \[\]; it is a list of one object or more"),
        ({"server_list": {}}, "server_list is {}"),
        ({"server_list": ["x"]}, r"server_list\[0\] is 'x'; it is an object"),
        ({"server_list": [_server("a", 0, 0), _server("a", 1, 1)]}, "server_id a stands twice"),
        (
            {"server_list": [_server("a", 0, 0), _server("b", 2, 1)]},
            "b begins with rank 2, where 1",
        ),
        (
            {"server_list": [_server("a", 0, 0), _server("b", 0, 1)]},
            "b begins with rank 0, where 1",
        ),
        (
            {"server_list": [_server("a", 1, 0), _server("b", 2, 1)]},
            "a begins with rank 1, where 0",
        ),
        ({"server_list": [_server("a", 0, 2, 2)]}, "in server a, device_id 2 stands twice"),
        ({"server_list": [_server("x" * 65, 0, 2)]}, "server_id is 'xxx.*1 to 64 characters"),
        ({"server_list": [_server("a\x1b[2J", 0, 2)]}, r"server_id is 'a\\x1b"),
        ({"server_list": [{"server_id": "a"}]}, "in server a, device is missing"),
        (
            {"server_list": [{"server_id": "a", "device": [{"device_id": "0"}]}]},
            "rank_id is missing",
        ),
        (
            {"server_list": [{"server_id": "a", "device": [{"device_id": "-1", "rank_id": "0"}]}]},
            "device_id is '-1'",
        ),
        (
            {"server_list": [{"server_id": "a", "device": [{"device_id": "0", "rank_id": True}]}]},
            "rank_id is True",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, message):
    content = {**ONE, "server_count": None, **change}
    with pytest.raises(UserError, match=message) as error:
        _read(tmp_path, content)
    assert "\x1b" not in str(error.value)


def test_ranks_of_servers_must_not_be_mixed(tmp_path):
    content = copy.deepcopy(ONE)
    ranks = iter("0213")
    for server in content["server_list"]:
        for device in server["device"]:
            device["rank_id"] = next(ranks)
    with pytest.raises(
        UserError, match=r"server node_0, its rank ids are 0, 2;.*follow one another"
    ):
        _read(tmp_path, content)


@pytest.mark.parametrize(
    ("pods", "message"),
    [
        ([["node_0"]], "super_pod_list has the servers node_0;"),
        ([["node_0"], ["node_1", "node_0"]], "node_0 stands twice"),
        ([["node_0"], ["node_2"]], "super_pod_list has the servers node_0, node_2"),
        ([[]], r"server_list is \[\]"),
    ],
)
def test_super_pods_are_those_of_the_servers(tmp_path, pods, message):
    pod_list = [
        {"super_pod_id": str(number), "server_list": [{"server_id": name} for name in names]}
        for number, names in enumerate(pods)
    ]
    with pytest.raises(UserError, match=message):
        _read(tmp_path, {**TWO, "super_pod_list": pod_list})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ('{"version": "1.0" // so', "not valid JSON.*comments are not allowed"),
        ("[" * 100_000, "not valid JSON"),
        ("\udcff".encode("utf-8", "surrogateescape"), "not valid JSON"),
        ("[]", r"the table is \[\]; it is an object"),
        (" " * (16 << 20) + "{}", "more than 16,777,216 bytes"),
    ],
    ids=["empty", "comment", "deep", "bytes", "list", "large"],
)
def test_what_is_no_table(tmp_path, text, message):
    path = tmp_path / "table.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        read_rank_table(str(path))


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("absent", "No such file"), ("pipe", "not a file"), (".", "not a file")):
        with pytest.raises(UserError, match=message):
            read_rank_table(str(tmp_path / name))
    with pytest.raises(UserError, match="cannot be read"):
        read_rank_table("a\0b")


# -- the hosts of a job -------------------------------------------------------------------------


def test_places_are_those_among_the_visible_devices(tmp_path):
    """The second host shows the devices 3, 2 and 0 only, in this order."""
    table = _read(tmp_path, ONE)
    other = replace(HOST, hostname="other", device_numbers=(3, 2, 0))
    assert device_places(table, [(HOST, 2), (other, 2)]) == ((0, 1), (1, 0))


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        ([(HOST, 2)], "for 4 ranks, but this job has 2;.*change --nodes and --devices"),
        ([(HOST, 4)], r"names 2 server\(s\) \(node_0, node_1\), but this job runs on 1 host"),
        ([(HOST, 1), (HOST, 3)], "server node_0 has 2 ranks, but atlas has 1"),
        (
            [(HOST, 2), (replace(HOST, hostname="other", device_numbers=(0, 1, 2)), 2)],
            "server node_1 names device 3, which other does not have; visible there are 0, 1, 2,",
        ),
        (
            [(HOST, 2), (replace(HOST, device_numbers=()), 2)],
            "names device 2, 3.*visible there are none",
        ),
    ],
)
def test_a_table_for_other_hosts_is_refused(tmp_path, hosts, message):
    with pytest.raises(UserError, match=message):
        device_places(_read(tmp_path, ONE), hosts)
