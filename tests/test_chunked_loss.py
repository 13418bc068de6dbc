"""Losses over large vocabularies in pieces: the numbers of the plain computation, in half the memory.

The plain computation is written out here: logits as a whole, torch's cross entropy, its own gradients.
"""

from __future__ import annotations

import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from ftlaunch.strategies.base import Batch
from ftlaunch.strategies.torch import chunked_loss
from ftlaunch.strategies.torch.chunked_loss import HeadLoss, LogitsLoss, score_head, score_rows
from ftlaunch.strategies.torch.ddp import create
from tests import tiny
from tests.ranks import run_ranks
from tests.token_cases import CASES
from tests.token_label_cases import LABEL_CASES

ROWS, WIDTH, CLASSES = 37, 16, 53


@pytest.fixture
def in_pieces(monkeypatch):
    """5 rows at a time: seven pieces of 5 and one of 2."""
    monkeypatch.setattr(chunked_loss, "CHUNK_ELEMENTS", 5 * CLASSES + 7)


def _random(seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, WIDTH, generator=generator)
    weight = torch.randn(CLASSES, WIDTH, generator=generator)
    bias = torch.randn(CLASSES, generator=generator)
    labels = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    weights = torch.rand(ROWS, generator=generator)
    return hidden, weight, bias, labels, weights


def _close(found, expected):
    assert torch.linalg.norm(found - expected) <= 1e-6 * torch.linalg.norm(expected)


@pytest.mark.parametrize("with_bias", [True, False])
def test_loss_and_gradients_of_a_head(in_pieces, with_bias):
    hidden, weight, bias, labels, weights = _random()
    wanted = [hidden, weight, bias] if with_bias else [hidden, weight]
    plain = [each.clone().requires_grad_() for each in wanted]
    logits = functional.linear(*plain)
    expected = (functional.cross_entropy(logits, labels, reduction="none") * weights).sum()
    torch.autograd.backward(expected * 3.0)
    pieces = [each.clone().requires_grad_() for each in wanted]
    arguments = (*pieces, None) if not with_bias else pieces
    loss = HeadLoss.apply(*arguments, labels, weights, torch.float32)
    torch.autograd.backward(loss * 3.0)
    _close(loss, expected)
    for found, reference in zip(pieces, plain, strict=True):
        _close(found.grad, reference.grad)
    scores = score_head(hidden, weight, bias if with_bias else None, labels)
    _close(scores[0], functional.cross_entropy(logits, labels, reduction="none"))
    assert scores[1].tolist() == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_of_logits(in_pieces, dtype):
    hidden, weight, _, labels, weights = _random()
    logits = (hidden @ weight.t()).to(dtype)
    plain = logits.clone().requires_grad_()
    losses = functional.cross_entropy(plain.float(), labels, reduction="none")
    torch.autograd.backward((losses * weights).sum())
    pieces = logits.clone().requires_grad_()
    loss = LogitsLoss.apply(pieces, labels, weights)
    torch.autograd.backward(loss)
    _close(loss, (losses * weights).sum())
    _close(pieces.grad.float(), plain.grad.float())
    _close(score_rows(logits, labels)[0], losses)


@pytest.mark.parametrize(("kind", "number", "rows"), [("cpu", 75, 220), ("cuda", 19, 883)])
def test_accelerators_have_larger_pieces(kind, number, rows):
    """16 x 1,024 tokens and a vocabulary of 151,936: 2^25 / 151,936 = 220.8, 2^27 / 151,936 = 883.4."""
    parts = list(chunked_loss._chunks(16 * 1024, 151_936, torch.device(kind)))
    assert (len(parts), parts[0]) == (number, slice(0, rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_weights_are_weights_of_1(in_pieces, dtype):
    hidden, weight, bias, labels, _ = _random()
    found = []
    for weights in (torch.ones(ROWS), None):
        leaves = [each.clone().requires_grad_() for each in (hidden, weight, bias)]
        loss = HeadLoss.apply(*leaves, labels, weights, dtype)
        torch.autograd.backward(loss * 3.0)
        logits = (hidden @ weight.t()).to(dtype).requires_grad_()
        other = LogitsLoss.apply(logits, labels, weights)
        torch.autograd.backward(other)
        found.append([loss, other, *(leaf.grad for leaf in leaves), logits.grad])
    assert all(torch.equal(one, same) for one, same in zip(*found, strict=True))


def _weights_of_the_head(world, listen_fd, folder):
    """What the head was given as weights: of a batch as it is, and with one token that counts twice."""
    case = CASES["causal-lm-qwen2"]
    strategy = create(case.request(world, None, folder))
    batch = case.collator(case.make_table(6)).batch(np.arange(6), seed=1)
    double = batch.weights.copy()
    double[tuple(np.argwhere(double)[0])] = 2.0
    head: Any = strategy._forward.head
    seen, loss_sum = [], head.loss_sum

    def noted(run, chosen, weights):
        seen.append(weights)
        return loss_sum(run, chosen, weights)

    head.loss_sum = noted
    for weights in (batch.weights, double):
        strategy.accumulate(replace(batch, weights=weights), 1.0, last=True)
    return [None if each is None else each.tolist() for each in seen], int((double != 0).sum())


def test_weights_that_are_all_1_are_not_multiplied_with(tmp_path):
    folder = tiny.write_config(tmp_path / "model", "qwen2")
    [(seen, number)] = run_ranks(1, _weights_of_the_head, folder)
    assert seen == [None, [2.0] + [1.0] * (number - 1)]


class _Questions(TorchDispatchMode):
    """Operations whose result has a size that only the device knows."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = [
            each
            for arg in args
            if isinstance(arg, list | tuple)
            for each in arg
            if isinstance(each, torch.Tensor) and each.dtype == torch.bool
        ]
        if masks or "nonzero" in str(func) or "masked_select" in str(func):
            self.asked.append(str(func))
        return func(*args, **(kwargs or {}))


def _questions(world, listen_fd, folder, case):
    strategy = create(case.request(world, None, folder))
    table, everything = case.make_table(6), np.arange(6)
    collator = case.collator(table)
    with _Questions() as questions:
        strategy.accumulate(
            collator.batch(everything, seed=1), collator.total_items(everything), last=True
        )
    loss = strategy.apply(0.0).loss
    with torch.no_grad():
        expected = float(case.full_loss(strategy.model, table, everything, 0))
    return questions.asked, loss / expected


@pytest.mark.parametrize("name", ["token-classification-bert", "capped"])
def test_the_device_is_not_asked_which_tokens_have_a_label(tmp_path, name):
    """Where there is no head that gives losses: few classes, or logits that are capped."""
    folder = tmp_path / "model"
    if name == "capped":
        folder, case = _gemma(folder), CASES["causal-lm-qwen2"]
        case = replace(case, model={**case.model, "random_weights": False})
    else:
        folder, case = tiny.write_config(folder, "bert"), LABEL_CASES[name]
    [(asked, ratio)] = run_ranks(1, _questions, folder, case)
    assert asked == []
    assert abs(ratio - 1) < 1e-6


def test_no_token_at_all_has_a_gradient_of_zero():
    hidden, weight, _, labels, weights = _random()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    loss = HeadLoss.apply(hidden[:0], weight, None, labels[:0], weights[:0], torch.float32)
    torch.autograd.backward(loss)
    assert loss == 0
    assert not hidden.grad.any() and not weight.grad.any()


def test_a_frozen_head_costs_no_gradient():
    hidden, weight, _, labels, weights = _random()
    hidden = hidden.requires_grad_()
    torch.autograd.backward(HeadLoss.apply(hidden, weight, None, labels, weights, torch.float32))
    assert hidden.grad.any() and weight.grad is None


def _gemma(folder: Path) -> Path:
    """Its logits are capped after the last layer: they are not that layer's."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    small = {key: value for key, value in tiny._SMALL.items() if key != "pad_token_id"}
    config = Gemma2Config(
        **small,
        head_dim=16,
        num_key_value_heads=1,
        final_logit_softcapping=0.5,
        query_pre_attn_scalar=16,
        initializer_range=0.5,
    )
    Gemma2ForCausalLM(config).save_pretrained(folder)
    return folder


def _first_passes(world, listen_fd, folder, first):
    case = CASES["causal-lm-qwen2"]
    weights = (folder / "model.safetensors").exists()
    strategy = create(case.request(world, None, folder, model={"random_weights": not weights}))
    table, everything = case.make_table(6), np.arange(6)
    collator = case.collator(table)
    batch = collator.batch(everything, seed=1)
    nothing = collator.batch(np.zeros(0, dtype=np.int64), seed=1)
    if first == "accumulate":
        strategy.accumulate(nothing, 1.0, last=False)
    elif first == "score":
        assert not strategy.score(nothing).losses.any()
    strategy.accumulate(batch, collator.total_items(everything), last=True)
    scores = strategy.score(batch)
    found = strategy.apply(0.0).loss
    with torch.no_grad():
        expected = float(case.full_loss(strategy.model, table, everything, 0))
    return found, expected, scores.losses.sum() / collator.total_items(everything)


@pytest.mark.parametrize("first", ["", "accumulate", "score"])
@pytest.mark.parametrize("model", ["capped", "plain"])
def test_a_model_that_changes_its_logits_is_asked_for_them(tmp_path, model, first):
    """Also where a rank has nothing to compute in its first pass: zero stays zero, capped or not."""
    folder = tmp_path / "model"
    folder = _gemma(folder) if model == "capped" else tiny.write_config(folder, "qwen2")
    found, expected, scored = run_ranks(1, _first_passes, folder, first)[0]
    assert abs(found / expected - 1) < 1e-6
    assert abs(scored / expected - 1) < 1e-6


def _after_what_is_not_finite(world, listen_fd, folder):
    """(whether a first score that overflows is a number, two after it, whether the head gives them, passes
    of the model for the first)
    """
    case = CASES["causal-lm-qwen2"]
    strategy = create(case.request(world, None, folder))
    table, everything = case.make_table(6), np.arange(6)
    batch = case.collator(table).batch(everything, seed=1)
    weight = strategy.model.model.norm.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.inf)
    passes = []
    strategy.model.register_forward_hook(lambda *_: passes.append(1))
    overflowed = strategy.score(batch).losses.sum()
    num_passes = len(passes)
    with torch.no_grad():
        weight.copy_(kept)
    losses = [float(strategy.score(batch).losses.sum()) for _ in range(2)]
    head = strategy._forward.head
    uses_head = head is not None and head._fits
    return bool(np.isfinite(overflowed)), losses, uses_head, num_passes


def test_a_first_pass_that_is_not_finite_tells_nothing_of_the_model(tmp_path):
    folder = tiny.write_config(tmp_path / "model", "qwen2")
    [(finite, losses, uses_head, num_passes)] = run_ranks(1, _after_what_is_not_finite, folder)
    assert not finite
    assert losses[0] == losses[1] and np.isfinite(losses[0])
    # One to look and one for the score, as on a rank whose numbers are finite: under ZeRO-3 a pass is
    # collective.
    assert uses_head and num_passes == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_head_in_half_precision(in_pieces, dtype):
    """Its products in 16 bits, its sums in 32: against fp32 of the same rounded numbers."""
    hidden, weight, bias, labels, weights = _random()
    plain = [each.to(dtype).float().requires_grad_() for each in (hidden, weight, bias)]
    logits = functional.linear(*plain)
    expected = (functional.cross_entropy(logits, labels, reduction="none") * weights).sum()
    torch.autograd.backward(expected)
    pieces = [each.clone().requires_grad_() for each in (hidden, weight, bias)]
    loss = HeadLoss.apply(*pieces, labels, weights, dtype)
    torch.autograd.backward(loss)
    assert abs(float(loss.detach() / expected.detach()) - 1) < 1e-2
    for found, reference in zip(pieces, plain, strict=True):
        error = torch.linalg.norm(found.grad.float() - reference.grad)
        assert error < 2e-2 * torch.linalg.norm(reference.grad)


# -- memory -------------------------------------------------------------------------------------

BIG_VOCABULARY, LENGTH = 150_000, 512


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _memory(world, listen_fd, folder, rows, plain):
    """(bytes that one micro-batch forward and backward took above what was there before, its loss)"""
    case = CASES["causal-lm-qwen2"]
    strategy = create(case.request(world, None, folder))
    generator = np.random.default_rng(0)
    ids = generator.integers(3, BIG_VOCABULARY, (rows, LENGTH))
    labels = np.concatenate([ids[:, 1:], np.full((rows, 1), -100)], axis=1)
    weights = (labels != -100).astype(np.float32)
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    before = _peak_bytes()
    if plain:
        tensors = {name: torch.from_numpy(values) for name, values in inputs.items()}
        logits = strategy.model(**tensors).logits
        loss = functional.cross_entropy(
            logits.float().flatten(0, 1), torch.from_numpy(labels).flatten()
        )
        torch.autograd.backward(loss)
        return _peak_bytes() - before, float(loss.detach())
    batch = Batch(inputs=inputs, labels=labels, weights=weights, indices=np.arange(rows), seed=1)
    strategy.accumulate(batch, float(weights.sum()), last=True)
    took = _peak_bytes() - before
    return took, strategy.apply(0.0).loss


@pytest.mark.parametrize("rows", [2, pytest.param(8, marks=pytest.mark.long)])
def test_a_large_vocabulary_takes_less_than_half_the_memory(tmp_path, rows):
    folder = tiny.write_config(tmp_path / "big", "qwen2")
    config = json.loads((folder / "config.json").read_text())
    config |= {"vocab_size": BIG_VOCABULARY, "max_position_embeddings": LENGTH}
    (folder / "config.json").write_text(json.dumps(config))
    plain, expected = run_ranks(1, _memory, folder, rows, True, seconds=900)[0]
    pieces, loss = run_ranks(1, _memory, folder, rows, False, seconds=900)[0]
    print(f"plain {plain / 1e6:.0f} MB, in pieces {pieces / 1e6:.0f} MB")
    assert abs(loss / expected - 1) < 1e-6
    assert pieces <= plain / 2
