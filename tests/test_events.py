"""What travels over the pipes: whole, typed, and nothing that a login shell prints."""

from __future__ import annotations

import json
import os

import pytest

from ftlaunch.cluster.events import (
    MAX_LINE_BYTES,
    Bind,
    Exited,
    Failure,
    FromRank,
    Kill,
    LineBuffer,
    RankPipe,
    RankStart,
    Start,
    Stop,
    decode_command,
    decode_event,
    encode_command,
    encode_event,
)
from ftlaunch.cluster.verdict import first_failure, signal_in_words

START = Start(
    ranks=[
        RankStart(
            rank=3, argv=["a b", "ü\n"], env={"X": "1"}, log_path="/l", inherits_listener=True
        )
    ]
)


@pytest.mark.parametrize("command", [Bind(address="::1", port=7), START, Stop(), Kill()])
def test_commands_arrive_as_they_left(command):
    line = encode_command(command)
    assert line.count(b"\n") == 1
    assert decode_command(line) == command


def test_events_arrive_and_other_lines_are_not_events():
    event = FromRank(rank=1, payload={"text": "line\nbreak", "value": float("inf")})
    assert decode_event(encode_event(event).rstrip(b"\n")) == event
    assert decode_event(b"Welcome to node 7!") is None
    assert decode_event(b"") is None


@pytest.mark.parametrize(
    "line",
    [b"{}", b"[]", b"1", b'{"kind": "exec"}', b'{"kind": "bind", "adress": 1}', b"{", b"\xff"],
)
def test_malformed_commands_are_refused(line):
    with pytest.raises(ValueError):
        decode_command(line)


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


def test_a_rank_tells_its_agent():
    reading, writing = os.pipe()
    pipe = RankPipe(writing)
    pipe.send({"kind": "note", "text": "ü\n"})
    assert json.loads(os.read(reading, 1000)) == {"kind": "note", "text": "ü\n"}
    os.close(reading)
    pipe.send({"kind": "note"})  # nobody listens any more: no error
    os.close(writing)
    RankPipe(None).send({"kind": "note"})


def _failure(rank, cause, title):
    return Failure(rank=rank, node="n", cause=cause, title=title, traceback="", log_path="")


def test_the_first_failure_is_not_the_one_that_lost_its_peer():
    lost = _failure(0, "exception", "RuntimeError: [gloo] Connection closed by peer [127.0.0.1]")
    killed = _failure(1, "signal", "killed by SIGKILL")
    own = _failure(2, "exception", "ValueError: boom")
    assert first_failure([lost, killed, own]) is killed
    assert first_failure([lost, own]) is own
    assert first_failure([own, killed]) is own
    assert first_failure([lost]) is lost


def test_signals_in_words():
    assert "SIGKILL" in signal_in_words(9)
    assert "segmentation fault" in signal_in_words(11)
    assert signal_in_words(10) == "ended by SIGUSR1"
    assert signal_in_words(99) == "ended by signal 99"
    assert Exited(rank=0, code=None, signal=9).signal == 9
