"""The safetensors reader and writer against the bytes, the library, and damaged files."""

import errno
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ftlaunch.strategies.safetensors_file import (
    FileDamaged,
    open_file,
    read_places,
    write_file,
    write_tensors,
)

ALL_DTYPES: dict[str, Any] = {
    "f64": np.array([[1.5, -2.0], [0.0, np.inf]], dtype=np.float64),
    "f32": np.arange(6, dtype=np.float32).reshape(1, 2, 3),
    "f16": np.array([1.0, 65504.0], dtype=np.float16),
    "i64": np.array([-(2**63), 2**63 - 1]),
    "i32": np.array([[7]], dtype=np.int32),
    "i16": np.array([1, 2, 3], dtype=np.int16),
    "i8": np.array([-128], dtype=np.int8),
    "u8": np.array([255, 0, 1], dtype=np.uint8),
    "bool": np.array([True, False, True]),
    "scalar": np.array(3.0),
    "empty": np.zeros((0, 4), dtype=np.float32),
}


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_round_trip_of_every_dtype(tmp_path: Path) -> None:
    path = tmp_path / "all.safetensors"
    write_file(path, ALL_DTYPES, {"who": "é", "n": "1"})
    file = open_file(path)
    assert file.metadata == {"who": "é", "n": "1"}
    assert set(file.names) == set(ALL_DTYPES)
    for name, expected in ALL_DTYPES.items():
        found = file.tensor(name)
        assert found.dtype == expected.dtype and file.dtype(name) == expected.dtype
        assert found.shape == expected.shape == file.shape(name)
        np.testing.assert_array_equal(found, expected)
        assert found.flags.aligned or found.size == 0
    assert [p.name for p in tmp_path.iterdir()] == ["all.safetensors"]


def test_the_library_reads_our_files(tmp_path: Path) -> None:
    write_file(tmp_path / "ours", ALL_DTYPES, {"a": "b"})
    found = load_file(tmp_path / "ours")
    assert set(found) == set(ALL_DTYPES)
    for name, expected in ALL_DTYPES.items():
        np.testing.assert_array_equal(found[name], expected)


def test_we_read_the_librarys_files(tmp_path: Path) -> None:
    save_file(ALL_DTYPES, tmp_path / "theirs", metadata={"a": "b"})
    file = open_file(tmp_path / "theirs")
    assert file.metadata == {"a": "b"}
    for name, expected in ALL_DTYPES.items():
        np.testing.assert_array_equal(file.tensor(name), expected)


def test_the_bytes_are_those_of_the_format(tmp_path: Path) -> None:
    write_file(tmp_path / "x", {"t": np.array([1, 2], dtype=np.int16)}, {})
    header = b'{"t":{"dtype":"I16","shape":[2],"data_offsets":[0,4]}}'
    header += b" " * (-len(header) % 8)
    expected = struct.pack("<Q", len(header)) + header + b"\x01\x00\x02\x00"
    assert (tmp_path / "x").read_bytes() == expected


def test_tensors_are_read_only_views_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_file(path, {"t": np.arange(8, dtype=np.int32)}, {})
    tensor = open_file(path).tensor("t")
    with pytest.raises(ValueError, match="read-only"):
        tensor[0] = 1
    with path.open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(struct.pack("<i", 99))
    assert tensor[-1] == 99


def test_writes_what_is_not_contiguous(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_file(tmp_path / "x", {"t": values.T, "s": values[:, 1:3]}, {})
    np.testing.assert_array_equal(open_file(tmp_path / "x").tensor("t"), values.T)
    np.testing.assert_array_equal(open_file(tmp_path / "x").tensor("s"), values[:, 1:3])


def test_an_unknown_dtype_is_a_programmers_mistake(tmp_path: Path) -> None:
    for values in (np.array([1j]), np.array([1], dtype=">i4"), np.array(["a"])):
        with pytest.raises(ValueError, match="cannot write tensor"):
            write_file(tmp_path / "x", {"t": values}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_a_failed_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: Any
) -> None:
    path = tmp_path / "x"
    write_file(path, {"t": np.zeros(3)}, {})
    before = path.read_bytes()

    def fail(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    owner = os if failing == "fsync" else Path
    monkeypatch.setattr(owner, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, {"t": np.ones(3)}, {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_file(path, {"t": np.arange(3, dtype=np.int64)}, {"k": "v"})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FileDamaged) as caught:
            open_file(path)
        assert caught.value.path == path and str(path) in str(caught.value)
    path.write_bytes(whole + b"\0")
    with pytest.raises(FileDamaged, match="holds 25 bytes of tensors, its header 24"):
        open_file(path)


def test_a_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_file(path, {"t": np.arange(3, dtype=np.int64)}, {})
    file = open_file(path)
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(FileDamaged, match="changed"):
        file.tensor("t")


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"[]", "not a JSON object"),
        (b"{]", "not JSON"),
        (b"\xff\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a":{},"a":{}}', "occurs twice"),
        ({"__metadata__": {"a": 1}}, "table of strings"),
        ({"__metadata__": []}, "table of strings"),
        ({"t": []}, "lacks dtype"),
        ({"t": {"dtype": "U8", "shape": [4]}}, "lacks dtype"),
        ({"t": entry(dtype="F8_E4M3")}, "not one of F64"),
        ({"t": {**entry(), "dtype": ["U8"]}}, "not one of F64"),
        ({"t": entry(shape=[-4])}, "has shape"),
        ({"t": entry(shape=4)}, "has shape"),
        ({"t": entry(shape=[True, 4])}, "has shape"),
        ({"t": entry(shape=[2**62, 0], offsets=[0, 0])}, "has shape"),
        ({"t": entry(shape=[1] * 40 + [4])}, "has shape"),
        ({"t": entry(offsets=[0])}, "has data_offsets"),
        ({"t": entry(offsets=[0.0, 4.0])}, "has data_offsets"),
        ({"t": entry(offsets=[4, 0])}, "not those of its shape"),
        ({"t": entry(shape=[5])}, "4 bytes, not those"),
        ({"t": entry(offsets=[4, 8])}, "follows a gap"),
        ({"t": entry(), "u": entry()}, "overlaps"),
        ({"t": entry(shape=[8], offsets=[0, 8])}, "holds 4 bytes of tensors, its header 8"),
        ({}, "holds 4 bytes of tensors, its header 0"),
    ],
)
def test_a_false_header_is_found(tmp_path: Path, header: Any, reason: Any) -> None:
    path = raw_file(tmp_path / "x", header, b"\0" * 4)
    with pytest.raises(FileDamaged, match=reason):
        open_file(path)


def test_a_header_length_beyond_all_bounds(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(FileDamaged, match="does not fit"):
        open_file(tmp_path / "x")


def test_a_missing_file_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "none")


def test_tensors_that_come_one_by_one_in_any_order(tmp_path: Path) -> None:
    kinds = {name: (array.dtype, array.shape) for name, array in ALL_DTYPES.items()}
    write_file(tmp_path / "whole", ALL_DTYPES, {"a": "b"})
    write_tensors(tmp_path / "one by one", kinds, reversed(ALL_DTYPES.items()), {"a": "b"})
    assert (tmp_path / "one by one").read_bytes() == (tmp_path / "whole").read_bytes()
    more = [*ALL_DTYPES.items(), ("f16", ALL_DTYPES["f16"])]
    for wrong in ([*ALL_DTYPES.items()][1:], more, [("f64", np.zeros(3)), *more]):
        with pytest.raises(ValueError, match=r"has not come|was not said"):
            write_tensors(tmp_path / "wrong", kinds, wrong, {})
    assert not (tmp_path / "wrong").exists()


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for read in (open_file, read_places):
        with pytest.raises(FileDamaged, match="it is no file"):
            read(tmp_path / "pipe")
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "nothing")
