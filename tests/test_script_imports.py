"""What is known of a script by its text, and when its ranks may share one import."""

from __future__ import annotations

import textwrap
import zipfile

import pytest

from ftlaunch.launcher.script_imports import ScriptImports, read_imports


def leading(folder, text, environ=None):
    path = folder / "script.py"
    path.write_text(textwrap.dedent(text))
    return read_imports(path, folder, environ or {}).leading


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import torch", ("torch",)),
        ('"""What it does."""\nfrom __future__ import annotations\nimport torch', ("torch",)),
        ("import os, sys\nimport numpy as np\nimport torch.nn as nn", ("numpy", "torch")),
        ("import argparse\nfrom torch.distributed import all_reduce", ("torch",)),
        # What could set a variable stands before it.
        ("import os\nos.environ['OMP_NUM_THREADS'] = '4'\nimport torch", ()),
        ("import settings\nimport torch", ()),
        ("import transformers, torch", ()),
        ("import deepspeed\nimport torch", ()),
        ("from . import settings\nimport torch", ()),
        ("from os import environ as e; e['A'] = 'b'\nimport torch", ()),
        ("with open('x'): pass\nimport torch", ()),
        ("import numpy\nimport os\nos.putenv('A', 'b')\nimport torch", ("numpy",)),
        ("try:\n    import torch\nexcept ImportError:\n    pass", ()),
        ("def main():\n    import torch", ()),
        ("VALUE = 1\nimport torch", ()),
        ("import os\n'a text that is no docstring'.join(os.environ)\nimport torch", ()),
        ("import (", ()),
        ("", ()),
    ],
)
def test_what_is_imported_before_anything_could_have_been_set(tmp_path, text, found):
    assert leading(tmp_path, text) == found


@pytest.mark.parametrize(
    "name",
    [
        "random.py",
        "torch.py",
        "torch/__init__.py",
        "torch.pyc",
        "torch.cpython-311-x86_64-linux-gnu.so",
        # torch imports them, too, or the process that forks does.
        "numbers.py",
        "shlex.py",
        "sympy/__init__.py",
    ],
)
def test_a_module_of_the_scripts_own_is_not_taken_for_another(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("import os\nos.environ['OMP_NUM_THREADS'] = '4'\n")
    assert leading(tmp_path, "import torch") == ()


@pytest.mark.parametrize("name", ["helper.py", "data/train.jsonl", "torch/notes.txt", "torch.md"])
def test_other_things_beside_the_script_do_not_matter(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    assert leading(tmp_path, "import torch") == ("torch",)


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}, ("torch",)),
        ({"OMP_NUM_THREADS": "2"}, ()),
        ({"OPENBLAS_NUM_THREADS": "2"}, ()),
    ],
)
def test_threads_that_were_asked_for(tmp_path, environ, found):
    assert leading(tmp_path, "import torch", environ) == found


def test_modules_that_hide_the_standard_library(tmp_path):
    (tmp_path / "path").mkdir()
    environ = {"PYTHONPATH": f"/nowhere:{tmp_path / 'path'}"}
    (tmp_path / "path" / "mine.py").touch()
    assert leading(tmp_path, "import torch", environ) == ("torch",)
    (tmp_path / "path" / "wave.py").touch()
    assert leading(tmp_path, "import wave\nimport torch", environ) == ()


def test_modules_that_cannot_be_listed(tmp_path):
    with zipfile.ZipFile(tmp_path / "modules.zip", "w") as archive:
        archive.writestr("wave.py", "")
    environ = {"PYTHONPATH": str(tmp_path / "modules.zip")}
    assert leading(tmp_path, "import wave\nimport torch", environ) == ()


def test_a_script_that_is_not_there_imports_nothing(tmp_path):
    assert read_imports(tmp_path / "none.py", tmp_path, {}) == ScriptImports()


def test_every_import_of_the_top_level_is_found(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(
        "import os\nos.environ['A'] = 'b'\nimport torch.nn, json\nfrom datasets import x\n"
    )
    assert read_imports(path, tmp_path, {}).anywhere == ("torch", "datasets")


@pytest.mark.filterwarnings("error")
def test_what_a_script_is_warned_of_is_said_when_it_runs(tmp_path):
    assert leading(tmp_path, 'import torch\nprint("\\d")') == ("torch",)
