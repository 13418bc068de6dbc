"""What `benchmarks.startup` asks of both sides: looked at, not timed."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import startup
from ftlaunch.peers.work import Work

HERE = Path("/somewhere")


def test_by_itself_each_side_chooses_its_precision():
    assert "--precision" not in startup.our_command(HERE, HERE, HERE, None)
    assert Work(**startup.trainer_work(HERE, HERE, None)).precision == "fp32"


def test_one_precision_for_both():
    ours = startup.our_command(HERE, HERE, HERE, "fp32")
    assert ours[ours.index("--precision") + 1] == "fp32"
    assert startup.trainer_work(HERE, HERE, "fp32")["precision"] == "fp32"


@pytest.mark.parametrize(
    ("asked", "words"), [([], "by itself"), (["--precision", "fp32"], "both in fp32")]
)
def test_the_printed_line_says_in_which(asked, words, monkeypatch, capsys):
    given = []

    def sides_of(model, data, precision):
        given.append(precision)
        return dict.fromkeys(startup._FIRST_STEP, lambda folder: 2.0)

    monkeypatch.setattr(startup, "sides_of", sides_of)
    startup.main(["--model", "m", "--data", "d", "--rounds", "1", *asked])
    assert given == [asked[-1] if asked else None]
    assert "1.00 of the other (1.00 to 1.00), " in capsys.readouterr().out.split(words)[0]
