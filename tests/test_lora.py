"""Adapters under every strategy: the same losses, small checkpoints, peft's own layout at the end.

The reference is written out here: the plain full batch, with W + scale·B·A in place of each weight.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ftlaunch.strategies import registry
from ftlaunch.strategies.checkpoint.manifest import folder_name, read_manifest
from ftlaunch.strategies.checkpoint.resuming import load_newest
from ftlaunch.strategies.checkpoint.saver import Saver
from ftlaunch.strategies.checkpoint.store import CheckpointReader
from ftlaunch.strategies.data.sample_order import samples_digest
from ftlaunch.strategies.loop import Cursor, train
from ftlaunch.strategies.model_folder import write_model_folder
from ftlaunch.strategies.options import LoraOptions
from tests import lora_jobs, tiny
from tests.jobs import ftlaunch, said
from tests.ranks import run_ranks
from tests.test_parity import GLOBAL_BATCH, SAMPLES, STEPS, _schedule

STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
TARGETS = ("query", "value", "output.dense")
PLAIN = LoraOptions(r=4, alpha=8, target_modules=TARGETS)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return lora_jobs.write_bert(tmp_path_factory.mktemp("base"))


def _request(world, listen_fd, folder, lora, **more):
    return tiny.request(
        world,
        listen_fd,
        folder,
        weight_decay=0.1,
        learning_rate=1e-2,
        model={"random_weights": False, **more.pop("model", {})},
        lora=lora,
        **more,
    )


def _run(world, strategy, cursor, until, micro_batch=2):
    seen = []

    def after_step(report):
        outcome = report.outcome
        seen.append((samples_digest(report.indices), outcome.loss, outcome.grad_norm))
        return False

    train(
        strategy,
        tiny.windows(
            world, tiny.random_table(SAMPLES), global_batch=GLOBAL_BATCH, micro_batch=micro_batch
        ),
        _schedule(),
        cursor,
        total_steps=until,
        after_step=after_step,
    )
    return seen


def _train(world, listen_fd, folder, name, lora, precision="fp32"):
    strategy = registry.load(name)(_request(world, listen_fd, folder, lora, precision=precision))
    return _run(world, strategy, Cursor(), STEPS)


# -- against the plain computation --------------------------------------------------------------


def _reference(world, listen_fd, folder, lora):
    """30 steps of plain torch: the frozen model called with changed weights."""
    strategy = registry.load("ddp")(_request(world, listen_fd, folder, lora))
    # Only first values come from there; what is computed with them is written here.
    start = {n: p.detach().clone() for n, p in strategy.model.named_parameters() if p.requires_grad}
    model = transformers_model(folder)
    frozen = {name: p.detach() for name, p in model.named_parameters()}
    scale = 8 / (math.sqrt(4) if lora.use_rslora else 4)
    trained = {name: torch.nn.Parameter(value) for name, value in start.items()}

    def weights():
        found = dict(frozen)
        for name, a in trained.items():
            if ".lora_A." in name:
                module = name.partition(".lora_A.")[0]
                added = scale * (trained[f"{module}.lora_B.default.weight"] @ a)
                # GPT-2's Conv1D has a row for each input.
                turned = isinstance(model.get_submodule(module), Conv1D)
                base = frozen[f"{module}.weight"]
                changed = (base.T if turned else base) + added
                if lora.use_dora:
                    length = changed.detach().norm(dim=1)
                    magnitude = trained[f"{module}.lora_magnitude_vector.default.weight"]
                    changed = (magnitude / length)[:, None] * changed
                found[f"{module}.weight"] = changed.T if turned else changed
            elif ".lora_" not in name:
                found[name] = trained[name]
        return found

    matrices = [p for p in trained.values() if p.dim() >= 2]
    vectors = [p for p in trained.values() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    )
    table = tiny.random_table(SAMPLES)
    order = tiny.windows(world, table, global_batch=GLOBAL_BATCH, micro_batch=12).order
    seen = []
    for step in range(STEPS):
        indices = order.global_batch(step)
        inputs = {k: torch.from_numpy(v) for k, v in tiny.full_batch(table, indices).items()}
        logits = torch.func.functional_call(model, weights(), kwargs=inputs).logits
        loss = functional.cross_entropy(logits, torch.from_numpy(table.labels(indices)))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        rate = 1e-3 * (step / 3 if step < 3 else (STEPS - step) / (STEPS - 3))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        seen.append((samples_digest(indices), float(loss.detach()), float(norm)))
    return seen


def transformers_model(folder):
    """The base as transformers loads it, with a head for three labels and no dropout."""
    config = transformers.AutoConfig.from_pretrained(folder, num_labels=3)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, config=config, ignore_mismatched_sizes=True
    )
    return model.train()


VARIANTS = {
    "plain": PLAIN,
    "rslora": LoraOptions(r=4, alpha=8, target_modules=TARGETS, use_rslora=True),
    "dora": LoraOptions(r=4, alpha=8, use_dora=True),
}


@pytest.fixture(scope="module")
def reference(bert):
    made = {}

    def of(variant):
        if variant not in made:
            made[variant] = run_ranks(1, _reference, bert, VARIANTS[variant])[0]
        return made[variant]

    return of


@pytest.mark.parametrize(
    ("name", "ranks", "variant"),
    [
        *(("ddp", 1, each) for each in VARIANTS),
        *(("ddp", 2, each) for each in VARIANTS),
        ("zero1", 2, "plain"),
        ("zero2", 3, "plain"),
        ("zero3", 2, "plain"),
        *(pytest.param("zero3", 2, each, marks=pytest.mark.long) for each in ("rslora", "dora")),
        ("zero3", 3, "plain"),
    ],
)
def test_thirty_steps_are_those_of_the_full_batch(bert, reference, name, ranks, variant):
    expected = reference(variant)
    for seen in run_ranks(ranks, _train, bert, name, VARIANTS[variant]):
        assert [digest for digest, _, _ in seen] == [digest for digest, _, _ in expected]
        losses, wanted = (np.array([(x, y) for _, x, y in each]) for each in (seen, expected))
        worst = np.abs(losses / wanted - 1).max(axis=0)
        print(f"{name}, {ranks} ranks, {variant}: loss {worst[0]:.1e} norm {worst[1]:.1e}")
        assert worst[0] < 1e-5
        assert worst[1] < 1e-4
    # It has learned something.
    assert expected[-1][1] < expected[0][1]


GPT2 = LoraOptions(r=4, alpha=8, use_dora=True, target_modules=("c_attn", "c_proj"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Matrices with a row for each input, some of them square."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        **{"vocab_size": tiny.VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2},
        **{"n_positions": 64, "initializer_range": 0.1, "pad_token_id": 0},
        **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    )
    transformers.GPT2ForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("name", "ranks"), [("ddp", 2), ("zero3", 2)])
def test_thirty_steps_of_matrices_with_a_row_for_each_input(gpt2, name, ranks):
    expected = run_ranks(1, _reference, gpt2, GPT2)[0]
    for seen in run_ranks(ranks, _train, gpt2, name, GPT2):
        assert [digest for digest, _, _ in seen] == [digest for digest, _, _ in expected]
        losses, wanted = (np.array([(x, y) for _, x, y in each]) for each in (seen, expected))
        worst = np.abs(losses / wanted - 1).max(axis=0)
        print(f"{name}, {ranks} ranks: loss {worst[0]:.1e} norm {worst[1]:.1e}")
        assert worst[0] < 1e-5
        assert worst[1] < 1e-4
    assert expected[-1][1] < expected[0][1]


# -- checkpoints --------------------------------------------------------------------------------

SAVED_AT, GOES_ON = 10, 10


def _manifest(strategy):
    manifest = tiny.manifest(SAVED_AT, world_size=strategy.world.size)
    return replace(manifest, identity={"lora": {"r": 4}})


def _save(world, listen_fd, folder, name, root, lora, precision="fp32"):
    """10 steps, a checkpoint, 10 more."""
    strategy = registry.load(name)(_request(world, listen_fd, folder, lora, precision=precision))
    cursor = Cursor()
    _run(world, strategy, cursor, SAVED_AT)
    files = strategy.model_files() if world.is_main else {}
    Saver(strategy, root, model_files=files).save(_manifest(strategy), now=True)
    table = tiny.random_table(SAMPLES)
    collator = tiny.windows(world, table, global_batch=12, micro_batch=12).collator
    logits = strategy.predict(collator.batch(np.arange(12), seed=0))
    return _run(world, strategy, cursor, SAVED_AT + GOES_ON), logits


def _resume(world, listen_fd, folder, name, root, lora):
    strategy = registry.load(name)(_request(world, listen_fd, folder, lora))
    found = load_newest(strategy, root, on_damaged=print)
    assert found is not None
    cursor = Cursor(step=found[1].step, applied=found[1].applied_steps)
    return _run(world, strategy, cursor, SAVED_AT + GOES_ON)


@pytest.fixture(scope="module")
def saved(bert, tmp_path_factory):
    """strategy → (its checkpoints, the 10 losses that follow, logits at the checkpoint)."""
    made = {}

    def save(name, variant="plain"):
        if (name, variant) not in made:
            root = tmp_path_factory.mktemp(f"{name}-{variant}")
            seen, logits = run_ranks(2, _save, bert, name, root, VARIANTS[variant])[0]
            made[name, variant] = (root, seen, logits)
        return made[name, variant]

    return save


@pytest.mark.parametrize(
    ("origin", "to", "ranks"),
    [
        ("ddp", "zero2", 3),
        ("zero2", "ddp", 1),
        ("zero2", "zero3", 3),
        ("zero3", "ddp", 3),
        ("ddp", "zero3", 1),
        ("zero3", "zero2", 1),
    ],
)
def test_it_goes_on_under_another_strategy_on_other_ranks(bert, saved, origin, to, ranks):
    root, expected, _ = saved(origin)
    for seen in run_ranks(ranks, _resume, bert, to, root, PLAIN):
        assert [digest for digest, _, _ in seen] == [digest for digest, _, _ in expected]
        losses, wanted = (np.array([loss for _, loss, _ in each]) for each in (seen, expected))
        assert np.abs(losses / wanted - 1).max() < 1e-5


def test_it_goes_on_with_dora(bert, saved):
    root, expected, _ = saved("zero3", "dora")
    for seen in run_ranks(3, _resume, bert, "ddp", root, VARIANTS["dora"]):
        losses, wanted = (np.array([loss for _, loss, _ in each]) for each in (seen, expected))
        assert np.abs(losses / wanted - 1).max() < 1e-5


# BERT with 2 layers of width 32 and inner width 48, rank 4: query and value 32→32, output.dense is
# attention.output.dense 32→32 and output.dense 48→32. The head is 3·32 + 3 and, as for every job with
# an adapter, all there is beside the matrices A and B.
_A_AND_B = 2 * (3 * (4 * 32 + 32 * 4) + (4 * 48 + 32 * 4))
_HEAD = 3 * 32 + 3


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_checkpoint_holds_the_adapter_and_its_moments_alone(saved, name):
    root, _, _ = saved(name)
    folder = root / folder_name(SAVED_AT)
    reader = CheckpointReader(folder, read_manifest(folder))
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        sizes = {n: math.prod(shape) for n, shape in reader.names(kind).items()}
        assert sum(sizes.values()) == _A_AND_B + _HEAD
        assert sum(size for n, size in sizes.items() if ".lora_" in n) == _A_AND_B
        for tensor in sizes:
            # Never empty, and never untrained: not even B is zero after ten steps.
            assert np.abs(reader.read_whole(kind, tensor)).max() > 0


# -- the model folder ---------------------------------------------------------------------------


def _write(world, listen_fd, folder, checkpoint, target):
    """What a job does at its end."""
    strategy = registry.load("ddp")(_request(world, listen_fd, folder, PLAIN))
    files = {p.name: p.read_bytes() for p in (checkpoint / "model").iterdir()}
    write_model_folder(
        strategy, checkpoint, target, model_files=files, dtype="fp32", alive=lambda: None
    )


@pytest.mark.parametrize(
    ("name", "variant"), [("ddp", "plain"), ("zero3", "plain"), ("zero3", "dora")]
)
def test_peft_loads_what_a_job_leaves(bert, saved, tmp_path, name, variant):
    root, _, expected = saved(name, variant)
    folder = tmp_path / "model"
    run_ranks(1, _write, bert, root / folder_name(SAVED_AT), folder)
    assert not (folder / "config.json").exists()
    own = lora_jobs.peft.AutoPeftModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, ignore_mismatched_sizes=True
    )
    # The other way, as docs/lora.md has it.
    config = transformers.AutoConfig.from_pretrained(folder / "model_config.json")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        bert, config=config, ignore_mismatched_sizes=True
    )
    other = lora_jobs.peft.PeftModel.from_pretrained(base, folder)
    table = tiny.random_table(SAMPLES)
    inputs = {k: torch.from_numpy(v) for k, v in tiny.full_batch(table, np.arange(12)).items()}
    with torch.no_grad():
        np.testing.assert_array_equal(other.eval()(**inputs).logits, own.eval()(**inputs).logits)
        found = own.eval()(**inputs).logits.numpy()
        merged = own.merge_and_unload()(**inputs).logits.numpy()
    print(f"peft {np.abs(found - expected).max():.1e} merged {np.abs(merged - expected).max():.1e}")
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    # Ours, without peft and torch, into the base that has a head for two labels.
    result = ftlaunch("merge", "--adapter", folder, bert, tmp_path / "merged")
    assert result.returncode == 0, said(result)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        ours = model.eval()(**inputs).logits.numpy()
    print(f"ours {np.abs(ours - expected).max():.1e}")
    np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=0)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}


def _predict(world, listen_fd, folder, name):
    """As an evaluation does."""
    request = tiny.request(world, listen_fd, folder, model={"random_weights": False})
    strategy = registry.load(name)(replace(request, trained_head=True))
    collator = tiny.windows(
        world, tiny.random_table(SAMPLES), global_batch=12, micro_batch=12
    ).collator
    return strategy.predict(collator.batch(np.arange(12), seed=0))


@pytest.mark.parametrize(("name", "ranks"), [("ddp", 1), ("zero3", 2)])
def test_an_adapters_folder_is_evaluated_with_its_base(bert, saved, tmp_path, name, ranks):
    root, _, expected = saved("ddp")
    run_ranks(1, _write, bert, root / folder_name(SAVED_AT), tmp_path / "model")
    for logits in run_ranks(ranks, _predict, tmp_path / "model", name):
        np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=0)


# -- first values -------------------------------------------------------------------------------


def _first(world, listen_fd, folder, name, root, lora, precision="fp32"):
    strategy = registry.load(name)(_request(world, listen_fd, folder, lora, precision=precision))
    Saver(strategy, root).save(_manifest(strategy), now=True)


def test_first_values_do_not_depend_on_strategy_or_ranks(bert, tmp_path):
    """Those of peft in kind: A uniform up to 1/√inputs, B zero, the lengths those of the base's rows."""
    lora = VARIANTS["dora"]
    run_ranks(1, _first, bert, "ddp", tmp_path / "one", lora)
    run_ranks(3, _first, bert, "zero3", tmp_path / "other", lora, "bf16")
    readers = []
    for name in ("one", "other"):
        folder = tmp_path / name / folder_name(SAVED_AT)
        readers.append(CheckpointReader(folder, read_manifest(folder)))
    one, other = readers
    assert one.names("weight") == other.names("weight")
    base = load_file(bert / "model.safetensors")
    for name, shape in one.names("weight").items():
        values = one.read_whole("weight", name)
        np.testing.assert_array_equal(values, other.read_whole("weight", name))
        module = name.partition(".lora_")[0]
        if ".lora_A." in name:
            bound = 1 / math.sqrt(shape[1])
            assert 0.9 * bound < np.abs(values).max() <= bound
            # Of a uniform distribution that wide; 4·32 values or more.
            assert math.isclose(values.std(), bound / math.sqrt(3), rel_tol=0.15)
        elif ".lora_B." in name:
            assert not values.any()
        elif ".lora_magnitude" in name:
            lengths = np.sqrt((base[f"{module}.weight"].astype(np.float64) ** 2).sum(axis=1))
            np.testing.assert_allclose(values, lengths, rtol=1e-6)


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        (
            LoraOptions(r=4, target_modules=("q_proj",)),
            ("no linear module is called 'q_proj'", "dense, key, query, value"),
        ),
        (LoraOptions(r=4, target_modules=("query", "qery")), ("'qery'", "dense, key, query")),
        (LoraOptions(r=4, target_modules=("classifier",)), ("trained whole",)),
        (LoraOptions(r=4, modules_to_save=("lm_head",)), ("'lm_head'", "word_embeddings")),
    ],
)
def test_names_that_match_nothing_are_told_with_those_that_exist(bert, lora, words):
    with pytest.raises(AssertionError) as caught:
        run_ranks(1, _train, bert, "ddp", lora)
    text = str(caught.value)
    assert text.startswith("UserError: lora.")
    for word in words:
        assert word in text


def _missing_head(world, listen_fd, folder, lora):
    strategy = registry.load("ddp")(_request(world, listen_fd, folder, lora))
    return [n for n, p in strategy.model.named_parameters() if p.requires_grad]


def test_what_no_file_has_is_trained_and_saved(tmp_path):
    """A masked language model has neither a pooler nor a head for labels."""
    config = {k: v for k, v in tiny.CONFIGS["bert"].items() if k != "model_type"}
    transformers.BertForMaskedLM(transformers.BertConfig(**config)).save_pretrained(tmp_path)
    names = run_ranks(1, _missing_head, tmp_path, LoraOptions(r=2))[0]
    whole = {name for name in names if ".lora_" not in name}
    parts = ("bert.pooler.dense", "classifier")
    assert whole == {f"{part}.{each}" for part in parts for each in ("weight", "bias")}
    assert not any("pooler" in name for name in names if ".lora_" in name)
