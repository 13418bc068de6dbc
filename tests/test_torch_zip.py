"""Files of torch.save read without torch; pickles and archives that mean harm."""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.checkpoint import restricted_pickle, torch_zip
from ftlaunch.strategies.checkpoint.restricted_pickle import PickleRefused, Record, load_pickle
from ftlaunch.strategies.checkpoint.torch_zip import StoredTensor, read_torch_file


def loaded(tensor: StoredTensor) -> np.ndarray:
    """The numbers of a contiguous fp32 tensor, by its place."""
    data = tensor.path.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
    return np.frombuffer(data, dtype="<f4").reshape(tensor.shape)


def rewrite(
    path: Path, changes: dict[str, bytes], *, compression: int = zipfile.ZIP_STORED
) -> Path:
    """The same archive with some members changed; names without the archive's own folder."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression=compression) as archive:
        for name, data in members.items():
            archive.writestr(name, changes.get(name.partition("/")[2], data))
    return path


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


# -- what is there ------------------------------------------------------------------------------


def test_tensors_are_places_in_the_file(tmp_path):
    base = torch.randn(6, 4)
    value = {
        "whole": base,
        "part": base[2:4],
        "column": base[:, 1],
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "shape": torch.Size([2, 3]),
        "list": [1, 2.5, None, True, "text", (1, 2)],
        "ordered": OrderedDict(a=1),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "set": {1, 2},
        "bytes": b"abc",
        "number": np.float64(1.5),
        5: "five",
    }
    found = read_torch_file(saved(tmp_path / "file.pt", value))
    np.testing.assert_array_equal(loaded(found["whole"]), base.numpy())
    np.testing.assert_array_equal(loaded(found["part"]), base[2:4].numpy())
    np.testing.assert_array_equal(loaded(found["parameter"]), value["parameter"].detach().numpy())
    assert found["column"].strides == (4,) and not found["column"].is_contiguous
    assert found["part"].storage == found["whole"].storage != found["parameter"].storage
    assert found["shape"] == (2, 3) and found["list"] == value["list"] and found[5] == "five"
    assert found["ordered"] == {"a": 1}
    for name in ("device", "set", "number"):
        assert isinstance(found[name], Record), name


def test_objects_of_deepspeed_and_torch_are_inert(tmp_path):
    """None of these modules is imported, though the pickle names them."""
    code = f"""
import sys
from pathlib import Path
from ftlaunch.strategies.checkpoint.torch_zip import read_torch_file
found = read_torch_file(Path({str(tmp_path / "file.pt")!r}))
assert found["object"].named.name == "Linear", found
assert not {{"torch", "deepspeed"}} & set(sys.modules)
"""
    saved(tmp_path / "file.pt", {"object": torch.nn.Linear(2, 2)})
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# -- what means harm ----------------------------------------------------------------------------


class Harmful:
    """Its pickle calls a function when it is loaded."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("function", "args", "named"),
    [
        (os.system, ("touch HERE/harm",), "posix.system"),
        (eval, ("open('HERE/harm', 'w')",), "builtins.eval"),
        (exec, ("open('HERE/harm', 'w')",), "builtins.exec"),
        (open, ("HERE/harm", "w"), "io.open"),
        (getattr, ("HERE", "harm"), "builtins.getattr"),
        (subprocess.call, (["touch", "HERE/harm"],), "subprocess.call"),
        (__import__, ("os",), "builtins.__import__"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value and "/" not in value else "",
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_wants_to_import_something_else(tmp_path, function, args, named, protocol):
    args = tuple(a.replace("HERE", str(tmp_path)) if isinstance(a, str) else a for a in args)
    path = tmp_path / "file.pt"
    torch.save({"a": Harmful(function, *args)}, path, pickle_protocol=protocol)
    with pytest.raises(UserError, match=rf"wants to import {named}; refused") as error:
        read_torch_file(path)
    assert str(path) in str(error.value)
    assert not (tmp_path / "harm").exists()


def test_even_what_may_be_named_is_not_called(tmp_path):
    """torch.hub.load or numpy.load are names in packages that are let through, as records."""
    path = saved(tmp_path / "file.pt", {"a": Harmful(torch.save, 1, str(tmp_path / "harm"))})
    assert isinstance(read_torch_file(path)["a"], Record)
    assert not (tmp_path / "harm").exists()


_NOTHING: Any = None


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            b"\x80\x02K\x01r\xff\xff\xff\xff.",
            None,
        ),  # a memo number that would take 34 GB as an index
        (b"\x80\x02\x8a\xffX", "UnpicklingError|EOFError|ValueError"),  # ends within a number
        (b"\x80\x02X\xff\xff\xff\x7fa.", "EOFError"),  # a text longer than the pickle
        (b"\x80\x02(i__main__\nA\n.", "instruction"),  # INST
        (b"\x80\x02\x82\x01.", "instruction"),  # EXT1
        (b"\x80\x02K\x01K\x02R.", "calls a int"),
        (b"\x80\x02]}b.", "sets the state of a list"),
        (b"\x80\x02}" + b"(" * 3 + b")" * 3 + b"ttt" + b"K\x01s.", "key"),
        (b"\x80\x02}(lK\x01s.", "key"),  # a list as a key
        (b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"K\x01s.", "key"),  # would overflow the C stack
        (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", None),  # 100,000 lists in each other
        (b"", "EOFError"),
        (b"not a pickle", "instruction|Error"),
    ],
)
def test_malformed_pickles(data, said):
    """Refused, or loaded into something harmless; never a crash, never much memory."""
    try:
        load_pickle(data, {}, lambda pid: _NOTHING)
    except PickleRefused as error:
        assert said is not None and re.search(said, str(error)), error
    else:
        assert said is None


def _tensor_pickle(first: int, shape: tuple[Any, ...], strides: tuple[Any, ...]) -> bytes:
    """A pickle of one tensor over storage 0, of 8 fp32 numbers, whatever it says of itself."""

    class Storage:
        pass

    class Tensor:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Storage(), first, shape, strides, False, {})

    class Pickler(pickle._Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if isinstance(obj, Storage):
                return ("storage", torch.FloatStorage, "0", "cpu", 8)
            return None

    file = io.BytesIO()
    Pickler(file, protocol=2).dump({"t": Tensor()})
    return file.getvalue()


@pytest.mark.parametrize(
    ("first", "shape", "strides"),
    [
        (0, (9,), (1,)),
        (1, (8,), (1,)),
        (0, (2, 4), (5, 1)),
        (-1, (1,), (1,)),
        (0, (-1,), (1,)),
        (0, (2,), (-1,)),
        (0, (1 << 60,), (0,)),
        (0, (2,), (1, 1)),
        (0, (1,) * 33, (1,) * 33),
        (0, (2.5,), (1,)),
        (0, (True,), (1,)),
    ],
)
def test_a_tensor_outside_of_its_storage(tmp_path, first, shape, strides):
    path = saved(tmp_path / "file.pt", {"t": torch.zeros(8)})
    assert read_torch_file(rewrite(path, {"data.pkl": _tensor_pickle(0, (8,), (1,))}))
    rewrite(path, {"data.pkl": _tensor_pickle(first, shape, strides)})
    with pytest.raises(UserError, match="is damaged: of its pickle, a tensor"):
        read_torch_file(path)


# -- archives -----------------------------------------------------------------------------------


def test_a_file_that_is_cut_off_says_how_much_is_there(tmp_path):
    name = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
    for rank in range(2):
        saved(tmp_path / name.format(rank), {"a": torch.zeros(1000)})
    path = tmp_path / name.format(1)
    whole = path.stat().st_size
    os.truncate(path, 2000)
    with pytest.raises(UserError) as error:
        read_torch_file(path)
    assert f"{path} is cut off" in str(error.value)
    assert "2,000 bytes" in str(error.value)
    # What it should have can only be guessed: by the files of the other ranks.
    assert f"{name.format(0)} has {whole:,} bytes" in str(error.value)


def test_every_length_of_a_file_that_is_cut_off(tmp_path):
    path = saved(tmp_path / "file.pt", {"a": torch.zeros(10)})
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match="is cut off"):
            read_torch_file(path)


def test_every_byte_of_a_file_that_is_changed(tmp_path):
    """It is read, or refused by name: nothing else may come out."""
    path = saved(tmp_path / "file.pt", {"a": torch.zeros(3), "b": OrderedDict(c=torch.ones(2, 2))})
    data = path.read_bytes()
    for position in range(0, len(data), 3):
        changed = bytearray(data)
        changed[position] ^= 0xFF
        path.write_bytes(changed)
        try:
            read_torch_file(path)
        except UserError as error:
            assert str(path) in str(error)


def test_a_storage_of_another_size(tmp_path):
    path = rewrite(saved(tmp_path / "file.pt", {"a": torch.zeros(10)}), {"data/0": b"\0" * 36})
    with pytest.raises(UserError, match="has 36 bytes and should have 40"):
        read_torch_file(path)


def test_compressed_members(tmp_path):
    path = saved(tmp_path / "file.pt", {"a": torch.zeros(10)})
    rewrite(path, {}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="is compressed"):
        read_torch_file(path)


def test_members_beyond_the_file(tmp_path):
    """The table of contents at the end says that a member is larger than the file."""
    path = saved(tmp_path / "file.pt", {"a": torch.zeros(10)})
    data = bytearray(path.read_bytes())
    entry = data.find(b"PK\x01\x02")
    data[entry + 20 : entry + 28] = struct.pack("<II", 1 << 30, 1 << 30)
    path.write_bytes(data)
    with pytest.raises(UserError, match="would end at byte"):
        read_torch_file(path)


@pytest.mark.parametrize("offset", [1 << 63, (1 << 64) - 2, 1 << 40])
def test_a_member_that_begins_beyond_the_file(tmp_path, offset):
    """Its place is in the extra field, in 64 bits."""
    path = rewrite(saved(tmp_path / "file.pt", {"a": torch.zeros(10)}), {})
    data = bytearray(path.read_bytes())
    entry = data.find(b"PK\x01\x02")
    [name_bytes] = struct.unpack("<H", data[entry + 28 : entry + 30])
    extra = struct.pack("<HHQ", 1, 8, offset)
    data[entry + 30 : entry + 32] = struct.pack("<H", len(extra))
    data[entry + 42 : entry + 46] = b"\xff" * 4
    data[entry + 46 + name_bytes : entry + 46 + name_bytes] = extra
    end = data.rfind(b"PK\x05\x06")
    [table_bytes] = struct.unpack("<I", data[end + 12 : end + 16])
    data[end + 12 : end + 16] = struct.pack("<I", table_bytes + len(extra))
    path.write_bytes(data)
    with pytest.raises(UserError, match="is not where it should be"):
        read_torch_file(path)


def test_other_formats(tmp_path):
    """torch.save's old one, a zip archive of something else, bytes of another order."""
    path = tmp_path / "file.pt"
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"no file of torch\.save"):
        read_torch_file(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/b.txt", "c")
    with pytest.raises(UserError, match=r"0 members data\.pkl"):
        read_torch_file(path)
    rewrite(saved(path, {"a": torch.zeros(3)}), {"byteorder": b"big"})
    with pytest.raises(UserError, match="byte order"):
        read_torch_file(path)


def _doubling(times: int) -> bytes:
    """A tuple that holds a tuple twice, that holds one twice, …: a few bytes for a double each."""
    pickled = b"\x80\x02)"
    for number in range(times):
        pickled += b"q" + bytes([number]) + b"h" + bytes([number]) + b"\x86"
    return pickled


@pytest.mark.parametrize(
    "pickled",
    [
        # The name of a storage is such a tuple: to show it would take for ever.
        b"\x80\x02X\x07\x00\x00\x00storageN" + _doubling(60)[2:] + b"X\x03\x00\x00\x00cpuK\x04tQ.",
        # One list of a thousand, of which a thousand calls each would make a copy.
        b"\x80\x02]q\x00(" + b"K\x01" * 1000 + b"e0" + b"ctorch\nSize\nh\x00\x85R0" * 1000 + b"N.",
        b"\x80\x02]q\x00("
        + b"K\x01K\x02\x86" * 1000
        + b"e0"
        + b"ccollections\nOrderedDict\nh\x00\x85R0" * 1000
        + b"N.",
    ],
    ids=["name", "sizes", "pairs"],
)
def test_a_small_pickle_cannot_ask_for_endless_memory(tmp_path, pickled):
    path = tmp_path / "file.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("file/data.pkl", pickled)
        archive.writestr("file/data/0", bytes(16))
    started = time.monotonic()
    with pytest.raises(UserError):
        read_torch_file(path)
    assert time.monotonic() - started < 1.0


@pytest.mark.parametrize("instruction", [b"}", b"N", b"(", b"\x94", b"\x8c\x02ab"])
def test_a_pickle_has_a_limited_number_of_instructions(monkeypatch, instruction):
    """A byte may ask for 80 bytes of memory: a pickle of 256 MiB would take 20 GiB."""
    monkeypatch.setattr(restricted_pickle, "_MAX_INSTRUCTIONS", 10_000)
    with pytest.raises(PickleRefused, match="more than 10,000 instructions"):
        load_pickle(b"\x80\x04N" + instruction * 10_000, {}, lambda pid: _NOTHING)
    # What calls copy counts as well, however long the pickle is.
    copies = b"e0" + b"ccollections\nOrderedDict\nh\x00\x85R" * 10
    pickled = b"\x80\x02]q\x00(" + b"K\x01K\x02\x86" * 1100 + copies
    with pytest.raises(PickleRefused, match="more than 10,000 instructions"):
        load_pickle(pickled + b"B\0\0\1\0" + b"a" * (1 << 16) + b".", {}, lambda pid: _NOTHING)


def test_a_tensor_takes_few_instructions(tmp_path, monkeypatch):
    """So many that the limit is enough for 200,000 of them."""
    number = 1000
    monkeypatch.setattr(
        *(restricted_pickle, "_MAX_INSTRUCTIONS"),
        restricted_pickle._MAX_INSTRUCTIONS * number // 200_000,
    )
    module = {f"model.layers.{i}.mlp.weight": torch.zeros(1) for i in range(number)}
    assert len(read_torch_file(saved(tmp_path / "file.pt", {"module": module}))["module"]) == number


def test_a_table_of_contents_that_is_too_large(tmp_path, monkeypatch):
    """Known by the record at the end, in 32 bits and in 64, before the table is read."""
    path = saved(tmp_path / "file.pt", {"a": torch.zeros(10)})
    monkeypatch.setattr(torch_zip, "_MAX_TABLE_BYTES", 200)
    for _ in range(2):
        with pytest.raises(UserError, match=r"its table of contents has \d+ bytes"):
            read_torch_file(path)
        rewrite(path, {})


def test_a_pipe_is_not_waited_for(tmp_path):
    path = tmp_path / "mp_rank_00_model_states.pt"
    os.mkfifo(path)
    with pytest.raises(UserError, match="it is no file"):
        read_torch_file(path)
