"""The memory of a job, beside numbers that were derived by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from ftlaunch.strategies.memory.architecture import Architecture, read_architecture
from ftlaunch.strategies.memory.estimate import MemoryEstimate, estimate, largest_micro_batch
from ftlaunch.strategies.memory.request import MemoryRequest

_GIB = 1 << 30


def _bert(**config: Any) -> Architecture:
    return read_architecture({"model_type": "bert", **config}, head="sequence-classification")


def _llama_70b() -> Architecture:
    config = {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
    return read_architecture(config, head="causal-lm")


def _request(architecture: Architecture, **changes: Any) -> MemoryRequest:
    request = MemoryRequest(
        architecture=architecture,
        strategy="ddp",
        precision="fp32",
        world_size=2,
        micro_batch=1,
        length=8,
    )
    return replace(request, **changes)


def test_known_models_have_their_known_sizes() -> None:
    # BERT-base with a classifier of two: 109,482,240 below the head, and 768 · 2 + 2.
    assert _bert().num_parameters == 109_482_240 + 1_538
    # Llama 3.1 70B, as its card says.
    assert _llama_70b().num_parameters == 70_553_706_496


def test_ddp_holds_sixteen_bytes_a_parameter() -> None:
    # 4 each of weight and gradient, 8 of two moments; of none of them a part.
    found = estimate(_request(_bert()))
    p = 109_483_778
    assert (found.weights, found.gradients, found.optimizer) == (4 * p, 4 * p, 8 * p)
    assert (found.masters, found.host) == (0, 0)


def test_zero3_divides_everything_by_the_ranks() -> None:
    # bf16 weights and gradients 2, fp32 masters 4, moments 8 bytes, each of a sixteenth of them.
    found = estimate(_request(_llama_70b(), strategy="zero3", precision="bf16", world_size=16))
    mine = 70_553_706_496 // 16
    assert (found.weights, found.masters, found.optimizer) == (2 * mine, 4 * mine, 8 * mine)
    assert found.gradients == 2 * mine
    # The optimizer steps 10^9 elements of the 4.4 · 10^9 at a time, with gradients in fp32
    # and in one piece; the bucket of 5 · 10^8 stays.
    steps = found.phases["optimizer"] - found.framework
    assert steps == (2 + 2 + 4 + 8) * mine + (2 + 4) * 10**9 + 2 * 5 * 10**8


def test_offload_moves_states_to_the_host() -> None:
    here = _request(_llama_70b(), strategy="zero3", precision="bf16", world_size=16)
    there = estimate(replace(here, offload_optimizer=True, offload_parameters=True))
    mine = 70_553_706_496 // 16
    assert there.optimizer == there.masters == there.weights == 0
    assert there.host >= (2 + 4 + 8) * mine
    assert there.peak < estimate(here).peak


def test_each_of_the_two_can_be_offloaded_alone() -> None:
    here = _request(_llama_70b(), strategy="zero3", precision="bf16", world_size=16)
    mine = 70_553_706_496 // 16
    # Masters of 4 bytes, moments of 8 and gradients in fp32 are the host's; bf16 weights stay.
    optimizer = estimate(replace(here, offload_optimizer=True))
    assert optimizer.weights == 2 * mine
    assert optimizer.masters == optimizer.optimizer == optimizer.gradients == 0
    assert optimizer.host == (4 + 8 + 4) * mine
    # The other way round.
    parameters = estimate(replace(here, offload_parameters=True))
    assert parameters.weights == 0
    assert (parameters.masters, parameters.optimizer) == (4 * mine, 8 * mine)
    assert parameters.gradients == 2 * mine
    assert parameters.host == 2 * mine
    # Only stage 3 has weights in parts, to keep them elsewhere.
    second = replace(here, strategy="zero2")
    assert estimate(replace(second, offload_parameters=True)) == estimate(second)


def test_frozen_parameters_have_weights_only() -> None:
    def head_only(name: str) -> bool:
        return name.startswith("classifier")

    found = estimate(_request(_bert(), trainable=head_only))
    trained = 768 * 2 + 2
    assert (found.gradients, found.optimizer) == (4 * trained, 8 * trained)
    assert found.weights == 4 * 109_483_778


def _without(*prefixes: str) -> Callable[[str], bool]:
    return lambda name: not name.startswith(prefixes)


def test_what_lies_before_the_first_trained_tensor_keeps_nothing() -> None:
    whole = _request(_bert(), micro_batch=4, length=128)
    frozen = ["bert.embeddings."]
    kept = [estimate(replace(whole, trainable=_without(*frozen))).activations]
    for number in range(12):
        frozen.append(f"bert.encoder.layer.{number}.")
        kept.append(estimate(replace(whole, trainable=_without(*frozen))).activations)
    # Of the embeddings' norm the input of 4 bytes, and a byte of dropout's mask, of 4 · 128 · 768 elements.
    assert estimate(whole).activations - kept[0] == 5 * 4 * 128 * 768
    # Each layer as much as any other.
    steps = {before - after for before, after in pairwise(kept[:-1])}
    assert len(steps) == 1
    # The head sees a token of each row: what `output` counts of 768 in and 2 out.
    assert kept[-1] == 12 * 4 * 2 + 8 * 4 * 768


def test_a_frozen_base_has_no_copy_in_bf16() -> None:
    base = estimate(_request(_bert(), precision="bf16", micro_batch=1, trainable=_without("bert.")))
    assert base.activations == 12 * 2 + 8 * 768 + 2 * 2 * 768  # that of the head's own weight

    # What a gradient passes on its way needs it, trained or not: all matrices of the last two layers.
    def norm_of_the_last_but_one(name: str) -> bool:
        return name == "bert.encoder.layer.10.attention.output.LayerNorm.weight"

    some = _request(_bert(), trainable=norm_of_the_last_but_one)
    in_fp32 = estimate(some).activations
    copied = estimate(replace(some, precision="bf16")).activations
    widths = estimate(replace(some, precision="bf16", strategy="zero2")).activations
    assert in_fp32 > widths
    assert copied > 2 * 2 * (4 * 768 * 768 + 2 * 768 * 3072)


def test_the_gradient_of_a_frozen_weight_needs_no_place() -> None:
    # 30,522 · 768 of the embeddings' are the largest; without them a layer's 768 · 3,072.
    whole, some = (
        estimate(_request(_bert(), trainable=each)) for each in (None, _without("bert.embeddings."))
    )

    def end(found: MemoryEstimate) -> int:
        held = found.weights + found.gradients + found.optimizer + found.framework
        return found.phases["end of backward"] - held

    assert end(whole) == 4 * 30_522 * 768
    assert end(some) == 4 * 768 * 3_072


def test_the_peak_is_the_most_of_the_phases() -> None:
    found = estimate(_request(_bert()))
    assert found.peak == max(found.phases.values())
    assert found.tensors == found.peak - found.framework


def test_more_never_takes_less() -> None:
    request = _request(_bert(), micro_batch=16, length=256, accelerator="cpu")
    peak = estimate(request).peak
    assert estimate(replace(request, micro_batch=32)).peak > peak
    assert estimate(replace(request, length=512)).peak > peak
    assert estimate(replace(request, gradient_checkpointing=True)).peak < peak


def test_a_bound_is_marked() -> None:
    config = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100}
    unknown = read_architecture({"model_type": "new", **config}, head="causal-lm")
    assert estimate(_request(unknown)).is_bound
    assert not estimate(_request(_bert())).is_bound


def test_a_bound_has_logits_as_a_whole() -> None:
    """A family that scales or caps its logits is asked for all of them, in fp32 with their gradients."""
    config = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 200_000}
    unknown = read_architecture({"model_type": "new", **config}, head="causal-lm")
    request = _request(unknown, micro_batch=16, length=512)
    assert estimate(request).activations > 3 * 4 * 16 * 512 * 200_000


@pytest.mark.parametrize("capacity", [3 * _GIB, 8 * _GIB, 80 * _GIB])
def test_the_largest_micro_batch_is_the_last_that_fits(capacity: int) -> None:
    request = _request(_bert(), length=512)
    rows = largest_micro_batch(request, capacity, 64)
    if rows > 0:
        assert estimate(replace(request, micro_batch=rows)).peak <= capacity
    if rows < 64:
        assert estimate(replace(request, micro_batch=rows + 1)).peak > capacity
    assert largest_micro_batch(request, 0, 64) == 0


@pytest.mark.parametrize(
    "wrong",
    [{"strategy": "fsdp"}, {"precision": "fp8"}, {"world_size": 0}, {"micro_batch": 0}],
)
def test_numbers_that_no_job_has_are_a_mistake_of_the_caller(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        estimate(_request(_bert(), **wrong))


def test_accelerators_have_larger_pieces_of_logits() -> None:
    # 512 tokens, 128,256 logits each. On a CPU 261 are a piece (2^25 / 128,256 = 261.6), and the first is
    # still there when the other 251 have their logits and as much for the normaliser. On accelerators
    # 512 are one piece. fp32.
    found = {
        kind: estimate(_request(_llama_70b(), length=512, accelerator=kind)).logits
        for kind in ("cpu", "cuda")
    }
    assert found["cuda"] - found["cpu"] == (2 * 512 - (261 + 2 * 251)) * 4 * 128_256
