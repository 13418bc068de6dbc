"""What will happen and why: a pure function of what was asked for and what the machines are.

`plan.json` is the only thing that a worker reads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.events import StartMethod
from ftlaunch.cluster.machine import Machine, check_framework
from ftlaunch.launcher.config import ClusterOptions, RunConfig
from ftlaunch.launcher.job_memory import JobMemory
from ftlaunch.launcher.layout import HostPlan, Reason, describe, make_layout
from ftlaunch.launcher.memory_table import MemoryTable, short_line, table_lines
from ftlaunch.launcher.micro_batch import choose_micro_batch, explain_evaluation
from ftlaunch.launcher.precision import choose_precision
from ftlaunch.launcher.site import Site
from ftlaunch.launcher.strategy_choice import choose_strategy
from ftlaunch.strategies.data.task_names import check_own_keys, check_task
from ftlaunch.strategies.deepspeed_config import (
    Decided,
    check_deepspeed_config,
    offload_devices,
)
from ftlaunch.strategies.mindspore_models import check_family
from ftlaunch.strategies.options import JobOptions, Precision
from ftlaunch.strategies.registry import STRATEGIES, entry

_LANGUAGE_TASKS = ("causal-lm", "masked-lm")


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchPlan:
    """Everything that is decided before a rank starts."""

    mode: Literal["train", "eval", "bench"]
    output_dir: str
    options: JobOptions
    cluster: ClusterOptions
    strategy: str
    precision: Precision
    accelerator: str
    num_nodes: int
    world_size: int
    global_batch_size: int
    micro_batch: int
    eval_micro_batch: int
    accumulation: int
    threads_per_rank: int
    start_method: StartMethod
    hosts: tuple[HostPlan, ...]
    reasons: tuple[Reason, ...]
    # With defaults, since the plans of earlier versions lack them.
    max_tokens_per_micro_batch: int | None = None
    eval_max_tokens: int | None = None
    prove_micro_batch: bool = False
    # Of training, where the model was looked at.
    memory: MemoryTable | None = None

    def to_json(self) -> Any:
        from ftlaunch.launcher.plan_file import PLAN

        return PLAN.dump_python(self, mode="json")

    @classmethod
    def read(cls, path: Path) -> LaunchPlan:
        """UserError when the file is not a plan."""
        from ftlaunch.launcher.plan_file import PLAN

        try:
            raw = json.loads(path.read_bytes())
            return PLAN.validate_python(raw)
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} is not a plan of this ftlaunch: {error}") from None

    def describe(self) -> list[str]:
        """The plan as lines for the terminal."""
        lines = describe(self.hosts, self.reasons)
        if self.memory is not None:
            lines += [f"warning: {text}" for text in self.memory.warnings]
        return lines

    def memory_lines(self) -> list[str]:
        """What each strategy would take of a device; none where nobody looked at the model."""
        return table_lines(self.memory) if self.memory is not None else []


def make_plan(
    config: RunConfig,
    machines: Sequence[Machine],
    site: Site,
    *,
    output_dir: str,
    mode: Literal["train", "eval"] = "train",
    assumed: bool = False,
    family: str | None = None,
    is_adapter: bool = False,
    memory: JobMemory | None = None,
) -> LaunchPlan:
    """Decide everything. Pure: the same arguments give the same plan.

    machines   one for each node; on one machine that plays several nodes the same one repeated
    assumed    the machines after the first were not asked
    family     of the model (`model_config.family_of`), None where it is not known yet
    is_adapter the model is an adapter's folder
    memory     what is known of the model; None: nobody looked
    UserError when what was asked for cannot be done.
    """
    reasons: list[Reason] = []
    check_task(config.task)
    check_own_keys(config.task, config.data)
    if not config.is_demo:
        data = f", data {config.data.name_or_path}" if config.data.name_or_path is not None else ""
        why = f"model {config.model.name_or_path}{data}"
        reasons.append(Reason(choice="task", value=config.task, why=why))
    layout = make_layout(
        config.cluster, machines, site, reasons, assumed=assumed, default_start="fork"
    )
    accelerator, world_size = layout.accelerator, layout.world_size
    _batch_fits(config, world_size, mode)
    choice = choose_strategy(
        config,
        machines,
        layout,
        is_one_machine=site.is_one_machine,
        memory=memory if mode == "train" else None,
    )
    reasons += choice.reasons
    config, strategy = choice.config, choice.strategy
    _check_packages(strategy, machines)
    if entry(strategy).package == "mindspore":
        _check_mindspore(config, strategy, mode, family, is_adapter=is_adapter)
    if mode == "train":
        _check_lora(config, strategy, machines, reasons)
    precision, why = choose_precision(config, machines, accelerator, strategy)
    reasons.append(Reason(choice="precision", value=precision, why=why))
    chosen = choose_micro_batch(config, world_size, accelerator, choice.fits)
    _check_deepspeed(config, strategy, precision, chosen.samples, chosen.accumulation, reasons)
    reasons.extend(chosen.reasons if mode == "train" else explain_evaluation(chosen))
    if choice.table is not None:
        value, why = short_line(choice.table)
        reasons.append(Reason(choice="memory", value=value, why=why))
    return LaunchPlan(
        mode=mode,
        output_dir=output_dir,
        options=config.job_options(),
        cluster=config.cluster,
        strategy=strategy,
        precision=precision,
        accelerator=accelerator,
        num_nodes=len(layout.hosts),
        world_size=world_size,
        global_batch_size=config.train.global_batch_size,
        micro_batch=chosen.samples,
        max_tokens_per_micro_batch=chosen.tokens,
        eval_micro_batch=chosen.eval_samples,
        eval_max_tokens=chosen.eval_tokens,
        prove_micro_batch=chosen.is_proven,
        accumulation=chosen.accumulation,
        threads_per_rank=layout.threads_per_rank,
        start_method=layout.start_method,
        hosts=layout.hosts,
        reasons=tuple(reasons),
        memory=choice.table,
    )


def _check_mindspore(
    config: RunConfig, strategy: str, mode: str, family: str | None, *, is_adapter: bool
) -> None:
    """UserError for what mindone's models do not do, or do otherwise than torch's."""
    if is_adapter:
        raise UserError(
            f"{config.model.name_or_path} holds an adapter, which the strategy {strategy} cannot put into "
            "its base. Merge it first (ftlaunch merge --adapter), and evaluate the merged model."
        )
    if config.model.gradient_checkpointing:
        raise UserError(
            f"model.gradient_checkpointing is set, and --strategy {strategy} has none: mindone's models "
            "do not offer it. Leave it out and use a smaller train.per_device_train_batch_size."
        )
    if config.data.packing == "samples" and mode == "train":
        raise UserError(
            f"data.packing is samples, and --strategy {strategy} cannot keep the samples of a row apart: "
            "mindone's models look at all that stands before a token, whatever its position. Set "
            "data.packing to none (or concatenate, for plain texts), or use --strategy ddp."
        )
    families = entry(strategy).families
    if families is not None and config.task not in families:
        raise UserError(
            f"the strategy {strategy} does not train {config.task}: it has {', '.join(families)}. Use "
            "--strategy ddp, zero1, zero2 or zero3 on CUDA or a CPU."
        )
    if family is not None:
        check_family(config.task, family, config.model)


def _check_deepspeed(
    config: RunConfig,
    strategy: str,
    precision: Precision,
    micro_batch: int,
    accumulation: int,
    reasons: list[Reason],
) -> None:
    """UserError where what was asked of DeepSpeed and the plan do not fit together."""
    options, stage = config.deepspeed, entry(strategy).zero_stage
    if stage is None:
        if options.config is None and options.offload in (None, "none"):
            return
        named = "deepspeed.offload" if options.config is None else "deepspeed.config"
        raise UserError(
            f"{named} is set, but the strategy is {strategy}, which does not use DeepSpeed. Add "
            "--strategy zero1, zero2 or zero3, or take it out."
        )
    decided = Decided(
        stage=stage, precision=precision, micro_batch=micro_batch, accumulation=accumulation
    )
    mistakes = check_deepspeed_config(options, config.train, decided)
    if mistakes:
        raise UserError("\n".join(mistakes))
    kept = [
        what
        for device, what in zip(
            offload_devices(options, stage), ("optimizer state", "weights"), strict=True
        )
        if device == "cpu"
    ]
    if kept:
        why = f"{' and '.join(kept)} in the host's memory"
        reasons.append(Reason(choice="offload", value="cpu", why=why))


def _check_lora(
    config: RunConfig, strategy: str, machines: Sequence[Machine], reasons: list[Reason]
) -> None:
    """UserError where an adapter was asked for and cannot be had."""
    lora = config.lora
    if lora.r is None:
        return
    if entry(strategy).package == "mindspore":
        raise UserError(
            f"lora.r is {lora.r}, and --strategy {strategy} has no adapters: peft, which makes them, "
            "knows torch's modules only. Use --strategy ddp, zero1, zero2 or zero3, or leave lora out."
        )
    for machine in machines:
        if "peft" not in machine.versions:
            raise UserError(
                f"{machine.hostname} lacks peft, which lora.r={lora.r} needs: it makes the adapter. "
                "Install it: pip install 'ftlaunch[lora]'."
            )
    kind = "DoRA" if lora.use_dora else "LoRA"
    # The head of a language model is not fresh: it is frozen like the rest.
    frozen = "the model is" if config.task in _LANGUAGE_TASKS else "the model below its head is"
    why = f"{', '.join(lora.target_modules)}; {frozen} frozen"
    reasons.append(Reason(choice="adapter", value=f"{kind}, rank {lora.r}", why=why))


def _check_packages(strategy: str, machines: Sequence[Machine]) -> None:
    """UserError where the strategy's framework is missing, or cannot use the accelerator."""
    needed = entry(strategy)
    package = needed.package
    for machine in machines:
        check_framework(machine)
        for name in (package, *needed.also):
            if name not in machine.versions:
                raise UserError(
                    f"{machine.hostname} lacks {name}, which the strategy {strategy} needs. "
                    f"Install a build of it that fits the machine: pip install {name}."
                    + _other_strategies(machine)
                )
        if not needed.is_new_enough(machine.versions[package]):
            raise UserError(
                f"{machine.hostname} has {package} {machine.versions[package]}; the strategy "
                f"{strategy} needs {needed.at_least} or newer: pip install "
                f"'{package}>={needed.at_least}'."
            )


def _other_strategies(machine: Machine) -> str:
    """What runs with what is installed: torch and MindSpore do not live in one environment."""
    others = [
        name
        for name, each in STRATEGIES.items()
        if {each.package, *each.also} <= machine.versions.keys()
        and machine.accelerator in each.accelerators
    ]
    return f" With what is installed --strategy {' or '.join(others)} runs." if others else ""


def _batch_fits(config: RunConfig, world_size: int, mode: str) -> None:
    size = config.train.global_batch_size
    if mode == "train" and size < world_size:
        raise UserError(
            f"a global batch of {size} cannot be spread over {world_size} ranks: each needs at "
            f"least one sample. Set train.global_batch_size to {world_size} or more, or use fewer "
            "nodes or devices."
        )
