"""Attention with dropout on CPUs: what is dropped, how often, and that the rest is as it was."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ftlaunch.strategies.torch.attention import ByteDropout, _instead_of


class _Module(torch.nn.Module):
    is_causal = False


def _inputs(dtype=torch.float64, length=48):
    torch.manual_seed(0)
    return [torch.randn(2, 3, length, 8, dtype=dtype, requires_grad=True) for _ in range(3)]


def _never(*arguments, **others):
    raise AssertionError("torch's own was to be replaced")


def test_as_many_are_dropped_as_asked_for_and_the_mean_stays():
    """0.1 of 2 million: a standard deviation of 2.1e-4; each element on its own."""
    torch.manual_seed(3)
    values = torch.ones(2048, 1024, dtype=torch.float64, requires_grad=True)
    found = ByteDropout.apply(values, 6554)
    kept = found != 0
    assert abs((~kept).double().mean() - 6554 / 65536) < 1e-3
    assert abs(found.mean() - 1) < 1e-3
    torch.testing.assert_close(found[kept].min(), torch.tensor(65536 / 58982, dtype=torch.float64))
    # Neighbours, and the same place of the next row, are dropped together as often as chance has it.
    dropped = (~kept).double()
    for one, other in ((dropped[:, 1:], dropped[:, :-1]), (dropped[1:], dropped[:-1])):
        assert abs((one * other).mean() - 0.1**2) < 1e-3
    found.sum().backward()
    assert values.grad is not None and torch.equal(values.grad, found.detach())


def test_the_seed_says_what_is_dropped():
    values = torch.ones(64, 64)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(ByteDropout.apply(values, 6554))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_what_is_not_dropped_is_torchs_attention(kind):
    """With a threshold of 1 in 65,536 hardly any of 13,824 weights goes; the seed is one where none does."""
    query, key, value = _inputs()
    allowed = torch.ones(2, 1, 48, 48, dtype=torch.bool)
    allowed[1, :, :, 30:] = False
    mask = {"none": None, "bool": allowed, "float": (~allowed).double() * -1e9}[kind]
    gradient = torch.randn(2, 48, 3, 8, dtype=torch.float64)
    found = []
    for attention, dropout in ((_instead_of(_never), 1 / 65536), (sdpa_attention_forward, 0.0)):
        torch.manual_seed(6)
        output, _ = attention(_Module(), query, key, value, mask, dropout=dropout, is_causal=False)
        found.append((output, *torch.autograd.grad(output, (query, key, value), gradient)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_autocast_is_minded_where_queries_and_values_differ_in_precision():
    """As in a decoder whose rotation widens queries and keys; a row that may look nowhere is a number."""
    query, key, value = _inputs(torch.float32)
    mask = torch.zeros(2, 1, 48, 48)
    mask[:, :, 5] = torch.finfo(torch.float32).min
    mask[:, :, 6] = -torch.inf
    found = []
    for attention, dropout in ((_instead_of(_never), 1 / 65536), (sdpa_attention_forward, 0.0)):
        torch.manual_seed(6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, _ = attention(_Module(), query, key, value.bfloat16(), mask, dropout=dropout)
        assert output.dtype == torch.bfloat16
        assert torch.isfinite(output).all()
        found.append(torch.cat([output[:, :5], output[:, 7:]], 1))
    torch.testing.assert_close(*found, rtol=0.02, atol=0.02)


def test_what_is_drawn_again_is_the_same():
    from torch.utils.checkpoint import checkpoint

    query, key, value = _inputs()
    found = []
    for again in (False, True):
        torch.manual_seed(7)

        def run(*inputs):
            return _instead_of(_never)(_Module(), *inputs, None, dropout=0.3)[0]

        output = (
            checkpoint(run, query, key, value, use_reentrant=False)
            if again
            else run(query, key, value)
        )
        found.append(torch.autograd.grad(output.sum(), (query, key, value)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_the_rest_goes_on_to_torch():
    calls = []

    def plain(*arguments, **others):
        calls.append(others)
        return arguments[1], None

    attention = _instead_of(plain)
    query, key, value = _inputs()
    attention(_Module(), query, key, value, None, dropout=0.0)
    attention(_Module(), query, key, value, None, dropout=0.1, is_causal=True)
    attention(_Module(), query, key[:, :1], value[:, :1], None, dropout=0.1)
    attention(_Module(), *_inputs(length=8), None, dropout=0.1)
    attention(_Module(), query, key, value, None, dropout=0.1, is_causal=False, softcap=30.0)
    assert [call["dropout"] for call in calls] == [0.0, 0.1, 0.1, 0.1, 0.1]
