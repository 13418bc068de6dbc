"""What every test gets: no network, caches of its own, and fixtures for tiny models and data."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from tests.fault_table import FaultTable

# Before any library reads them: nothing is looked up on a hub, nothing lands in the user's caches.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# torch and MindSpore do not fit into one environment; the tests run in both, each what it can.
HAS_TORCH = importlib.util.find_spec("torch") is not None
HAS_MINDSPORE = importlib.util.find_spec("mindspore") is not None
_FOLDER = Path(__file__).parent
# Tests of shared code that need no torch.
_IN_BOTH = (
    "test_addresses.py",
    "test_ascend.py",
    "test_batches.py",
    "test_console.py",
    "test_events.py",
    "test_examples.py",
    "test_hccl.py",
    "test_hosts.py",
    "test_metrics.py",
    "test_mindspore_bad_input.py",
    "test_model_folder.py",
    "test_npus.py",
    "test_rank_table.py",
    "test_recorder.py",
    "test_report.py",
    "test_safetensors_file.py",
    "test_sample_order.py",
    "test_text_classification.py",
)


def pytest_ignore_collect(collection_path, config):
    """Leave out what the other environment runs."""
    if collection_path.suffix != ".py" or not collection_path.name.startswith("test_"):
        return None
    if collection_path.parent == _FOLDER / "mindspore":
        return None if HAS_MINDSPORE else True
    if collection_path.parent == _FOLDER and not HAS_TORCH:
        return None if collection_path.name in _IN_BOTH else True
    return None


FAULTS = pytest.StashKey[FaultTable]()


@pytest.fixture(scope="session")
def fault_table(pytestconfig):
    """What faults cost, to be printed at the end."""
    return pytestconfig.stash.setdefault(FAULTS, FaultTable())


def pytest_terminal_summary(terminalreporter, config):
    table = config.stash.get(FAULTS, None)
    if table is not None and table.cells:
        terminalreporter.section("seconds from a fault until nothing of the job was left")
        for line in table.lines():
            terminalreporter.write_line(line)


def pytest_report_header(config):
    frameworks = [n for n, has in (("torch", HAS_TORCH), ("MindSpore", HAS_MINDSPORE)) if has]
    return f"frameworks: {', '.join(frameworks) or 'none'}"


@pytest.fixture(autouse=True, scope="session")
def _own_caches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    before = dict(os.environ)
    os.environ["HF_HOME"] = str(folder / "hf")
    os.environ["HF_DATASETS_CACHE"] = str(folder / "hf" / "datasets")
    os.environ["FTLAUNCH_CACHE"] = str(folder / "ftlaunch")
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def slurm(_own_caches):
    """A SLURM of four nodes, started for the first test that asks. A test leaves it idle."""
    from tests import beds

    with beds.slurm_cluster() as bed:
        yield bed


@pytest.fixture(scope="session")
def ssh_hosts(_own_caches):
    """Four hosts that ssh reaches from a fifth, started for the first test that asks."""
    from tests import beds

    with beds.ssh_cluster() as bed:
        yield bed


@pytest.fixture
def srun():
    """Of a SLURM, which submitit looks for. Asked when a test runs: earlier ones may have installed it."""
    import shutil

    from tests import beds, slurm_bed

    if shutil.which("srun") is None:
        beds.require(slurm_bed.PROGRAMS)


@pytest.fixture
def merge(capsys):
    """`ftlaunch merge` in this process: (exit code, all that it says)."""
    from ftlaunch.launcher.cli import run

    def merge(*words):
        code = run(["merge", *map(str, words)])
        output = capsys.readouterr()
        return code, output.out + output.err

    return merge
