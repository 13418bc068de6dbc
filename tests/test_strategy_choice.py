"""Which strategy a plan chooses by memory, what it says of the others, and what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.machine import Machine
from ftlaunch.launcher.config import load_config
from ftlaunch.launcher.hardware import HARDWARE, assume
from ftlaunch.launcher.job_memory import JobMemory, read_job_memory
from ftlaunch.launcher.memory_table import MemoryRow
from ftlaunch.launcher.plan import LaunchPlan, make_plan
from ftlaunch.launcher.site import find_site
from ftlaunch.strategies.memory import encoders
from tests.model_configs import BERT_BASE, LLAMA_1B, LLAMA_70B, PARAMETERS_70B, write_json

# Of an accelerator so much is counted on.
USABLE = 0.97
GIB = 1 << 30
A_LOT = 1 << 50
ROOMY = replace(HARDWARE["H100-80GB"], memory_bytes=A_LOT)


@pytest.fixture
def plan(tmp_path):
    """plan(config.json's content, device memory, overrides…, flags…) on 8 GPUs of one node."""

    def make(content=LLAMA_1B, memory_bytes=A_LOT, *overrides, change=None, **flags) -> LaunchPlan:
        write_json(tmp_path, content)
        config = load_config(
            file=None,
            flags={"model": str(tmp_path), "task": "causal-lm", **flags},
            overrides=["train.per_device_train_batch_size=1", *overrides],
            data_optional=True,
        )
        site, machines = assume(config.cluster, replace(ROOMY, memory_bytes=memory_bytes))
        if change is not None:
            machines = [change(machine) for machine in machines]
        return make_plan(config, machines, site, output_dir="", memory=read_job_memory(config))

    return make


def rows_of(plan: LaunchPlan) -> dict[str, MemoryRow]:
    assert plan.memory is not None
    return {row.label: row for row in plan.memory.rows}


def why(plan: LaunchPlan, choice: str) -> str:
    [reason] = [reason for reason in plan.reasons if reason.choice == choice]
    return f"{reason.value} {reason.why}"


def enough_for(row: MemoryRow) -> int:
    """Memory of a device that just holds it."""
    return int(row.peak / USABLE) + 1024


ON_DEVICE = ("ddp", "zero1", "zero2", "zero3")


def all_ways(plan) -> dict[str, MemoryRow]:
    """Every way of the model, seen where hardly anything fits but in the host's memory."""
    return rows_of(plan(LLAMA_1B, GIB, strategy="ddp", change=roomy_host))


# -- the choice ---------------------------------------------------------------------------------


def test_ddp_where_it_fits(plan):
    made = plan()
    assert (made.strategy, made.options) == ("ddp", made.options)
    assert made.options.model.gradient_checkpointing is None
    assert [row.label for row in made.memory.rows] == list(ON_DEVICE)
    assert [row.chosen for row in made.memory.rows] == [True, False, False, False]
    assert all(row.fits for row in made.memory.rows)


@pytest.mark.parametrize("strategy", ON_DEVICE)
def test_the_first_that_fits(plan, strategy):
    rows = rows_of(plan())
    needs = [rows[name].peak for name in ON_DEVICE]
    assert needs == sorted(needs, reverse=True)
    made = plan(LLAMA_1B, enough_for(rows[strategy]))
    assert made.strategy == strategy
    assert made.options.model.gradient_checkpointing is None
    number = ON_DEVICE.index(strategy)
    shown = rows_of(made)
    assert [shown[name].fits for name in ON_DEVICE] == [n >= number for n in range(4)]
    # By how much the others do not fit.
    usable = made.memory.usable
    assert [shown[name].lacking for name in ON_DEVICE] == [max(0, n - usable) for n in needs]
    if number:
        assert f"nothing faster fits: {ON_DEVICE[number - 1]} needs" in why(made, "strategy")
        assert "in 8 parts" in why(made, "strategy")


def test_a_byte_less_is_not_enough(plan):
    needed = rows_of(plan())["ddp"].peak
    assert plan(LLAMA_1B, int(needed / USABLE) + 2).strategy == "ddp"
    assert plan(LLAMA_1B, int(needed / USABLE) - 1).strategy == "zero1"


def test_checkpointing_only_where_nothing_fits_on_the_devices_without(plan):
    rows = all_ways(plan)
    [most, least] = rows["zero3"].peak, rows["zero3 + checkpointing"].peak
    assert least < most
    made = plan(LLAMA_1B, int((least + most) / 2 / USABLE))
    chosen = made.memory.chosen
    assert (chosen.gradient_checkpointing, chosen.offload) == (True, False)
    assert made.options.model.gradient_checkpointing is True
    assert "fits on the devices alone without" in why(made, "checkpointing")


def roomy_host(machine: Machine) -> Machine:
    return replace(machine, memory_bytes=A_LOT)


def test_offload_comes_last(plan):
    rows = all_ways(plan)
    room = enough_for(rows["zero3 + offload"])
    sooner = [row.label for row in rows.values() if not row.offload and enough_for(row) <= room]
    assert sooner == [], "then it would not come last"
    made = plan(LLAMA_1B, room, change=roomy_host)
    assert (made.strategy, made.options.deepspeed.offload) == ("zero3", "cpu")
    assert made.options.model.gradient_checkpointing is None
    assert "in the host's memory" in why(made, "offload")
    assert made.memory.chosen.host > 12 * made.memory.num_parameters / 8


@pytest.mark.parametrize("what", ["optimizer", "param"])
def test_a_deepspeed_file_offloads_one_of_the_two(plan, tmp_path, what):
    place = {f"offload_{what}": {"device": "cpu"}}
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, **place}}))
    made = plan(LLAMA_1B, A_LOT, f"deepspeed.config={file}")
    row = made.memory.chosen
    mine = -(-made.memory.num_parameters // 8)
    assert (made.strategy, made.precision, row.offload) == ("zero3", "bf16", True)
    assert row.weights == (2 * mine if what == "optimizer" else 0)
    assert row.masters == (4 * mine if what == "param" else 0)
    assert row.host == (16 * mine if what == "optimizer" else 2 * mine)


def test_offload_needs_the_hosts_memory(plan):
    row = all_ways(plan)["zero3 + offload"]
    room = enough_for(row)
    # 8 ranks share a host, of which four fifths are counted on.
    enough = int(8 * row.host / 0.8)

    def with_host(memory_bytes):
        return plan(
            LLAMA_1B,
            room,
            "model.gradient_checkpointing=false",
            change=lambda machine: replace(machine, memory_bytes=memory_bytes),
        )

    assert with_host(enough + 64).memory.chosen.offload
    with pytest.raises(UserError, match="in the host's memory"):
        with_host(enough - 64)


def test_what_the_user_says_of_checkpointing_stays(plan):
    rows = all_ways(plan)
    room = enough_for(rows["zero3 + checkpointing"])
    with pytest.raises(UserError, match="do not fit"):
        plan(LLAMA_1B, room, "model.gradient_checkpointing=false", "deepspeed.offload=none")
    made = plan(LLAMA_1B, A_LOT, "model.gradient_checkpointing=true")
    assert [row.label for row in made.memory.rows] == [f"{n} + checkpointing" for n in ON_DEVICE]
    assert made.strategy == "ddp"


def test_what_the_user_chooses_is_run_with_a_warning(plan):
    made = plan(LLAMA_1B, 2 * GIB, "deepspeed.offload=none", strategy="zero1")
    assert made.strategy == "zero1"
    assert made.options.model.gradient_checkpointing is None
    [line] = [line for line in made.describe() if line.startswith("warning")]
    assert re.search(r"zero1 does not fit by the estimate: .* GiB, and 1\.94 are counted on", line)


def test_a_strategy_by_name_gets_checkpointing_where_it_helps(plan):
    made = plan(LLAMA_1B, enough_for(all_ways(plan)["zero1 + checkpointing"]), strategy="zero1")
    assert (made.strategy, made.options.model.gradient_checkpointing) == ("zero1", True)
    assert "zero1 does not fit without" in why(made, "checkpointing")
    assert made.describe()[-1].startswith("memory")


def test_offload_without_a_strategy_is_refused_as_ever(plan):
    with pytest.raises(UserError, match=r"deepspeed\.offload is set, but the strategy is ddp"):
        plan(LLAMA_1B, GIB, "deepspeed.offload=cpu")


def test_offload_is_not_taken_where_it_was_excluded(plan):
    least = all_ways(plan)["zero3 + checkpointing"]
    message = r"smallest cluster that would hold it: \d+ such nodes"
    with pytest.raises(UserError, match=message) as error:
        plan(LLAMA_1B, enough_for(least) - 4096, "deepspeed.offload=none")
    assert "offload" not in str(error.value)


def test_without_deepspeed_it_is_said_what_would_fit(plan):
    def bare(machine: Machine) -> Machine:
        versions = {k: v for k, v in machine.versions.items() if k != "deepspeed"}
        return replace(machine, versions=versions)

    assert plan(LLAMA_1B, A_LOT, change=bare).strategy == "ddp"
    room = enough_for(rows_of(plan())["zero2"])
    message = r"no strategy that is installed fits: zero\d would.* deepspeed is not installed.*pip"
    with pytest.raises(UserError, match=message):
        plan(LLAMA_1B, room, "model.gradient_checkpointing=false", change=bare)
    # Of two that fit the one that is there: it computes its activations twice.
    made = plan(LLAMA_1B, enough_for(rows_of(plan())["ddp"]), change=bare)
    assert made.strategy == "ddp"


def test_where_nobody_knows_the_memory_nothing_changes(plan):
    made = plan(LLAMA_1B, 0)
    assert made.strategy == "ddp"
    assert made.memory.capacity == 0
    assert not any(row.lacking for row in made.memory.rows)
    assert "how much a rank has is not known" in "\n".join(made.memory_lines())


# -- what fits nowhere --------------------------------------------------------------------------


def test_the_smallest_cluster_is_named_and_would_hold_it(plan):
    """One node less would not."""

    def with_nodes(nodes):
        flags = ["train.global_batch_size=1024", "deepspeed.offload=none"]
        return plan(LLAMA_70B, 24 * GIB, *flags, nodes=nodes)

    with pytest.raises(UserError, match="smallest cluster") as error:
        with_nodes(1)
    found = re.search(
        r"hold it: (\d+) such nodes with 8 rank\(s\) each, zero3 \+ checkp", str(error.value)
    )
    assert found is not None, error.value
    nodes = int(found[1])
    assert f"--nodes {nodes}" in str(error.value)
    assert f"{PARAMETERS_70B:,} parameters" in str(error.value)
    assert with_nodes(nodes).strategy == "zero3"
    with pytest.raises(UserError, match=f"hold it: {nodes} such nodes"):
        with_nodes(nodes - 1)


def test_more_ranks_than_samples_are_named(plan):
    with pytest.raises(UserError, match=r"So many ranks need train\.global_batch_size=\d+ or more"):
        plan(LLAMA_70B, 24 * GIB, "deepspeed.offload=none")


def test_what_no_number_of_devices_holds(plan):
    """A row that is too long for one device is so on any number of them."""
    with pytest.raises(UserError, match=r"No number of such devices.*smaller data\.max_length"):
        plan(LLAMA_70B, 4 * GIB, "data.max_length=131072")


# -- what is not known --------------------------------------------------------------------------


def test_an_unknown_family_gives_a_bound_that_is_marked(plan):
    made = plan({**LLAMA_1B, "model_type": "zebra"})
    assert made.memory.is_bound
    text = "\n".join([*made.describe(), *made.memory_lines()])
    assert "the family 'zebra' is not known" in text
    assert "every number is an upper bound" in text
    assert why(made, "memory").startswith("at most ")


def test_a_known_family_without_the_head_is_not_called_unknown(plan):
    made = plan(LLAMA_1B, A_LOT, task="masked-lm")
    assert made.memory.is_bound
    note = "a bound: 'llama' is not known here with a head for masked-lm"
    assert note in why(made, "memory")
    assert f"{note}: every number is an upper bound" in made.memory_lines()


def test_an_encoder_that_is_to_predict_what_it_sees_is_refused(plan):
    """As the ranks would refuse it; one that is told to be a decoder reads from left to right."""
    for family in encoders.FAMILIES:
        with pytest.raises(UserError, match=f"'{family}' model, which reads in both directions"):
            plan({**BERT_BASE, "model_type": family})
    made = plan({**BERT_BASE, "is_decoder": True})
    assert "'bert' is not known here with a head for causal-lm" in why(made, "memory")


def test_a_bound_refuses_nothing(plan):
    """The most frugal way is tried, and where the bound itself would fit is said."""
    zebra = {**LLAMA_70B, "model_type": "zebra"}
    made = plan(zebra, 40 * GIB)
    lacking = {row.label: row.lacking + row.host_lacking for row in made.memory.rows}
    assert made.memory.chosen.label == "zero3 + offload" == min(lacking, key=lambda n: lacking[n])
    assert (made.strategy, made.options.deepspeed.offload) == ("zero3", "cpu")
    assert "nothing fits for sure, and this lacks least" in why(made, "strategy")
    [line] = [line for line in made.describe() if line.startswith("warning")]
    assert "zero3 + offload does not fit by the estimate: a rank needs at most " in line
    assert line.endswith("It is started all the same: an estimate is no measurement.")


def test_a_bound_names_the_smallest_cluster_and_fits_there(plan):
    zebra, flags = {**LLAMA_70B, "model_type": "zebra"}, ("train.global_batch_size=1024",)
    made = plan(zebra, 80 * GIB, *flags)
    [line] = [line for line in made.describe() if line.startswith("warning")]
    found = re.search(
        r"The smallest cluster that would hold it: (\d+) such nodes with 8 rank", line
    )
    assert found is not None, line
    nodes = int(found[1])
    assert plan(zebra, 80 * GIB, *flags, nodes=nodes).memory.warnings == ()
    assert f"{nodes} such nodes" in plan(zebra, 80 * GIB, *flags, nodes=nodes - 1).describe()[-1]


def test_a_bound_chooses_among_what_is_installed_and_left_to_us(plan):
    def bare(machine: Machine) -> Machine:
        versions = {k: v for k, v in machine.versions.items() if k != "deepspeed"}
        return replace(machine, versions=versions)

    zebra = {**LLAMA_70B, "model_type": "zebra"}
    assert plan(zebra, 4 * GIB, change=bare).strategy == "ddp"
    room = enough_for(rows_of(plan({**LLAMA_1B, "model_type": "zebra"}))["zero3"])
    made = plan({**LLAMA_1B, "model_type": "zebra"}, room, change=bare)
    assert made.strategy == "ddp"
    assert "zero3 would fit, but deepspeed is not installed" in made.memory.warnings[0]
    asked = plan(zebra, 4 * GIB, strategy="ddp")
    assert asked.strategy == "ddp"
    assert "smallest cluster" not in asked.memory.warnings[0]


def test_a_bound_chooses_but_does_not_switch_checkpointing_on(plan):
    unknown = {**LLAMA_1B, "model_type": "zebra"}
    room = enough_for(rows_of(plan(unknown))["zero3"])
    assert plan(unknown, room).strategy == "zero3"
    for size in (room // 2, room // 4, GIB):
        assert plan(unknown, size).options.model.gradient_checkpointing is None


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        {"model_type": 3},
        {**LLAMA_1B, "hidden_size": "many"},
        {**LLAMA_1B, "hidden_size": -1},
        {**LLAMA_1B, "num_hidden_layers": 10**30},
        {**LLAMA_1B, "num_attention_heads": 0},
        {**LLAMA_1B, "vocab_size": None},
        {**LLAMA_1B, "max_position_embeddings": "long"},
        {**LLAMA_1B, "id2label": {"a": "b", "c": "d"}},
        {"model_type": "zebra", "hidden_size": [1]},
        {**LLAMA_1B, "model_type": "zebra\ud800"},
        {**LLAMA_1B, "attention_dropout": 10**400},
        {"model_type": "roberta", "max_position_embeddings": 1},
        {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 10**400},
    ],
    ids=lambda content: repr(content)[:80],
)
def test_a_configuration_that_is_nonsense_leaves_the_rest_of_the_plan(plan, content):
    """Whoever loads the model says what is wrong with it; a plan says why it has no estimate."""
    # An encoder is refused for causal-lm before anything else is looked at.
    task = "masked-lm" if "roberta" in repr(content) else "causal-lm"
    made = plan(content, task=task)
    assert made.strategy == "ddp"
    json.dumps(made.to_json(), ensure_ascii=False).encode()
    if made.memory.why_not:
        assert made.memory_lines() == [f"memory is not estimated: {made.memory.why_not}"]
        assert "not known" in why(made, "memory")


@pytest.mark.parametrize(
    "key",
    [
        "data.max_length",
        "lora.r",
        "train.global_batch_size",
        "train.per_device_train_batch_size",
        "train.max_tokens_per_micro_batch",
    ],
)
def test_a_number_beyond_all_sense_is_planned_or_refused(plan, key):
    """It is beyond floats, too. All at once or one at a time, there is no other end than these two."""
    unlimited = {k: v for k, v in LLAMA_1B.items() if k != "max_position_embeddings"}
    overrides = [f"{key}=1{'0' * 400}"]
    if key == "train.per_device_train_batch_size":
        overrides.append(f"train.global_batch_size=1{'0' * 400}")
    for strategy in ("auto", "zero2"):
        try:
            made = plan(unlimited, 24 * GIB, *overrides, strategy=strategy)
        except UserError as error:
            assert "do not fit on" in str(error)
        else:
            assert made.describe()
            assert made.memory_lines()


def test_a_name_that_no_file_can_have_is_no_model_of_the_hub(tmp_path):
    config = load_config(file=None, flags={"model": "a" * 300}, overrides=[], data_optional=True)
    assert "is not in the hub's cache" in read_job_memory(config).why_not


def test_a_file_that_is_no_json(plan, tmp_path):
    plan()
    for raw in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000):
        (tmp_path / "config.json").write_bytes(raw)
        config = load_config(
            file=None, flags={"model": str(tmp_path)}, overrides=[], data_optional=True
        )
        known = read_job_memory(config)
        assert known.architecture is None
        assert "config.json" in known.why_not


def test_rows_longer_than_the_model_takes(plan):
    with pytest.raises(UserError, match=r"Rows of up to 513 tokens.*takes 512 at most"):
        plan(BERT_BASE, A_LOT, "data.max_length=513", task="masked-lm")
    made = plan(BERT_BASE, A_LOT, "data.max_length=512", task="masked-lm")
    assert made.memory.length == 512


def test_the_longest_row_that_nobody_set(plan):
    assert plan(LLAMA_1B).memory.length == 512
    short = {**BERT_BASE, "max_position_embeddings": 64}
    assert plan(short, A_LOT, task="masked-lm").memory.length == 64


# -- the micro-batch ----------------------------------------------------------------------------


def test_the_micro_batch_is_what_it_was_where_memory_suffices(plan):
    auto = "train.per_device_train_batch_size=null"
    made = plan(BERT_BASE, A_LOT, auto, "train.global_batch_size=256", task="masked-lm")
    assert (made.micro_batch, made.max_tokens_per_micro_batch, made.accumulation) == (32, None, 1)
    assert made.memory.chosen.micro_batch == 32


def test_the_largest_micro_batch_that_fits(plan):
    settings = ["train.per_device_train_batch_size=null", "train.global_batch_size=256"]
    rows = {
        n: plan(
            LLAMA_1B,
            A_LOT,
            f"train.per_device_train_batch_size={n}",
            "train.global_batch_size=256",
            strategy="ddp",
        )
        for n in (5, 6)
    }
    five, six = (rows[n].memory.chosen.peak for n in (5, 6))
    assert five < six
    made = plan(LLAMA_1B, int((five + six) / 2 / USABLE), *settings, strategy="ddp")
    assert made.memory.chosen.micro_batch == 5
    # 5 rows of the longest length; of shorter ones there may be more.
    assert made.max_tokens_per_micro_batch == 5 * 512
    assert "holds 5 of 512 tokens" in why(made, "tokens")


def test_no_bound_in_tokens_leaves_the_samples_to_memory(plan):
    """It fixes no number of them: the strategy is the same, and so many are computed as fit."""
    settings = ["train.per_device_train_batch_size=null", "train.global_batch_size=256"]
    one = plan(LLAMA_1B, A_LOT, "train.global_batch_size=256").memory.chosen
    room = enough_for(one) + (2 << 30)
    usual = plan(LLAMA_1B, room, *settings)
    made = plan(LLAMA_1B, room, *settings, "train.max_tokens_per_micro_batch=0")
    assert made.strategy == usual.strategy == "ddp"
    rows = made.memory.chosen.micro_batch
    assert 1 <= rows == usual.memory.chosen.micro_batch < 32
    assert (usual.micro_batch, usual.max_tokens_per_micro_batch) == (32, rows * 512)
    assert made.max_tokens_per_micro_batch is None
    # 32 samples a rank in as few pieces as memory allows, all of about one size.
    assert made.accumulation == -(-32 // rows)
    assert made.micro_batch <= rows
    assert f"the memory of a device holds {rows} of 512 tokens" in why(made, "micro-batch")


def test_the_users_own_micro_batch_is_not_lowered(plan):
    set_by_user = ["train.per_device_train_batch_size=32", "train.global_batch_size=256"]
    peak = plan(LLAMA_1B, A_LOT, *set_by_user, strategy="ddp").memory.chosen.peak
    made = plan(
        LLAMA_1B,
        peak // 2,
        *set_by_user,
        "model.gradient_checkpointing=false",
        strategy="ddp",
    )
    assert made.micro_batch == 32
    assert made.memory.chosen.micro_batch == 32
    assert any(line.startswith("warning: ddp does not fit") for line in made.describe())


def test_buckets_are_as_large_as_deepspeeds_configuration_says(plan):
    """Two that take turns and one on its way, of a million gradients in bf16: 6 MB."""

    def buckets(**settings):
        text = json.dumps({"zero_optimization": {"stage": 2, **settings}})
        return plan(LLAMA_1B, A_LOT, f"deepspeed.config={text}").memory.chosen.buckets

    assert buckets(reduce_bucket_size=1e6) == 6_000_000
    usual = buckets()
    assert usual > 100 * 6_000_000
    for no_size in ("auto", -1, True, "many", [1], 1e300):
        assert buckets(reduce_bucket_size=no_size) == usual


# -- on a CPU -----------------------------------------------------------------------------------


CPU = Machine(
    hostname="here",
    accelerator="cpu",
    device_name="Some CPU",
    num_devices=1,
    device_memory_bytes=160 * GIB,
    fast_bf16=False,
    cpu_cores=8,
    memory_bytes=160 * GIB,
    versions={"torch": "2.13.0", "deepspeed": "0.19.2"},
    code_fingerprint="abc",
    notes=(),
)


@pytest.fixture
def on(tmp_path):
    """on(nodes of one machine, its memory, overrides…, flags…)"""
    write_json(tmp_path, LLAMA_1B)

    def make(nodes, memory_bytes=160 * GIB, *overrides, **flags):
        config = load_config(
            file=None,
            flags={"model": str(tmp_path), "task": "causal-lm", "nodes": nodes, **flags},
            overrides=list(overrides),
            data_optional=True,
        )
        site = find_site(config.cluster, {})
        mine = replace(CPU, memory_bytes=memory_bytes)
        known = read_job_memory(config)
        return make_plan(config, [mine] * nodes, site, output_dir="", memory=known)

    return make


def test_what_a_cpu_offloads_takes_the_same_memory(on):
    """So fewer rows fit beside it."""

    def offloaded(memory_bytes, *overrides):
        overrides = ("deepspeed.offload=cpu", "model.gradient_checkpointing=false", *overrides)
        return on(1, memory_bytes, *overrides, strategy="zero2").memory.chosen

    two = offloaded(A_LOT)
    one = offloaded(A_LOT, "train.per_device_train_batch_size=1")
    assert (two.micro_batch, one.micro_batch) == (2, 1)
    assert one.peak < two.peak
    between = offloaded((one.peak + two.peak) // 2)
    assert (between.micro_batch, between.fits) == (1, True)


def test_ranks_on_a_cpu_divide_the_machines_memory(on):
    assert (on(1).memory.capacity, on(4).memory.capacity) == (160 * GIB, 40 * GIB)
    assert on(4).strategy == "ddp"
    # What the framework has loaded is there once for all ranks, which are forked.
    assert on(4).memory.chosen.framework == on(1).memory.chosen.framework // 4
    # A little less than what the most frugal needs: more machines divide its states further.
    ways = on(4, GIB, strategy="ddp").memory.rows
    least = min(row.peak for row in ways)
    with pytest.raises(
        UserError, match=r"smallest cluster .*: \d+ machines like this one with 4 rank"
    ):
        on(4, int(4 * 0.97 * least))


# -- what is left of it -------------------------------------------------------------------------


def test_the_table_survives_json(plan, tmp_path):
    made = plan(LLAMA_1B, 24 * GIB)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(made.to_json()))
    assert LaunchPlan.read(path) == made
    before = made.to_json()
    del before["memory"]
    path.write_text(json.dumps(before))
    assert LaunchPlan.read(path).memory is None


def test_frozen_parts_have_neither_gradients_nor_moments(plan):
    """4 bytes each of gradient and two moments, of what is trained."""
    whole = plan(BERT_BASE, A_LOT, task="text-classification", strategy="ddp").memory
    head = plan(
        BERT_BASE, A_LOT, "model.freeze=base_model", task="text-classification", strategy="ddp"
    ).memory
    assert whole.num_trained == whole.num_parameters == head.num_parameters
    assert head.num_trained == 768 * 2 + 2
    assert head.chosen.weights == whole.chosen.weights
    assert head.chosen.gradients == 4 * head.num_trained
    assert head.chosen.optimizer == 8 * head.num_trained


def test_an_adapter_adds_two_matrices_to_each_layer(plan):
    """BERT has 6 linear layers a block: 4 of 768 × 768, and 2 of 768 × 3072. Rank 8 adds to each 8 rows
    of its width and 8 columns of its height; the head is trained beside it.
    """
    made = plan(BERT_BASE, A_LOT, "lora.r=8", task="text-classification", strategy="ddp").memory
    added = 12 * 8 * (4 * (768 + 768) + 2 * (768 + 3072))
    assert made.num_trained == added + 768 * 2 + 2


def test_nobody_looks_at_the_model_of_an_evaluation(tmp_path):
    config = load_config(file=None, flags={"nodes": 1}, overrides=[])
    site, machines = assume(config.cluster, ROOMY)
    nothing = JobMemory(architecture=None, why_not="nobody looked")
    made = make_plan(config, machines, site, output_dir="", mode="eval", memory=nothing)
    assert made.memory is None
    assert made.memory_lines() == []
