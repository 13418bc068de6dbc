"""In which numbers a job computes: as asked for, or what the machines are fast and right in."""

from __future__ import annotations

from collections.abc import Sequence

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.machine import Machine
from ftlaunch.launcher.config import RunConfig
from ftlaunch.strategies.options import Precision
from ftlaunch.strategies.registry import entry

_OLD_NPU = "has neither bf16 nor infinite numbers in fp16, so that an overflow would not be seen"
# Why a precision cannot be had on CPUs.
_PRECISION_REASONS = {
    "torch": "",
    "deepspeed": "DeepSpeed has no fp16 on CPUs.",
    "mindspore": "MindSpore multiplies matrices in fp32 only on CPUs.",
}


def choose_precision(
    config: RunConfig, machines: Sequence[Machine], accelerator: str, strategy: str
) -> tuple[Precision, str]:
    """(the precision, why). UserError where the one that was asked for cannot be had."""
    runs = entry(strategy).runs
    if config.precision != "auto" and not runs(config.precision, accelerator):
        having = [name for name in ("fp32", "bf16", "fp16") if runs(name, accelerator)]
        raise UserError(
            f"--precision {config.precision} with --strategy {strategy} does not run on "
            f"{accelerator}: {_PRECISION_REASONS[entry(strategy).package]} Use --precision "
            f"{' or '.join(having)}, or --strategy ddp."
        )
    old = [machine for machine in machines if not machine.fast_bf16]
    if accelerator == "ascend" and config.precision in ("bf16", "fp16") and old:
        raise UserError(
            f"--precision {config.precision} cannot be had on {old[0].hostname}: "
            f"{old[0].device_name} {_OLD_NPU}. Use --precision fp32, or leave it out."
        )
    if config.precision != "auto":
        return config.precision, "as asked for"
    chosen: Precision
    if accelerator == "ascend" and not all(machine.fast_bf16 for machine in machines):
        chosen, why = "fp32", f"{machines[0].device_name} {_OLD_NPU}"
    elif not runs("bf16", accelerator) and accelerator == "cpu":
        chosen, why = "fp32", f"{_PRECISION_REASONS[entry(strategy).package]}"
    elif all(machine.fast_bf16 for machine in machines):
        chosen, why = "bf16", f"{machines[0].device_name} computes bf16 fast; weights stay fp32"
    elif accelerator != "cpu":
        chosen, why = "fp16", f"{machines[0].device_name} has no fast bf16; weights stay fp32"
    else:
        chosen, why = "fp32", f"{machines[0].device_name} has no fast bf16"
    return chosen, why
