"""Splits, subsets and fingerprints of data sets, and what is said of those that cannot be read."""

import gzip
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.data import sources
from ftlaunch.strategies.data.cache_folder import cache_root
from ftlaunch.strategies.data.local_files import canonical_split
from ftlaunch.strategies.data.sources import data_fingerprint, loaded_fingerprint
from ftlaunch.strategies.options import DataOptions

ROWS = [{"text": f"text {i}", "label": i % 2} for i in range(20)]


def load(options: DataOptions, *, seed: int) -> Any:
    return sources.load_splits(options, seed=seed)


def write_jsonl(path: Any, rows: Any = ROWS) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_any(path: Any, rows: Any = ROWS) -> Any:
    """Write rows in the format that the suffix names."""
    import pandas

    frame = pandas.DataFrame(rows)
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        frame.to_parquet(path)
    elif name.endswith(".arrow"):
        import pyarrow

        table = pyarrow.Table.from_pandas(frame)
        with (
            pyarrow.OSFile(str(path), "wb") as sink,
            pyarrow.ipc.new_stream(sink, table.schema) as w,
        ):
            w.write_table(table)
    else:
        text: Any = {
            ".csv": frame.to_csv(index=False),
            ".tsv": frame.to_csv(index=False, sep="\t"),
            ".json": json.dumps(rows),
            ".jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        }["." + name.rpartition(".")[2]]
        text = text.encode()
        path.write_bytes(gzip.compress(text) if path.name.endswith(".gz") else text)
    return path


@pytest.fixture
def options(tmp_path: Path) -> Any:
    def make(path: Any, **values: Any) -> Any:
        return DataOptions(name_or_path=str(path), cache_dir=str(tmp_path / "cache"), **values)

    return make


SUFFIXES = ["csv", "tsv", "json", "jsonl", "parquet", "arrow"]
SUFFIXES += ["csv.gz", "tsv.gz", "json.gz", "jsonl.gz"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_of_one_file(tmp_path: Path, options: Any, suffix: Any) -> None:
    path = write_any(tmp_path / f"my *data* [1]::x.{suffix}")
    splits = load(options(path, eval_fraction=0.25), seed=1)
    # 20 rows, a quarter held out; together they are all rows, each in its old order.
    assert (len(splits.train), len(splits.eval)) == (15, 5)
    assert len(splits.whole_train) == 20
    numbers = [[int(t.split()[1]) for t in part["text"]] for part in (splits.train, splits.eval)]
    assert all(part == sorted(part) for part in numbers)
    assert sorted(numbers[0] + numbers[1]) == list(range(20))
    assert splits.train["label"] == [n % 2 for n in numbers[0]]
    assert splits.notes == (
        "evaluation: 5 of the 20 training samples held out at random (data.eval_fraction = 0.25)",
    )


def test_nothing_is_printed_and_nothing_stays_switched_off(
    tmp_path: Path, options: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    import datasets

    datasets.enable_progress_bars()
    level = logging.getLogger("datasets").level
    load(options(write_jsonl(tmp_path / "a.jsonl")), seed=1)
    (tmp_path / "bad.jsonl").write_text("x")
    with pytest.raises(UserError):
        load(options(tmp_path / "bad.jsonl"), seed=1)
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()
    assert logging.getLogger("datasets").level == level


@pytest.mark.parametrize(
    ("names", "expected_eval"),
    [
        (["train.jsonl", "test.jsonl", "dev.jsonl"], "dev.jsonl"),
        (["train.jsonl", "test.jsonl"], "test.jsonl"),
        (["mrpc_train.jsonl", "mrpc-val.jsonl"], "mrpc-val.jsonl"),
        (["Train.jsonl", "validation-00000-of-00001.jsonl"], "validation-00000-of-00001.jsonl"),
        (["train/a.jsonl", "valid/b.jsonl", "test/c.jsonl"], "valid/b.jsonl"),
        (["data/train-0.jsonl", "data/test-0.jsonl"], "data/test-0.jsonl"),
    ],
)
def test_splits_of_a_folder(tmp_path: Path, options: Any, names: Any, expected_eval: Any) -> None:
    for name in names:
        write_jsonl(tmp_path / "d" / name, [{"text": name, "label": 0}])
    (tmp_path / "d" / "README.md").write_text("no data")
    splits = load(options(tmp_path / "d"), seed=1)
    assert splits.train["text"] == names[:1]
    assert splits.eval["text"] == [expected_eval]
    assert splits.notes[0].startswith("evaluation: split '")


def test_plain_text_is_one_row_a_line(tmp_path: Path, options: Any) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.txt").write_bytes("\ufeffone é\r\n\n  three\nlast".encode())
    (tmp_path / "d" / "test.txt.gz").write_bytes(gzip.compress(b"x\ny\n"))
    splits = load(options(tmp_path / "d"), seed=1)
    assert splits.train["text"] == ["one é", "", "  three", "last"]
    assert splits.eval["text"] == ["x", "y"]
    (tmp_path / "d" / "train.txt").write_bytes(b"good\nb\xe9d\n")
    with pytest.raises(UserError, match=r"train.txt cannot be read as text: line 2 is not UTF-8"):
        load(options(tmp_path / "d"), seed=1)


def test_plain_text_beside_other_data_is_no_data(tmp_path: Path, options: Any) -> None:
    write_jsonl(tmp_path / "d" / "data" / "train.jsonl")
    (tmp_path / "d" / "train.txt").write_text("a licence")
    (tmp_path / "d" / "data" / "train.txt").write_text("a licence")
    assert len(load(options(tmp_path / "d"), seed=1).whole_train) == 20


def test_shards_follow_each_other_by_name(tmp_path: Path, options: Any) -> None:
    for i in (2, 0, 1):
        write_jsonl(tmp_path / "d" / f"train-{i}.jsonl", [{"text": str(i), "label": 0}] * 2)
    write_jsonl(tmp_path / "d" / "test.jsonl")
    splits = load(options(tmp_path / "d"), seed=1)
    assert splits.train["text"] == ["0", "0", "1", "1", "2", "2"]


def test_chosen_splits(tmp_path: Path, options: Any) -> None:
    for name in ("train", "test", "english"):
        write_jsonl(tmp_path / "d" / f"{name}.jsonl", [{"text": name, "label": 0}])
    chosen = options(tmp_path / "d", train_split="english", eval_split="train")
    splits = load(chosen, seed=1)
    assert (splits.train["text"], splits.eval["text"]) == (["english"], ["train"])
    assert splits.notes == ()
    with pytest.raises(
        UserError, match=r"no split 'french'.*'english', 'test', 'train'.*eval_split"
    ):
        load(options(tmp_path / "d", eval_split="french"), seed=1)


def test_words_that_only_look_like_splits() -> None:
    assert [canonical_split(n) for n in ("value", "testimony", "devices", "retrain")] == [None] * 4
    assert canonical_split("traindata") == canonical_split("TRAINING_2") == "train"
    assert canonical_split("validation_matched") == "validation"


def test_saved_data_sets(tmp_path: Path, options: Any) -> None:
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(str(tmp_path / "one"))
    parts = {"train": rows, "validation": rows.select(range(3))}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "many"))
    assert len(load(options(tmp_path / "one"), seed=1).train) == 18
    splits = load(options(tmp_path / "many"), seed=1)
    assert (len(splits.train), len(splits.eval)) == (20, 3)
    assert data_fingerprint(options(tmp_path / "many"), seed=1) is not None
    (tmp_path / "many" / "train" / "data-00000-of-00001.arrow").write_bytes(b"x" * 10)
    with pytest.raises(UserError, match=r"many/train cannot be read"):
        load(options(tmp_path / "many"), seed=1)
    (tmp_path / "many" / "dataset_dict.json").write_text('{"splits": ["../one"]}')
    with pytest.raises(UserError, match=r"names the split '../one'"):
        load(options(tmp_path / "many"), seed=1)
    (tmp_path / "many" / "dataset_dict.json").write_text("[")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        load(options(tmp_path / "many"), seed=1)


def test_subsets_are_random_ordered_and_repeatable(tmp_path: Path, options: Any) -> None:
    write_jsonl(tmp_path / "d" / "train.jsonl")
    write_jsonl(tmp_path / "d" / "test.jsonl")
    chosen = options(tmp_path / "d", max_train_samples=8, max_eval_samples=50)
    texts = [load(chosen, seed=seed).train["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    numbers = [int(text.split()[1]) for text in texts[0]]
    assert len(set(numbers)) == 8 and numbers == sorted(numbers) and numbers != list(range(8))
    splits = load(chosen, seed=1)
    assert len(splits.eval) == 20
    assert splits.notes[1:] == (
        "train: a random subset of 8 of 20 samples (data.max_train_samples)",
    )


def test_the_draw_is_the_same_in_every_release(tmp_path: Path, options: Any) -> None:
    import xxhash

    # SplitMix64 of the row number in plain integers; the six lowest of twenty are held out.
    start = xxhash.xxh3_64_intdigest(b"7 held out")

    def key(i: Any) -> Any:
        z = (i + start) * 0x9E3779B97F4A7C15 % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    held_out = sorted(sorted(range(20), key=key)[:6])
    assert held_out == [3, 6, 10, 14, 16, 18]
    path = write_jsonl(tmp_path / "a.jsonl")
    splits = load(options(path, eval_fraction=0.3), seed=7)
    assert splits.eval["text"] == [f"text {i}" for i in held_out]


def test_text_that_pandas_takes_for_missing(tmp_path: Path, options: Any) -> None:
    (tmp_path / "a.csv").write_text('text,label\nNA,0\nNone,1\n"null",0\n,1\n')
    splits = load(options(tmp_path / "a.csv", eval_split="train"), seed=1)
    assert splits.train["text"] == ["NA", "None", "null", None]


def test_fingerprints_follow_content_and_options(tmp_path: Path, options: Any) -> None:
    path = write_jsonl(tmp_path / "d" / "train.jsonl")
    test = write_jsonl(tmp_path / "d" / "test.jsonl")
    base = data_fingerprint(options(tmp_path / "d"), seed=1)
    assert base == data_fingerprint(options(tmp_path / "d"), seed=2)
    assert base == data_fingerprint(options(tmp_path / "d", eval_fraction=0.2), seed=1)
    others = [
        data_fingerprint(options(tmp_path / "d", **changed), seed=1)
        for changed in ({"max_train_samples": 3}, {"eval_split": "train"}, {"revision": "x"})
    ]
    subset = options(tmp_path / "d", max_train_samples=3)
    others.append(data_fingerprint(subset, seed=2))
    (tmp_path / "d").rename(tmp_path / "e")
    assert base == data_fingerprint(options(tmp_path / "e"), seed=1)
    path, test = tmp_path / "e" / path.name, tmp_path / "e" / test.name
    before = path.stat()
    path.write_text(path.read_text().replace("text 3", "text X"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    others.append(data_fingerprint(options(tmp_path / "e"), seed=1))
    test.unlink()
    held_out = [data_fingerprint(options(tmp_path / "e"), seed=seed) for seed in (1, 2)]
    held_out.append(data_fingerprint(options(tmp_path / "e", eval_fraction=0.2), seed=1))
    assert len({base, *others, *held_out}) == 1 + len(others) + len(held_out)


def test_a_file_replaced_within_one_time_stamp_is_read_anew(tmp_path: Path, options: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    before = path.stat()
    load(options(path), seed=1)
    path.write_text(path.read_text().replace('"text ', '"word '))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load(options(path), seed=1).train["text"][0].startswith("word")


def test_loaded_fingerprints(tmp_path: Path, options: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    found = [loaded_fingerprint(load(options(path), seed=seed)) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]


def test_a_fingerprint_imports_no_data_library(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl")
    script = (
        "import sys\n"
        "from ftlaunch.strategies.data.sources import data_fingerprint\n"
        "from ftlaunch.strategies.options import DataOptions\n"
        "assert data_fingerprint(DataOptions(name_or_path=sys.argv[1]), seed=1)\n"
        "assert data_fingerprint(DataOptions(name_or_path='org/name'), seed=1) is None\n"
        "print({'datasets', 'pyarrow', 'pandas', 'transformers', 'torch'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.jsonl", b"\n\n", "a.jsonl has no rows"),
        ("a.csv", b"text,label\n", "a.csv has no rows"),
        ("a.xlsx", b"x", "unknown suffix '.xlsx': known are .csv, .tsv, .json, .jsonl, .parquet"),
        ("a.jsonl", b'{"a":1}\n{"a":2\n{"a":3}\n', "a.jsonl .* line 2 is not JSON"),
        ("a.jsonl", b'{"a":1}\n2\n', "line 2 is not a JSON object: 2"),
        ("a.jsonl", b"hello\n", r"line 1 is not JSON \(Expecting value\): hello"),
        ("a.json", b'[{"a":1},\n{"a":}]', "line 2 is not JSON"),
        ("a.json", b'[{"a":1}, 3]', "row 2 is not a JSON object"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "line 3 has 3 fields instead of 2"),
        ("a.csv", b"a,b\n1,2,3\n", "first row of .*a.csv has 3 fields, its header 2"),
        ("a.csv", b'a,b\n1,2\n"x,2\n', "quote opened in line 3"),
        ("a.csv", b"a,b\n1,2\n\xe9,2\n", "line 3 is not UTF-8"),
        ("a.csv.gz", b"a,b\n1,2\n", "a.csv.gz cannot be read as csv: Not a gzipped file"),
        ("a.csv.gz", gzip.compress(b"a,b\n1,2\n" * 99)[:30], "ended before the end"),
        ("a.parquet", b"PAR1xxxxxxxxx", "a.parquet cannot be read as parquet: Parquet magic"),
        ("a.arrow", b"xxxx", "a.arrow cannot be read as arrow"),
    ],
)
# datasets 3 leaves a CSV file open when it fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_files_that_cannot_be_read(
    tmp_path: Path, options: Any, name: Any, content: Any, message: Any
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"(?s){message}"):
        load(options(tmp_path / name), seed=1)


def test_shards_with_different_columns(tmp_path: Path, options: Any) -> None:
    write_jsonl(tmp_path / "d" / "train-1.jsonl", [{"text": "a", "label": 1}])
    write_jsonl(tmp_path / "d" / "train-2.jsonl", [{"words": ["a"], "n": {"x": 1}}])
    with pytest.raises(UserError, match=r"train-1.jsonl', .*same columns with the same types"):
        load(options(tmp_path / "d"), seed=1)


def test_a_broken_shard_is_named(tmp_path: Path, options: Any) -> None:
    write_jsonl(tmp_path / "d" / "train-1.jsonl")
    (tmp_path / "d" / "train-2.jsonl").write_text('{"text": "a", "label": 1}\n{"text"\n')
    with pytest.raises(UserError, match=r"train-2.jsonl cannot be read as json: line 2"):
        load(options(tmp_path / "d"), seed=1)


def test_paths_and_folders_that_hold_nothing(tmp_path: Path, options: Any) -> None:
    with pytest.raises(UserError, match=r"no data set at .*/none\.jsonl: .*Check the spelling"):
        load(options(tmp_path / "none.jsonl"), seed=1)
    with pytest.raises(UserError, match="no home folder"):
        load(options("~nobody-of-that-name/x"), seed=1)
    with pytest.raises(UserError, match="neither a file nor a folder"):
        load(options("/dev/null"), seed=1)
    with pytest.raises(UserError, match="No data set was given"):
        load(DataOptions(), seed=1)
    (tmp_path / "d").mkdir()
    with pytest.raises(UserError, match=r"holds no data files: found nothing"):
        load(options(tmp_path / "d"), seed=1)
    write_jsonl(tmp_path / "d" / "test.jsonl")
    write_jsonl(tmp_path / "d" / "rest.jsonl")
    with pytest.raises(UserError, match=r"no training split: found 'rest', 'test'"):
        data_fingerprint(options(tmp_path / "d"), seed=1)
    write_any(tmp_path / "d" / "train.jsonl")
    write_any(tmp_path / "d" / "train.csv")
    with pytest.raises(UserError, match=r"different formats: 'train.csv', 'train.jsonl'"):
        load(options(tmp_path / "d"), seed=1)


def test_one_row_cannot_be_divided(tmp_path: Path, options: Any) -> None:
    with pytest.raises(UserError, match="only 1 sample"):
        load(options(write_jsonl(tmp_path / "a.jsonl", ROWS[:1])), seed=1)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = write_jsonl(tmp_path / "a.jsonl")
    chosen = DataOptions(name_or_path=str(path), cache_dir=str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cache folder .*/file cannot be used.*data.cache_dir"):
        load(chosen, seed=1)


def test_hub_names_offline_and_unreachable(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"'org/none' is not in the cache, and HF_HUB_OFFLINE"):
        load(options("org/none"), seed=1)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    cases = {
        "cannot be reached": ConnectionError("Couldn't reach 'org/none' on the Hub"),
        "was not found": datasets.exceptions.DatasetNotFoundError("Dataset 'org/none' doesn't"),
        r"config_name = None\) cannot be loaded: Config name is missing": ValueError(
            "Config name is missing.\nPlease pick one"
        ),
        "Dataset scripts are no longer supported": RuntimeError(
            "Dataset scripts are no longer supported, but found x.py"
        ),
    }
    for message, error in cases.items():

        def fail(*_: Any, error: Any = error, **__: Any) -> Any:
            raise error

        monkeypatch.setattr(datasets, "load_dataset", fail)
        with pytest.raises(UserError, match=message):
            load(options("org/none", trust_remote_code=True), seed=1)


def test_hub_splits(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    empty = rows.select([])
    loaded = datasets.DatasetDict(
        {"train": rows, "validation_matched": rows.select(range(4)), "test": empty}
    )
    asked = []

    def fake_load(*args: Any, **keywords: Any) -> Any:
        asked.append((args, keywords))
        return loaded

    monkeypatch.setattr(datasets, "load_dataset", fake_load)
    chosen = options("org/name", config_name="c", revision="r", trust_remote_code=True)
    splits = load(chosen, seed=1)
    assert asked == [(("org/name", "c"), {"revision": "r"})]
    assert len(splits.eval) == 4
    assert splits.notes == (
        "evaluation: split 'validation_matched' (set data.eval_split to choose)",
        "data.trust_remote_code has no effect: the installed datasets runs no loading scripts",
    )
    with pytest.raises(UserError, match="split 'test' of the data set org/name has no rows"):
        load(options("org/name", eval_split="test"), seed=1)


def test_where_the_cache_lies(tmp_path: Path) -> None:
    home = {"XDG_CACHE_HOME": "/x", "FTLAUNCH_CACHE": "/f"}
    assert str(cache_root(DataOptions(cache_dir="/o"), home)) == "/o"
    assert str(cache_root(DataOptions(), home)) == "/f"
    assert str(cache_root(DataOptions(), {"XDG_CACHE_HOME": "/x"})) == "/x/ftlaunch"
    expected = os.path.expanduser("~/.cache/ftlaunch")  # noqa: PTH111
    assert str(cache_root(DataOptions(), {"XDG_CACHE_HOME": "relative"})) == expected
