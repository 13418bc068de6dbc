"""What every test gets: no network, caches of its own, and fixtures for tiny models and data."""

from __future__ import annotations

import os

import pytest

# Before any library reads them: nothing is looked up on a hub, nothing lands in the user's caches.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


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
