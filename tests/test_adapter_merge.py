"""`ftlaunch merge --adapter` against peft's own merge, on adapters that peft itself has written."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from tests import tiny
from tests.jobs import assert_mistake, contents, ftlaunch, said
from tests.lora_jobs import peft, write_bert
from tests.merge_jobs import peak_kib

_SIZES = {key: tiny.CONFIGS["qwen2"][key] for key in tiny.CONFIGS["qwen2"] if key != "model_type"}


def _bert(folder):
    write_bert(folder, num_labels=3)
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder)


def _qwen(folder):
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_SIZES)).save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def _gpt2(folder):
    config = transformers.GPT2Config(
        vocab_size=tiny.VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


# What of peft's settings each of the three models is tried with.
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert": (_bert, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "bert-rslora": (
        _bert,
        {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS", "use_rslora": True},
    ),
    "bert-dora": (
        _bert,
        {"target_modules": "all-linear", "task_type": "SEQ_CLS", "use_dora": True},
    ),
    "qwen2": (_qwen, {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "qwen2-patterns": (
        _qwen,
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 32},
            "modules_to_save": ["norm"],
        },
    ),
    "qwen2-embedding": (_qwen, {"target_modules": ["q_proj", "embed_tokens"]}),
    "gpt2": (
        _gpt2,
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"},
    ),
    "gpt2-dora": (
        _gpt2,
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
    ),
}


def _make(folder, name):
    """A base and an adapter with numbers of its own in every part; (model, inputs)."""
    make, settings = CASES[name]
    torch.manual_seed(1)
    model = make(folder / "base")
    config = peft.LoraConfig(r=4, lora_alpha=8, **settings)
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                if "magnitude" in parameter_name:
                    parameter.mul_(torch.rand_like(parameter) + 0.5)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(folder / "adapter")
    inputs = torch.randint(3, tiny.VOCABULARY, (4, 17))
    return adapted, inputs


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_it_is_pefts_own_merge(tmp_path, merge, name):
    adapted, inputs = _make(tmp_path, name)
    with torch.no_grad():
        expected = adapted(inputs).logits
    code, text = merge("--adapter", tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    assert code == 0, text
    kind = transformers.AutoModelForCausalLM
    if name.startswith("bert"):
        kind = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        found = model(inputs).logits
        theirs = adapted.merge_and_unload()
    worst = float((found - expected).abs().max())
    wanted = dict(theirs.state_dict().items())
    weights = max(float((v - wanted[k]).abs().max()) for k, v in model.state_dict().items())
    print(f"{name}: logits {worst:.1e}, weights {weights:.1e}")
    assert worst < 1e-5
    assert weights < 1e-6
    # The adapter did something: what the base alone predicts is far off.
    base = kind.from_pretrained(tmp_path / "base").eval()
    with torch.no_grad():
        assert float((base(inputs).logits - expected).abs().max()) > 1e-2
    code, text = merge(
        "--verify", "--adapter", tmp_path / "adapter", tmp_path / "base", tmp_path / "merged"
    )
    assert code == 0, text
    code, text = merge(
        "--verify", "--adapter", tmp_path / "adapter", tmp_path / "base", tmp_path / "base"
    )
    assert code == 1, text


def test_the_dtype_is_the_bases_unless_another_is_asked_for(tmp_path, merge):
    _adapted, _inputs = _make(tmp_path, "qwen2")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "narrow")
    words = ("--adapter", tmp_path / "adapter", tmp_path / "narrow")
    assert merge(*words, tmp_path / "same")[0] == 0
    assert merge(*words, tmp_path / "wide", "--dtype", "fp32")[0] == 0
    config = json.loads((tmp_path / "same" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    same = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "same", dtype="auto")
    wide = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype="auto")
    assert {p.dtype for p in same.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    for name, parameter in wide.named_parameters():
        # Added in fp32 and rounded once.
        torch.testing.assert_close(
            parameter.to(torch.bfloat16), same.get_parameter(name), rtol=0, atol=0
        )


def test_a_base_without_the_prefix_of_its_head(tmp_path, merge):
    """As encoders are published: the adapter's model has "bert." in front of every name below the head."""
    adapted, inputs = _make(tmp_path, "bert")
    with torch.no_grad():
        expected = adapted(inputs).logits
    transformers.AutoModel.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "bare")
    names = load_file(tmp_path / "bare" / "model.safetensors")
    assert not any(name.startswith("bert.") for name in names)
    code, text = merge("--adapter", tmp_path / "adapter", tmp_path / "bare", tmp_path / "merged")
    assert code == 0, text
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert float((model.eval()(inputs).logits - expected).abs().max()) < 1e-5


def test_a_base_in_shards(tmp_path, merge):
    _adapted, _inputs = _make(tmp_path, "qwen2")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    for base in ("base", "shards"):
        words = ("--adapter", tmp_path / "adapter", tmp_path / base, tmp_path / f"from-{base}")
        assert merge(*words)[0] == 0
    whole, parts = (
        (tmp_path / f"from-{base}" / "model.safetensors").read_bytes()
        for base in ("base", "shards")
    )
    assert whole == parts


def test_it_imports_neither_torch_nor_peft_and_needs_little_memory(tmp_path):
    """A base of 256 MiB; the same command on one of 64 KiB shows what the interpreter needs."""
    peaks = []
    for name, width in (("small", 64), ("large", 4096)):
        rows = 16 if name == "small" else 4096
        weights = {
            f"model.layers.{i}.q_proj.weight": np.ones((rows, width), "<f4") for i in range(4)
        }
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
        adapter = {}
        for key in weights:
            module = f"base_model.model.{key.removesuffix('.weight')}"
            adapter[f"{module}.lora_A.weight"] = np.ones((4, width), "<f4")
            adapter[f"{module}.lora_B.weight"] = np.ones((rows, 4), "<f4")
        (tmp_path / f"{name}-adapter").mkdir()
        save_file(adapter, tmp_path / f"{name}-adapter" / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
        (tmp_path / f"{name}-adapter" / "adapter_config.json").write_text(json.dumps(settings))
        code = (
            "import sys\nfrom ftlaunch.launcher.cli import run\nassert run(sys.argv[1:]) == 0\n"
            "assert not {'torch', 'peft', 'transformers'} & set(sys.modules)"
        )
        target = tmp_path / f"{name}-merged"
        peaks.append(
            peak_kib(
                code, "merge", "--adapter", f"{tmp_path / name}-adapter", tmp_path / name, target
            )
        )
        # 1 + (8 / 4) · 4 ranks of 1·1
        merged = load_file(target / "model.safetensors")
        assert all((values == 9).all() for values in merged.values())
    print(f"{peaks[0]:,} and {peaks[1]:,} KiB")
    assert peaks[1] - peaks[0] < 48 * 1024


# -- what is refused ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    _make(folder, "bert")
    return folder


def _edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_weights(folder, edit):
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path)


QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"


def _drop(end):
    return lambda folder: _edit_weights(folder, lambda weights: weights.pop(f"{QUERY}{end}"))


def _put(end, shape):
    values = np.ones(shape, "<f4")
    return lambda folder: _edit_weights(
        folder, lambda weights: weights.update({f"{QUERY}{end}": values})
    )


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_drop(".lora_B.weight"), ("lora_A of bert.encoder.layer.0.attention.self.query and no",)),
        (_put(".lora_A.weight", (4, 31)), ("does not fit the base", "(32, 32)", "(32, 31)")),
        (_put(".lora_A.weight", (5, 32)), ("(5, 32)", "cannot be multiplied")),
        (_put(".lora_A.weight", (0,)), ("is empty", "ZeRO-3")),
        (_put(".lora_B.bias", (32,)), ("lora_B.bias", "not understood")),
        (_put(".lora_magnitude_vector", (32,)), ("use_dora=False",)),
        (lambda f: _edit_config(f, r=8), ("has rank 4", "says 8")),
        (lambda f: _edit_config(f, r=0), ("r is 0", "above 0")),
        (lambda f: _edit_config(f, lora_alpha="x"), ("lora_alpha is 'x'",)),
        (lambda f: _edit_config(f, peft_type="IA3"), ("peft_type is 'IA3'",)),
        (lambda f: _edit_config(f, init_lora_weights="pissa"), ("changes the base",)),
        (lambda f: _edit_config(f, target_parameters=["x"]), ("target_parameters",)),
        (lambda f: _edit_config(f, rank_pattern={".*(a+)+": 4}), ("no patterns",)),
        (lambda f: (f / "adapter_config.json").write_text("{"), ("cannot be read",)),
        (lambda f: (f / "adapter_model.safetensors").unlink(), ("has no adapter_model",)),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\0" * 50), ("damaged",)),
        (lambda f: (f / "adapter_config.json").unlink(), ("has no adapter_config.json",)),
        (shutil.rmtree, ("does not exist",)),
    ],
)
def test_an_adapter_that_makes_no_sense(made, tmp_path, merge, damage, words):
    shutil.copytree(made / "adapter", tmp_path / "adapter")
    damage(tmp_path / "adapter")
    code, text = merge("--adapter", tmp_path / "adapter", made / "base", tmp_path / "merged")
    assert code == 2, text
    for word in words:
        assert word in text, text
    assert not (tmp_path / "merged").exists()


def test_a_base_that_it_was_not_trained_on(made, tmp_path, merge):
    write_bert(tmp_path / "wide", hidden_size=64)
    write_bert(tmp_path / "flat", num_hidden_layers=1)
    _qwen(tmp_path / "qwen")
    for base, words in (
        ("wide", ("bert.encoder.layer.0.attention", "has shape (64, 64)", "(32, 32)")),
        ("flat", ("bert.encoder.layer.1.attention", "does not have")),
        ("qwen", ("does not have",)),
    ):
        code, text = merge("--adapter", made / "adapter", tmp_path / base, tmp_path / "merged")
        assert code == 2, text
        assert "does not fit the base" in text
        assert str(tmp_path / base) in text
        for word in words:
            assert word in text, text
        assert not (tmp_path / "merged").exists()


def test_a_target_or_a_base_that_will_not_do(made, tmp_path, merge):
    (tmp_path / "there").mkdir()
    before = contents(tmp_path)
    words = ("--adapter", made / "adapter")
    for rest, word in (
        ((made / "base", tmp_path / "there"), "exists. A merge replaces nothing"),
        ((made / "adapter", tmp_path / "merged"), "is an adapter itself"),
        ((tmp_path / "there", tmp_path / "merged"), "has no model.safetensors"),
        ((tmp_path / "nowhere", tmp_path / "merged"), "is no folder"),
    ):
        code, text = merge(*words, *rest)
        assert code == 2, text
        assert word in text
    assert contents(tmp_path) == before


def test_an_adapter_is_no_model_to_train(made, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a", "label": "b"}\n')
    result = ftlaunch("--model", made / "adapter", "--dataset", data, "--dry-run")
    assert_mistake(result, "holds an adapter", f"merge --adapter {made / 'adapter'} BASE TARGET")
    assert "Traceback" not in said(result)
