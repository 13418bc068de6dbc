"""What travels between the processes of a job: whole, typed, and nothing that a login shell prints."""

from __future__ import annotations

import pytest

from ftlaunch.cluster.events import (
    EVENT_PREFIX,
    MAX_LINE_BYTES,
    AskStacks,
    Bind,
    Exited,
    FromRank,
    Kill,
    Leave,
    LineBuffer,
    Ping,
    Prepare,
    RankStart,
    Spawn,
    Start,
    Stop,
    Suspend,
    decode_command,
    decode_event,
    decode_server_event,
    encode_command,
    encode_event,
    encode_server_event,
)

RANK = RankStart(
    rank=3,
    title="",
    module="a.b",
    arguments=["a b", "ü\n"],
    env={"X": "1"},
    working_dir=None,
    log_path="/l",
    inherits_listener=True,
    shows_output=False,
)


@pytest.mark.parametrize(
    "command",
    [
        Ping(time=0.1),
        Suspend(),
        Bind(address="::1", port=7, listens=False),
        Prepare(start_method="fork", env={"A": "b"}, preload=["json"], grace_seconds=1.5),
        Start(ranks=[RANK]),
        Spawn(rank=RANK),
        Stop(signal=15),
        Kill(at_once=True),
        Leave(),
        AskStacks(),
    ],
    ids=lambda command: command.kind,
)
def test_commands_arrive_as_they_left(command):
    line = encode_command(command)
    assert line.count(b"\n") == 1
    assert decode_command(line) == command


def test_events_arrive_and_other_lines_are_not_events():
    event = FromRank(rank=1, payload={"text": "line\nbreak", "value": float("inf")}, time=1.5)
    assert decode_event(encode_event(event).rstrip(b"\n")) == event
    assert decode_event(b"Welcome to node 7!") is None
    assert decode_event(b"") is None
    exited = Exited(rank=0, code=None, signal=9, time=2.0)
    assert decode_server_event(encode_server_event(exited)) == exited


@pytest.mark.parametrize(
    "line",
    [
        b"{}",
        b"[]",
        b"1",
        b"{",
        b"\xff",
        b'{"kind": "exec"}',
        b'{"kind": "bind", "adress": 1}',
        b'{"kind": "start", "ranks": [{"rank": 1}]}',
        b'{"kind": "spawn", "rank": 7}',
    ],
)
def test_malformed_commands_are_refused(line):
    with pytest.raises(ValueError):
        decode_command(line)


@pytest.mark.parametrize(
    "message",
    [
        '{"kind": ["hello"]}',
        "[" * 100_000,
        '{"kind": "hello", "machine": {}, "pid": 1, "boot_id": [], "network": "", "addresses": {}}',
        '{"kind": "hello", "machine": {}, "pid": 1, "boot_id": "", "network": {}, "addresses": {}}',
        '{"kind": "hello", "machine": {}, "pid": 1, "boot_id": "", "network": "", "addresses": []}',
        '{"kind": "hello", "machine": 7, "pid": 1, "boot_id": "", "network": "", "addresses": {}}',
        '{"kind": "signalled", "signal": "TERM"}',
        '{"kind": "pong", "echo": null, "time": 1.0}',
        '{"kind": "reached", "reasons": {"10.0.0.1": 1}, "interfaces": {}}',
        '{"kind": "inspected", "time": "", "missing": {}, "sees_token": true, "unwritable": "", '
        '"free_bytes": 1}',
        '{"kind": "exited", "rank": {}, "code": 0, "signal": null, "time": 1.0}',
    ],
)
def test_malformed_events_are_refused(message):
    with pytest.raises(ValueError):
        decode_event(EVENT_PREFIX + message.encode())


def test_lines_are_cut_whatever_the_pieces():
    lines = LineBuffer()
    assert list(lines.feed(b"ab")) == []
    assert list(lines.feed(b"c\nd\n\ne")) == [b"abc", b"d", b""]
    assert list(lines.feed(b"\n")) == [b"e"]


def test_a_line_without_end_is_dropped():
    lines = LineBuffer()
    for _ in range(MAX_LINE_BYTES // 65536 + 2):
        assert list(lines.feed(b"x" * 65536)) == []
    rest = list(lines.feed(b"\nafter\n"))
    assert rest[-1] == b"after"
    assert len(rest[0]) < MAX_LINE_BYTES
