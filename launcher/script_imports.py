"""What a user's script imports, by its text alone: nothing of it is run."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
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


def imports_of(text_path: Path) -> tuple[str, ...]:
    """The heavy libraries that a script imports anywhere at its top level."""
    found = {name for node in _statements(text_path) for name in _imported(node) or ()}
    return tuple(name for name in _PRELOADED if name in found)


def leading_imports(text_path: Path, folder: Path) -> tuple[str, ...]:
    """Of numpy and torch what a script imports before it could have set a variable for them.

    Before them stand only imports of the standard library, and nothing in the script's folder has the
    name of one of these modules: so what is imported is the same whether the script does it or another
    process did it before, in the same environment.
    """
    found: list[str] = []
    for number, node in enumerate(_statements(text_path)):
        if number == 0 and _is_text(node):
            continue
        names = _imported(node)
        if names is None:
            break
        for name in names:
            if name not in _QUIET and name not in sys.stdlib_module_names:
                return tuple(found)
            if (folder / name).exists() or (folder / f"{name}.py").exists():
                return tuple(found)
            if name in _QUIET and name not in found:
                found.append(name)
    return tuple(found)


def _statements(text_path: Path) -> Iterator[ast.stmt]:
    """Of the top level; none where the text cannot be read."""
    try:
        yield from ast.parse(text_path.read_bytes()).body
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return


def _imported(node: ast.stmt) -> list[str] | None:
    """The top-level packages of an import; None for any other statement."""
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module.partition(".")[0]] if node.module and not node.level else []
    return None


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
