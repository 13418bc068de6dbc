"""`ftlaunch merge` of MindSpore's checkpoints, written by hand: what comes out, under which names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.checkpoint.merge import write_weights
from ftlaunch.strategies.checkpoint.model_files import ModelShapes
from ftlaunch.strategies.checkpoint.sources import Source, open_source
from tests.deepspeed_jobs import BERT
from tests.jobs import contents, ftlaunch, said
from tests.merge_jobs import peak_kib
from tests.mindspore_files import (
    KINDS,
    chunk,
    numbers,
    of,
    value,
    varint,
    with_crc,
    write_ckpt,
    write_split_info,
)
from tests.test_cli import imported_by


def merged(path: Path, target: Path, known: Any = None) -> tuple[Source, dict[str, np.ndarray]]:
    """The source and what `merge` writes of it."""
    source = open_source(path, ModelShapes(known or {}))
    target.mkdir()
    write_weights(source.weights, target)
    return source, load_file(target / "model.safetensors")


def names_of(tensors: Mapping[str, Any], folder: Path, known: Any = None) -> set[str]:
    """Of a checkpoint with these entries."""
    source = open_source(write_ckpt(folder / "model.ckpt", tensors), ModelShapes(known or {}))
    return {weight.name for weight in source.weights}


def assert_equal(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype), name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


# -- the format ---------------------------------------------------------------------------------


def test_the_writer_of_these_tests_writes_what_mindspore_does():
    """Bytes of a file that mindspore 2.10 has written of {"i8": Tensor([1, 1, 1], int8)}."""
    expected = b"\n\x13\n\x02i8\x12\r\x08\x03\x12\x04Int8\x1a\x03\x01\x01\x01"
    assert of("i8", np.ones(3, np.int8)) == expected


def test_every_dtype_and_shape_comes_out_as_it_was(tmp_path):
    tensors = {
        kind: np.arange(6).reshape(2, 3).astype(kind) for kind in KINDS if "float" not in kind
    }
    tensors |= {
        "weight": numbers(4, 5),
        "one": np.array([2.5], np.float32),
        "number": np.array(7, np.int32),
        "empty": np.zeros((0, 3), np.float32),
        "deep": numbers(1, 2, 1, 3, 1),
        "names may be odd: \t\n ü 雪 \x7f": numbers(2),
        "x" * 4096: numbers(1),
    }
    _, found = merged(write_ckpt(tmp_path / "a.ckpt", tensors), tmp_path / "merged")
    assert_equal(found, tensors)


def test_floats_become_the_dtype_that_is_asked_for(tmp_path):
    """bfloat16 is the upper half of fp32: 3F80 is 1, C000 is -2."""
    content = value("bf16", [2], "BFloat16", bytes.fromhex("803f00c0"))
    content += of("fp16", np.array([0.5, -1], np.float16)) + of("fp64", np.array([0.25]))
    (tmp_path / "a.ckpt").write_bytes(content)
    _, found = merged(tmp_path / "a.ckpt", tmp_path / "merged")
    expected = {"bf16": [1, -2], "fp16": [0.5, -1], "fp64": [0.25]}
    assert_equal(found, {k: np.array(v, np.float32) for k, v in expected.items()})


def test_a_tensor_in_several_parts(tmp_path):
    """As those above 512 MiB are: the shape is in each part, the bytes go on."""
    array = numbers(5, 3)
    raw = array.tobytes()
    parts = [raw[:8], raw[8:32], raw[32:]]
    content = of("first", numbers(2))
    content += b"".join(value("large", [5, 3], "Float32", part) for part in parts)
    (tmp_path / "a.ckpt").write_bytes(with_crc(content + of("last", numbers(2))))
    _, found = merged(tmp_path / "a.ckpt", tmp_path / "merged")
    np.testing.assert_array_equal(found["large"], array)
    assert set(found) == {"first", "large", "last"}


def test_shapes_as_other_writers_have_them(tmp_path):
    """A number as MindSpore 1 wrote it, and the axes in one field, as protobuf allows."""
    four = np.float32(4).tobytes()
    packed = chunk(1, varint(2) + varint(300)) + chunk(2, b"UInt8") + chunk(3, bytes(600))
    content = value("number", [0], "Float32", four) + value("none", [0], "Float32", b"")
    content += chunk(1, chunk(2, packed) + chunk(1, b"packed"))
    (tmp_path / "a.ckpt").write_bytes(content)
    _, found = merged(tmp_path / "a.ckpt", tmp_path / "merged")
    assert {name: array.shape for name, array in found.items()} == {
        "number": (),
        "none": (0,),
        "packed": (2, 300),
    }


@pytest.mark.parametrize("crc", [True, False])
def test_a_file_without_a_checksum_is_told(tmp_path, crc):
    path = write_ckpt(tmp_path / "a.ckpt", {"weight": numbers(3)}, crc=crc)
    assert any("has no checksum" in note for note in open_source(path).notes) == (not crc)


# -- what is no weight --------------------------------------------------------------------------


MODEL = {"embed.weight": numbers(4, 3), "head.weight": numbers(2, 3), "head.bias": numbers(2)}


@pytest.mark.parametrize(
    "prefixes",
    [
        ("adam_m", "adam_v"),
        ("moment1", "moment2", "vhat"),
        ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
        ("moments",),
        ("accum", "stat"),
        ("lamb_m", "lamb_v"),
        ("accum_grad", "accum_grad.adam_m", "adam_m"),
        ("master", "ema", "swap"),
    ],
    ids="-".join,
)
def test_an_optimizers_state_is_left_out(tmp_path, prefixes):
    state = {f"{prefix}.{name}": a for prefix in prefixes for name, a in MODEL.items()}
    source, found = merged(write_ckpt(tmp_path / "a.ckpt", {**MODEL, **state}), tmp_path / "merged")
    assert_equal(found, MODEL)
    [note] = source.notes
    assert f"left out, since no weights ({len(state)}): " in note
    assert all(f"of {prefix.partition('.')[0]}" in note for prefix in prefixes)


def test_numbers_of_optimizers_and_callbacks_are_left_out(tmp_path):
    one, step = np.array(0.5, np.float32), np.array([7], np.int32)
    ones = ("beta1_power", "beta2_power", "learning_rate", "momentum", "scale_value", "epoch_num")
    state: dict[str, Any] = dict.fromkeys(ones, one)
    state |= dict.fromkeys(("global_step", "counter", "current_iterator_step"), step)
    state |= {"learning_rate_group_0": numbers(30), "comment": "héllo", "flag": np.array(True)}
    source, found = merged(write_ckpt(tmp_path / "a.ckpt", {**MODEL, **state}), tmp_path / "merged")
    # What nobody can know to be no weight stays.
    assert_equal(found, {**MODEL, "flag": np.array(True)})
    assert "'comment'" in source.notes[0]


@pytest.mark.parametrize(
    "name",
    [
        # Moments of nothing.
        "adam_m.other.weight",
        # A module that is called like an optimizer's state, with a child called like a weight.
        "accum.own",
        "moments.own",
        "counter.weight",
    ],
)
def test_a_weight_is_not_taken_for_an_optimizers_state(tmp_path, name):
    shadow = name.partition(".")[0] + ".head.weight"
    tensors = {**MODEL, name: numbers(5), shadow: numbers(2, 3)}
    kept = names_of(tensors, tmp_path)
    assert name in kept
    # All of a module or nothing, unless the prefix is no word that a module would be called.
    assert (shadow in kept) == (not name.startswith("adam_m"))


def test_shapes_decide_too(tmp_path):
    tensors = {**MODEL, "adam_m.head.weight": numbers(2, 5), "counter": numbers(3)}
    assert names_of(tensors, tmp_path) == set(tensors)


def test_what_the_model_has_is_a_weight(tmp_path):
    tensors = {**MODEL, "counter": numbers(1), "ema.head.bias": numbers(2)}
    assert names_of(tensors, tmp_path / "alone") == set(MODEL)
    known = {name: array.shape for name, array in tensors.items()}
    assert names_of(tensors, tmp_path / "known", known) == set(tensors)


# -- names --------------------------------------------------------------------------------------


def test_names_follow_the_cells_and_not_the_words(tmp_path):
    expected = {
        "norm.gamma": "norm.weight",
        "norm.beta": "norm.bias",
        "bn.gamma": "bn.weight",
        "bn.beta": "bn.bias",
        "bn.moving_mean": "bn.running_mean",
        "bn.moving_variance": "bn.running_var",
        "embed.embedding_table": "embed.weight",
    }
    tensors = {name: numbers(4, seed=i) for i, name in enumerate(expected)}
    tensors["embed.embedding_table"] = numbers(7, 4)
    # A Dense called gamma; a layer's scale; a modulation of two sizes; one beside a bias; a stray average.
    same = {
        "gamma.weight": numbers(3, 4),
        "gamma.bias": numbers(3),
        "layer.gamma": numbers(4),
        "film.gamma": numbers(4),
        "film.beta": numbers(5),
        "mixed.gamma": numbers(4),
        "mixed.beta": numbers(4),
        "mixed.bias": numbers(4),
        "half.gamma": numbers(4),
        "half.beta": numbers(4),
        "half.moving_mean": numbers(4),
        "flat.embedding_table": numbers(4),
    }
    source, found = merged(
        write_ckpt(tmp_path / "a.ckpt", {**tensors, **same}), tmp_path / "merged"
    )
    assert_equal(found, {**{new: tensors[own] for own, new in expected.items()}, **same})
    assert "renamed as in torch (7), such as " in source.notes[0]


def test_the_model_decides_where_it_is_known(tmp_path):
    tensors = {
        "film.gamma": numbers(4),
        "film.beta": numbers(4),
        "bert.norm.gamma": numbers(4),
        "bert.norm.beta": numbers(5),
    }
    known = {"film.gamma": (4,), "film.beta": (4,), "norm.weight": (4,), "norm.bias": (5,)}
    found = names_of(tensors, tmp_path, known)
    assert found == {"film.gamma", "film.beta", "bert.norm.weight", "bert.norm.bias"}


def test_a_conv1d_needs_the_model(tmp_path):
    path = write_ckpt(tmp_path / "a.ckpt", {"conv.weight": numbers(5, 4, 1, 3)})
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    save_file({"conv.weight": numbers(5, 4, 3)}, model / "model.safetensors", {"format": "pt"})
    alone = ftlaunch("merge", path, tmp_path / "alone")
    assert alone.returncode == 0, said(alone)
    assert "'conv.weight' may be of a Conv1d" in alone.stdout
    known = ftlaunch("merge", path, tmp_path / "known", "--model", model)
    assert known.returncode == 0, said(known)
    assert "Conv1d" not in known.stdout
    [array] = load_file(tmp_path / "known" / "model.safetensors").values()
    np.testing.assert_array_equal(array, numbers(5, 4, 1, 3).reshape(5, 4, 3))
    # Either is the same as its source, whose shape it may have by --model alone.
    for target in ("alone", "known"):
        same = ftlaunch("merge", "--verify", path, tmp_path / target)
        assert same.returncode == 0, said(same)


def test_what_the_model_has_besides_is_told(tmp_path):
    known = {"head.weight": (2, 3), "head.bias": (2,), "pooler.weight": (3, 3)}
    source = open_source(write_ckpt(tmp_path / "a.ckpt", MODEL), ModelShapes(known))
    assert source.notes == ("not in the checkpoint, but in --model (1): 'pooler.weight'",)


# -- safetensors --------------------------------------------------------------------------------


@pytest.mark.parametrize("metadata", [{"format": "ms"}, {"format": "np"}, None], ids=str)
def test_safetensors_of_mindspore(tmp_path, metadata):
    save_file(MODEL, tmp_path / "model.safetensors", metadata)
    (tmp_path / "config.json").write_text('{"dtype": "float16"}')
    for number, source in enumerate((tmp_path, tmp_path / "model.safetensors")):
        target = tmp_path.parent / f"{tmp_path.name}-{number}"
        result = ftlaunch("merge", source, target)
        assert result.returncode == 0, said(result)
        assert_equal(load_file(target / "model.safetensors"), MODEL)
        assert b'"format":"pt"' in (target / "model.safetensors").read_bytes()[:200]
        assert json.loads((target / "config.json").read_text()) == {"dtype": "float32"}


def test_shards_with_an_index(tmp_path):
    index = {}
    for number, (name, array) in enumerate(MODEL.items(), 1):
        file = f"model-{number:05d}-of-00003.safetensors"
        save_file({name: array}, tmp_path / file, {"format": "np"})
        index[name] = file
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    _, found = merged(tmp_path, tmp_path.parent / f"{tmp_path.name}-merged")
    assert_equal(found, MODEL)


# -- ranks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["rank_{}/model.ckpt", "ckpt_rank_{}/1-5.ckpt", "b_op_rank_{}.ckpt", "CKP_rank_{}-1_10.ckpt"],
)
def test_every_rank_has_the_same(tmp_path, name):
    source = tmp_path / "source"
    for rank in range(12):
        state = {"adam_m.head.bias": numbers(2, seed=rank)}
        write_ckpt(source / name.format(rank), {**MODEL, **state})
    found, tensors = merged(source, tmp_path / "merged")
    assert_equal(tensors, MODEL)
    assert found.what.endswith("MindSpore, written by 12 rank(s)")
    # One of them does, too.
    _, tensors = merged(source / name.format(3), tmp_path / "of one")
    assert_equal(tensors, MODEL)


def split_ranks(folder: Path, num_ranks: int, *, state: bool = True) -> dict[str, np.ndarray]:
    """Of mindone's ZeRO-3: what divides by the ranks is split. Returns the whole."""
    whole = {"a.weight": numbers(12, 3), "a.bias": numbers(12), "b": numbers(7, 2)}
    split = {name: array.shape[0] % num_ranks == 0 for name, array in whole.items()}
    for rank in range(num_ranks):
        own = {n: np.split(a, num_ranks)[rank] if split[n] else a for n, a in whole.items()}
        moments = {f"moment1.{name}": array for name, array in own.items()} if state else {}
        write_ckpt(folder / f"m_op_rank_{rank}.ckpt", {**own, **moments, "frozen": numbers(3)})
    write_split_info(folder / "params_info", split, num_ranks)
    return {**whole, "frozen": numbers(3)}


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_what_zero3_has_split_is_put_together(tmp_path, num_ranks, state):
    whole = split_ranks(tmp_path / "source", num_ranks, state=state)
    source, found = merged(tmp_path / "source", tmp_path / "merged")
    assert_equal(found, whole)
    assert f"2 tensors are put together of {num_ranks} ranks' parts" in source.notes


@pytest.mark.parametrize("evidence", ["moments", "model", "bytes"])
def test_zero2_splits_the_optimizer_alone(tmp_path, evidence):
    """The same params_info, but each rank's file has the whole model."""
    tensors = {"a.weight": numbers(4, 3), "a.bias": numbers(4)}
    for rank in range(2):
        own = {f"moment1.{n}": np.split(a, 2)[rank] for n, a in tensors.items()}
        state = own if evidence == "moments" else {}
        write_ckpt(tmp_path / "s" / f"rank_{rank}" / "m.ckpt", {**tensors, **state})
    write_split_info(tmp_path / "s" / "params_info", dict.fromkeys(tensors, True), 2)
    known = {n: a.shape for n, a in tensors.items()} if evidence == "model" else None
    _, found = merged(tmp_path / "s", tmp_path / "merged", known)
    assert_equal(found, tensors)
    if evidence != "bytes":
        _, found = merged(tmp_path / "s" / "rank_1" / "m.ckpt", tmp_path / "one", known)
        assert_equal(found, tensors)


@pytest.mark.parametrize(
    ("file", "info"),
    [
        ("ckpt/ckpt_0.ckpt", "params_info"),
        ("ckpts/rank_0/m.ckpt", "params_info"),
        ("out/rank_0/ckpt/m.ckpt", "out/params_info"),
        ("m.ckpt", "params_info"),
    ],
)
def test_one_part_never_passes_for_the_whole(tmp_path, file, info):
    """Whatever the file is called, and wherever params_info lies around it."""
    path = tmp_path / "s" / file
    path.parent.mkdir(parents=True)
    write_ckpt(path, {"fc.weight": numbers(4, 3)})
    write_split_info(tmp_path / "s" / info, {"fc.weight": True}, 2)
    for source in (path, path.parent):
        with pytest.raises(UserError, match="each of 2 ranks holds a part of"):
            open_source(source, ModelShapes({}))
    # The model says that it is whole.
    [weight] = open_source(path, ModelShapes({"fc.weight": (4, 3)})).weights
    assert weight.shape == (4, 3)


@pytest.mark.parametrize("beside", ["ema", "accum_grad"])
def test_whole_weights_with_whole_averages_are_not_multiplied(tmp_path, beside):
    """Under ZeRO-1 and 2, where the moments are split and an average is not."""
    whole = numbers(8, 3)
    for rank in range(2):
        own = {"fc.weight": whole, f"{beside}.fc.weight": numbers(8, 3, seed=2)}
        own["moments.fc.weight"] = np.split(numbers(8, 3, seed=3), 2)[rank]
        write_ckpt(tmp_path / "s" / f"rank_{rank}" / "m.ckpt", own)
    write_split_info(tmp_path / "s" / "params_info", {"fc.weight": True}, 2)
    _, found = merged(tmp_path / "s", tmp_path / "merged")
    assert_equal(found, {"fc.weight": whole})


def test_parts_of_two_saves_are_not_put_together(tmp_path):
    for rank in range(2):
        own = {"fc.weight": numbers(4, 3, seed=rank), "global_step": np.array(100 * (rank + 1))}
        write_ckpt(tmp_path / f"rank_{rank}" / "m.ckpt", own)
    write_split_info(tmp_path / "params_info", {"fc.weight": True}, 2)
    with pytest.raises(UserError, match="'global_step' has other bytes on rank 1"):
        open_source(tmp_path, ModelShapes({}))


def test_a_file_beside_the_folders_of_ranks_is_not_passed_over(tmp_path):
    write_ckpt(tmp_path / "final.ckpt", {"fc.weight": numbers(4, 3)})
    write_ckpt(tmp_path / "rank_0" / "old.ckpt", {"fc.weight": numbers(4, 3, seed=1)})
    with pytest.raises(UserError, match="nothing says which one is meant"):
        open_source(tmp_path, ModelShapes({}))


def test_parts_beside_a_config_are_merged(tmp_path):
    """What lies with the parts is not another model to compare with."""
    whole = numbers(8, 3)
    for rank in range(2):
        folder = tmp_path / "s" / f"rank_{rank}"
        folder.mkdir(parents=True)
        part = np.split(whole, 2)[rank]
        save_file({"fc.weight": part}, folder / "model.safetensors", {"format": "np"})
        (folder / "config.json").write_text("{}")
    write_split_info(tmp_path / "s" / "params_info", {"fc.weight": True}, 2)
    result = ftlaunch("merge", tmp_path / "s", tmp_path / "merged")
    assert result.returncode == 0, said(result)
    found = load_file(tmp_path / "merged" / "model.safetensors")
    np.testing.assert_array_equal(found["fc.weight"], whole)


# -- a whole model ------------------------------------------------------------------------------


CLASSIC = {
    "embeddings.weight": "embeddings.embedding_table",
    "LayerNorm.weight": "LayerNorm.gamma",
    "LayerNorm.bias": "LayerNorm.beta",
}


def classic(name: str) -> str:
    for ending, own in CLASSIC.items():
        if name.endswith(ending):
            return name.removesuffix(ending) + own
    return name


def test_transformers_loads_it_and_computes_the_same(tmp_path):
    """A Bert as `mindspore.nn` would name its parts, with what AdamWeightDecay has beside it."""
    torch.manual_seed(1)
    model = BertForSequenceClassification(BertConfig(**BERT, num_labels=3)).eval()
    tensors = {classic(name): tensor.numpy() for name, tensor in model.state_dict().items()}
    assert "bert.embeddings.word_embeddings.embedding_table" in tensors
    state = {f"adam_v.{name}": array * 0 for name, array in tensors.items()}
    state["global_step"] = np.array([5], np.int32)
    path = write_ckpt(tmp_path / "rank_0" / "model.ckpt", {**tensors, **state})
    model.config.save_pretrained(tmp_path / "model")

    result = ftlaunch("merge", path, tmp_path / "merged", "--model", tmp_path / "model")
    assert result.returncode == 0, said(result)
    loaded, info = BertForSequenceClassification.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not any(info.values()), info
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        difference = loaded.eval()(ids).logits - model(ids).logits
    assert difference.abs().max() <= 1e-6


# -- memory and imports -------------------------------------------------------------------------


def test_it_imports_no_framework(tmp_path):
    path = write_ckpt(tmp_path / "model.ckpt", MODEL)
    modules = imported_by("merge", str(path), str(tmp_path / "merged"))
    heavy = {"torch", "mindspore", "google", "transformers", "huggingface_hub", "pydantic", "rich"}
    assert modules.isdisjoint(heavy)


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Two ranks of 160 MB, compared and merged: the same few MiB above a bare interpreter."""
    bare = peak_kib("pass")
    run = "import sys; from ftlaunch.launcher.cli import run; assert run(sys.argv[1:]) == 0"
    peaks = {}
    for name, rows in (("small", 1 << 10), ("large", 10 << 20)):
        tensors = {f"{i}": np.zeros(rows, np.float32) for i in range(4)}
        for rank in range(2):
            write_ckpt(tmp_path / name / f"rank_{rank}" / "model.ckpt", tensors)
        target = tmp_path / f"{name} merged"
        peaks[name] = peak_kib(run, "merge", tmp_path / name, target) - bare
    print(f"KiB above a bare interpreter: {peaks}")
    assert max(peaks.values()) < 96 << 10
    # A buffer of 8 MiB for each of the two ranks.
    assert peaks["large"] - peaks["small"] < 32 << 10


def test_nothing_changes_in_the_source(tmp_path):
    for rank in range(2):
        write_ckpt(tmp_path / "source" / f"rank_{rank}" / "model.ckpt", MODEL).chmod(0o400)
    before = contents(tmp_path / "source")
    for flag in ((), ("--verify",)):
        result = ftlaunch("merge", *flag, tmp_path / "source", tmp_path / "merged")
        assert result.returncode == 0, said(result)
    assert contents(tmp_path / "source") == before
