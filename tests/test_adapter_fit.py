"""What an adapter does to its base's config.json and tokenizer, and bases that it does not fit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from ftlaunch.cluster.errors import UserError
from ftlaunch.launcher.cli import run
from ftlaunch.strategies.adapter import ADAPTER_CONFIG, base_options
from ftlaunch.strategies.checkpoint.adapter_weights import adapter_key
from ftlaunch.strategies.options import LoraOptions, ModelOptions
from ftlaunch.strategies.torch.adapted import put_adapter_in
from ftlaunch.strategies.torch.lora import adapter_files, add_lora
from tests.lora_jobs import peft, write_bert

SMALL = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture
def merge(capsys):
    def merge(*words):
        code = run(["merge", *map(str, words)])
        output = capsys.readouterr()
        return code, output.out + output.err

    return merge


def _qwen(folder, **changes):
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**{**SMALL, **changes})
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def _adapt(model, folder, **settings):
    """peft's adapter of the model with numbers of its own in every part."""
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, **settings)).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    adapted.save_pretrained(folder)
    return adapted


def _inputs():
    return torch.from_numpy(np.random.default_rng(0).integers(3, 20, (3, 11)))


def _logits(model):
    with torch.no_grad():
        return model.eval()(_inputs()).logits


def _assert_same(found, expected):
    """To 1e-5 of the largest: the weights are large, so that a wrong one shows."""
    assert float((found - expected).abs().max()) < 1e-5 * max(1.0, float(expected.abs().max()))


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
    own = _qwen(tmp_path / "own", **changes)
    _adapt(own, tmp_path / "adapter", target_modules=["gate_proj"])
    (tmp_path / "own" / "config.json").rename(tmp_path / "adapter" / "model_config.json")
    _qwen(tmp_path / "base")
    code, text = merge("--adapter", tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    assert code == 2, text
    for word in ("does not fit the base", "Pass the base that it was", *words):
        assert word in text, text
    assert not (tmp_path / "merged").exists()


def test_sizes_that_one_side_does_not_say_are_not_compared(tmp_path, merge):
    own = _qwen(tmp_path / "base")
    _adapt(own, tmp_path / "adapter", target_modules=["gate_proj"])
    config = _json(tmp_path / "base" / "config.json")
    (tmp_path / "adapter" / "model_config.json").write_text(json.dumps(config))
    del config["max_position_embeddings"]
    (tmp_path / "base" / "config.json").write_text(
        json.dumps(config | {"num_key_value_heads": None})
    )
    code, text = merge("--adapter", tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    assert code == 0, text


# -- the embedding and the output that are one ------------------------------------------------


TIED = {
    "lora": {"target_modules": ["q_proj", "embed_tokens"]},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", TIED)
def test_a_tied_embedding_is_not_changed_alone(tmp_path, merge, name):
    """peft leaves the output what it was; one matrix for both would be another model."""
    model = _qwen(tmp_path / "base", tie_word_embeddings=True)
    _adapt(model, tmp_path / "adapter", **TIED[name])
    words = ("tie_word_embeddings", "model.embed_tokens.weight", "merge_and_unload")
    code, text = merge("--adapter", tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    assert code == 2, text
    for word in words:
        assert word in text, text
    assert not (tmp_path / "merged").exists()
    # An evaluation says the same.
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(UserError) as caught:
        put_adapter_in(model, tmp_path / "adapter", ())
    for word in words:
        assert word in str(caught.value), caught.value


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("family", "whole"),
    [
        ("qwen2", ["embed_tokens", "lm_head"]),
        ("qwen2", ["lm_head"]),
        ("bert", ["word_embeddings", "cls.predictions.decoder"]),
    ],
)
def test_two_of_what_was_one_are_two(tmp_path, merge, family, whole):
    if family == "bert":
        kind, target = transformers.AutoModelForMaskedLM, "query"
        config = transformers.BertConfig(**{**SMALL, "num_key_value_heads": 2})
        transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "base")
    else:
        kind, target = transformers.AutoModelForCausalLM, "q_proj"
        _qwen(tmp_path / "base", tie_word_embeddings=True)
    model = kind.from_pretrained(tmp_path / "base")
    adapted = _adapt(model, tmp_path / "adapter", target_modules=[target], modules_to_save=whole)
    expected = _logits(adapted)
    code, text = merge("--adapter", tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    assert code == 0, text
    merged = kind.from_pretrained(tmp_path / "merged")
    assert _json(tmp_path / "merged" / "config.json")["tie_word_embeddings"] is False
    _assert_same(_logits(merged), expected)
    model = kind.from_pretrained(tmp_path / "base")
    put_adapter_in(model, tmp_path / "adapter", ())
    _assert_same(_logits(model), expected)
    assert model.config.tie_word_embeddings is False


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_output_that_the_bases_file_has_stays_what_it_is(tmp_path, merge):
    """As older files of tied models do: the adapter's change is the input's alone."""
    model = _qwen(tmp_path / "base", tie_word_embeddings=True)
    path = tmp_path / "base" / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    save_file(weights, path, metadata={"format": "pt"})
    expected = _logits(_adapt(model, tmp_path / "adapter", **TIED["lora"]))
    code, text = merge("--adapter", tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    assert code == 0, text
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    _assert_same(_logits(merged), expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_embedding_of_a_classification_is_tied_to_nothing(tmp_path, merge):
    """Also where the base is a tied language model, whose output the classification leaves out."""
    _qwen(tmp_path / "qwen", tie_word_embeddings=True, pad_token_id=0)
    write_bert(tmp_path / "bert", vocab_size=20)
    for name, module in (("qwen", "embed_tokens"), ("bert", "word_embeddings")):
        kind = transformers.AutoModelForSequenceClassification
        model = kind.from_pretrained(tmp_path / name, num_labels=2)
        adapter = tmp_path / f"{name}-adapter"
        adapted = _adapt(model, adapter, target_modules=[module], task_type="SEQ_CLS")
        expected = _logits(adapted)
        code, text = merge("--adapter", adapter, tmp_path / name, tmp_path / f"{name}-merged")
        assert code == 0, text
        merged = kind.from_pretrained(tmp_path / f"{name}-merged")
        _assert_same(_logits(merged), expected)
        model = kind.from_pretrained(tmp_path / name, num_labels=2)
        put_adapter_in(model, adapter, ("score.weight",) if name == "qwen" else ())
        _assert_same(_logits(model), expected)


# -- words and shapes ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tied", [False, True])
def test_added_words_are_in_the_configuration(tmp_path, merge, tied):
    _qwen(tmp_path / "base", tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(23)
    expected = _logits(_adapt(model, tmp_path / "adapter", target_modules=["q_proj"]))
    assert expected.shape[-1] == 23
    code, text = merge("--adapter", tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    assert code == 0, text
    assert _json(tmp_path / "merged" / "config.json")["vocab_size"] == 23
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    _assert_same(_logits(merged), expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_added_words_in_a_configuration_of_parts(tmp_path, merge):
    _qwen(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(23)
    _adapt(model, tmp_path / "adapter", target_modules=["q_proj"])
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({"model_type": "x", "text_config": _json(path)}))
    code, text = merge("--adapter", tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    assert code == 0, text
    config = _json(tmp_path / "merged" / "config.json")
    assert config["text_config"]["vocab_size"] == 23
    assert "vocab_size" not in config


def _edit_weights(folder, edit):
    weights = load_file(folder / "adapter_model.safetensors")
    edit(weights)
    save_file(weights, folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    model = _qwen(folder / "base")
    whole = ["norm", "embed_tokens", "lm_head"]
    _adapt(model, folder / "adapter", target_modules=["q_proj"], modules_to_save=whole)
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
        (["model.norm", "embed_tokens", "head", "lm_head"], "head"),
        (["norm", "classifier", "score"], "classifier"),
    ],
)
def test_what_the_adapter_says_it_has_and_has_not(made, tmp_path, merge, entries, missing):
    (tmp_path / "adapter").mkdir()
    for path in (made / "adapter").iterdir():
        (tmp_path / "adapter" / path.name).write_bytes(path.read_bytes())
    _edit(tmp_path / "adapter" / ADAPTER_CONFIG, modules_to_save=entries)
    _refused(made, tmp_path, merge, f"modules_to_save names {missing!r}", "Copy the adapter anew")
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


# -- files beside the weights -------------------------------------------------------------------


def test_a_tokenizer_comes_whole_from_one_place(made, tmp_path, merge):
    for name in ("adapter", "base"):
        (tmp_path / name).mkdir()
        for path in (made / name).iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "generation_config.json"):
        (tmp_path / "base" / name).write_text("base")
    (tmp_path / "adapter" / "chat_template.jinja").write_text("adapter")
    words = ("--adapter", tmp_path / "adapter", tmp_path / "base")
    # A template alone is no tokenizer.
    assert merge(*words, tmp_path / "one")[0] == 0
    assert {p.name for p in (tmp_path / "one").iterdir()} >= {"vocab.json", "chat_template.jinja"}
    (tmp_path / "adapter" / "tokenizer.json").write_text("adapter")
    assert merge(*words, tmp_path / "two")[0] == 0
    found = {p.name: p.read_bytes() for p in (tmp_path / "two").iterdir()}
    assert found.keys() == {
        *("config.json", "model.safetensors", "generation_config.json"),
        *("chat_template.jinja", "tokenizer.json"),
    }
    assert found["tokenizer.json"] == b"adapter"


def test_labels_are_those_of_the_head_also_when_the_base_has_none(tmp_path, merge):
    write_bert(tmp_path / "base")
    kind = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(tmp_path / "base")
    _adapt(model, tmp_path / "adapter", target_modules=["query"], task_type="SEQ_CLS")
    config = _json(tmp_path / "base" / "config.json")
    config.pop("id2label", None)
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    code, text = merge("--adapter", tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    assert code == 0, text
    found = _json(tmp_path / "merged" / "config.json")
    assert found["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}


# -- the base on the hub ------------------------------------------------------------------------


def _snapshots(cache, name, **commits):
    """A repository as the hub's library keeps it; name of a reference → the folder of its commit."""
    repo = cache / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    folders = {}
    for number, reference in enumerate(commits["names"]):
        commit = f"{number + 1:040d}"
        (repo / "refs" / reference).write_text(commit)
        folders[reference] = repo / "snapshots" / commit
    return folders


def test_the_base_is_of_the_revision_that_the_adapter_names(tmp_path, merge, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folders = _snapshots(tmp_path / "hub", "somebody/tiny", names=("main", "v2"))
    for factor, folder in enumerate(folders.values()):
        model = _qwen(folder, initializer_range=0.1 + factor)
    expected = _logits(_adapt(model, tmp_path / "adapter", target_modules=["q_proj"]))
    _edit(
        tmp_path / "adapter" / ADAPTER_CONFIG,
        base_model_name_or_path="somebody/tiny",
        revision="v2",
    )
    code, text = merge("--adapter", tmp_path / "adapter", "somebody/tiny", tmp_path / "merged")
    assert code == 0, text
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    _assert_same(_logits(merged), expected)
    # Another name is another model, of which that revision means nothing.
    (tmp_path / "hub" / "models--somebody--tiny").rename(tmp_path / "hub" / "models--other--tiny")
    code, text = merge("--adapter", tmp_path / "adapter", "other/tiny", tmp_path / "other")
    assert code == 0, text
    found = load_file(tmp_path / "other" / "model.safetensors")["model.norm.weight"]
    wanted = load_file(
        tmp_path / "hub" / "models--other--tiny" / "snapshots" / f"{1:040d}" / "model.safetensors"
    )
    np.testing.assert_array_equal(found, wanted["model.norm.weight"])


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
    before = _logits(model)
    options = LoraOptions(
        r=2, alpha=4, use_dora=dora, target_modules=("c_attn", "c_proj", "lm_head")
    )
    place = ModelOptions(name_or_path=str(tmp_path / "base"))
    add_lora(model, options, place, missing=(), seed=3)
    _assert_same(_logits(model), before)
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
        loss = model.train()(_inputs(), labels=_inputs()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected = _logits(model)
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
        _assert_same(_logits(merged), expected)
