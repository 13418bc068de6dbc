"""What `ftlaunch merge` refuses: exit code 2, the cause by name, and nothing written or changed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.checkpoint.manifest import CheckpointDamaged, read_manifest
from ftlaunch.strategies.checkpoint.merge import compare_weights, write_weights
from ftlaunch.strategies.checkpoint.resuming import newest_manifest
from ftlaunch.strategies.checkpoint.sources import open_source
from ftlaunch.strategies.checkpoint.weights import cut
from tests.deepspeed_jobs import BERT
from tests.jobs import contents, ftlaunch, said
from tests.merge_jobs import saved_jobs, write_torch_checkpoint

OPTIMIZER = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
MODEL = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
WHOLE = "mp_rank_00_model_states.pt"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saved_jobs(tmp_path_factory)


@pytest.fixture
def copy(saved, tmp_path) -> Callable[[str], Path]:
    """The tag folder of a copy of a checkpoint, to be damaged."""

    def make(name: str) -> Path:
        source = tag_folder(saved, name)
        shutil.copytree(source.parent, tmp_path / "source" / name)
        return Path(tmp_path / "source" / name / source.name)

    return make


def tag_folder(saved: Any, name: str) -> Path:
    [folder] = Path(saved[name].folder).glob("global_step*")
    return folder


def refused(tmp_path: Path, source: Path, *flags: object) -> str:
    """What is said when it is refused. The target does not come to be, the source stays."""
    before = contents(tmp_path)
    result = ftlaunch("merge", source, tmp_path / "merged", *flags, timeout=60)
    assert result.returncode == 2, said(result)
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert contents(tmp_path) == before
    return result.stderr


# -- files that are missing ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("zero1-3", OPTIMIZER.format(0)),
        ("zero1-3", OPTIMIZER.format(2)),
        ("zero3-3", OPTIMIZER.format(1)),
        ("zero3-3", MODEL.format(0)),
        ("zero3-3", MODEL.format(2)),
    ],
)
def test_a_missing_rank_file_is_named(copy, tmp_path, name, file):
    folder = copy(name)
    (folder / file).unlink()
    text = refused(tmp_path, folder)
    assert f"{folder / file} is missing" in text


def test_a_checkpoint_without_names(copy, tmp_path):
    folder = copy("zero1-3")
    (folder / WHOLE).unlink()
    assert f"lacks {WHOLE}" in refused(tmp_path, folder)


def test_all_optimizer_files_are_missing(copy, tmp_path):
    folder = copy("zero1-3")
    for rank in range(3):
        (folder / OPTIMIZER.format(rank)).unlink()
    assert f"{OPTIMIZER.format(0)} is missing" in refused(tmp_path, folder)


# -- files that do not belong together ----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "other", "file", "reason"),
    [
        # Of a job on another number of ranks.
        ("zero1-3", "zero1-2", OPTIMIZER.format(1), "number of ranks"),
        ("zero3-3", "zero3-2", OPTIMIZER.format(1), "number of ranks"),
        # Of the same job on the same ranks, saved a step later.
        (
            "zero1-3",
            "zero1-later",
            OPTIMIZER.format(1),
            "the number of steps of .* differ: 3.0 and 4",
        ),
        (
            "zero3-3",
            "zero3-later",
            OPTIMIZER.format(2),
            "the number of steps of .* differ: 3.0 and 4",
        ),
        ("zero3-3", "zero3-later", MODEL.format(1), "global_steps of .* differ: 3 and 4"),
        # Of another model.
        ("zero1-2", "mlm2", OPTIMIZER.format(1), "the ZeRO stage of .* differ: 1 and 2"),
        ("zero1-2", "mlm2", WHOLE, "has a part of embedding.weight"),
        # Of another stage.
        ("zero3-2", "zero1-2", OPTIMIZER.format(0), "is of ZeRO-1"),
    ],
)
def test_a_file_of_another_job(saved, copy, tmp_path, name, other, file, reason):
    folder = copy(name)
    shutil.copy(tag_folder(saved, other) / file, folder / file)
    text = refused(tmp_path, folder)
    assert "do not belong together" in text

    assert re.search(reason, text), text


def test_more_files_than_the_world_size_in_them(saved, copy, tmp_path):
    """As a job leaves them that saved on fewer ranks over an older checkpoint."""
    folder = copy("zero1-2")
    shutil.copy(tag_folder(saved, "zero1-3") / OPTIMIZER.format(2), folder)
    text = refused(tmp_path, folder)
    assert "says that 2 rank(s) wrote it, but there are files of 3" in text
    assert OPTIMIZER.format(2) in text


def test_a_world_size_that_contradicts_the_model_states(saved, copy, tmp_path):
    folder = copy("zero1-2")
    shutil.copy(tag_folder(saved, "zero1-3") / WHOLE, folder)
    assert f"{WHOLE} says 3 ranks" in refused(tmp_path, folder)


def test_two_kinds_of_names(saved, copy, tmp_path):
    folder = copy("zero1-2")
    shutil.copy(folder / OPTIMIZER.format(1), folder / f"bf16_{OPTIMIZER.format(1)}")
    assert "files of two jobs" in refused(tmp_path, folder)
    (folder / f"bf16_{OPTIMIZER.format(1)}").unlink()
    shutil.copy(tag_folder(saved, "zero3-2") / MODEL.format(1), folder)
    assert "files of two jobs" in refused(tmp_path, folder)


def test_zero_and_no_zero(saved, copy, tmp_path):
    folder = copy("zero0")
    shutil.copy(tag_folder(saved, "zero1-2") / OPTIMIZER.format(0), folder)
    assert "without ZeRO" in refused(tmp_path, folder)


# -- files that are damaged ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file"),
    [("zero1-3", OPTIMIZER.format(1)), ("zero3-3", MODEL.format(1)), ("zero0", WHOLE)],
)
@pytest.mark.parametrize("keep", [0.0, 0.6])
def test_a_file_that_is_cut_off_is_named(copy, tmp_path, name, file, keep):
    folder = copy(name)
    length = int(keep * (folder / file).stat().st_size)
    os.truncate(folder / file, length)
    text = refused(tmp_path, folder)
    assert f"{folder / file} is cut off" in text
    assert f"it has {length:,} bytes" in text


def test_a_pickle_that_wants_to_import_something(tmp_path):
    class Harmful:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'harm'}",)

    folder = write_torch_checkpoint(
        tmp_path / "global_step1", {"weight": torch.zeros(2), "x": Harmful()}
    )
    text = refused(tmp_path, folder)
    assert f"{folder / WHOLE}: the pickle wants to import posix.system; refused" in text


@pytest.mark.parametrize(
    "damage",
    [
        {"buffer_names": [{}]},
        {"param_shapes": [{"weight": (2, "x")}]},
        {"param_shapes": 5},
        {"shared_params": 7},
        {"module": [1, 2]},
        {"frozen_param_fragments": {"weight": "x"}},
    ],
    ids=lambda damage: next(iter(damage)),
)
def test_values_that_make_no_sense(tmp_path, damage):
    folder = write_torch_checkpoint(tmp_path / "global_step1", {"weight": torch.zeros(2)})
    state = torch.load(folder / WHOLE, weights_only=False)
    torch.save({**state, **damage}, folder / WHOLE)
    assert str(folder / WHOLE) in refused(tmp_path, folder)


@pytest.fixture
def flat(tmp_path) -> Callable[..., Path]:
    """A checkpoint of ZeRO-1 on one rank, of two weights of 4 numbers, with other values in it."""

    def make(model: dict[Any, Any], optimizer: dict[Any, Any]) -> Path:
        folder: Path = tmp_path / "global_step1"
        names = ("one", "two")
        if not folder.exists():
            write_torch_checkpoint(folder, {name: torch.zeros(4) for name in names})
        state = torch.load(folder / WHOLE, weights_only=False)
        shapes = [{name: torch.Size([4]) for name in names}]
        torch.save({**state, "param_shapes": shapes, **model}, folder / WHOLE)
        inner = {
            "zero_stage": 1,
            "partition_count": [1],
            "single_partition_of_fp32_groups": [torch.arange(8.0)],
            "base_optimizer_state": {},
            "param_alignment_paddings": [[0, 0]],
            **optimizer,
        }
        optim = {"optimizer_state_dict": inner, "ds_version": "0.19.8"}
        torch.save(optim, folder / OPTIMIZER.format(0))
        return folder

    return make


_HUGE = 1 << 20_000


@pytest.mark.parametrize(
    ("model", "optimizer", "named"),
    [
        # The second weight would be the numbers from the start on, and the file too short.
        ({}, {"param_alignment_paddings": [[-4, 4]]}, "-4 where a number of elements has to be"),
        ({}, {"param_alignment_paddings": [[float("inf"), 0]]}, "inf where a number"),
        ({}, {"param_alignment_paddings": [[True, 0]]}, "True where a number"),
        ({}, {"param_alignment_paddings": [[_HUGE, 0]]}, "a number of 20,001 bits"),
        ({}, {"partition_count": [_HUGE]}, "its partition_count is no count"),
        ({}, {"zero_stage": _HUGE}, "a number of 20,001 bits"),
        ({}, {"base_optimizer_state": {"state": {0: {"step": _HUGE}}}}, "a number of 20,001 bits"),
        ({}, {"param_slice_mappings": [{5: 1}]}, "a int where a name has to be"),
        ({"dp_world_size": _HUGE}, {}, "a number of 20,001 bits"),
        ({"mp_world_size": _HUGE}, {}, "makes no sense"),
        ({"module": {5: torch.zeros(4)}}, {}, "a name in its module is no text"),
        ({"module": {(1, 2): 5}}, {}, "a name in its module is no text"),
        ({"param_shapes": [{"one": (1,) * 100_000}]}, {}, "the shape of one makes no sense"),
        ({"frozen_param_shapes": {"x": (1,) * 33}}, {}, "the shape of x makes no sense"),
        ({"frozen_param_fragments": {5: torch.zeros(4)}}, {}, "not all named tensors"),
    ],
)
def test_numbers_and_names_that_make_no_sense(flat, model, optimizer, named):
    assert len(open_source(flat({}, {})).weights) == 2
    file = WHOLE if model else OPTIMIZER.format(0)
    with pytest.raises(UserError, match=re.escape(named)) as error:
        open_source(flat(model, optimizer))
    assert file in str(error.value)


def test_a_weight_that_has_other_bytes_than_its_shape_needs(flat, tmp_path):
    """Whatever let it through: the header would say more than the file has."""
    one, two = open_source(flat({}, {})).weights
    short = replace(two, runs=cut(two.runs, 0, 12))
    (tmp_path / "merged").mkdir()
    with pytest.raises(UserError, match="12 bytes of two, of which 16 are needed"):
        write_weights((one, short), tmp_path / "merged")
    assert list((tmp_path / "merged").iterdir()) == []
    write_weights((one, two), tmp_path / "merged")
    with pytest.raises(UserError, match="12 bytes of two, of which 16 are needed"):
        list(compare_weights((one, short), tmp_path / "merged"))
    for start, nbytes in ((-4, 8), (4, -4), (8, 12)):
        with pytest.raises(ValueError, match="bytes"):
            cut(two.runs, start, nbytes)


# -- what is not supported, or no checkpoint ----------------------------------------------------


@pytest.mark.parametrize(
    ("file", "said_of_it"),
    [
        ("mp_rank_01_model_states.pt", "model-parallel"),
        ("zero_pp_rank_0_mp_rank_01_optim_states.pt", "model-parallel"),
        ("layer_00-model_00-model_states.pt", "pipeline"),
        ("expp_rank_0_mp_rank_00_optim_states.pt", "expert-parallel"),
        ("strange_states.pt", "not known"),
    ],
)
def test_files_of_what_is_not_supported(copy, tmp_path, file, said_of_it):
    folder = copy("zero1-2")
    (folder / file).write_bytes(b"")
    text = refused(tmp_path, folder)
    assert said_of_it in text and file in text


def test_a_universal_checkpoint(copy, tmp_path):
    folder = copy("zero1-2")
    (folder / "zero").mkdir()
    assert "universal checkpoint" in refused(tmp_path, folder)


def test_a_folder_that_is_no_checkpoint(tmp_path):
    assert "does not exist" in refused(tmp_path, tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(tmp_path, tmp_path / "file")
    (tmp_path / "folder").mkdir()
    assert "holds no checkpoint" in refused(tmp_path, tmp_path / "folder")
    (tmp_path / "folder" / "run").mkdir()
    (tmp_path / "folder" / "run" / "latest").write_text("global_step7\n")
    assert "Below it are run" in refused(tmp_path, tmp_path / "folder")
    text = refused(tmp_path, tmp_path / "folder" / "run")
    assert "there is no folder" in text and "global_step7" in text
    for tag in ("../run", "", "..", "/etc"):
        (tmp_path / "folder" / "run" / "latest").write_text(tag)
        assert "has to name one beside it" in refused(tmp_path, tmp_path / "folder" / "run")


def test_several_checkpoints_and_nothing_that_says_which(saved, tmp_path):
    for name in ("zero1-3", "zero1-later"):
        folder = tag_folder(saved, name)
        shutil.copytree(folder, tmp_path / "source" / folder.name)
    text = refused(tmp_path, tmp_path / "source")
    assert "global_step3, global_step4" in text


# -- targets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "dangling link"])
def test_a_target_that_exists(saved, tmp_path, kind):
    target = tmp_path / "merged"
    if kind == "file":
        target.write_text("x")
    elif kind == "dangling link":
        target.symlink_to(tmp_path / "nowhere")
    else:
        target.mkdir()
        if kind == "folder":
            (target / "precious").write_text("x")
    assert f"the target {target} exists" in refused(tmp_path, saved["zero1-2"].folder)


def test_an_unfinished_folder_that_no_merge_has_left(saved, tmp_path):
    (tmp_path / "merged.unfinished").mkdir()
    (tmp_path / "merged.unfinished" / "precious").write_text("x")
    text = refused(tmp_path, saved["zero1-2"].folder)
    assert "merged.unfinished exists and is not what a merge has left" in text


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True, timeout=30)
    if mounted.returncode:
        reason = f"a small file system cannot be mounted here: {mounted.stderr.strip()}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=30)


def test_a_full_disk(tmp_path, small_disk):
    # 125,000 fp32 numbers are 500,000 bytes.
    folder = write_torch_checkpoint(tmp_path / "global_step1", {"weight": torch.ones(125_000)})
    result = ftlaunch("merge", folder, small_disk / "merged", timeout=60)
    assert result.returncode == 2, said(result)
    # A megabyte is asked for besides, for what is written beside the weights.
    assert f"{500_000 + (1 << 20):,} bytes are needed, 409,600 are free" in result.stderr
    assert list(small_disk.iterdir()) == []
    # Space that somebody else takes in the meantime.
    with pytest.raises(UserError, match=r"no space left on the disk .* need 500,000 bytes"):
        write_weights(open_source(folder).weights, small_disk)


# -- models that do not fit ---------------------------------------------------------------------


def test_a_model_of_other_shapes(saved, tmp_path):
    """By the headers of its weights, also when it has them without the prefix of the whole model."""
    from transformers import BertConfig, BertForMaskedLM

    model = BertForMaskedLM(BertConfig(**{**BERT, "intermediate_size": 15}))
    source = saved["mlm2"].folder
    for name, part in (("whole", model), ("base", model.bert)):
        part.save_pretrained(tmp_path / name)
        text = refused(tmp_path, source, "--model", tmp_path / name)
        assert (
            "bert.encoder.layer.1.intermediate.dense.weight has shape (14, 10), there (15, 10)"
            in text
        )
        assert "more" in text
    BertForMaskedLM(BertConfig(**BERT)).save_pretrained(tmp_path / "right")
    result = ftlaunch(
        "merge", source, tmp_path / "merged", "--model", tmp_path / "right", timeout=60
    )
    assert result.returncode == 0, said(result)


def test_a_configuration_of_another_vocabulary(saved, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({**BERT, "vocab_size": 24}))
    text = refused(tmp_path, saved["mlm2"].folder, "--model", model)
    assert "word_embeddings.weight has shape (23, 10), by its config.json (24, 10)" in text


def test_a_model_that_is_none(saved, tmp_path):
    source = saved["mlm2"].folder
    (tmp_path / "model").mkdir()
    assert "has no config.json" in refused(tmp_path, source, "--model", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("[" * 10_000)
    assert "cannot be read" in refused(tmp_path, source, "--model", tmp_path / "model")
    assert "is no folder" in refused(tmp_path, source, "--model", tmp_path / "nowhere")
    text = refused(tmp_path, source, "--model", "no-such/model")
    assert "neither a folder here nor could it be had from the hub" in text
    assert "HF_HUB_OFFLINE keeps the hub from being asked" in text


def test_pipes_are_not_waited_for(saved, tmp_path):
    """In the place of a model's weights, of what is verified, and of a manifest."""
    source = saved["mlm2"].folder
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    os.mkfifo(model / "model.safetensors")
    assert "it is no file" in refused(tmp_path, source, "--model", model)
    result = ftlaunch("merge", "--verify", source, model, timeout=60)
    assert result.returncode == 2, said(result)
    assert "it is no file" in result.stderr
    folder = tmp_path / "out" / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "manifest.json")
    assert "holds no checkpoint" in refused(tmp_path, tmp_path / "out")
    assert newest_manifest(folder.parent) is None
    with pytest.raises(CheckpointDamaged, match="is no file"):
        read_manifest(folder)


# -- verify -------------------------------------------------------------------------------------


def test_verify_of_what_cannot_be_compared(saved, tmp_path):
    source = saved["zero1-2"].folder
    for target in (tmp_path / "nothing", tmp_path):
        result = ftlaunch("merge", "--verify", source, target, timeout=60)
        assert result.returncode == 2
        assert "has no safetensors files" in result.stderr
    (tmp_path / "model.safetensors").write_bytes(b"x" * 20)
    result = ftlaunch("merge", "--verify", source, tmp_path, timeout=60)
    assert result.returncode == 2
    assert "is damaged" in result.stderr


def test_verify_takes_no_other_flag(tmp_path):
    result = ftlaunch("merge", "--verify", tmp_path, tmp_path, "--dtype", "bf16", timeout=60)
    assert result.returncode == 2
    assert "--verify compares what is there" in result.stderr
