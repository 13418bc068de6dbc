"""Labels of tokens: gradients, losses and evaluations do not depend on the topology.

The reference is the full batch in one piece with torch's own mean, written out in `token_cases`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies import registry
from ftlaunch.strategies.data.arrangements import Selection
from ftlaunch.strategies.data.packing import PackedSamples
from ftlaunch.strategies.data.sample_order import samples_digest
from ftlaunch.strategies.loop import Cursor, train
from ftlaunch.strategies.options import DataOptions
from ftlaunch.strategies.schedule import Schedule
from ftlaunch.strategies.token_evaluation import TokenEvaluator
from ftlaunch.strategies.torch.ddp import create
from tests import tiny, token_cases
from tests.ranks import run_ranks
from tests.token_cases import TokenRows
from tests.token_label_cases import LABEL_CASES

CASES = {**token_cases.CASES, **LABEL_CASES}
SAMPLES, GLOBAL_BATCH = 18, 15
STEPS = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: case.write_model(root / name) for name, case in CASES.items()}


def _flat(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _window_gradients(world, listen_fd, folder, name, micro_batch, step):
    case = CASES[name]
    strategy = create(case.request(world, listen_fd, folder))
    table = case.make_table(SAMPLES)
    windows = case.windows(world, table, global_batch=GLOBAL_BATCH, micro_batch=micro_batch)
    indices = windows.order.global_batch(step)
    batches = list(windows.micro_batches(indices, step))
    for batch, last in batches:
        strategy.accumulate(batch, windows.total_items(indices, step), last=last)
    flat = _flat(strategy.model)
    strategy.close()
    return flat.double().numpy(), len(batches)


def _full_gradient(world, listen_fd, folder, name, step):
    case = CASES[name]
    model = create(case.request(world, listen_fd, folder)).model.train()
    table = case.make_table(SAMPLES)
    order = case.windows(world, table, global_batch=GLOBAL_BATCH, micro_batch=15).order
    loss = case.full_loss(model, table, order.global_batch(step), order.epoch(step))
    torch.autograd.backward(loss)
    return _flat(model).double().numpy()


# 18 samples in global batches of 15: the second window has 3. On 2 ranks with micro-batches of 2
# that is 4 micro-batches a rank, then 1.
@pytest.mark.parametrize(("step", "accumulation"), [(0, 4), (1, 1)], ids=["whole", "last"])
@pytest.mark.parametrize("name", CASES)
def test_window_gradient_is_that_of_the_full_batch(folders, name, step, accumulation):
    expected = run_ranks(1, _full_gradient, folders[name], name, step)[0]
    for gradient, batches in run_ranks(2, _window_gradients, folders[name], name, 2, step):
        assert batches == accumulation
        ratio = np.linalg.norm(gradient) / np.linalg.norm(expected)
        cosine = gradient @ expected / np.linalg.norm(gradient) / np.linalg.norm(expected)
        print(f"{name}: ratio {ratio:.7f} cosine {cosine:.9f}")
        assert abs(ratio - 1) < 1e-5
        assert cosine > 0.99999
        assert np.linalg.norm(gradient - expected) / np.linalg.norm(expected) < 1e-5


# -- losses of some steps, and an evaluation after them ------------------------------------------


def _schedule():
    return Schedule(name="constant", peak=1e-3, warmup_steps=0, total_steps=STEPS)


def _steps(world, listen_fd, folder, name, strategy_name):
    """(digest, loss) of each step, then loss and metrics of an evaluation of 11 samples."""
    case = CASES[name]
    strategy = registry.load(strategy_name)(case.request(world, listen_fd, folder))
    table = case.make_table(SAMPLES)
    seen = []

    def after_step(report):
        seen.append((samples_digest(report.indices), report.outcome.loss))
        return False

    train(
        strategy,
        case.windows(world, table, global_batch=7, micro_batch=2),
        _schedule(),
        Cursor(),
        total_steps=STEPS,
        after_step=after_step,
    )
    collator = case.collator(Selection(table, np.arange(11)))
    evaluator = TokenEvaluator(
        collator=collator,
        task=collator.task,
        spec=case.spec,
        metrics=dict(collator.task.metrics(case.spec)),
        micro_batch=3,
    )
    outputs = evaluator.run(strategy)
    return seen, evaluator.evaluate(outputs), evaluator.records(outputs)


def _plain_steps(world, listen_fd, folder, name):
    """The same steps in one piece, with torch's own mean, clipping and AdamW."""
    case = CASES[name]
    model = create(case.request(world, listen_fd, folder)).model.train()
    table = case.make_table(SAMPLES)
    order = case.windows(world, table, global_batch=7, micro_batch=7).order
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    seen = []
    for step in range(STEPS):
        indices = order.global_batch(step)
        loss = case.full_loss(model, table, indices, order.epoch(step))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen.append((samples_digest(indices), float(loss.detach())))
    with torch.no_grad():
        evaluated = float(case.full_loss(model.eval(), table, np.arange(11), -1))
    return seen, evaluated


@pytest.fixture(scope="module")
def plain(folders):
    """name → its plain steps."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = run_ranks(1, _plain_steps, folders[name], name)[0]
        return made[name]

    return get


@pytest.mark.parametrize(
    ("strategy", "ranks"), [("ddp", 1), ("ddp", 2), ("ddp", 3), ("zero2", 2), ("zero3", 3)]
)
@pytest.mark.parametrize("name", CASES)
def test_samples_and_losses_are_the_same_everywhere(folders, plain, name, strategy, ranks):
    steps, evaluated = plain(name)
    results = run_ranks(ranks, _steps, folders[name], name, strategy)
    for seen, metrics, _ in results:
        assert [digest for digest, _ in seen] == [digest for digest, _ in steps]
        losses = np.array([loss for _, loss in seen])
        worst = np.abs(losses / np.array([loss for _, loss in steps]) - 1).max()
        print(f"{name}, {strategy} on {ranks}: loss {worst:.1e}, evaluated {metrics['loss']:.7f}")
        assert worst < 1e-5
        assert abs(metrics["loss"] / evaluated - 1) < 1e-5
    # Every rank holds the same numbers, to the bit.
    assert all(result[1:] == results[0][1:] for result in results)


# -- packing ------------------------------------------------------------------------------------


def _kept_apart(world, listen_fd, folder, name, case=None):
    """What is said of a model that is asked to keep the samples of a row apart; "" for nothing."""
    model = {} if case else {"random_weights": False}
    request = CASES[case or "causal-lm-qwen2"].request(world, listen_fd, folder, model=model)
    options = replace(request.options, data=DataOptions(packing="samples"))
    try:
        registry.load(name)(replace(request, options=options))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ["ddp", "zero3"])
@pytest.mark.parametrize("family", ["opt", "bloom"])
def test_a_model_that_does_not_keep_samples_apart_is_refused(tmp_path, family, name):
    config = {
        "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16, "num_attention_heads": 2},
        "bloom": {"n_layer": 2, "n_head": 2},
    }[family]
    small = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 120, "init_std": 0.1}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **small, **config))
    model.save_pretrained(tmp_path)
    for said in run_ranks(2, _kept_apart, tmp_path, name):
        assert said.startswith(
            "data.packing is samples, and in this model the samples of a row see"
        )


@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3"])
@pytest.mark.parametrize("case", ["causal-lm-qwen2", "causal-lm-llama", "causal-lm-gpt2"])
def test_a_model_that_keeps_samples_apart_is_not_refused(folders, case, name):
    assert run_ranks(2, _kept_apart, folders[case], name, case) == ["", ""]


def _packed_loss(world, listen_fd, folder, name, attention):
    """(mean loss, gradient) of 12 samples one a row, and of the same packed into rows of 64."""
    case = CASES[name]
    table = Selection(case.make_table(SAMPLES), np.arange(12))
    found = []
    for samples in (table, PackedSamples(table, 64)):
        request = case.request(world, None, folder, model={"attn_implementation": attention})
        strategy = create(request)
        collator = case.collator(samples)
        everything = np.arange(len(samples))
        strategy.accumulate(
            collator.batch(everything, seed=1), collator.total_items(everything), last=True
        )
        gradient = _flat(strategy.model).double().numpy()
        found.append((strategy.apply(0.0).loss, gradient, len(samples)))
    return found


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("causal-lm")])
def test_packing_changes_no_loss(folders, name, attention):
    alone, packed = run_ranks(1, _packed_loss, folders[name], name, attention)[0]
    assert packed[2] < alone[2] == 12
    print(f"{name}, {attention}: loss {packed[0] / alone[0] - 1:.1e} in {packed[2]} rows")
    assert abs(packed[0] / alone[0] - 1) < 1e-5
    assert np.linalg.norm(packed[1] - alone[1]) / np.linalg.norm(alone[1]) < 1e-5


def _load_encoder(world, listen_fd, folder):
    with pytest.raises(UserError, match="'bert' model, which reads in both directions"):
        create(CASES["causal-lm-qwen2"].request(world, None, folder))


def test_an_encoder_is_no_causal_model(tmp_path):
    run_ranks(1, _load_encoder, tiny.write_config(tmp_path / "bert", "bert"))


# -- completions --------------------------------------------------------------------------------


def _completion_loss(world, listen_fd, folder):
    """(loss of two rows in one step, the same by hand)"""
    case = CASES["causal-lm-llama"]
    strategy = create(case.request(world, None, folder))
    prompts, completions = ([5, 6, 7], [8]), ([9, 10], [11, 12, 13, 14])
    rows = [[*prompt, *rest] for prompt, rest in zip(prompts, completions, strict=True)]
    # The place of each prompt's last token is the first that predicts a completion's.
    labels = [[-100, -100, 9, 10, -100], [11, 12, 13, 14, -100]]
    table = TokenRows(
        [np.array(row, dtype=np.int32) for row in rows],
        [np.array(row, dtype=np.int32) for row in labels],
    )
    collator = case.collator(table)
    batch = collator.batch(np.arange(2), seed=1)
    strategy.accumulate(batch, collator.total_items(np.arange(2)), last=True)
    found = strategy.apply(0.0).loss
    total = 0.0
    with torch.no_grad():
        for prompt, rest in zip(prompts, completions, strict=True):
            logits = strategy.model(input_ids=torch.tensor([[*prompt, *rest]])).logits[0].double()
            for number, token in enumerate(rest):
                scores = logits[len(prompt) + number - 1].numpy()
                total += np.log(np.exp(scores).sum()) - scores[token]
    return found, total / 6


def test_the_loss_of_completions_is_that_by_hand(folders):
    found, expected = run_ranks(1, _completion_loss, folders["causal-lm-llama"])[0]
    assert abs(found / expected - 1) < 1e-6
