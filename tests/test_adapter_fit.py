"""Adapters and bases that do not fit each other, and which way round matrices are."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.adapter import ADAPTER_CONFIG, base_options
from ftlaunch.strategies.checkpoint.adapter_weights import adapter_key
from ftlaunch.strategies.options import LoraOptions, ModelOptions
from ftlaunch.strategies.torch.lora import adapter_files, add_lora
from tests.lora_jobs import adapt, assert_same, inputs, logits, write_qwen


def _json(path):
    return json.loads(path.read_text())


def _edit(path, **changes):
    path.write_text(json.dumps(_json(path) | changes))


# -- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 30}, ("vocab_size is 30", "20 in the base's config.json")),
        ({"num_hidden_layers": 1}, ("num_hidden_layers is 1", "2 in the base's")),
        ({"num_attention_heads": 4, "head_dim": 4}, ("num_attention_heads is 4",)),
    ],
)
def test_a_base_of_other_sizes_is_refused(tmp_path, merge, changes, words):
    """The tensors that such an adapter touches have the base's shapes, the rest of the model has not."""
    own = write_qwen(tmp_path / "own", **changes)
    adapt(own, tmp_path / "adapter", target_modules=["gate_proj"])
    (tmp_path / "own" / "config.json").rename(tmp_path / "adapter" / "model_config.json")
    write_qwen(tmp_path / "base")
    code, text = merge("--adapter", tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    assert code == 2, text
    for word in ("does not fit the base", "Pass the base that it was", *words):
        assert word in text, text
    assert not (tmp_path / "merged").exists()


def test_sizes_that_one_side_does_not_say_are_not_compared(tmp_path, merge):
    own = write_qwen(tmp_path / "base")
    adapt(own, tmp_path / "adapter", target_modules=["gate_proj"])
    config = _json(tmp_path / "base" / "config.json")
    (tmp_path / "adapter" / "model_config.json").write_text(json.dumps(config))
    del config["max_position_embeddings"]
    (tmp_path / "base" / "config.json").write_text(
        json.dumps(config | {"num_key_value_heads": None})
    )
    code, text = merge("--adapter", tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    assert code == 0, text


# -- shapes and numbers ------------------------------------------------------------------------


def _edit_weights(folder, edit):
    weights = load_file(folder / "adapter_model.safetensors")
    edit(weights)
    save_file(weights, folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    model = write_qwen(folder / "base")
    whole = ["norm", "embed_tokens", "lm_head"]
    adapt(model, folder / "adapter", target_modules=["q_proj"], modules_to_save=whole)
    return folder


def _refused(made, tmp_path, merge, *words):
    code, text = merge("--adapter", tmp_path / "adapter", made / "base", tmp_path / "merged")
    assert code == 2, text
    for word in words:
        assert word in text, text
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("model.norm.weight", (9,), ("model.norm.weight has shape (9,), in the base (8,)",)),
        (
            "model.layers.0.self_attn.k_proj.weight",
            (5, 8),
            ("k_proj.weight has shape (5, 8), in the base (4, 8)",),
        ),
        ("lm_head.weight", (23, 8), ("lm_head.weight has 23 rows", "embed_tokens.weight 20")),
        (
            "model.embed_tokens.weight",
            (23, 8),
            ("embed_tokens.weight has 23 rows", "lm_head.weight 20"),
        ),
    ],
)
def test_what_is_replaced_keeps_its_shape(made, tmp_path, merge, name, shape, words):
    (tmp_path / "adapter").mkdir()
    for path in (made / "adapter").iterdir():
        (tmp_path / "adapter" / path.name).write_bytes(path.read_bytes())
    values = np.ones(shape, "<f4")
    _edit_weights(tmp_path / "adapter", lambda w: w.update({f"base_model.model.{name}": values}))
    _refused(made, tmp_path, merge, "does not fit the base", *words)


@pytest.mark.parametrize(
    ("entries", "missing"),
    [
        (["norm", "embed_tokens", "lm_head", "gate_proj"], "gate_proj"),
        (["model.norm", "embed_tokens", "heads", "lm_head"], "heads"),
        (["classifier", "score"], "classifier"),
    ],
)
def test_what_the_adapter_says_it_has_and_has_not(made, tmp_path, merge, entries, missing):
    (tmp_path / "adapter").mkdir()
    for path in (made / "adapter").iterdir():
        (tmp_path / "adapter" / path.name).write_bytes(path.read_bytes())
    _edit(tmp_path / "adapter" / ADAPTER_CONFIG, modules_to_save=entries)
    _refused(made, tmp_path, merge, f"modules_to_save names {missing!r}", "Copy the adapter anew")
    # As peft names what it keeps: by the end of a name, and its own two beside another head.
    saved = ["norm", "tokens", "head", "classifier", "score"]
    _edit(tmp_path / "adapter" / ADAPTER_CONFIG, modules_to_save=saved)
    assert merge("--adapter", tmp_path / "adapter", made / "base", tmp_path / "whole")[0] == 0
    _edit(tmp_path / "adapter" / ADAPTER_CONFIG, modules_to_save=[{}])
    _refused(made, tmp_path, merge, "modules_to_save is [{}]", "list of modules' names")


@pytest.mark.parametrize(
    "changes", [{"lora_alpha": 10**400}, {"alpha_pattern": {"q_proj": 10**400}}]
)
def test_a_number_without_end(made, tmp_path, merge, changes):
    (tmp_path / "adapter").mkdir()
    for path in (made / "adapter").iterdir():
        (tmp_path / "adapter" / path.name).write_bytes(path.read_bytes())
    _edit(tmp_path / "adapter" / ADAPTER_CONFIG, **changes)
    _refused(made, tmp_path, merge, "alpha", "is 1000", "it must be a number")


def test_an_adapter_of_a_base_in_the_home_of_nobody(tmp_path):
    home = "~nosuchuser/model"
    (tmp_path / ADAPTER_CONFIG).write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": home})
    )
    with pytest.raises(UserError, match=f"belongs to the model {home}, which is not here"):
        base_options(ModelOptions(name_or_path=str(tmp_path)))
    assert base_options(ModelOptions(name_or_path=home)).name_or_path == home


def test_the_home_of_nobody(made, tmp_path, merge):
    home = "~nosuchuser/model"
    words = ("merge", "--adapter", made / "adapter")
    for places in ((home, tmp_path / "t"), (made / "base", tmp_path / "t", "--model", home)):
        code, text = merge(*words[1:], *places)
        assert code == 2, text
        assert f"the path {home} cannot be used" in text


# -- GPT-2, whose matrices have a row for each input --------------------------------------------


def _gpt2(folder):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=20,
        n_embd=8,
        n_layer=2,
        n_head=2,
        n_positions=32,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=1,
        tie_word_embeddings=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_of_both_kinds_of_matrices(tmp_path, merge, dora):
    """c_proj is square: only the other matrices tell which way round it is."""
    model = _gpt2(tmp_path / "base")
    base = load_file(tmp_path / "base" / "model.safetensors")
    before = logits(model)
    options = LoraOptions(
        r=2, alpha=4, use_dora=dora, target_modules=("c_attn", "c_proj", "lm_head")
    )
    place = ModelOptions(name_or_path=str(tmp_path / "base"))
    add_lora(model, options, place, missing=(), seed=3)
    assert_same(logits(model), before)
    # The lengths of what makes one output each: columns of a Conv1D, rows of a Linear.
    parameters = dict(model.named_parameters())
    for module, axis in (("transformer.h.1.attn.c_proj", 0), ("lm_head", 1)):
        name = f"{module}.lora_magnitude_vector.default.weight"
        assert (name in parameters) == dora
        if dora:
            wanted = np.sqrt((base[f"{module}.weight"].astype("<f8") ** 2).sum(axis=axis))
            np.testing.assert_allclose(parameters[name].detach(), wanted, rtol=1e-6)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-2)
    for _ in range(8):
        loss = model.train()(inputs(), labels=inputs()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected = logits(model)
    assert float((expected - before).abs().max()) > 0.1
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name, content in adapter_files(model, {"config.json": b"{}"}).items():
        (adapter / name).write_bytes(content)
    tensors = {
        adapter_key(n): p.detach().numpy() for n, p in model.named_parameters() if p.requires_grad
    }
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "model_config.json").unlink()
    assert _json(adapter / ADAPTER_CONFIG)["fan_in_fan_out"] is True
    # Also as peft itself writes it: that of the module that came last.
    for number, said_to_be in enumerate((True, False)):
        _edit(adapter / ADAPTER_CONFIG, fan_in_fan_out=said_to_be)
        target = tmp_path / f"merged-{number}"
        code, text = merge("--adapter", adapter, tmp_path / "base", target)
        assert code == 0, text
        merged = transformers.AutoModelForCausalLM.from_pretrained(target)
        assert_same(logits(merged), expected)
