"""`ftlaunch merge`: what comes out against what training held, and what happens when it is disturbed."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import threading

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch_file
from safetensors.torch import save_file as save_torch_file
from transformers import BertConfig, BertForMaskedLM

from ftlaunch.launcher.merge_target import new_folder
from ftlaunch.strategies.checkpoint.conversion import SaveDtype
from ftlaunch.strategies.checkpoint.manifest import CheckpointDamaged
from ftlaunch.strategies.checkpoint.merge import write_weights
from ftlaunch.strategies.checkpoint.sources import open_source
from tests.deepspeed_jobs import BERT
from tests.jobs import MODULE, contents, ftlaunch, said, write_tokenizer
from tests.merge_jobs import JOBS, peak_kib, saved_jobs, start_disturbed, write_torch_checkpoint
from tests.test_cli import imported_by
from tests.training_jobs import Inputs

TIED = {
    "net": {"head.weight"},
    "bert": {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saved_jobs(tmp_path_factory)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A finished job of 20 steps on 3 ranks, with checkpoints of its own format and its final model."""
    folder = tmp_path_factory.mktemp("own")
    out = folder / "out"
    command = Inputs(folder / "inputs").command(
        out, "--strategy", "ddp", "train.max_steps=20", nodes=3
    )
    result = ftlaunch(*command)
    assert result.returncode == 0, said(result)
    return out


def merge(*args: object):
    return ftlaunch("merge", *args, timeout=120)


def assert_done(result) -> None:
    assert result.returncode == 0, said(result)
    assert result.stderr == ""


# -- DeepSpeed's checkpoints --------------------------------------------------------------------


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_it_is_what_training_held(saved, job, tmp_path):
    """Bit by bit the fp32 masters that DeepSpeed itself had; each tied weight once."""
    held = saved[job.name].held
    write_weights(open_source(saved[job.name].folder).weights, tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert set(found) == set(held) - TIED[job.model]
    for name, expected in found.items():
        assert expected.dtype == held[name].dtype
        np.testing.assert_array_equal(expected, held[name], err_msg=name)
    assert all(np.array_equal(held[n], found[_stored(n)]) for n in TIED[job.model])
    # The whole file, header and all, is the one that the library writes of the same tensors.
    tensors = {name: torch.from_numpy(values) for name, values in found.items()}
    save_torch_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "theirs").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def _stored(name: str) -> str:
    """Of a tied weight's other name: under which it is stored, the first in the order of modules."""
    return {
        "head.weight": "embedding.weight",
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }[name]


@pytest.mark.parametrize(
    "job", [job for job in JOBS if job.stage and not job.config], ids=lambda job: job.name
)
def test_zero_to_fp32_says_the_same_where_it_says_something(saved, job):
    """Under ZeRO-1 it loses the frozen parameters."""
    held, peer = saved[job.name].held, saved[job.name].peer
    for name, values in peer.items():
        np.testing.assert_array_equal(values, held[name], err_msg=name)
    missing = {"frozen.weight", "frozen.bias"} if job.stage == 1 else set()
    assert set(held) - set(peer) == missing


def test_equal_weights_are_equal_files(saved, tmp_path):
    """Whoever held them: ZeRO-1 and 2 compute the same on the same ranks."""
    files = []
    for name in ("zero1-2", "zero2-2"):
        folder = tmp_path / name
        folder.mkdir()
        write_weights(open_source(saved[name].folder).weights, folder)
        files.append((folder / "model.safetensors").read_bytes())
    one, two = (saved[name].held for name in ("zero1-2", "zero2-2"))
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert files[0] == files[1]


@pytest.fixture
def trainer_folder(saved, tmp_path):
    """checkpoint-3 as the HF Trainer leaves it, with global_step3, the model's files and its own."""
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(saved["mlm3"].folder, folder)
    config = BertConfig(**BERT, architectures=["BertForMaskedLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    write_tokenizer(folder, ["[UNK]", "[PAD]", "[CLS]", "[SEP]"])
    for name in ("trainer_state.json", "rng_state_0.pth", "training_args.bin"):
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize("place", [".", "global_step3"])
def test_a_checkpoint_of_the_hf_trainer_loads_as_a_model(saved, trainer_folder, tmp_path, place):
    target = tmp_path / "merged"
    assert_done(merge(trainer_folder / place, target))
    assert {path.name for path in target.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads((target / "config.json").read_text())["dtype"] == "float32"
    model, info = BertForMaskedLM.from_pretrained(target, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, value in model.state_dict().items():
        if name in saved["mlm3"].held:
            np.testing.assert_array_equal(value.numpy(), saved["mlm3"].held[name], err_msg=name)
    assert merge("--verify", trainer_folder, target).returncode == 0


def test_without_a_configuration_it_says_so(saved, trainer_folder, tmp_path):
    result = merge(saved["mlm3"].folder, tmp_path / "bare")
    assert_done(result)
    [line] = [line for line in result.stdout.splitlines() if "config.json is missing" in line]
    assert "--model" in line
    last = result.stdout.splitlines()[-1]
    elements = sum(v.size for n, v in saved["mlm3"].held.items() if n not in TIED["bert"])
    assert f"{elements:,} parameters" in last and "fp32" in last
    result = merge(saved["mlm3"].folder, tmp_path / "whole", "--model", trainer_folder)
    assert_done(result)
    assert "missing" not in result.stdout
    assert (tmp_path / "whole" / "tokenizer.json").is_file()


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_narrower_dtypes_round_as_torch_does(saved, trainer_folder, tmp_path, dtype, torch_dtype):
    target = tmp_path / "merged"
    assert_done(merge(trainer_folder, target, "--dtype", dtype))
    for name, tensor in load_torch_file(target / "model.safetensors").items():
        expected = torch.from_numpy(saved["mlm3"].held[name])
        if expected.is_floating_point():
            expected = expected.to(getattr(torch, torch_dtype))
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)
    assert json.loads((target / "config.json").read_text())["dtype"] == torch_dtype
    assert BertForMaskedLM.from_pretrained(target).dtype == getattr(torch, torch_dtype)
    assert merge("--verify", trainer_folder, target).returncode == 0


# -- our own checkpoints ------------------------------------------------------------------------


def test_our_own_checkpoint_is_the_model_that_the_job_left(own, tmp_path):
    newest = own / "checkpoints" / "step-00000020"
    for number, source in enumerate((newest, own)):
        target = tmp_path / f"merged{number}"
        assert_done(merge(source, target))
        found, expected = (load_file(f / "model.safetensors") for f in (target, own / "model"))
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values, err_msg=name)
        left = {path.name for path in (own / "model").iterdir()}
        assert {path.name for path in target.iterdir()} == left


def test_other_names_of_shared_weights_are_left_out(own, tmp_path):
    folder = tmp_path / "step-00000020"
    shutil.copytree(own / "checkpoints" / "step-00000020", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["aliases"] = {"classifier.weight": "bert.pooler.dense.weight"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert_done(merge(folder, tmp_path / "merged"))
    names = set(load_file(own / "model" / "model.safetensors"))
    assert set(load_file(tmp_path / "merged" / "model.safetensors")) == names - {
        "classifier.weight"
    }


def test_the_newest_whole_checkpoint_of_an_output_folder(own, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(own / "checkpoints", out / "checkpoints")
    next((out / "checkpoints" / "step-00000020").glob("state-*")).unlink()
    result = merge(out, tmp_path / "merged")
    assert_done(result)
    assert "step-00000020 is damaged" in result.stdout
    assert (
        merge("--verify", out / "checkpoints" / "step-00000010", tmp_path / "merged").returncode
        == 0
    )


@pytest.mark.parametrize("damage", ["missing", "cut off", "changed"])
def test_a_damaged_shard_is_named(own, tmp_path, damage):
    folder = tmp_path / "step-00000020"
    shutil.copytree(own / "checkpoints" / "step-00000020", folder)
    shard = sorted(folder.glob("state-*"))[1]
    data = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    elif damage == "cut off":
        shard.write_bytes(data[:-100])
    else:
        # A byte of the first slice of a weight: behind the header, which names it.
        header = 8 + int.from_bytes(data[:8], "little")
        entries = json.loads(data[8:header])
        offset = next(e["data_offsets"][0] for n, e in entries.items() if n.startswith("weight/"))
        data[header + offset] ^= 1
        shard.write_bytes(data)
    result = merge(folder, tmp_path / "merged")
    assert result.returncode == 2, said(result)
    assert shard.name in result.stderr
    if damage == "cut off":
        assert f"{len(data) - 100} bytes where {len(data)}" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize(
    "damage",
    [
        {"aliases": {"classifier.weight": "not there"}},
        {"aliases": {"classifier.weight": "classifier.bias", "classifier.bias": "bert.x"}},
        {"best": {"step": 1, "metric": "loss", "value": 10**400, "metrics": {"loss": 1}}},
        {"best": {"step": 1, "metric": "loss", "value": 1, "metrics": {"loss": 10**400}}},
        {"best": {"step": -1, "metric": "loss", "value": 1, "metrics": {"loss": 1}}},
        {"loss_scale": {"scale": 10**400, "applied_in_a_row": 0, "enabled": 0}},
        {"step": True},
        {"applied_steps": -1},
        {"world_size": 1 << 63},
        {"model_files": {"adapter_config.json": 2}},
    ],
    ids=lambda damage: next(iter(damage)),
)
def test_a_manifest_that_makes_no_sense(own, tmp_path, damage):
    folder = tmp_path / "step-00000020"
    shutil.copytree(own / "checkpoints" / "step-00000020", folder)
    (folder / "model" / "adapter_config.json").write_text("{}")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | damage))
    with pytest.raises(CheckpointDamaged, match=r"malformed|which is not there"):
        open_source(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shape", [-2, -3]),
        ("shape", [1 << 60]),
        ("shape", [2.0]),
        ("shape", [1] * 33),
        ("start", float("inf")),
        ("start", -1),
        ("start", True),
        ("crc32", float("nan")),
    ],
)
def test_a_slice_that_makes_no_sense(own, tmp_path, field, value):
    folder = tmp_path / "step-00000020"
    shutil.copytree(own / "checkpoints" / "step-00000020", folder)
    shard = min(folder.glob("state-*"))
    header = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
    content = json.loads(shard.read_bytes()[8:header])
    table = json.loads(content["__metadata__"]["slices"])
    table[0][field] = value
    content["__metadata__"]["slices"] = json.dumps(table)
    text = json.dumps(content).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + shard.read_bytes()[header:])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][shard.name] = shard.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointDamaged, match=r"where a count has to be|33 axes"):
        open_source(folder)


# -- files --------------------------------------------------------------------------------------


def test_a_large_model_goes_into_shards_with_an_index(saved, tmp_path):
    """Here above 200 bytes: 13 x 5 numbers alone have more and get a file of their own."""
    weights = open_source(saved["mlm2"].folder).weights
    written = write_weights(weights, tmp_path, max_shard_bytes=2000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert set(written.files) == {*shards, "model.safetensors.index.json"}
    found: dict[str, np.ndarray] = {}
    for shard in shards:
        tensors = load_file(tmp_path / shard)
        assert sum(t.nbytes for t in tensors.values()) <= 2000 or len(tensors) == 1
        assert {index["weight_map"][name] for name in tensors} == {shard}
        found |= tensors
    assert index["weight_map"].keys() == found.keys() == {weight.name for weight in weights}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    BertConfig(**BERT).save_pretrained(tmp_path)
    model = BertForMaskedLM.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), saved["mlm2"].held[name], err_msg=name)


def test_numbers_of_every_dtype(tmp_path):
    """Without ZeRO the module is all there is: strided, empty, scalar and shared tensors, too."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    module = {
        "double": torch.tensor([1.5, 1e300], dtype=torch.float64),
        "half": torch.tensor([0.1, -65504.0], dtype=torch.float16),
        "bf16": torch.tensor([0.1, 3e38], dtype=torch.bfloat16),
        "transposed": base.t(),
        "part": base[1:3, 2:5],
        "shared": base,
        "shared_again": base,
        "empty": torch.zeros(0, 3),
        "empty_too": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
        "flags": torch.tensor([True, False]),
        "bytes": torch.tensor([1, 255], dtype=torch.uint8),
        "words": torch.tensor([1, 65535], dtype=torch.uint16),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    folder = write_torch_checkpoint(tmp_path / "global_step1", module)
    cases: list[tuple[SaveDtype, torch.dtype]]
    cases = [("fp32", torch.float32), ("bf16", torch.bfloat16)]
    for dtype, expected_dtype in cases:
        target = tmp_path / dtype
        target.mkdir()
        write_weights(open_source(folder).weights, target, dtype=dtype)
        found = load_torch_file(target / "model.safetensors")
        assert set(found) == set(module) - {"shared_again"}
        for name, tensor in found.items():
            expected = module[name].detach()
            if expected.is_floating_point():
                expected = expected.float().to(expected_dtype)
            assert tensor.dtype == expected.dtype and tensor.shape == expected.shape, name
            assert torch.equal(tensor, expected), name


def test_what_fp16_cannot_hold_is_told_once(tmp_path):
    module = {"a": torch.ones(3), "b": torch.full((3,), 1e5), "c": torch.full((3,), 1e6)}
    folder = write_torch_checkpoint(tmp_path / "global_step1", module)
    result = merge(folder, tmp_path / "merged", "--dtype", "fp16")
    assert_done(result)
    assert result.stdout.count("too large for fp16") == 1
    assert "b has numbers too large" in result.stdout
    assert torch.isinf(load_torch_file(tmp_path / "merged" / "model.safetensors")["b"]).all()


def test_a_bar_on_a_terminal_and_nothing_elsewhere(saved, tmp_path):
    terminal, end = pty.openpty()
    command = [*MODULE, "merge", str(saved["mlm2"].folder), str(tmp_path / "merged")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=end, timeout=60, check=True)
    os.close(end)
    shown = os.read(terminal, 10_000).decode()
    os.close(terminal)
    assert re.search(r"\r\S* *\s0\.00 of 0\.00 GB, \d+ MB/s", shown), shown
    assert done.stdout.splitlines()[-1].startswith(b"wrote ")


# -- memory and imports -------------------------------------------------------------------------


def test_it_imports_no_framework(saved, tmp_path):
    modules = imported_by("merge", str(saved["zero3-2"].folder), str(tmp_path / "merged"))
    heavy = {"torch", "deepspeed", "transformers", "huggingface_hub", "pydantic", "rich", "pandas"}
    assert modules.isdisjoint(heavy)


def test_memory_does_not_grow_with_the_model(tmp_path):
    """A file of 160 MB, and one of next to nothing: the same few MiB above a bare interpreter."""
    bare = peak_kib("pass")
    run = "import sys; from ftlaunch.launcher.cli import run; assert run(sys.argv[1:]) == 0"
    peaks = {}
    for name, rows in (("small", 1 << 10), ("large", 10 << 20)):
        module = {f"{i}": torch.zeros(rows) for i in range(4)}
        folder = write_torch_checkpoint(tmp_path / name / "global_step1", module)
        for dtype in ("fp32", "bf16"):
            target = tmp_path / name / dtype
            peaks[name, dtype] = peak_kib(run, "merge", folder, target, "--dtype", dtype) - bare
    print(f"KiB above a bare interpreter: {peaks}")
    assert max(peaks.values()) < 96 << 10
    # The buffer of 8 MiB itself is only touched as far as it is needed.
    assert peaks["large", "fp32"] - peaks["small", "fp32"] < 16 << 10


# -- disturbed ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 130)]
)
def test_a_merge_that_is_ended_leaves_nothing_and_can_be_done_again(saved, tmp_path, number, code):
    source, target = saved["zero3-3"].folder, tmp_path / "merged"
    with start_disturbed("merge", source, target, at=9, signal=number) as process:
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    assert not target.exists()
    # Nobody can clean up after SIGKILL but the next one.
    left = [path.name for path in tmp_path.iterdir()]
    assert left == (["merged.unfinished"] if number == signal.SIGKILL else [])
    assert_done(merge(source, target))
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert [path.name for path in target.iterdir()] == ["model.safetensors"]
    assert merge("--verify", source, target).returncode == 0


def test_a_cleanup_that_is_interrupted_does_not_block_the_next_merge(tmp_path, monkeypatch):
    """By a second Ctrl-C, at any of the files: what is left is still known as a merge's."""
    target, names = tmp_path / "merged", [f"model-{i}.safetensors" for i in range(5)]
    unlink, at = os.unlink, [0]

    def interrupted(*args, **kwargs):
        at[0] -= 1
        if at[0] == 0:
            raise KeyboardInterrupt
        unlink(*args, **kwargs)

    # Five files and the mark.
    for number in range(1, 7):
        with (
            pytest.raises(KeyboardInterrupt),
            monkeypatch.context() as patch,
            new_folder(target) as folder,
        ):
            for name in names:
                (folder / name).touch()
            at[0] = number
            patch.setattr(os, "unlink", interrupted)
            raise OSError("the disk is full")
    with new_folder(target) as folder:
        assert [path.name for path in folder.iterdir()] == [".ftlaunch-merge"]
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_two_merges_into_one_target_do_not_disturb_each_other(saved, tmp_path):
    source, target = saved["zero1-3"].folder, tmp_path / "merged"
    with start_disturbed("merge", source, target, at=5, signal=signal.SIGSTOP) as first:
        guard = threading.Timer(60, first.kill)
        guard.start()
        try:
            os.waitid(os.P_PID, first.pid, os.WSTOPPED | os.WNOWAIT)
            second = merge(saved["zero2-2"].folder, target)
            assert second.returncode == 2
            assert "another merge" in second.stderr
            first.send_signal(signal.SIGCONT)
            _, stderr = first.communicate(timeout=60)
        finally:
            guard.cancel()
            first.kill()
        assert first.returncode == 0, stderr
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert merge("--verify", source, target).returncode == 0


# -- verify -------------------------------------------------------------------------------------


def test_verify_names_what_differs_and_changes_nothing(saved, tmp_path):
    source, target = saved["zero2-3"].folder, tmp_path / "merged"
    assert_done(merge(source, target, "--dtype", "bf16"))
    same = merge("--verify", source, target)
    assert_done(same)
    assert "is the same" in same.stdout

    file = target / "model.safetensors"
    tensors = load_torch_file(file)
    tensors["inner.weight"].view(-1)[7] += 1
    tensors["norm.bias"] = tensors["norm.bias"].reshape(1, 5)
    tensors["count"] = tensors["count"].float()
    tensors["more"] = tensors.pop("scale")
    save_torch_file(tensors, file, metadata={"format": "pt"})
    before = contents(tmp_path)
    result = merge("--verify", source, target)
    assert result.returncode == 1, said(result)
    for line in (
        "inner.weight: other bytes from element 7 on",
        "norm.bias: shape (1, 5), in the source (5,)",
        "count: dtype F32, in the source I64",
        "more: not in the source",
        "scale: missing",
    ):
        assert line in result.stdout
    assert "differs in 5 tensors" in result.stdout
    assert contents(tmp_path) == before
