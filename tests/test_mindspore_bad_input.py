"""What `ftlaunch merge` refuses of MindSpore: exit code 2, the cause by name, nothing written or changed."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.checkpoint.mindspore_file import read_ckpt
from ftlaunch.strategies.checkpoint.model_files import ModelShapes
from ftlaunch.strategies.checkpoint.sources import open_source
from tests.jobs import contents, ftlaunch, said
from tests.mindspore_files import (
    chunk,
    numbers,
    of,
    value,
    varint,
    with_crc,
    write_ckpt,
    write_split_info,
)

MODEL = {"embed.weight": numbers(4, 3), "head.weight": numbers(2, 3), "head.bias": numbers(2)}
WHOLE = b"".join(of(name, array) for name, array in MODEL.items())


def refused(tmp_path: Path, source: Path, *flags: object) -> str:
    """What is said when it is refused. The target does not come to be, the source stays."""
    before = contents(tmp_path)
    result = ftlaunch("merge", source, tmp_path / "merged", *flags, timeout=60)
    assert result.returncode == 2, said(result)
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert contents(tmp_path) == before
    return result.stderr


def reason(path: Path) -> str:
    """As above, within this process: only what is said."""
    with pytest.raises(UserError) as caught:
        open_source(path)
    return str(caught.value)


def write(tmp_path: Path, content: bytes) -> Path:
    (tmp_path / "a.ckpt").write_bytes(content)
    return tmp_path / "a.ckpt"


# -- files that are cut off or have changed -----------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 40, -20, -5])
def test_a_file_that_is_cut_off_is_named(tmp_path, keep):
    path = write(tmp_path, with_crc(WHOLE)[:keep])
    text = refused(tmp_path, path)
    assert f"{path} is cut off" in text or (keep == 0 and f"{path} is damaged: it is empty" in text)


def test_a_file_may_be_cut_off_anywhere(tmp_path):
    """With a checksum only between two entries, without the checksum, it is a whole file again."""
    content = with_crc(WHOLE)
    ends = [len(of("embed.weight", MODEL["embed.weight"]))]
    ends.append(ends[0] + len(of("head.weight", MODEL["head.weight"])))
    ends.append(len(WHOLE))
    for keep in range(len(content)):
        path = write(tmp_path, content[:keep])
        if keep in ends:
            assert not read_ckpt(path).has_checksum
        else:
            assert str(path) in reason(path)


def test_every_changed_byte_is_noticed(tmp_path):
    content = with_crc(WHOLE)
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 0x11
        assert str(tmp_path / "a.ckpt") in reason(write(tmp_path, bytes(changed)))


def test_a_wrong_checksum(tmp_path):
    wrong = (zlib.crc32(WHOLE) ^ 1).to_bytes(10, "big")
    path = write(tmp_path, WHOLE + b"crc_num" + wrong)
    assert f"{path} is damaged: its bytes have another checksum" in refused(tmp_path, path)
    # More than 32 bits, and something behind it.
    assert "another checksum" in reason(write(tmp_path, WHOLE + b"crc_num" + b"\xff" * 10))
    assert "no entry begins" in reason(write(tmp_path, with_crc(WHOLE) + b"\0"))


def test_whatever_has_changed_there_is_no_other_error(tmp_path):
    """Without a checksum a file may be read or refused, but nothing else may happen."""
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(3000):
        content = bytearray(WHOLE)
        for position in rng.integers(0, len(content), rng.integers(1, 4)):
            content[position] = rng.choice([0, 1, 8, 0x0A, 0x12, 0x1A, 0x7F, 0x80, 0xFF])
        try:
            open_source(write(tmp_path, bytes(content)))
            outcomes.add("read")
        except UserError as error:
            assert str(tmp_path / "a.ckpt") in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


# -- contents that make no sense ----------------------------------------------------------------


def entry(name: bytes = b"w", tensor: bytes = b"") -> bytes:
    return chunk(1, chunk(1, name) + tensor)


def tensor(dims: bytes, *, kind: bytes = b"Float32", content: bytes = bytes(8)) -> bytes:
    return chunk(2, dims + chunk(2, kind) + chunk(3, content))


TWO = b"\x08\x02"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\x0a" + b"\xff" * 10, "does not end"),
        (b"\x0a" + b"\xff" * 9 + b"\x7f", "out of range"),
        (b"\x0a" + b"\xff" * 8 + b"\x7f", "is cut off"),
        (b"\x0a" + varint(1 << 40), "is cut off"),
        (b"\x0b\x00", "no entry begins at byte 0"),
        (b"\x12\x00", "no entry begins at byte 0"),
        (b"hello", "no entry begins at byte 0"),
        (chunk(1, b""), "has no name"),
        (chunk(1, chunk(1, b"")), "a name has 0 bytes"),
        (chunk(1, chunk(1, b"w" * 4097)), "a name has 4,097 bytes"),
        (chunk(1, chunk(1, b"\xff\xfe")), "is no UTF-8"),
        (chunk(1, chunk(1, b"\xed\xa0\x80")), "is no UTF-8"),
        (chunk(1, chunk(1, b"a") + chunk(1, b"b")), "key 10 that it should not have"),
        (chunk(1, chunk(1, b"a") + chunk(4, b"b")), "key 34 that it should not have"),
        (chunk(1, chunk(1, b"a") + b"\x15\0\0\0\0"), "has a field of key 21"),
        (chunk(1, b"\x0a\x7fab"), "is cut off"),
        (chunk(1, b"\x0a\x03ab") + bytes(9), "ends at byte 7, after 6"),
        (entry(), "'w' has no tensor"),
        (entry(tensor=chunk(2, TWO)), "has no type or no content"),
        (entry(tensor=tensor(b"\x08\x03")), "has 8 bytes, its shape (3,) of Float32 needs 12"),
        (entry(tensor=tensor(b"")), "has 8 bytes, its shape () of Float32 needs 4"),
        (entry(tensor=tensor(b"\x08" + b"\xff" * 9 + b"\x01")), "out of range"),
        (entry(tensor=tensor(b"\x08" + varint(1 << 50))), "makes no sense"),
        (entry(tensor=tensor(TWO * 33)), "makes no sense"),
        (entry(tensor=tensor(chunk(1, b"\x02" * 99))), "makes no sense"),
        (entry(tensor=tensor(chunk(1, b"\x82"))), "does not end"),
        # 2^32 times 2^32: in 64 bits there would be nothing left.
        (entry(tensor=tensor((b"\x08" + varint(1 << 32)) * 2)), "needs 73,786,976,294,838,206,464"),
        (entry(tensor=tensor(TWO, kind=b"Complex64")), "'w' is of type 'Complex64'"),
        (entry(tensor=tensor(TWO, kind=b"Int4")), "'w' is of type 'Int4'"),
        (entry(tensor=tensor(TWO, kind=b"x" * 33)), "the type of 'w' has 33 bytes"),
        (entry(tensor=chunk(3, b"")), "is a MapParameter"),
        (entry(tensor=tensor(TWO)) * 2, "'w' has 16 bytes"),
        (of("a", numbers(1)) + of("b", numbers(1)) + of("a", numbers(1)), "stands at two places"),
        (of("a", "one") + of("a", "two"), "stands at two places"),
        (
            value("a", [4], "Float32", bytes(8)) + value("a", [4], "Int32", bytes(8)),
            "differ in shape",
        ),
        (
            value("a", [4], "Float32", bytes(8)) + value("a", [2, 2], "Float32", bytes(8)),
            "differ in shape",
        ),
        (
            value("a", [4], "Float32", bytes(8)),
            "has 8 bytes, its shape (4,) of Float32 needs 16",
        ),
        ((0x7F3A5ED8).to_bytes(4, "little") + bytes(80), "is encrypted"),
        ((0x7F3A5EDA).to_bytes(4, "little") + bytes(80), "is encrypted"),
        (b"PK\x03\x04" + bytes(80), "is a file of torch.save"),
    ],
)
def test_contents_that_make_no_sense(tmp_path, content, expected):
    path = write(tmp_path, content)
    text = reason(path)
    assert expected in text and str(path) in text


def test_too_many_entries(tmp_path, monkeypatch):
    monkeypatch.setattr("ftlaunch.strategies.checkpoint.mindspore_file._MAX_VALUES", 3)
    assert read_ckpt(write(tmp_path, WHOLE)).entries
    assert "more than 3 entries" in reason(write(tmp_path, WHOLE + of("x", numbers(1))))


def test_a_name_that_would_play_with_the_terminal(tmp_path):
    name = "\x1b[2Jweight\nerror: all is well"
    path = write(tmp_path, of(name, numbers(2)) + of("b", numbers(1)) + of(name, numbers(2)))
    text = refused(tmp_path, path)
    assert text.count("\n") == 1 and "\x1b" not in text
    [line] = open_source(
        write(tmp_path, of(f"{name}.gamma", numbers(2)) + of(f"{name}.beta", numbers(2)))
    ).notes[1:]
    assert "\x1b" not in line and "\n" not in line


def test_no_weights_at_all(tmp_path):
    assert "has no weights" in refused(tmp_path, write(tmp_path, of("epoch_num", np.array(1))))
    assert "has no weights" in refused(tmp_path, write(tmp_path, with_crc(b"")))


# -- paths --------------------------------------------------------------------------------------


def test_what_is_no_file(tmp_path):
    (tmp_path / "loop.ckpt").symlink_to("loop.ckpt")
    (tmp_path / "nowhere.ckpt").symlink_to("nothing")
    os.mkfifo(tmp_path / "pipe.ckpt")
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    for name in ("loop.ckpt", "nowhere.ckpt"):
        assert "is a link that leads to no file" in refused(tmp_path, tmp_path / name)
    assert "pipe.ckpt is no file" in refused(tmp_path, tmp_path / "pipe.ckpt")
    for name in ("text.txt", "model.safetensors.index.json"):
        assert "is a file; pass the folder that it is in" in reason(tmp_path / name)
    assert "does not exist" in refused(tmp_path, tmp_path / "none.ckpt")


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop"])
def test_what_is_no_file_in_a_folder(tmp_path, kind):
    path = tmp_path / "source" / "model.ckpt"
    path.parent.mkdir()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path.name)
    assert f"{path} is " in reason(path.parent) and "no file" in reason(path.parent)


def test_a_folder_that_is_its_own_rank(tmp_path):
    (tmp_path / "rank_0").symlink_to(".")
    assert "holds no checkpoint" in reason(tmp_path)
    write_ckpt(tmp_path / "model.ckpt", MODEL)
    assert len(open_source(tmp_path).weights) == len(MODEL)


def test_several_files_and_nothing_that_says_which(tmp_path):
    for name in ("1-1.ckpt", "1-2.ckpt", "b_rank_0.ckpt"):
        write_ckpt(tmp_path / name, MODEL)
    text = refused(tmp_path, tmp_path)
    assert "3 files that may be checkpoints ('1-1.ckpt', '1-2.ckpt', 'b_rank_0.ckpt')" in text
    for path in tmp_path.glob("1-*"):
        path.unlink()
    for name in ("c_rank_0.ckpt", "b_rank_00.ckpt"):
        write_ckpt(tmp_path / name, MODEL)
        assert "2 files that may be checkpoints" in reason(tmp_path)
        (tmp_path / name).unlink()


# -- ranks --------------------------------------------------------------------------------------


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    """A folder with the files of three ranks that hold the same."""
    for rank in range(3):
        write_ckpt(tmp_path / "source" / f"rank_{rank}" / "model.ckpt", MODEL)
    return tmp_path / "source"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"head.weight": numbers(2, 3, seed=5)}, "'head.weight' has other bytes on rank 1"),
        ({"head.bias": numbers(3)}, "'head.bias' is (2,) of F32 on rank 0, (3,) of F32 on rank 1"),
        ({"head.bias": np.zeros(2, np.int32)}, "'head.bias' is (2,) of F32 on rank 0, (2,) of I32"),
        ({"more": numbers(1)}, "'more' is on rank 1 only"),
        ({"head.bias": None}, "'head.bias' is on rank 0 only"),
    ],
)
def test_ranks_that_disagree(tmp_path, ranks, change, expected):
    tensors = {name: array for name, array in {**MODEL, **change}.items() if array is not None}
    write_ckpt(ranks / "rank_1" / "model.ckpt", tensors)
    assert f"the ranks 0 and 1 disagree: {expected}" in refused(tmp_path, ranks)


def test_one_byte_at_the_end_of_a_rank(tmp_path, ranks):
    path = ranks / "rank_2" / "model.ckpt"
    content = bytearray(WHOLE)
    content[-1] ^= 1
    path.write_bytes(with_crc(bytes(content)))
    assert "'head.bias' has other bytes on rank 2" in reason(ranks)


def test_a_missing_rank(tmp_path, ranks):
    shutil.move(ranks / "rank_1" / "model.ckpt", tmp_path / "away.ckpt")
    assert f"{ranks / 'rank_1'} holds no checkpoint" in refused(tmp_path, ranks)
    (ranks / "rank_1").rmdir()
    assert "but rank 1 is missing" in refused(tmp_path, ranks)
    shutil.rmtree(ranks / "rank_0")
    assert "but rank 0 is missing" in reason(ranks)
    shutil.copytree(ranks / "rank_2", ranks / "other_rank_2")
    assert "two folders of rank 2, other_rank_2 and rank_2" in reason(ranks)


def test_a_damaged_rank_is_named(ranks):
    path = ranks / "rank_2" / "model.ckpt"
    os.truncate(path, 50)
    assert f"{path} is cut off" in reason(ranks)


# -- ZeRO ---------------------------------------------------------------------------------------


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """Two ranks with halves of `a` and the whole of `b`."""
    whole = numbers(4, 3)
    for rank in range(2):
        own = {"a": whole[2 * rank : 2 * rank + 2], "b": numbers(3)}
        write_ckpt(tmp_path / "source" / f"m_op_rank_{rank}.ckpt", own)
    write_split_info(tmp_path / "source" / "params_info", {"a": True, "b": False}, 2)
    assert {w.name: w.shape for w in open_source(tmp_path / "source").weights}["a"] == (4, 3)
    return tmp_path / "source"


def test_one_rank_of_what_is_split(tmp_path, split):
    text = refused(tmp_path, split / "m_op_rank_0.ckpt")
    assert "each of 2 ranks holds a part of 'a'" in text
    (split / "m_op_rank_1.ckpt").unlink()
    assert "has the files of 1 rank(s), but by" in refused(tmp_path, split)


def test_split_files_of_another_job(tmp_path, split):
    info = split / "params_info"
    write_split_info(info, {"a": True, "c": False}, 2)
    assert "does not hold 'c'" in refused(tmp_path, split)
    write_split_info(info, {"a": False, "b": False}, 2)
    assert "'a' has other bytes on rank 1" in reason(split)
    shutil.rmtree(info)
    assert "its folder params_info has to be beside the files" in reason(split)
    write_split_info(info, {"a": True, "b": False}, 3)
    assert "has the files of 2 rank(s), but by" in reason(split)
    shutil.rmtree(info)
    write_split_info(info, {"a": True, "b": True}, 2)
    write_ckpt(split / "m_op_rank_0.ckpt", {"a": numbers(2), "b": np.array(1.0)})
    write_ckpt(split / "m_op_rank_1.ckpt", {"a": numbers(2, seed=1), "b": np.array(2.0)})
    assert "'b' is one number" in reason(split)


def test_split_or_whole_and_nothing_that_says_which(split):
    """Halves of zeros, or zeros twice."""
    for rank in range(2):
        write_ckpt(split / f"m_op_rank_{rank}.ckpt", {"a": np.zeros((2, 3)), "b": numbers(3)})
    assert "all ranks have the same numbers of them" in reason(split)
    for known in ((2, 3), (4, 3)):
        [weight, _] = open_source(split, ModelShapes({"a": known})).weights
        assert weight.shape == known


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("{", "it is no JSON"),
        ("[" * 100_000, "it is no JSON"),
        ("[]", "it holds no JSON object"),
        ("{}", "says 0 different numbers of ranks"),
        ('{"a": 1}', "what it says of 'a' is not split"),
        ('{"a": {"split": 1, "group_size": 2, "rank_id": 1}}', "what it says of 'a'"),
        ('{"a": {"split": true, "group_size": 1, "rank_id": 1}}', "what it says of 'a'"),
        ('{"a": {"split": true, "group_size": 2, "rank_id": 0}}', "is of rank 0"),
        ('{"a": {"split": true, "group_size": 2, "rank_id": 1}}', "what they say of 'b'"),
        (
            '{"a": {"split": true, "group_size": 3, "rank_id": 1},'
            ' "b": {"split": false, "group_size": 3, "rank_id": 1}}',
            "the number of ranks",
        ),
        (
            '{"a": {"split": true, "group_size": 3, "rank_id": 1},'
            ' "b": {"split": false, "group_size": 2, "rank_id": 1}}',
            "says 2 different numbers of ranks",
        ),
    ],
)
def test_split_files_that_make_no_sense(split, table, expected):
    path = split / "params_info" / "params_split_info_1.json"
    path.write_text(table)
    text = reason(split)
    assert expected in text and path.name in text


def test_a_missing_split_file(split):
    write_split_info(split / "params_info", {"a": True, "b": False}, 4, without=[2])
    assert "4 ranks took part, but that of rank 2 is missing" in reason(split)


# -- names and safetensors ----------------------------------------------------------------------


def test_two_entries_of_one_name(tmp_path):
    tensors = {"n.gamma": numbers(4), "n.beta": numbers(4), "e.weight": numbers(2, 2)}
    tensors["e.embedding_table"] = numbers(2, 2)
    path = write_ckpt(tmp_path / "a.ckpt", tensors)
    text = refused(tmp_path, path)
    assert "'e.weight' and 'e.embedding_table' would both be called 'e.weight'" in text


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"format": "pt"}, "from_pretrained loads as it is"),
        ({"format": "ftlaunch"}, "needs its manifest.json"),
        ({"format": "ms", "remove_redundancy": "True"}, "a share of the tensors only"),
        ({"format": "ms", "crc_num": "17"}, "another checksum"),
        ({"format": "ms", "head.bias": "Int4"}, "'head.bias' is of type 'Int4'"),
    ],
)
def test_safetensors_of_another_kind(tmp_path, metadata, expected):
    save_file(MODEL, tmp_path / "model.safetensors", metadata)
    assert expected in refused(tmp_path, tmp_path / "model.safetensors")
    assert expected in reason(tmp_path)


def test_safetensors_that_are_cut_off(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(MODEL, path, {"format": "np"})
    for keep in (0, 7, 100, path.stat().st_size - 1):
        os.truncate(path, keep)
        assert f"{path} is damaged" in reason(path)
        save_file(MODEL, path, {"format": "np"})


def test_shards_that_are_not_what_the_index_says(tmp_path):
    files = [f"model-{n:05d}-of-00002.safetensors" for n in (1, 2)]
    save_file({"a": numbers(1)}, tmp_path / files[0], {"format": "np"})
    save_file({"b": numbers(1)}, tmp_path / files[1], {"format": "np"})
    index = tmp_path / "model.safetensors.index.json"

    def said_of(weight_map: object) -> str:
        index.write_text(json.dumps({"weight_map": weight_map}))
        return reason(tmp_path)

    assert "one of 2 shards; pass the folder" in refused(tmp_path, tmp_path / files[0])
    assert "2 files that may be checkpoints" in reason(tmp_path)
    assert "'c' are not in the files" in said_of({"a": files[0], "b": files[1], "c": files[1]})
    assert "'c', 'b' are not in the files" in said_of({"a": files[0], "c": files[1]})
    assert "has to name those beside it" in said_of({"a": f"../{files[0]}"})
    assert "has no table weight_map" in said_of([])
    assert "is no file" in said_of({"a": files[0], "b": files[1], "c": "model-3.safetensors"})
    save_file({"a": numbers(1)}, tmp_path / files[1], {"format": "np"})
    assert "'a' is in it and" in said_of({"a": files[0], "b": files[1]})


def test_a_number_that_is_cut_in_two(tmp_path):
    """Two parts of 3 and 5 bytes are as many as two numbers of fp32."""
    values = numbers(2).tobytes()
    content = value("a", (2,), "Float32", values[:3]) + value("a", (2,), "Float32", values[3:])
    (tmp_path / "m.ckpt").write_bytes(with_crc(content))
    text = refused(tmp_path, tmp_path / "m.ckpt", "--dtype", "bf16")
    assert "'a' is cut into pieces that make no sense" in text
