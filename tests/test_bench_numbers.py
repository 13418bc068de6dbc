"""The arithmetic of `ftlaunch bench`, by hand: floating point operations, shares, efficiencies, cells."""

from __future__ import annotations

import pytest

from ftlaunch.cluster.errors import UserError
from ftlaunch.launcher.bench_cells import Cell, make_cells, read_names, read_nodes, rounds
from ftlaunch.launcher.bench_report import (
    CellResult,
    cell_json,
    efficiency,
    mean_shares,
    run_utilisation,
    spread,
    table_lines,
)
from ftlaunch.strategies.flops import (
    Shape,
    Weight,
    is_countable,
    read_shape,
    step_flops,
    utilisation,
)
from ftlaunch.strategies.instruments import make_shares, split_waits
from ftlaunch.strategies.progress import Measured, from_dict, to_dict

# -- operations ---------------------------------------------------------------------------------


def weights(*trained, kinds=("embedding", "token", "token", "token")):
    """An embedding of 1000 elements, two layers of 10 and 20, a classifier of 5."""
    names = ("embeddings.weight", "encoder.layer.0.dense", "encoder.layer.1.dense", "classifier")
    return [
        Weight(name=name, size=size, kind=kind, trained=flag)
        for name, size, kind, flag in zip(names, (1000, 10, 20, 5), kinds, trained, strict=True)
    ]


SHAPE = Shape(num_layers=2, width=4)


def test_everything_trained():
    # 6 · 35 weights · 5 tokens = 1050; attention 12 · 2 layers · 4 · (2² + 3²) = 1248.
    assert step_flops(weights(True, True, True, True), SHAPE, [2, 3], 5) == 1050 + 1248


def test_a_frozen_body_is_passed_forward_only():
    # 2 · 30 · 5 = 300 for the layers, 6 · 5 · 5 = 150 for the classifier; 4 · 2 · 4 · 13 = 416.
    assert step_flops(weights(False, False, False, True), SHAPE, [2, 3], 5) == 300 + 150 + 416


def test_gradients_pass_through_what_is_frozen_behind_what_is_trained():
    # The embedding and the classifier are trained: 4 · 30 · 5 = 600, and 6 · 5 · 5 = 150, and all
    # attention backward as well.
    assert step_flops(weights(True, False, False, True), SHAPE, [2, 3], 5) == 600 + 150 + 1248


def test_half_of_the_layers_frozen():
    # Layer 0: 2 · 10 · 5; layer 1: 6 · 20 · 5; the classifier 6 · 5 · 5.
    # Attention: layer 0 forward, 4 · 4 · 13 = 208; layer 1 whole, 12 · 4 · 13 = 624.
    found = step_flops(weights(False, False, True, True), SHAPE, [2, 3], 5)
    assert found == 100 + 600 + 150 + 208 + 624


def test_an_output_layer_is_multiplied_with_the_tokens_that_are_learned():
    kinds = ("head", "token", "token", "token")
    # The tied embedding: 6 · 1000 · 2 tokens that are learned of 5.
    found = step_flops(weights(True, True, True, True, kinds=kinds), SHAPE, [5], 2)
    assert found == 12_000 + 1050 + 12 * 2 * 4 * 25


def test_gradients_pass_through_a_frozen_output_layer():
    # It is tied to the embedding, which comes first: 4 · 1000 · 2 tokens that are learned of 5. Of the
    # layers, 2 · 10 · 5 and 6 · 20 · 5, the last weight 4 · 5 · 5; attention 4 and 12 times 4 · 25.
    kinds = ("head", "token", "token", "token")
    found = step_flops(weights(False, False, True, False, kinds=kinds), SHAPE, [5], 2)
    assert found == 8000 + 100 + 600 + 100 + 400 + 1200


def test_nothing_trained_needs_nothing():
    assert step_flops(weights(False, False, False, False), SHAPE, [5], 5) == 0


def test_experts_count_as_far_as_a_token_uses_them():
    shape = Shape(num_layers=1, width=4, expert_share=0.25)
    expert = Weight(name="layers.0.mlp.experts.0.up", size=40, kind="token", trained=True)
    first = Weight(name="embed", size=8, kind="embedding", trained=True)
    # 6 · 10 of 40 · 3 tokens, and attention 12 · 4 · 9.
    assert step_flops([first, expert], shape, [3], 3) == 180 + 432


@pytest.mark.parametrize(
    ("share", "name", "known"),
    [
        (None, "layers.0.mlp.up", True),
        (0.25, "layers.0.mlp.experts.0.up", True),
        (1.0, "layers.0.mlp.up", True),
        # How many a token uses is not known.
        (None, "layers.0.mlp.experts.0.up", False),
        # Which weights are the experts' is not known.
        (0.25, "layers.0.moe.input_linear", False),
    ],
)
def test_what_is_not_known_of_experts_is_not_counted(share, name, known):
    weight = Weight(name=name, size=40, kind="token", trained=True)
    assert is_countable([weight], Shape(num_layers=1, width=4, expert_share=share)) is known


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"num_hidden_layers": 2, "hidden_size": 8}, Shape(num_layers=2, width=8)),
        ({"n_layer": 3, "n_embd": 16, "n_head": 2}, Shape(num_layers=3, width=16)),
        (
            {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 3, "head_dim": 4},
            Shape(num_layers=2, width=12),
        ),
        (
            {
                "num_hidden_layers": 1,
                "hidden_size": 8,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
            },
            Shape(num_layers=1, width=8, expert_share=0.25),
        ),
        (
            {"num_hidden_layers": 1, "hidden_size": 8, "num_experts": 8},
            Shape(num_layers=1, width=8),
        ),
        ({"num_hidden_layers": -1, "hidden_size": 8}, None),
        ({"num_hidden_layers": "many", "hidden_size": True}, None),
        ({}, None),
    ],
)
def test_what_config_json_says_of_attention(config, shape):
    assert read_shape(config) == shape


def test_utilisation():
    # 600 operations in 2 s on two devices of 100 and 200 a second: 300 of 300.
    assert utilisation(600, 2.0, [100, 200]) == pytest.approx(1.0)
    assert utilisation(600, 2.0, []) is None


# -- shares -------------------------------------------------------------------------------------


def test_the_last_to_come_waits_for_the_collective_alone():
    # First collective: rank 1 came last and waited 0.1, so rank 0 waited 0.3 for it. Second: the other way.
    found = split_waits([[0.4, 0.2], [0.1, 0.7]])
    assert found == [pytest.approx((0.3, 0.3)), pytest.approx((0.3, 0.5))]


def test_shares_sum_to_one():
    # 10 s, of which 8 within the strategy: 1 communication, 2 idle, so 5 of computing.
    shares = make_shares(10.0, 8.0, 1.0, 2.0)
    assert (shares.compute, shares.communication) == (0.5, 0.1)
    assert [shares.data, shares.idle] == pytest.approx([0.2, 0.2])


@pytest.mark.parametrize("numbers", [(0, 0, 0, 0), (1, 2, 3, 4), (5, 4, 9, 9), (1, -1, 2, 0)])
def test_shares_stay_shares_when_clocks_are_coarse(numbers):
    shares = make_shares(*map(float, numbers))
    parts = (shares.compute, shares.communication, shares.data, shares.idle)
    assert sum(parts) == pytest.approx(1.0)
    assert all(0 <= part <= 1 for part in parts)


# -- what runs come to --------------------------------------------------------------------------


def measured(tokens, *, seconds=2.0, ranks=1, flops=600.0):
    rank = {
        "compute": 0.5,
        "communication": 0.2,
        "data": 0.2,
        "idle": 0.1,
        "peak_flops_per_second": 1000.0,
        "peak_memory_bytes": 1.0,
    }
    return Measured(
        step_seconds=(0.5, 1.5),
        seconds=seconds,
        num_samples=10,
        num_tokens=tokens,
        num_padded_tokens=2 * tokens,
        skipped_steps=0,
        model_flops=flops,
        ranks=(rank,) * ranks,
        share_steps=2,
    )


def cell(nodes, scaling="base"):
    return Cell(nodes=nodes, strategy="ddp", precision="fp32", scaling=scaling)


def test_efficiencies():
    base = CellResult(cell=cell(1), runs=[measured(100), measured(120), measured(500)])
    strong = CellResult(cell=cell(4, "strong"), runs=[measured(360, ranks=4)])
    weak = CellResult(cell=cell(4, "weak"), runs=[measured(960, seconds=4.0, ranks=4)])
    # The median of the base is 60 tokens/s. Strong: 180 by 4 ranks, 45 each; weak: 240, 60 each.
    assert efficiency(base, base) == 1.0
    assert efficiency(base, strong) == pytest.approx(0.75)
    assert efficiency(base, weak) == pytest.approx(1.0)
    assert efficiency(CellResult(cell=cell(1), why="no"), strong) is None


def test_a_spread_is_median_lowest_and_highest():
    assert spread([3.0, 1.0, 2.0, 9.0]).to_json() == {"median": 2.5, "lowest": 1.0, "highest": 9.0}


def test_utilisation_of_a_run():
    # 600 operations in 2 s on 3 ranks of 1000 a second: 10 %.
    assert run_utilisation(measured(10, ranks=3)) == pytest.approx(0.1)
    assert run_utilisation(measured(10, flops=None)) is None


def test_the_table_and_the_json():
    results = [
        CellResult(cell=cell(1), runs=[measured(100)]),
        CellResult(cell=cell(2, "strong"), why="rank 1: out of memory", log_path="log"),
    ]
    group, header, base, failed, why = table_lines(results)
    assert group == "ddp, fp32"
    assert "strategy" not in header
    assert header.split()[:3] == ["nodes", "ranks", "scaling"]
    assert "50 %" in base or "50.0 %" in base
    assert "failed" in failed
    assert why == "ddp-fp32-strong-2 failed: rank 1: out of memory"
    content = cell_json(results, results[0])
    assert content["tokens_per_second"] == {"median": 50.0, "lowest": 50.0, "highest": 50.0}
    assert content["step_seconds"]["of_steps"] == {"median": 1.0, "lowest": 0.5, "highest": 1.5}
    assert content["padding_share"] == pytest.approx(0.5)
    assert content["efficiency"] == 1.0
    assert cell_json(results, results[1])["failure"] == {
        "why": "rank 1: out of memory",
        "log": "log",
    }
    assert mean_shares([measured(1), measured(2, ranks=3)])["compute"] == pytest.approx(0.5)


def test_what_is_measured_travels_as_it_is():
    message = measured(10, ranks=2)
    assert from_dict(to_dict(message)) == message


# -- cells --------------------------------------------------------------------------------------


def test_cells_of_a_grid():
    cells = make_cells((1, 2), ("ddp", "zero2"), ("fp32",))
    assert [each.name for each in cells] == [
        "ddp-fp32-base-1",
        "ddp-fp32-strong-2",
        "ddp-fp32-weak-2",
        "zero2-fp32-base-1",
        "zero2-fp32-strong-2",
        "zero2-fp32-weak-2",
    ]
    assert [each.name for _, each in rounds(cells[:2], 2)] == [
        "ddp-fp32-base-1",
        "ddp-fp32-strong-2",
    ] * 2


def test_nodes_come_in_their_order():
    assert read_nodes("4, 1,2") == (1, 2, 4)
    assert read_nodes(None) == ()


@pytest.mark.parametrize("text", ["", "0", "1,,2", "-1", "1.5", "a", "1,1", "99999999", "1;2", "²"])
def test_nodes_that_are_none(text):
    with pytest.raises(UserError, match="--nodes"):
        read_nodes(text)


@pytest.mark.parametrize("text", ["", "ddp,", "ddp,ddp"])
def test_names_that_are_none(text):
    with pytest.raises(UserError, match="--strategy"):
        read_names("--strategy", text)


def test_unknown_names_of_a_grid():
    with pytest.raises(UserError, match=r"no strategy 'zero9'"):
        make_cells((1,), ("ddp", "zero9"), ("fp32",))
    with pytest.raises(UserError, match=r"no precision 'fp8'"):
        make_cells((1,), ("ddp",), ("fp32", "fp8"))
