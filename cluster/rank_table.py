"""A rank table: which NPU of which server is which rank of HCCL. Read, checked; written by others.

The format is CANN's ("Rank Table Configuration" of its HCCL user guide): version 1.0 for servers, 1.2
for super pods of them. A table is a file of somebody else: its size and every value are checked.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.machine import Machine

VERSIONS = ("1.0", "1.2")
# A device takes some 200 bytes, so this is room for 80,000 of them.
_MAX_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TableServer:
    """One host: the physical numbers of its NPUs, by rank; the first of these ranks is `first_rank`."""

    server_id: str
    first_rank: int
    devices: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTable:
    """`servers` in the order of their ranks."""

    path: str
    version: str
    servers: tuple[TableServer, ...]

    @property
    def num_ranks(self) -> int:
        return sum(len(server.devices) for server in self.servers)


def read_rank_table(path: str) -> RankTable:
    """UserError when the file cannot be read, is no rank table, or contradicts itself."""
    try:
        # A pipe would be waited for, and every rank reads the file again.
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise _wrong(path, "it is not a file", "every rank reads it")
        with open(path, "rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the rank table {path!r} cannot be read: {getattr(error, 'strerror', error)}. Correct "
            "cluster.rank_table or RANK_TABLE_FILE, or leave both out: HCCL then finds the ranks "
            "by itself."
        ) from None
    if len(raw) > _MAX_BYTES:
        raise _wrong(path, f"it has more than {_MAX_BYTES:,} bytes", "a rank table is small")
    try:
        content = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _wrong(path, f"it is not valid JSON ({error})", "comments are not allowed") from None
    return _parse(path, content)


def device_places(
    table: RankTable, hosts: Sequence[tuple[Machine, int]]
) -> tuple[tuple[int, ...], ...]:
    """For each host, the places of its ranks' NPUs among the visible ones of its machine, by rank.

    hosts   each machine once, in the order of the ranks, with the number of its ranks
    UserError when the table is for other hosts, another number of ranks, or names absent devices.
    """
    num_ranks = sum(number for _, number in hosts)
    if table.num_ranks != num_ranks:
        raise _wrong(
            table.path,
            f"it is for {table.num_ranks} ranks, but this job has {num_ranks}",
            "each rank stands in it once",
            "Make a table for these ranks, or change --nodes and --devices.",
        )
    if len(table.servers) != len(hosts):
        raise _wrong(
            table.path,
            f"it names {_servers(table)}, but this job runs on {len(hosts)} host(s)",
            "a server is a host; nodes that are played on one machine are one server",
        )
    return tuple(
        _places_on(table, server, machine, number)
        for server, (machine, number) in zip(table.servers, hosts, strict=True)
    )


def _places_on(
    table: RankTable, server: TableServer, machine: Machine, num_ranks: int
) -> tuple[int, ...]:
    if len(server.devices) != num_ranks:
        raise _wrong(
            table.path,
            f"server {server.server_id} has {len(server.devices)} ranks, but {machine.hostname} "
            f"has {num_ranks}",
            "servers stand in the order of the nodes, with the same number of ranks",
        )
    there = machine.device_numbers
    if absent := [device for device in server.devices if device not in there]:
        raise _wrong(
            table.path,
            f"server {server.server_id} names device {', '.join(map(str, absent))}, which "
            f"{machine.hostname} does not have",
            f"visible there are {', '.join(map(str, there)) or 'none'}, by their numbers in "
            "/dev/davinciN",
            "Correct device_id in the table, or show more devices with ASCEND_RT_VISIBLE_DEVICES.",
        )
    return tuple(there.index(device) for device in server.devices)


def _servers(table: RankTable) -> str:
    names = [server.server_id for server in table.servers]
    shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
    return f"{len(names)} server(s) ({shown})"


# -- reading ------------------------------------------------------------------------------------


def _parse(path: str, content: object) -> RankTable:
    table = _Reader(path, "the table", content)
    version = table.text("version")
    if version not in VERSIONS:
        raise table.wrong(
            f"version is {version!r}", f"this ftlaunch reads {' and '.join(VERSIONS)}"
        )
    if (status := table.text("status")) != "completed":
        raise table.wrong(
            f"status is {status!r}",
            "only a 'completed' table may be used",
            "Wait until whatever writes it has finished.",
        )
    readers = table.entries("server_list")
    servers = sorted((_parse_server(each) for each in readers), key=lambda each: each.first_rank)
    if table.has("server_count") and table.number("server_count") != len(servers):
        raise table.wrong(
            f"server_count is {table.number('server_count')}, but server_list has {len(servers)}",
            "they agree",
        )
    _check_once(table, "server_id", [server.server_id for server in servers])
    expected = 0
    for server in servers:
        if server.first_rank != expected:
            raise table.wrong(
                f"server {server.server_id} begins with rank {server.first_rank}, where "
                f"{expected} is next",
                "rank ids are 0, 1, 2, ... without a gap, each once",
            )
        expected += len(server.devices)
    if version == "1.2" and table.has("super_pod_list"):
        _check_super_pods(table, servers)
    return RankTable(path=path, version=version, servers=tuple(servers))


def _parse_server(server: _Reader) -> TableServer:
    server_id = server.text("server_id")
    server = server.called(f"server {server_id}")
    devices = server.entries("device")
    ranks = [device.number("rank_id") for device in devices]
    numbers = [device.number("device_id") for device in devices]
    _check_once(server, "device_id", numbers)
    for device in devices:
        if device.has("device_ip") and device.value("device_ip") != "":
            device.text("device_ip")
    # MindSpore's scheduler takes the devices by their place in the list, HCCL by rank_id.
    if ranks != list(range(ranks[0], ranks[0] + len(ranks))):
        raise server.wrong(
            f"its rank ids are {', '.join(map(str, ranks[:16]))}",
            "those of a server follow one another: 4, 5, 6, 7; as the nodes of a job have them",
            "Order device by rank_id, and do not mix the ranks of servers.",
        )
    return TableServer(server_id=server_id, first_rank=ranks[0], devices=tuple(numbers))


def _check_super_pods(table: _Reader, servers: Sequence[TableServer]) -> None:
    named = [
        server.text("server_id")
        for pod in table.entries("super_pod_list")
        for server in pod.called(f"super pod {pod.text('super_pod_id')}").entries("server_list")
    ]
    _check_once(table, "server_id in super_pod_list", named)
    if set(named) != {server.server_id for server in servers}:
        raise table.wrong(
            f"super_pod_list has the servers {', '.join(named[:8])}",
            "they are those of server_list",
        )


def _check_once(table: _Reader, key: str, values: Sequence[object]) -> None:
    seen: set[object] = set()
    for value in values:
        if value in seen:
            raise table.wrong(f"{key} {value} stands twice", "each stands once")
        seen.add(value)


def _wrong(path: str, what: str, rule: str, remedy: str = "") -> UserError:
    return UserError(f"the rank table {path}: {what}; {rule}. {remedy or 'Correct the table.'}")


@dataclass(frozen=True, slots=True)
class _Reader:
    """An object of the file; `name` is what a mistake calls it."""

    path: str
    name: str
    content: object

    def wrong(self, what: str, rule: str, remedy: str = "") -> UserError:
        return _wrong(self.path, f"in {self.name}, {what}", rule, remedy)

    def called(self, name: str) -> _Reader:
        return _Reader(self.path, name, self.content)

    def _object(self) -> Mapping[str, Any]:
        if not isinstance(self.content, dict):
            raise _wrong(self.path, f"{self.name} is {self.content!r:.40}", "it is an object, {…}")
        return self.content

    def has(self, key: str) -> bool:
        return self._object().get(key) is not None

    def value(self, key: str) -> object:
        if key not in self._object():
            raise self.wrong(f"{key} is missing", "a rank table needs it")
        return self._object()[key]

    def text(self, key: str) -> str:
        value = self.value(key)
        if not isinstance(value, str) or not 0 < len(value) <= 64 or not value.isprintable():
            raise self.wrong(f"{key} is {value!r:.80}", "it is a text of 1 to 64 characters")
        return value

    def number(self, key: str) -> int:
        """Numbers are written as text; a plain number is taken, too."""
        value = self.value(key)
        text = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
        if not (text.isascii() and text.isdecimal() and len(text) <= 7):
            raise self.wrong(f"{key} is {value!r:.80}", "it is a whole number")
        return int(text)

    def entries(self, key: str) -> list[_Reader]:
        value = self.value(key)
        if not isinstance(value, list) or not value:
            raise self.wrong(f"{key} is {value!r:.80}", "it is a list of one object or more")
        return [_Reader(self.path, f"{key}[{i}]", each) for i, each in enumerate(value)]
