"""What the documents say is what the code does: keys, flags, files, modules, links, examples."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import typing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftlaunch.cluster import errors
from ftlaunch.cluster.machine import detect_machine
from ftlaunch.cluster.rank_pipe import EVENT_FD_VARIABLE, LISTEN_FD_VARIABLE
from ftlaunch.cluster.world import World
from ftlaunch.launcher.cli import parse
from ftlaunch.launcher.config import (
    ALIASES,
    RunConfig,
    _parse_override,
    all_keys,
    load_config,
)
from ftlaunch.launcher.output_folder import OWN_NAMES
from ftlaunch.launcher.parsers import (
    build_eval_parser,
    build_merge_parser,
    build_parser,
    build_plan_parser,
    build_submit_parser,
)
from ftlaunch.launcher.plan import make_plan
from ftlaunch.launcher.ranks import device_environment, interface_environment, rank_environment
from ftlaunch.launcher.site import find_site
from ftlaunch.strategies.base import TensorSlice
from ftlaunch.strategies.checkpoint.manifest import (
    FORMAT_VERSION,
    Manifest,
    folder_name,
    write_manifest,
)
from ftlaunch.strategies.checkpoint.store import shard_name, write_shard
from ftlaunch.strategies.data.demo import DEMO_OPTIONS

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path for folder in (".", "docs", "examples") for path in (ROOT / folder).glob("*.md")
)
FOLDERS = ("launcher", "strategies", "cluster")

each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix()
)


# -- reading Markdown ---------------------------------------------------------------------------


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _section(name: str, title: str) -> str:
    """A document's part below a heading, up to the next one of its level or above."""
    lines = _text(name).splitlines()
    [start] = [i for i, line in enumerate(lines) if re.fullmatch(rf"#+ {re.escape(title)}", line)]
    level = len(lines[start].split()[0])
    rest = lines[start + 1 :]
    ends = [i for i, line in enumerate(rest) if re.match(rf"#{{1,{level}}} ", line)]
    return "\n".join(rest[: ends[0]] if ends else rest)


def _rows(text: str) -> Iterator[list[str]]:
    """The cells of every row of every table, headers left out."""
    for line in text.splitlines():
        if line.startswith("| ") and line.endswith("|"):
            yield [cell.strip() for cell in line[1:-1].split("|")]


def _code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def _table(text: str) -> dict[str, list[str]]:
    """First cell, which is code, → the others. No row may stand twice."""
    rows = [row for row in _rows(text) if row[0].startswith("`")]
    table = {_code(row[0])[0]: row[1:] for row in rows}
    assert len(table) == len(rows), "a row stands twice"
    return table


def _blocks(document: Path, language: str) -> list[str]:
    text = document.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def _commands(document: Path) -> list[list[str]]:
    """The words of every command line in a block of shell, or in an indented one."""
    text = document.read_text(encoding="utf-8")
    indented = re.findall(r"^    ((?:ftlaunch|make|\.venv)\b.*)$", text, flags=re.MULTILINE)
    lines = [*indented, *"\n".join(_blocks(document, "sh")).replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


# -- settings -----------------------------------------------------------------------------------


def _documented_keys() -> dict[str, list[str]]:
    return _table(_section("docs/configuration.md", "Keys"))


def _default_of(config: RunConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return list(value) if isinstance(value, tuple) else value


def test_every_key_is_documented() -> None:
    assert sorted(_documented_keys()) == all_keys()


def _read_as_yaml(text: str) -> Any:
    """As the command line reads the value of KEY=VALUE."""
    return _parse_override(f"key={text}")[1]


def test_documented_defaults_are_the_real_ones() -> None:
    config = RunConfig()
    for table in (_documented_keys(), _table(_section("README.md", "A real job"))):
        for key, cells in table.items():
            [default] = _code(cells[0])
            assert _read_as_yaml(default) == _default_of(config, key), key


def test_documented_meanings_name_every_choice() -> None:
    hints = {
        f"{section}.{name}": hint
        for section in (
            "cluster",
            "model",
            "data",
            "train",
            "checkpoint",
            "deepspeed",
            "lora",
            "slurm",
            "bench",
        )
        for name, hint in typing.get_type_hints(
            typing.get_type_hints(RunConfig)[section], include_extras=False
        ).items()
    } | typing.get_type_hints(RunConfig)
    documented = _documented_keys()
    checked = 0
    for key in all_keys():
        for choice in _choices(hints[key]):
            checked += 1
            assert f"`{choice}`" in " ".join(documented[key]), f"{key} does not mention {choice}"
    # precision, cluster.kind, save_dtype, lr_scheduler_type, class_weights, eval_strategy,
    # start_method, show_output, offload, packing, long_samples
    assert checked == 4 + 4 + 3 + 3 + 1 + 3 + 2 + 3 + 2 + 3 + 3


def _choices(hint: Any) -> Iterator[Any]:
    if typing.get_origin(hint) is typing.Literal:
        yield from typing.get_args(hint)
    else:
        for part in typing.get_args(hint):
            yield from _choices(part)


def test_documented_defaults_of_the_demo() -> None:
    table = _table(_section("docs/configuration.md", "The demo"))
    documented = {key: _read_as_yaml(_code(cells[0])[0]) for key, cells in table.items()}
    plain = RunConfig()
    differing = {k: v for k, v in DEMO_OPTIONS.items() if v != _default_of(plain, k)}
    assert documented == differing


def test_documented_aliases() -> None:
    table = _table(_section("docs/configuration.md", "YAML"))
    assert {name: _code(cells[0])[0] for name, cells in table.items()} == ALIASES


def test_documented_yaml_is_a_configuration(tmp_path: Path) -> None:
    blocks = [b for document in DOCUMENTS for b in _blocks(document, "yaml")]
    assert blocks
    for block in blocks:
        (tmp_path / "job.yaml").write_text(block)
        load_config(file=tmp_path / "job.yaml", flags={}, overrides=[])


def test_documented_flags() -> None:
    """Every flag of either command, with the key that it sets and where it is missing."""
    documented = {}
    for row in _rows(_section("docs/configuration.md", "Flags")):
        if row[0].startswith("`"):
            flags = frozenset(code.split()[0] for code in _code(row[0]))
            documented[flags] = (_code(row[1]), "not of" in row[2])
    parsers = build_parser(), build_eval_parser()
    main, evaluation = (
        {frozenset(a.option_strings): a.dest for a in parser._actions if a.option_strings}
        for parser in parsers
    )
    assert set(documented) == set(main)
    assert set(evaluation) <= set(main)
    for flags, (keys, only_main) in documented.items():
        name = main[flags]
        assert only_main == (flags not in evaluation), flags
        assert keys == ([ALIASES.get(name, name)] if ALIASES.get(name, name) in all_keys() else [])


def test_documented_flags_of_submit() -> None:
    """Those of the main command but three, and some that are keys of the section slurm."""
    own = {a.dest: a.option_strings[0] for a in build_submit_parser()._actions if a.option_strings}
    main = {a.dest: a.option_strings[0] for a in build_parser()._actions if a.option_strings}
    without = {main[name] for name in main.keys() - own.keys()}
    added = {own[name] for name in own.keys() - main.keys()}
    assert {name for name in own if name not in main} <= set(all_keys())
    [sentence] = re.findall(
        r"`ftlaunch submit` has them without (.*?)see",
        _section("docs/configuration.md", "Flags"),
        re.S,
    )
    gone, _, new = sentence.partition("and six")
    assert set(_code(gone)) == without
    assert {code for code in _code(new) if code.startswith("--")} == added


def test_documented_flags_of_plan() -> None:
    own = {a.option_strings[0] for a in build_plan_parser()._actions if a.option_strings}
    main = {a.option_strings[0] for a in build_parser()._actions if a.option_strings}
    [sentence] = re.findall(
        r"`ftlaunch plan` has them without (.*?)\.",
        _section("docs/configuration.md", "Flags"),
        re.S,
    )
    gone, _, new = sentence.partition("and two")
    assert {code.split()[0] for code in _code(gone)} == main - own
    assert {code.split()[0] for code in _code(new)} == own - main


def test_documented_flags_of_merge() -> None:
    documented = set(_table(_section("docs/checkpoints.md", "Merging")))
    flags = {a.option_strings[0] for a in build_merge_parser()._actions if a.option_strings}
    assert {flag.split()[0] for flag in documented} == flags - {"-h"}


def test_documented_variables_of_a_rank(tmp_path: Path) -> None:
    """What a rank's environment gets, and the two that its agent adds."""
    machine = detect_machine({"CUDA_VISIBLE_DEVICES": "", "ASCEND_RT_VISIBLE_DEVICES": ""})
    config = RunConfig()
    site = find_site(config.cluster, {})
    plan = make_plan(config, [machine], site, output_dir=str(tmp_path))
    host = replace(plan.hosts[0], devices=("GPU-1",))
    given = {
        **rank_environment(plan),
        **device_environment(host),
        **interface_environment("eth0", {}),
        **World.alone().to_environment(),
    }
    paragraph = _section("docs/configuration.md", "Environment").rpartition("\n\n")[2]
    documented = {code for code in _code(paragraph) if code.isupper()}
    assert documented == {*given, EVENT_FD_VARIABLE, LISTEN_FD_VARIABLE}


# -- commands -----------------------------------------------------------------------------------


def _check_ftlaunch(words: list[str]) -> None:
    _, arguments = parse(words)
    for override in getattr(arguments, "overrides", ()):
        assert override.partition("=")[0] in all_keys(), override


@each_document
def test_commands_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", _text("Makefile"), flags=re.MULTILINE))
    for program, *words in _commands(document):
        if program == "make":
            assert words and set(words) <= targets, words
        elif program == "ftlaunch":
            _check_ftlaunch([word for word in words if word != "…"])
    in_text = re.findall(r"`make ([^`]*)`", document.read_text(encoding="utf-8"))
    assert set(in_text) <= targets


def test_the_readme_shows_the_main_commands() -> None:
    commands = [" ".join(words) for words in _commands(ROOT / "README.md")]
    assert {"make demo", "make test"} <= set(commands)
    assert any(command.startswith("ftlaunch --nodes") for command in commands)
    assert any(command.startswith("ftlaunch eval") for command in commands)
    assert any(command.startswith("ftlaunch merge") for command in commands)


@each_document
def test_keys_in_the_text_exist(document: Path) -> None:
    """Everything in code that looks like a key of a section is one."""
    sections = ("cluster", "model", "data", "train", "checkpoint", "lora")
    files = ("json", "jsonl", "safetensors", "md", "py", "yaml")
    for code in _code(document.read_text(encoding="utf-8").replace("```", "")):
        for word in re.findall(rf"^(?:{'|'.join(sections)})\.\w+", code):
            if word.rpartition(".")[2] not in files:
                assert word in all_keys(), word


# -- names --------------------------------------------------------------------------------------


def test_every_module_has_its_line() -> None:
    documented = set(_table(_section("docs/architecture.md", "Every module")))
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert documented == found


@each_document
def test_files_and_tests_that_are_named_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for name, test in re.findall(r"`([\w./-]+\.(?:py|md|txt|toml))(?:::(\w+))?`", text):
        if "/" in name or name.endswith((".md", ".toml")):
            assert (ROOT / name).is_file() or (document.parent / name).is_file(), name
        if test:
            assert re.search(rf"^def {test}\(", _text(name), flags=re.MULTILINE), test


def test_files_of_the_output_folder() -> None:
    named = _table(_section("README.md", "What comes out"))
    assert {name.rstrip("/") for name in named} == set(OWN_NAMES)


def test_exit_codes() -> None:
    rows = _rows(_section("README.md", "What comes out"))
    documented = {int(row[0]) for row in rows if row[0].isdecimal()}
    assert documented == {value for name, value in vars(errors).items() if name.startswith("EXIT_")}


def test_every_dependency_has_its_reason() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML, 3.10 does not")
    project = tomllib.loads(_text("pyproject.toml"))["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[<>=!~ \[;]", requirement)[0] for requirement in requirements}

    at_run_time = _table(_section("docs/dependencies.md", "At run time"))
    assert set(at_run_time) == names(project["dependencies"])
    assert all(cells[0] for cells in at_run_time.values())
    extras = _table(_section("docs/dependencies.md", "Extras"))
    found: dict[str, set[str]] = {}
    for extra, requirements in project["optional-dependencies"].items():
        for name in names(requirements):
            found.setdefault(name, set()).add(extra)
    assert {name: set(_code(cells[0])) for name, cells in extras.items()} == found


# -- links --------------------------------------------------------------------------------------


def _anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        assert path.is_file(), target
        assert not anchor or anchor in _anchors(path), target


# -- checkpoints --------------------------------------------------------------------------------


def _write_checkpoint(root: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """Two tensors and an empty run, cut across two shards in the middle of the first tensor."""
    weight = np.arange(12, dtype=np.float32).reshape(3, 4)
    counter = np.array(7, dtype=np.int64)
    folder = root / folder_name(5)
    folder.mkdir()

    def piece(name: str, whole: np.ndarray, start: int, stop: int, kind: str) -> TensorSlice:
        values = whole.reshape(-1)[start:stop]
        return TensorSlice(name=name, kind=kind, shape=whole.shape, start=start, values=values)

    shards = [
        [piece("layer.weight", weight, 0, 5, "weight")],
        [
            piece("layer.weight", weight, 5, 12, "weight"),
            piece("counter", counter, 0, 1, "weight"),
            piece("layer.weight", weight * 2, 0, 12, "exp_avg"),
        ],
    ]
    for rank, slices in enumerate(shards):
        write_shard(folder / shard_name(rank, 2), slices)
    manifest = Manifest(
        identity={"task": "text-classification"},
        step=5,
        applied_steps=4,
        epoch=0.5,
        world_size=2,
        strategy="ddp",
        precision="fp32",
        loss_scale={"scale": 1.0, "applied_in_a_row": 0.0, "enabled": 0.0},
        best=None,
        evaluation=None,
        evaluations_without_gain=0,
        schedule={"name": "linear"},
        files={path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    )
    write_manifest(folder, manifest)
    return folder, {"layer.weight": weight, "counter": counter}


def _example() -> str:
    [block] = _blocks(ROOT / "docs" / "checkpoints.md", "python")
    return block


def test_the_example_reads_a_checkpoint(tmp_path: Path) -> None:
    code = _example()
    assert len(code.splitlines()) <= 30
    assert "ftlaunch" not in code
    namespace: dict[str, Any] = {}
    exec(compile(code, "docs/checkpoints.md", "exec"), namespace)
    folder, weights = _write_checkpoint(tmp_path)

    manifest, state = namespace["read_checkpoint"](folder)
    assert (manifest["step"], manifest["applied_steps"]) == (5, 4)
    assert {kind: set(tensors) for kind, tensors in state.items()} == {
        "weight": {"layer.weight", "counter"},
        "exp_avg": {"layer.weight"},
    }
    for name, expected in weights.items():
        np.testing.assert_array_equal(state["weight"][name], expected)
        assert state["weight"][name].dtype == expected.dtype
        assert state["weight"][name].shape == expected.shape
    np.testing.assert_array_equal(state["exp_avg"]["layer.weight"], weights["layer.weight"] * 2)

    # It notices a byte that has changed, and elements that are not there.
    shard = folder / shard_name(0, 2)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"layer\.weight@0 is damaged"):
        namespace["read_checkpoint"](folder)
    manifest["files"].pop(shard.name)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="elements are missing"):
        namespace["read_checkpoint"](folder)


def test_documented_fields_of_a_checkpoint(tmp_path: Path) -> None:
    fields = {field.name for field in dataclasses.fields(Manifest)}
    assert set(_table(_section("docs/checkpoints.md", "manifest.json"))) == fields
    assert f"Format version {FORMAT_VERSION}." in _text("docs/checkpoints.md")

    folder, _ = _write_checkpoint(tmp_path)
    raw = (folder / shard_name(0, 2)).read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    [entry] = json.loads(header["__metadata__"]["slices"])
    assert set(_table(_section("docs/checkpoints.md", "The shards"))) == set(entry)
    assert set(header["__metadata__"]) == {"format", "slices"}
    assert folder.name == "step-00000005"
    assert shard_name(0, 2) in _text("docs/checkpoints.md")


# -- the rest -----------------------------------------------------------------------------------


def test_the_changelog_has_this_version() -> None:
    version = re.search(r'^version = "(.+)"$', _text("pyproject.toml"), flags=re.MULTILINE)
    assert version is not None
    assert f"## {version[1]}" in _text("CHANGELOG.md").splitlines()
