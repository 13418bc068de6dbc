"""What a merged adapter leaves in config.json and beside it; matrices that are tied; the base on the hub."""

from __future__ import annotations

import json

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.adapter import ADAPTER_CONFIG
from ftlaunch.strategies.torch.adapted import put_adapter_in
from tests.lora_jobs import SMALL, adapt, assert_same, logits, write_bert, write_qwen


def _json(path):
    return json.loads(path.read_text())


def _edit(path, **changes):
    path.write_text(json.dumps(_json(path) | changes))


# -- the embedding and the output that are one ------------------------------------------------


TIED = {
    "lora": {"target_modules": ["q_proj", "embed_tokens"]},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", TIED)
def test_a_tied_embedding_is_not_changed_alone(tmp_path, merge, name):
    """peft leaves the output what it was; one matrix for both would be another model."""
    model = write_qwen(tmp_path / "base", tie_word_embeddings=True)
    adapt(model, tmp_path / "adapter", **TIED[name])
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
        write_qwen(tmp_path / "base", tie_word_embeddings=True)
    model = kind.from_pretrained(tmp_path / "base")
    adapted = adapt(model, tmp_path / "adapter", target_modules=[target], modules_to_save=whole)
    expected = logits(adapted)
    code, text = merge("--adapter", tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    assert code == 0, text
    merged = kind.from_pretrained(tmp_path / "merged")
    assert _json(tmp_path / "merged" / "config.json")["tie_word_embeddings"] is False
    assert_same(logits(merged), expected)
    model = kind.from_pretrained(tmp_path / "base")
    put_adapter_in(model, tmp_path / "adapter", ())
    assert_same(logits(model), expected)
    assert model.config.tie_word_embeddings is False


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_output_that_the_bases_file_has_stays_what_it_is(tmp_path, merge):
    """As older files of tied models do: the adapter's change is the input's alone."""
    model = write_qwen(tmp_path / "base", tie_word_embeddings=True)
    path = tmp_path / "base" / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    save_file(weights, path, metadata={"format": "pt"})
    expected = logits(adapt(model, tmp_path / "adapter", **TIED["lora"]))
    code, text = merge("--adapter", tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    assert code == 0, text
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_same(logits(merged), expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_embedding_of_a_classification_is_tied_to_nothing(tmp_path, merge):
    """Also where the base is a tied language model, whose output the classification leaves out."""
    write_qwen(tmp_path / "qwen", tie_word_embeddings=True, pad_token_id=0)
    write_bert(tmp_path / "bert", vocab_size=20)
    for name, module in (("qwen", "embed_tokens"), ("bert", "word_embeddings")):
        kind = transformers.AutoModelForSequenceClassification
        model = kind.from_pretrained(tmp_path / name, num_labels=2)
        adapter = tmp_path / f"{name}-adapter"
        adapted = adapt(model, adapter, target_modules=[module], task_type="SEQ_CLS")
        expected = logits(adapted)
        code, text = merge("--adapter", adapter, tmp_path / name, tmp_path / f"{name}-merged")
        assert code == 0, text
        merged = kind.from_pretrained(tmp_path / f"{name}-merged")
        assert_same(logits(merged), expected)
        model = kind.from_pretrained(tmp_path / name, num_labels=2)
        put_adapter_in(model, adapter, ("score.weight",) if name == "qwen" else ())
        assert_same(logits(model), expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_output_of_its_own_has_the_words_of_the_embedding(tmp_path, merge):
    model = write_qwen(tmp_path / "base", tie_word_embeddings=True)
    adapt(model, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    weights["base_model.model.lm_head.weight"] = np.ones((23, 8), "<f4")
    save_file(weights, path)
    code, text = merge("--adapter", tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    assert code == 2, text
    assert "lm_head.weight has 23 rows, model.embed_tokens.weight 20" in text
    assert not (tmp_path / "merged").exists()


# -- words and shapes ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tied", [False, True])
def test_added_words_are_in_the_configuration(tmp_path, merge, tied):
    write_qwen(tmp_path / "base", tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(23)
    expected = logits(adapt(model, tmp_path / "adapter", target_modules=["q_proj"]))
    assert expected.shape[-1] == 23
    code, text = merge("--adapter", tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    assert code == 0, text
    assert _json(tmp_path / "merged" / "config.json")["vocab_size"] == 23
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_same(logits(merged), expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_classification_with_added_words_leaves_the_output_of_its_base_out(tmp_path, merge):
    write_qwen(tmp_path / "base", tie_word_embeddings=False)
    kind = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(tmp_path / "base", num_labels=3)
    model.resize_token_embeddings(23)
    model.config.pad_token_id = 22
    ended = adapt(model, tmp_path / "adapter", target_modules=["q_proj"], task_type="SEQ_CLS")
    expected = logits(ended)
    code, text = merge("--adapter", tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    assert code == 0, text
    merged = kind.from_pretrained(tmp_path / "merged", num_labels=3, pad_token_id=22)
    assert merged.get_input_embeddings().weight.shape[0] == 23
    assert_same(logits(merged), expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_added_words_in_a_configuration_of_parts(tmp_path, merge):
    write_qwen(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(23)
    adapt(model, tmp_path / "adapter", target_modules=["q_proj"])
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({"model_type": "x", "text_config": _json(path)}))
    code, text = merge("--adapter", tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    assert code == 0, text
    config = _json(tmp_path / "merged" / "config.json")
    assert config["text_config"]["vocab_size"] == 23
    assert "vocab_size" not in config


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    model = write_qwen(folder / "base")
    whole = ["norm", "embed_tokens", "lm_head"]
    adapt(model, folder / "adapter", target_modules=["q_proj"], modules_to_save=whole)
    return folder


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
    adapt(model, tmp_path / "adapter", target_modules=["query"], task_type="SEQ_CLS")
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
        model = write_qwen(folder, initializer_range=0.1 + factor)
    expected = logits(adapt(model, tmp_path / "adapter", target_modules=["q_proj"]))
    _edit(
        tmp_path / "adapter" / ADAPTER_CONFIG,
        base_model_name_or_path="somebody/tiny",
        revision="v2",
    )
    code, text = merge("--adapter", tmp_path / "adapter", "somebody/tiny", tmp_path / "merged")
    assert code == 0, text
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_same(logits(merged), expected)
    # Another name is another model, of which that revision means nothing.
    (tmp_path / "hub" / "models--somebody--tiny").rename(tmp_path / "hub" / "models--other--tiny")
    code, text = merge("--adapter", tmp_path / "adapter", "other/tiny", tmp_path / "other")
    assert code == 0, text
    found = load_file(tmp_path / "other" / "model.safetensors")["model.norm.weight"]
    wanted = load_file(
        tmp_path / "hub" / "models--other--tiny" / "snapshots" / f"{1:040d}" / "model.safetensors"
    )
    np.testing.assert_array_equal(found, wanted["model.norm.weight"])
