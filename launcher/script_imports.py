"""What a user's script imports, by its text and its folder alone: nothing of it is run."""

from __future__ import annotations

import ast
import importlib.machinery
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Slow to import, and known to bear a fork: what a script imports of these, its fork server does.
_PRELOADED = (
    "numpy",
    "torch",
    "transformers",
    "datasets",
    "tokenizers",
    "accelerate",
    "safetensors",
)
# Of these it is known that their import sets no variable that another's import reads.
_QUIET = ("numpy", "torch")
# The pool of numpy's matrix products: one thread where ranks are forked.
_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptImports:
    """The heavy libraries that a script imports.

    anywhere   at its top level
    leading    of numpy and torch, before it could have set anything for them, so that it is the same
               whether the script imports them or another process did it before
    """

    anywhere: tuple[str, ...] = ()
    leading: tuple[str, ...] = ()


def read_imports(text_path: Path, folder: Path, environ: Mapping[str, str]) -> ScriptImports:
    """folder: where the script looks for modules of its own, which is where its target is."""
    statements = _statements(text_path)
    found = {name for node in statements for name in _imported(node) or ()}
    leading = _leading(statements)
    if leading and not (_is_plain(environ) and _has_its_names_alone(folder)):
        leading = ()
    return ScriptImports(
        anywhere=tuple(name for name in _PRELOADED if name in found), leading=leading
    )


def _leading(statements: Sequence[ast.stmt]) -> tuple[str, ...]:
    """Before them stand only imports of the standard library."""
    found: list[str] = []
    for number, node in enumerate(statements):
        if number == 0 and _is_text(node):
            continue
        for name in _imported(node) or [""]:
            if name not in _QUIET and name not in sys.stdlib_module_names:
                return tuple(found)
            if name in _QUIET and name not in found:
                found.append(name)
    return tuple(found)


def _is_plain(environ: Mapping[str, str]) -> bool:
    """Nothing in the environment would have another effect on a rank that is forked."""
    if any(environ.get(name, "1") != "1" for name in _THREAD_VARIABLES):
        return False
    # Modules that hide those of the standard library could set anything, too.
    folders = [path for path in environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return all(_leaves_the_library_alone(_module_names(Path(path))) for path in folders)


def _leaves_the_library_alone(names: set[str] | None) -> bool:
    return names is not None and not names & sys.stdlib_module_names


def _has_its_names_alone(folder: Path) -> bool:
    """No module beside the script has the name of one elsewhere, for which a library may ask as well."""
    names = _module_names(folder)
    if names is None or not _leaves_the_library_alone(names):
        return False
    elsewhere = [path for path in sys.path if path and Path(path).resolve() != folder]
    return not any(importlib.machinery.PathFinder.find_spec(name, elsewhere) for name in names)


def _module_names(folder: Path) -> set[str] | None:
    """The modules and packages of a folder, by what stands before the first dot. None where they cannot be
    listed: of an archive, or of a folder that may be passed but not read.

    Folders without an __init__ are left out: a module of that name anywhere else goes before them.
    """
    endings = tuple(importlib.machinery.all_suffixes())
    packages = tuple(f"__init__{ending}" for ending in endings)
    found: set[str] = set()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                is_package = entry.is_dir() and any(
                    Path(entry.path, each).exists() for each in packages
                )
                if is_package or entry.name.endswith(endings):
                    found.add(entry.name.partition(".")[0])
    except FileNotFoundError:
        return set()
    except OSError:
        return None
    return found


def _statements(text_path: Path) -> list[ast.stmt]:
    """Of the top level; none where the text cannot be read."""
    try:
        with warnings.catch_warnings():
            # The script will say it when it is run.
            warnings.simplefilter("ignore")
            return ast.parse(text_path.read_bytes(), filename=str(text_path)).body
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def _imported(node: ast.stmt) -> list[str] | None:
    """The top-level packages of an import; None for any other statement."""
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return [node.module.partition(".")[0]]
    return None


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
