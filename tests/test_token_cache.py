"""The token cache: what it holds, when it is hit, and what it withstands."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftlaunch.cluster.errors import JobError, UserError
from ftlaunch.strategies.data import cache_folder, cache_writing, token_table
from ftlaunch.strategies.data.token_cache import prepare_tokens
from ftlaunch.strategies.data.token_table import num_slices, slice_rows
from ftlaunch.strategies.data.tokenizer import (
    TokenizerSource,
    locate_tokenizer,
    tokenizer_files,
    tokenizer_fingerprint,
)
from ftlaunch.strategies.options import DataOptions
from ftlaunch.strategies.safetensors_file import open_file, write_file

NUM_TRAIN, NUM_EVAL = 1300, 40
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(20))]
FORK = multiprocessing.get_context("fork")


def write_rows(path: Any, count: Any, seed: Any, **more: Any) -> Any:
    choose = random.Random(seed)
    rows = [
        {"text": " ".join(choose.choices(WORDS[4:], k=choose.randint(0, 30))), "label": i % 3}
        for i in range(count)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row | more) + "\n" for row in rows))
    return rows


def write_tokenizer(folder: Any, **config: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    folder.mkdir(parents=True, exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    defaults = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "model_max_length": 64,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
    }
    values = {k: v for k, v in (defaults | config).items() if v is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return TokenizerSource(name_or_path=str(folder))


class Job:
    """A data set, a tokenizer and a cache folder of a test's own."""

    def __init__(self, folder: Any) -> None:
        self.folder = folder
        self.rows = write_rows(folder / "data" / "train.jsonl", NUM_TRAIN, 1)
        write_rows(folder / "data" / "test.jsonl", NUM_EVAL, 2)
        self.source = write_tokenizer(folder / "tokenizer")

    def options(self, **values: Any) -> Any:
        defaults = {
            "name_or_path": str(self.folder / "data"),
            "cache_dir": str(self.folder / "cache"),
        }
        return DataOptions(**(defaults | values))

    def prepare(
        self,
        rank: Any = 0,
        world_size: Any = 1,
        model_max_length: Any = None,
        limits: Any = None,
        **values: Any,
    ) -> Any:
        return prepare_tokens(
            "text-classification",
            self.options(**values),
            self.source,
            seed=1,
            model_max_length=model_max_length,
            rank=rank,
            world_size=world_size,
            **(limits or {}),
        )


@pytest.fixture
def job(tmp_path: Path) -> Any:
    # Imported once here, so that the processes forked by a test find them.
    import datasets
    import transformers

    assert datasets and transformers
    return Job(tmp_path)


def expected_ids(row: Any, max_length: Any = 64) -> Any:
    words = [WORDS.index(word) for word in row["text"].split()]
    return [2, *words[: max_length - 2], 3]


def run_all(*targets: Any) -> Any:
    """Run functions in processes of their own; their exit codes."""
    processes = [FORK.Process(target=target, args=args) for target, *args in targets]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("held", [True, False], ids=["held", "in slices"])
def test_the_tables_hold_the_rows(job: Any, monkeypatch: pytest.MonkeyPatch, held: bool) -> None:
    """Also tables so large that lengths and labels stay in the slices."""
    if not held:
        monkeypatch.setattr(token_table, "_MAX_HELD_BYTES", 8 * NUM_TRAIN - 1)
    tokens = job.prepare()
    assert not tokens.hit
    assert (len(tokens.train), len(tokens.eval)) == (NUM_TRAIN, NUM_EVAL)
    indices = np.array([1299, 0, 511, 512, 0, 1024])
    expected = [expected_ids(job.rows[i]) for i in indices]
    found = tokens.train.rows(indices)
    assert [ids.tolist() for ids, _ in found] == expected
    assert all(ids.dtype == np.int32 and types.dtype == np.uint8 for ids, types in found)
    assert [types.tolist() for _, types in found] == [[0] * len(ids) for ids in expected]
    lengths = tokens.train.lengths(indices)
    assert lengths.dtype == np.int64 and lengths.tolist() == [len(ids) for ids in expected]
    labels = tokens.train.labels(indices)
    assert labels.dtype == np.int64 and labels.tolist() == [i % 3 for i in indices]
    # 1300 = 3 * 433 + 1
    assert tokens.train.label_counts().tolist() == [434, 433, 433]
    everything = np.arange(NUM_TRAIN)
    assert tokens.train.num_tokens == tokens.train.lengths(everything).sum()
    assert tokens.train.num_tokens == sum(len(expected_ids(row)) for row in job.rows)
    assert tokens.max_token_id == len(WORDS) - 1
    assert (tokens.pad_token_id, tokens.padding_side, tokens.max_length) == (0, "right", 64)
    assert tokens.uses_token_type_ids and tokens.spec.label_names == ("0", "1", "2")
    assert tokens.train.rows(indices[:0]) == [] and len(tokens.train.lengths(indices[:0])) == 0
    for wrong in ([NUM_TRAIN], [-1]):
        for ask in (tokens.train.rows, tokens.train.lengths, tokens.train.labels):
            with pytest.raises(IndexError):
                ask(np.array(wrong))


def test_rows_are_views_of_the_files(job: Any) -> None:
    tokens = job.prepare()
    [(ids, _)] = tokens.train.rows(np.array([0]))
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 1
    base = ids
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert type(base) is np.memmap


def test_the_number_of_slices_follows_from_the_number_of_samples() -> None:
    assert [num_slices(n) for n in (1, 512, 513, 1300)] == [1, 1, 2, 3]
    assert num_slices(512 * 64) == num_slices(1_000_000) == 64
    assert slice_rows(100_000_000) == 65_536 and num_slices(100_000_000) == 1526


def test_no_more_than_a_few_slices_are_open(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_table, "_MIN_SLICE_ROWS", 10)
    monkeypatch.setattr(token_table, "_MAX_OPEN_SLICES", 4)
    tokens = job.prepare()
    assert num_slices(NUM_TRAIN) == 62
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    lengths = tokens.train.lengths(np.arange(NUM_TRAIN))
    assert lengths.tolist() == [len(expected_ids(row)) for row in job.rows]
    assert len(os.listdir("/proc/self/fd")) <= before + 4  # noqa: PTH208


def test_a_hit_reads_and_imports_little(job: Any) -> None:
    first = job.prepare()
    script = (
        "import sys, json, time\n"
        "from ftlaunch.strategies.data.token_cache import prepare_tokens\n"
        "from ftlaunch.strategies.data.tokenizer import TokenizerSource\n"
        "from ftlaunch.strategies.options import DataOptions\n"
        "o = DataOptions(name_or_path=sys.argv[1] + '/data', cache_dir=sys.argv[1] + '/cache')\n"
        "t = TokenizerSource(name_or_path=sys.argv[1] + '/tokenizer')\n"
        "k = prepare_tokens('text-classification', o, t, seed=1, model_max_length=None)\n"
        "heavy = {'datasets', 'transformers', 'torch', 'pyarrow', 'pandas', 'huggingface_hub'}\n"
        "print(json.dumps([k.hit, k.key, len(k.train), sorted(heavy & set(sys.modules))]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, job.folder], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True, first.key, NUM_TRAIN, []]
    started = time.perf_counter()
    second = job.prepare(rank=3, world_size=8)
    assert time.perf_counter() - started < 0.5
    assert second.hit and (second.spec, second.notes) == (first.spec, first.notes)


def test_a_hit_needs_no_write_permission(job: Any) -> None:
    job.prepare()
    for folder, _, _ in os.walk(job.folder / "cache"):
        os.chmod(folder, 0o500)  # noqa: PTH101
    try:
        assert job.prepare().hit
    finally:
        for folder, _, _ in os.walk(job.folder / "cache"):
            os.chmod(folder, 0o700)  # noqa: PTH101


def test_the_key_follows_from_all_that_matters(job: Any) -> None:
    keys = [job.prepare().key]
    assert job.prepare(model_max_length=64).key != keys[0]
    explicit = [job.prepare(max_length=32, model_max_length=limit).key for limit in (None, 64)]
    assert explicit[0] == explicit[1]
    keys.append(explicit[0])
    keys.append(job.prepare(text_columns=("text",)).key)
    keys.append(job.prepare(label_column="label").key)
    keys.append(job.prepare(max_train_samples=5).key)
    job.source = write_tokenizer(job.folder / "tokenizer", model_max_length=63)
    keys.append(job.prepare().key)
    write_rows(job.folder / "data" / "train.jsonl", 20, 9)
    keys.append(job.prepare().key)
    assert len(set(keys)) == len(keys)


def test_the_same_data_elsewhere_is_a_hit(job: Any) -> None:
    job.prepare()
    (job.folder / "data").rename(job.folder / "moved")
    (job.folder / "tokenizer").rename(job.folder / "words")
    job.source = TokenizerSource(name_or_path=str(job.folder / "words"))
    tokens = job.prepare(name_or_path=str(job.folder / "moved"))
    assert tokens.hit and str(job.folder) not in " ".join(tokens.notes)


def test_truncation_is_counted(job: Any) -> None:
    tokens = job.prepare(max_length=10)
    # 8 words fit beside [CLS] and [SEP].
    long = sum(len(row["text"].split()) > 8 for row in job.rows)
    assert tokens.train.num_truncated == long > 0
    assert tokens.train.lengths(np.arange(NUM_TRAIN)).max() == 10
    assert f"train: {long} of 1300 samples were cut to 10 tokens (data.max_length)" in tokens.notes
    [(ids, _)] = tokens.train.rows(np.array([0]))
    assert ids.tolist() == expected_ids(job.rows[0], 10)


def test_max_length_has_the_models_as_its_limit(job: Any) -> None:
    with pytest.raises(UserError, match=r"up to 65 tokens do not fit the model: it takes 64"):
        job.prepare(max_length=65, model_max_length=64)
    with pytest.raises(UserError, match=r"Rows of 2 tokens leave no room.*Set it to 3 or more"):
        job.prepare(max_length=2)
    small = {"max_train_samples": 6, "max_eval_samples": 2}
    assert job.prepare(model_max_length=20, **small).max_length == 20
    assert job.prepare(max_length=100, **small).max_length == 100
    job.source = write_tokenizer(job.folder / "tokenizer", model_max_length=None)
    assert job.prepare(**small).max_length == 512


def test_regression_labels_are_float32(job: Any) -> None:
    write_rows(job.folder / "data" / "train.jsonl", 12, 1, label=0.25)
    write_rows(job.folder / "data" / "test.jsonl", 3, 1, label=1.5)
    tokens = job.prepare()
    labels = tokens.eval.labels(np.arange(3))
    assert labels.dtype == np.float32 and labels.tolist() == [1.5] * 3
    assert job.prepare().hit and job.prepare().spec.problem == "regression"


def test_a_tokenizer_without_token_types(job: Any) -> None:
    job.source = write_tokenizer(
        job.folder / "tokenizer", model_input_names=["input_ids", "attention_mask"]
    )
    tokens = job.prepare(max_train_samples=6)
    assert not tokens.uses_token_type_ids
    assert tokens.train.rows(np.array([0]))[0][1] is None


def test_padding_without_a_padding_token(job: Any) -> None:
    job.source = write_tokenizer(job.folder / "tokenizer", pad_token=None, eos_token="[SEP]")
    tokens = job.prepare(max_train_samples=6)
    assert tokens.pad_token_id == 3
    expected = "tokenizer: it has no padding token, so '[SEP]' is used for padding"
    assert expected in tokens.notes
    job.source = write_tokenizer(job.folder / "tokenizer", pad_token=None)
    with pytest.raises(UserError, match=r"neither a padding nor an end-of-text token"):
        job.prepare(max_train_samples=6)


def test_tokenizers_that_are_not_there(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    (tmp_path / "empty").mkdir()
    for name, message in (
        (tmp_path / "none", "no tokenizer at"),
        (tmp_path / "data" / "train.jsonl", "no tokenizer at"),
        (tmp_path / "empty", r"no tokenizer in .*none of tokenizer.json"),
    ):
        with pytest.raises(UserError, match=message):
            locate_tokenizer(TokenizerSource(name_or_path=str(name)))
    (job.folder / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer .* cannot be loaded: .*model.tokenizer"):
        job.prepare()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for wrong in ("org/none", "not a name"):
        with pytest.raises(UserError, match=rf"tokenizer '{wrong}' cannot be found: .*Offline"):
            locate_tokenizer(TokenizerSource(name_or_path=wrong))


def test_a_tokenizer_of_the_hub_is_its_snapshot(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def download(name: Any, **arguments: Any) -> Any:
        asked.append((name, arguments["revision"]))
        return str(job.folder / "tokenizer")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = TokenizerSource(name_or_path="org/name", revision="r")
    assert locate_tokenizer(source) == job.folder / "tokenizer"
    assert asked == [("org/name", "r")]


def test_the_fingerprint_of_a_tokenizer(job: Any) -> None:
    folder = job.folder / "tokenizer"
    assert [f.name for f in tokenizer_files(folder)] == ["tokenizer.json", "tokenizer_config.json"]
    found = [tokenizer_fingerprint(folder, job.source)]
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text('{"dropout": 0.1}')
    assert tokenizer_fingerprint(folder, job.source) == found[0]
    (folder / "config.json").write_text('{"model_type": "bert"}')
    found.append(tokenizer_fingerprint(folder, job.source))
    (folder / "added_tokens.json").write_text("{}")
    found.append(tokenizer_fingerprint(folder, job.source))
    assert len(set(found)) == 3


def cache_files(job: Any) -> Any:
    return sorted(p for p in (job.folder / "cache" / "tokens").rglob("*") if p.is_file())


def test_four_processes_at_once(job: Any) -> None:
    def work(rank: Any, world_size: Any) -> Any:
        tokens = job.prepare(rank=rank, world_size=world_size)
        assert len(tokens.train) == NUM_TRAIN and tokens.train.num_tokens > NUM_TRAIN

    # Two jobs of the same key, each of two ranks.
    assert run_all((work, 0, 2), (work, 1, 2), (work, 0, 2), (work, 1, 2)) == [0] * 4
    names = [path.name for path in cache_files(job)]
    assert names == [
        "eval-00000.safetensors",
        "meta.json",
        "train-00000.safetensors",
        "train-00001.safetensors",
        "train-00002.safetensors",
    ]
    alone = Job(job.folder / "alone")
    assert alone.prepare().key == job.prepare().key
    contents = [[path.read_bytes() for path in cache_files(j)] for j in (job, alone)]
    assert contents[0] == contents[1]


def test_a_process_that_is_killed_midway(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def die_after_two() -> Any:
        written: list[Any] = []

        def write_then_die(path: Any, *rest: Any) -> Any:
            if len(written) == 2:
                path.with_name(f"{path.name}.tmp-1-aa").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            written.append(path)
            write_file(path, *rest)

        monkeypatch.setattr(cache_writing, "write_file", write_then_die)
        job.prepare()

    assert run_all((die_after_two,)) == [-signal.SIGKILL]
    names = [path.name for path in cache_files(job)]
    assert "train-00001.safetensors" in names and "eval-00000.safetensors" not in names
    kept = next(path for path in cache_files(job) if path.name == "train-00000.safetensors")
    inode = kept.stat().st_ino
    leftover = next(path for path in cache_files(job) if ".tmp-" in path.name)
    os.utime(leftover, (0, 0))
    tokens = job.prepare()
    assert not tokens.hit and len(tokens.eval) == NUM_EVAL
    assert kept.stat().st_ino == inode
    assert not [path for path in cache_files(job) if ".tmp-" in path.name]
    assert job.prepare().hit


def test_a_rank_waits_for_the_others(job: Any) -> None:
    def late(rank: Any) -> Any:
        time.sleep(0.5)
        job.prepare(rank=rank, world_size=2)

    def early(rank: Any) -> Any:
        tokens = job.prepare(rank=rank, world_size=2)
        assert len(tokens.train) == NUM_TRAIN

    assert run_all((late, 0), (early, 1)) == [0, 0]


def test_a_rank_that_never_comes(job: Any) -> None:
    limits = {"stall_seconds": 0.2, "takeover_seconds": 60.0}
    with pytest.raises(JobError, match=r"lacks 2 slices \(train-00001.*data.cache_dir"):
        job.prepare(rank=0, world_size=2, limits=limits)
    tokens = job.prepare(rank=0, world_size=2, limits={"takeover_seconds": 0.2})
    assert not tokens.hit and job.prepare().hit


@pytest.mark.parametrize("damage", ["truncated", "header", "foreign", "gone", "empty", "folder"])
def test_a_damaged_slice_is_written_again(job: Any, damage: Any) -> None:
    tokens = job.prepare()
    path = tokens.folder / "train-00001.safetensors"
    whole = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(whole[:-1])
    elif damage == "header":
        path.write_bytes(whole[:20] + b"\xff" + whole[21:])
    elif damage == "foreign":
        path.write_bytes((tokens.folder / "train-00002.safetensors").read_bytes())
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "folder":
        path.mkdir()
        with pytest.raises(UserError, match="cache folder"):
            job.prepare()
        path.rmdir()
    again = job.prepare()
    assert not again.hit and again.key == tokens.key
    assert path.read_bytes() == whole
    assert job.prepare().hit


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-5],
        lambda text: "[]",
        lambda text: "[" * 100_000,
        lambda text: text.replace('"train": 1300', '"train": -1'),
        lambda text: text.replace('"train": 1300', '"train": 1e99'),
        lambda text: text.replace('"format": 1', '"format": 99'),
        lambda text: text.replace('"text_columns"', '"txt"'),
        lambda text: text.replace('"splits"', '"split"'),
    ],
)
def test_a_damaged_meta_file_is_written_again(job: Any, change: Any) -> None:
    tokens = job.prepare()
    path = tokens.folder / "meta.json"
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))
    assert not job.prepare().hit
    assert path.read_text() == text


def test_the_folder_is_for_its_owner_alone(job: Any) -> None:
    job.prepare(max_train_samples=5)
    assert (job.folder / "cache").stat().st_mode & 0o777 == 0o700


def test_a_cache_folder_that_cannot_be_used(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (job.folder / "file").write_text("")
    for path in (job.folder / "file", job.folder / "file" / "below"):
        with pytest.raises(UserError, match=rf"cache folder {path} cannot be used.*data.cache_dir"):
            job.prepare(cache_dir=str(path))
    with pytest.raises(UserError, match="no home folder"):
        job.prepare(cache_dir="~nobody-of-that-name/x")

    def fail(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_writing, "write_file", fail)
    with pytest.raises(UserError, match=r"cannot be used: No space left.*make room"):
        job.prepare()


def test_a_new_slice_is_a_plain_safetensors_file(job: Any) -> None:
    tokens = job.prepare(max_train_samples=7)
    file = open_file(tokens.folder / "train-00000.safetensors")
    assert set(file.names) == {"input_ids", "offsets", "labels", "token_type_ids"}
    assert file.tensor("offsets").tolist()[0] == 0 and len(file.tensor("labels")) == 7
    assert cache_folder.cache_root(job.options()) == job.folder / "cache"


def test_a_hub_data_set_is_known_by_what_was_loaded(
    job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    rows = datasets.Dataset.from_list(job.rows[:30])
    loaded = datasets.DatasetDict({"train": rows, "test": rows.select(range(6))})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: loaded)
    first = job.prepare(name_or_path="org/name")
    assert not first.hit and len(first.eval) == 6
    assert job.prepare(name_or_path="org/name").hit
    loaded["train"] = rows.select(range(1, 30))
    assert job.prepare(name_or_path="org/name").key != first.key
