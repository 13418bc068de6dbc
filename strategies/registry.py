"""Which strategies exist, and what each needs. Importing this imports no framework."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.mindspore_models import FAMILIES


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyEntry:
    """Where a strategy lives and what it can run on.

    implementation   "module:function"; the function takes a `StrategyRequest` and returns a Strategy
    package          what has to be installed, of version `at_least`
    also             further packages that have to be there
    preload          modules that a process imports before it forks ranks: all that they will need
    fp16_on          accelerators on which it computes in fp16
    bf16_on          the same for bf16
    scheduler        the ranks meet at a process of MindSpore's own instead of a store in rank 0
    zero_stage       of DeepSpeed; None without it
    families         of models that it can train, by task; None for all
    instruments      "module:class", how the framework is measured
    """

    implementation: str
    package: str
    accelerators: tuple[str, ...]
    preload: tuple[str, ...]
    fp16_on: tuple[str, ...]
    bf16_on: tuple[str, ...] = ("cpu", "cuda")
    scheduler: bool = False
    also: tuple[str, ...] = ()
    zero_stage: int | None = None
    at_least: str = "0"
    families: Mapping[str, tuple[str, ...]] | None = None
    instruments: str = "ftlaunch.strategies.torch.instruments:TorchInstruments"

    def runs(self, precision: str, accelerator: str) -> bool:
        """Whether the precision can be had on that accelerator."""
        having = {"fp16": self.fp16_on, "bf16": self.bf16_on}
        return accelerator in having.get(precision, (accelerator,))

    def is_new_enough(self, version: str) -> bool:
        """Whether that version of `package` will do."""
        return _numbers(version) >= _numbers(self.at_least)


def _numbers(version: str) -> tuple[int, ...]:
    """Of a release; what follows it ("+cpu", "rc1") is left out."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:2])


_ZERO = "ftlaunch.strategies.torch.zero"
STRATEGIES: dict[str, StrategyEntry] = {
    "ddp": StrategyEntry(
        implementation="ftlaunch.strategies.torch.ddp:create",
        package="torch",
        accelerators=("cpu", "cuda"),
        preload=(
            "ftlaunch.strategies.torch.ddp",
            # What torch and transformers import only on first use: the optimizer's compiler support
            # alone takes two seconds.
            "torch._dynamo",
        ),
        fp16_on=("cpu", "cuda"),
    ),
    **{
        f"zero{stage}": StrategyEntry(
            implementation=f"{_ZERO}:create_zero{stage}",
            package="deepspeed",
            also=("torch",),
            accelerators=("cpu", "cuda"),
            # DeepSpeed itself looks for accelerators when it is imported: the ranks do that.
            preload=(_ZERO, "torch._dynamo"),
            fp16_on=("cuda",),
            zero_stage=stage,
            # Where its engines keep their state has moved before that.
            at_least="0.19",
        )
        for stage in (1, 2, 3)
    },
    "mindspore": StrategyEntry(
        implementation="ftlaunch.strategies.mindspore.data_parallel:create",
        package="mindspore",
        also=("mindone",),
        accelerators=("ascend", "cpu"),
        preload=("ftlaunch.strategies.mindspore.data_parallel",),
        # Its CPU kernels for products of matrices know fp32 and fp64.
        fp16_on=("ascend",),
        bf16_on=("ascend",),
        scheduler=True,
        at_least="2.7",
        families=FAMILIES,
        instruments="ftlaunch.strategies.mindspore.instruments:MindSporeInstruments",
    ),
}


def entry(name: str) -> StrategyEntry:
    """UserError for an unknown name."""
    if name not in STRATEGIES:
        near = difflib.get_close_matches(name, STRATEGIES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"there is no strategy {name!r}.{hint} "
            f"This version has: {', '.join(STRATEGIES)}. Choose one with --strategy, or leave it out."
        )
    return STRATEGIES[name]


def load(name: str) -> Any:
    """The function that creates the strategy; imports its framework."""
    module, _, function = entry(name).implementation.partition(":")
    return getattr(importlib.import_module(module), function)
