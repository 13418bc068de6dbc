"""The rules of docs/architecture.md that no other test would notice: imports, start-up, packages."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each folder may import itself and what stands to the right of it.
FOLDERS = ("launcher", "strategies", "cluster")
SOURCES = sorted(
    path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")
)
# Programs that are installed with them and run beside them: no part imports another.
PEERS = Path("benchmarks/peers")
PACKAGES = {**{folder: Path(folder) for folder in FOLDERS}, "peers": PEERS}
# The one file that names them, to start them.
STARTS_PEERS = Path("launcher/bench_peers.py")
# The one folder of each framework; None where no file may import it yet.
FRAMEWORKS = {
    "torch": "strategies/torch",
    "torchvision": None,
    "mindspore": "strategies/mindspore",
    "mindone": "strategies/mindspore",
    "deepspeed": "strategies/torch",
}

TREES = {source: ast.parse((ROOT / source).read_text(encoding="utf-8")) for source in SOURCES}


def _imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported at any level, with `from a import b` as a and as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _names_of_modules(tree: ast.AST) -> Iterator[str]:
    """Strings such as those of a registry: "ftlaunch.strategies.torch.ddp:create"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r"^ftlaunch\.\w+(?:\.\w+)*", node.value)


# -- imports ------------------------------------------------------------------------------------


def test_there_is_something_to_look_at() -> None:
    assert {source.parts[0] for source in SOURCES} == set(FOLDERS)
    assert len(SOURCES) > 50


def test_imports_go_one_way() -> None:
    wrong = []
    for source, tree in TREES.items():
        allowed = FOLDERS[FOLDERS.index(source.parts[0]) :]
        names = [name for name in _names_of_modules(tree) if not _is_peers_start(source, name)]
        for name in (*_imports(tree), *names):
            first, *rest = name.split(".")
            # A bare `strategies` is the working folder's, or somebody else's distribution.
            if first in FOLDERS or (first == "ftlaunch" and rest and rest[0] not in allowed):
                wrong.append(f"{source} imports {name}")
    assert wrong == []


def _is_peers_start(source: Path, name: str) -> bool:
    return source == STARTS_PEERS and name == "ftlaunch.peers"


def test_the_peers_know_nothing_of_ours() -> None:
    """What is measured beside us must not be made of us."""
    wrong = [
        f"{path.name} imports {name}"
        for path in (ROOT / PEERS).glob("*.py")
        for name in _imports(ast.parse(path.read_text(encoding="utf-8")))
        if name.split(".")[0] in (*FOLDERS, "ftlaunch", "benchmarks")
        and name.split(".")[:2] not in (["ftlaunch", "peers"], ["ftlaunch"])
    ]
    assert wrong == []


def test_a_framework_is_imported_in_its_own_folder_only() -> None:
    wrong = []
    for source, tree in TREES.items():
        for name in _imports(tree):
            home = FRAMEWORKS.get(name.split(".")[0], ".")
            if home is None or Path(home) not in source.parents:
                wrong.append(f"{source} imports {name}")
    assert wrong == []


def test_no_relative_imports() -> None:
    wrong = [
        f"{source}:{node.lineno}"
        for source, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert wrong == []


def test_a_module_says_what_it_knows() -> None:
    wrong = [str(s) for s, tree in TREES.items() if tree.body and not ast.get_docstring(tree)]
    assert wrong == []


# -- start-up -----------------------------------------------------------------------------------


def _modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `code`."""
    code = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        (
            "import ftlaunch.launcher.cli",
            {"pydantic", "yaml", "rich", "numpy", "torch", "transformers", "datasets"},
        ),
        (
            "import ftlaunch.cluster.agent",
            {"pydantic", "numpy", "torch", "transformers", "datasets"},
        ),
        (
            "import ftlaunch.cluster.coordinator",
            {"pydantic", "numpy", "torch", "transformers", "datasets"},
        ),
    ],
    ids=["cli", "agent", "coordinator"],
)
def test_no_heavy_import_at_start_up(code: str, absent: set[str]) -> None:
    assert absent.isdisjoint(_modules_after(code))


# -- packages -----------------------------------------------------------------------------------


def test_every_package_is_in_the_wheel() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML, 3.10 does not")
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        ".".join(("ftlaunch", name, *path.relative_to(ROOT / folder).parent.parts))
        for name, folder in PACKAGES.items()
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert set(setuptools["packages"]) == found
    assert setuptools["package-dir"] == {
        f"ftlaunch.{name}": folder.as_posix() for name, folder in PACKAGES.items()
    }


def test_every_module_is_in_a_package() -> None:
    for source in SOURCES:
        assert (ROOT / source).with_name("__init__.py").is_file(), source


def test_type_checkers_find_the_folders() -> None:
    typings = ROOT / "typings" / "ftlaunch"
    assert {path.name for path in typings.iterdir()} == set(PACKAGES)
    for name, folder in PACKAGES.items():
        assert (typings / name).is_symlink()
        assert (typings / name).resolve() == (ROOT / folder).resolve()
        assert (ROOT / folder / "py.typed").is_file()


def test_nothing_hides_the_installed_package() -> None:
    assert not (ROOT / "ftlaunch").exists()
