"""Training keeps no keys and values for a generation that does not come."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.cache_utils import Cache  # noqa: E402

from ftlaunch.cluster.world import World  # noqa: E402
from ftlaunch.strategies.torch.model import load_model, model_files  # noqa: E402
from tests import tiny  # noqa: E402

_ALONE = World(
    rank=0,
    size=1,
    local_rank=0,
    local_size=1,
    node_rank=0,
    num_nodes=1,
    master_address="127.0.0.1",
    master_port=1,
)


def _load(folder: Path, **config: Any) -> Any:
    (folder / "config.json").write_text(json.dumps({**tiny.CONFIGS["qwen2"], **config}))
    request = replace(
        tiny.request(_ALONE, None, folder), head="causal-lm", num_outputs=0, label_names=()
    )
    return load_model(request)


def test_a_decoder_makes_no_cache(tmp_path: Path) -> None:
    ids = torch.tensor([[5, 6, 7]])
    model = _load(tmp_path)
    assert model(input_ids=ids).past_key_values is None
    # It would by itself: otherwise this test says nothing.
    plain = AutoModelForCausalLM.from_config(type(model.config)(**tiny.CONFIGS["qwen2"]))
    assert isinstance(plain(input_ids=ids).past_key_values, Cache)


@pytest.mark.parametrize("said", [True, False])
def test_the_finished_model_says_what_it_said_before(tmp_path: Path, said: bool) -> None:
    written = json.loads(model_files(_load(tmp_path, use_cache=said))["config.json"])
    assert written.get("use_cache", True) is said
