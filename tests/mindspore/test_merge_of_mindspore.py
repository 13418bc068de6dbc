"""`ftlaunch merge` of what MindSpore and mindone themselves write; skipped where they are not installed."""

from __future__ import annotations

import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.checkpoint.merge import write_weights
from ftlaunch.strategies.checkpoint.sources import Source, open_source
from tests.jobs import ftlaunch, said

with warnings.catch_warnings():
    # Of the libraries that they import, not of ours.
    warnings.simplefilter("ignore")
    ms = pytest.importorskip("mindspore", reason="MindSpore is not installed")
    from mindspore import nn
    from mindspore.train import serialization

BERT = {
    "vocab_size": 23,
    "hidden_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 14,
    "max_position_embeddings": 40,
    "num_labels": 3,
}
FORMATS = [("ckpt", True), ("ckpt", False), ("safetensors", True), ("safetensors", False)]


@pytest.fixture(autouse=True)
def _no_warnings_of_theirs() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_net() -> Any:
    """A cell of every kind whose parameters torch calls otherwise, and two that it must not touch."""

    class Net(nn.Cell):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.norm = nn.LayerNorm((4,))
            self.batch = nn.BatchNorm1d(4)
            self.group = nn.GroupNorm(2, 4)
            self.conv = nn.Conv2d(4, 5, 3, has_bias=True)
            self.gamma = nn.Dense(4, 3)
            self.scale = ms.Parameter(ms.Tensor(2.0), name="scale")

    net, rng = Net(), np.random.default_rng(3)
    for parameter in net.get_parameters():
        # Otherwise norms are zeros and ones, which could be mistaken for one another.
        parameter.set_data(ms.Tensor(rng.standard_normal(parameter.shape).astype(np.float32)))
    return net


NAMES = {
    "embed.embedding_table": "embed.weight",
    "norm.gamma": "norm.weight",
    "norm.beta": "norm.bias",
    "group.gamma": "group.weight",
    "group.beta": "group.bias",
    "batch.gamma": "batch.weight",
    "batch.beta": "batch.bias",
    "batch.moving_mean": "batch.running_mean",
    "batch.moving_variance": "batch.running_var",
}


def held(cell: Any) -> dict[str, np.ndarray]:
    """What a cell has, under the names that torch would use."""
    return {NAMES.get(p.name, p.name): p.asnumpy() for p in cell.get_parameters()}


def merged(path: Path, target: Path) -> tuple[Source, dict[str, np.ndarray]]:
    source = open_source(path)
    target.mkdir()
    write_weights(source.weights, target)
    return source, load_file(target / "model.safetensors")


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype), name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


# -- the format ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "crc"), FORMATS)
def test_it_is_what_the_cell_held(tmp_path, kind, crc):
    net = make_net()
    more = {"epoch_num": 3, "flag": True, "ratio": 0.5}
    texts = {"comment": "héllo 雪"} if kind == "ckpt" else {}
    path = tmp_path / f"net.{kind}"
    ms.save_checkpoint(net, str(path), append_dict={**more, **texts}, format=kind, crc_check=crc)
    result = ftlaunch("merge", path, tmp_path / "merged")
    assert result.returncode == 0, said(result)
    expected = {**held(net), "flag": np.array(True), "ratio": np.array(0.5, np.float32)}
    assert_equal(load_file(tmp_path / "merged" / "model.safetensors"), expected)
    assert ("comment" in result.stdout) == (kind == "ckpt")
    assert ("has no checksum" in result.stdout) == (kind == "ckpt" and not crc)


@pytest.mark.parametrize(("kind", "crc"), FORMATS)
def test_every_dtype(tmp_path, kind, crc):
    kinds = [*(getattr(ms, f"int{n}") for n in (8, 16, 32, 64)), ms.bool_]
    kinds += [
        *(getattr(ms, f"uint{n}") for n in (8, 16, 32, 64)),
        ms.float16,
        ms.float32,
        ms.float64,
    ]
    if (kind, crc) != ("safetensors", True):
        # Of which MindSpore 2.10 fails to take the checksum.
        kinds.append(ms.bfloat16)
    tensors = {str(k): ms.Tensor(np.arange(6).reshape(2, 3), k) for k in kinds}
    tensors |= {"number": ms.Tensor(1000, ms.int64), "negative": ms.Tensor(2.5, ms.float64)}
    entries = [{"name": name, "data": tensor} for name, tensor in tensors.items()]
    ms.save_checkpoint(entries, str(tmp_path / f"a.{kind}"), format=kind, crc_check=crc)
    _, found = merged(tmp_path / f"a.{kind}", tmp_path / "merged")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        is_float = "float" in str(tensor.dtype).lower()
        array = tensor.astype(ms.float32).asnumpy() if is_float else tensor.asnumpy()
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("async_save", [False, True])
def test_tensors_in_several_parts(tmp_path, monkeypatch, async_save):
    """As above 512 MiB, but above 1 KiB here. In the background numpy cuts, along the first axis."""
    monkeypatch.setattr(serialization, "SLICE_SIZE", 1)
    array = np.random.default_rng(0).standard_normal((301, 7)).astype(np.float32)
    path = tmp_path / "a.ckpt"
    entries = [{"name": "large", "data": ms.Tensor(array)}, {"name": "b", "data": ms.Tensor([1.0])}]
    ms.save_checkpoint(entries, str(path), crc_check=True, async_save=async_save)
    serialization._wait_async_thread_save_ckpt()
    # 301 * 7 * 4 = 8,428 bytes, in parts of 1,024 at most.
    assert path.read_bytes().count(b"large") == 9
    source, found = merged(path, tmp_path / "merged")
    assert len(source.weights[0].runs) == 9
    np.testing.assert_array_equal(found["large"], array)


@pytest.mark.parametrize("mode", ["AES-GCM", "AES-CBC", "SM4-CBC"])
def test_an_encrypted_file_is_refused(tmp_path, mode):
    path = tmp_path / "a.ckpt"
    ms.save_checkpoint(make_net(), str(path), enc_key=b"0123456789abcdef", enc_mode=mode)
    with pytest.raises(UserError, match=r"a\.ckpt is encrypted"):
        open_source(path)


# -- what is no weight --------------------------------------------------------------------------


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "AdamWeightDecay": lambda p: nn.AdamWeightDecay(p),
    "Adam": lambda p: nn.Adam(p, use_amsgrad=True),
    "Adam with rates": lambda p: nn.Adam([{"params": p, "lr": [0.1, 0.2]}]),
    "Momentum": lambda p: nn.Momentum(p, 0.1, 0.9),
    "SGD": lambda p: nn.SGD(p, 0.1),
    "Lamb": lambda p: nn.Lamb(p, 0.1),
    "RMSProp": lambda p: nn.RMSProp(p, 0.1),
    "experimental AdamW": lambda p: ms.experimental.optim.AdamW(p),
    "mint AdamW": lambda p: ms.mint.optim.AdamW(p),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizers_state_is_left_out(tmp_path, name):
    net = make_net()
    cell = nn.WithLossCell(net, nn.MSELoss())
    optimizer = OPTIMIZERS[name](net.trainable_params())
    scaler = nn.DynamicLossScaleUpdateCell(1024, 2, 100)
    train = nn.TrainOneStepWithLossScaleCell(cell, optimizer, scaler)
    parameters = list(train.get_parameters())
    # Every weight that is trained has state: two for most of these optimizers.
    assert len(parameters) > 2 * len(net.trainable_params())
    ms.save_checkpoint(train, str(tmp_path / "a.ckpt"), append_dict={"step_num": 5})
    _, found = merged(tmp_path / "a.ckpt", tmp_path / "merged")
    assert_equal(found, held(net))


# -- ranks --------------------------------------------------------------------------------------


@pytest.fixture
def zero(monkeypatch: pytest.MonkeyPatch) -> Any:
    """mindone's ZeRO. It needs ml_dtypes for an optimizer on NPUs, and does not say so to pip."""
    if importlib.util.find_spec("ml_dtypes") is None:
        played = types.ModuleType("ml_dtypes")
        played.bfloat16 = np.float16  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "ml_dtypes", played)
    return pytest.importorskip("mindone.trainers.zero", reason="mindone is not installed")


def test_zero3_is_put_together_as_mindone_does_it(tmp_path, zero):
    """With its own params_split_info files, against its own convert_checkpoints."""
    net, expected = make_net(), held(make_net())
    ranks = []
    for rank in range(2):
        helper = zero.ZeroHelper(nn.AdamWeightDecay(net.trainable_params()))
        helper.op_group_size, helper.op_rank_id = 2, rank
        splits = [p.ndim > 0 and p.shape[0] % 2 == 0 for p in net.trainable_params()]
        helper.need_parameter_split = splits
        (tmp_path / "params_info").mkdir(exist_ok=True)
        helper.dump_params_split_info(str(tmp_path / "params_info"))
        names = {p.name for p, split in zip(net.trainable_params(), splits, strict=True) if split}
        arrays = {p.name: p.asnumpy() for p in net.get_parameters()}
        own = {n: np.split(a, 2)[rank] if n in names else a for n, a in arrays.items()}
        entries = [{"name": name, "data": ms.Tensor(array)} for name, array in own.items()]
        ms.save_checkpoint(entries, str(tmp_path / f"m_op_rank_{rank}.ckpt"))
        ranks.append(names)
    assert ranks[0] == ranks[1] and {"norm.gamma", "norm.beta"} <= ranks[0]
    _, found = merged(tmp_path, tmp_path.parent / f"{tmp_path.name}-merged")
    assert_equal(found, expected)
    info = str(tmp_path / "params_info" / "params_split_info_{}.json")
    zero.convert_checkpoints(str(tmp_path / "m_op_rank_{}.ckpt"), info, 2)
    theirs = ms.load_checkpoint(str(tmp_path / "m_op_rank_all_2.ckpt"))
    assert_equal(found, {NAMES.get(n, n): tensor.asnumpy() for n, tensor in theirs.items()})


# -- a whole model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = pytest.importorskip("mindone.transformers", reason="mindone is not installed")
        from transformers import BertConfig

        return models.BertForSequenceClassification(BertConfig(**BERT))


def test_a_bert_of_mindone(tmp_path, bert):
    """Its checkpoint, and the folder of save_pretrained: the names are those of Hugging Face."""
    bert.save_pretrained(str(tmp_path / "saved"))
    (tmp_path / "rank_0").mkdir()
    path = tmp_path / "rank_0" / "bert.ckpt"
    ms.save_checkpoint(bert, str(path), crc_check=True)
    expected = {parameter.name: parameter.asnumpy() for parameter in bert.get_parameters()}
    assert "bert.embeddings.LayerNorm.weight" in expected
    for number, source in enumerate((path, tmp_path / "rank_0", tmp_path / "saved")):
        target = tmp_path / f"merged {number}"
        flags = ("--model", tmp_path / "saved") if number == 0 else ()
        result = ftlaunch("merge", source, target, *flags)
        assert result.returncode == 0, said(result)
        assert_equal(load_file(target / "model.safetensors"), expected)
        assert (target / "config.json").exists() == (number != 1)
        same = ftlaunch("merge", "--verify", source, target)
        assert same.returncode == 0, said(same)


def test_shards_of_mindone(tmp_path, bert):
    bert.save_pretrained(str(tmp_path), max_shard_size="2KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    _, found = merged(tmp_path, tmp_path.parent / f"{tmp_path.name}-merged")
    assert_equal(found, {p.name: p.asnumpy() for p in bert.get_parameters()})
