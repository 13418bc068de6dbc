"""Accelerators by name, for plans of machines that are not here. Asks nobody.

Memory is what the driver reports for the whole device (NVML's total, npu-smi's HBM), in MiB; peaks are
the vendors', of dense products of matrices in 16 bits with sums in fp32, from the data sheet or white
paper that is named.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.hosts import MAX_HOSTS, Host
from ftlaunch.cluster.machine import Accelerator, Machine
from ftlaunch.launcher.config import ClusterOptions
from ftlaunch.launcher.site import Site, find_site
from ftlaunch.strategies.registry import STRATEGIES

_MIB = 1 << 20
# Machines are bought with so many cores for each accelerator, or more, and with so many times the
# accelerators' memory in the host's.
_CORES_A_DEVICE = 8
_HOST_MEMORY = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One kind of accelerator.

    device_name             as the driver calls it
    memory_bytes            of one device, as the driver reports it
    fast_bf16               bf16 in hardware
    peak_flops_per_second   of dense products in bf16, or in fp16 where bf16 is not fast
    source                  whose number that is
    num_devices             in a usual machine, where the user names none
    """

    name: str
    accelerator: Accelerator
    device_name: str
    memory_bytes: int
    fast_bf16: bool
    peak_flops_per_second: float
    source: str
    num_devices: int = 8


def _cuda(
    name: str,
    device_name: str,
    mib: int,
    teraflops: float,
    source: str,
    *,
    fast_bf16: bool = True,
    num_devices: int = 8,
) -> Hardware:
    return Hardware(
        name=name,
        accelerator="cuda",
        device_name=f"NVIDIA {device_name}",
        memory_bytes=mib * _MIB,
        fast_bf16=fast_bf16,
        peak_flops_per_second=teraflops * 1e12,
        source=f"NVIDIA, {source}",
        num_devices=num_devices,
    )


def _ascend(
    name: str, mib: int, teraflops: float, source: str, *, fast_bf16: bool = True
) -> Hardware:
    return Hardware(
        name=name,
        accelerator="ascend",
        device_name=f"Ascend {name.partition('-')[0]}",
        memory_bytes=mib * _MIB,
        fast_bf16=fast_bf16,
        peak_flops_per_second=teraflops * 1e12,
        source=f"Huawei, {source}",
    )


_KNOWN = (
    _cuda("A100-40GB", "A100-SXM4-40GB", 40960, 312, "A100 data sheet"),
    _cuda("A100-80GB", "A100-SXM4-80GB", 81920, 312, "A100 data sheet"),
    _cuda("H100-80GB", "H100 80GB HBM3", 81559, 989, "H100 data sheet (SXM)"),
    _cuda("H100-PCIE-80GB", "H100 PCIe", 81559, 756, "H100 data sheet (PCIe)"),
    _cuda("H20-96GB", "H20", 97871, 148, "H20 data sheet"),
    _cuda("H200-141GB", "H200", 143771, 989, "H200 data sheet (SXM)"),
    _cuda("GH200-96GB", "GH200 480GB", 97871, 989, "GH200 data sheet", num_devices=1),
    _cuda("B200-180GB", "B200", 183359, 2250, "DGX B200 data sheet"),
    _cuda("L4-24GB", "L4", 23034, 121, "L4 data sheet", num_devices=1),
    _cuda("L40S-48GB", "L40S", 46068, 362, "L40S data sheet"),
    _cuda("A10-24GB", "A10", 23028, 125, "A10 data sheet", num_devices=1),
    _cuda("A10G-24GB", "A10G", 23028, 70, "A10G data sheet", num_devices=1),
    _cuda("A30-24GB", "A30", 24576, 165, "A30 data sheet", num_devices=1),
    _cuda("A40-48GB", "A40", 46068, 149.7, "A40 data sheet"),
    _cuda("A6000-48GB", "RTX A6000", 49140, 154.8, "RTX A6000 data sheet", num_devices=1),
    _cuda("V100-16GB", "Tesla V100-SXM2-16GB", 16384, 125, "V100 data sheet", fast_bf16=False),
    _cuda("V100-32GB", "Tesla V100-SXM2-32GB", 32768, 125, "V100 data sheet", fast_bf16=False),
    _cuda("T4-16GB", "Tesla T4", 15360, 65, "T4 data sheet", fast_bf16=False, num_devices=1),
    _cuda("RTX-3090", "GeForce RTX 3090", 24576, 71, "GA102 white paper", num_devices=1),
    _cuda("RTX-4090", "GeForce RTX 4090", 24564, 165.2, "Ada white paper", num_devices=1),
    _cuda("RTX-5090", "GeForce RTX 5090", 32607, 209.5, "Blackwell white paper", num_devices=1),
    _ascend("910B-64GB", 65536, 313, "Atlas 800T A2, 910B3"),
    _ascend("910B-32GB", 32768, 280, "Atlas 300T A2, 910B4"),
    _ascend("910A-32GB", 32768, 256, "Atlas 800 model 9000", fast_bf16=False),
)
HARDWARE: dict[str, Hardware] = {each.name: each for each in _KNOWN}


def find_hardware(name: str) -> Hardware:
    """By its name, in any case and with or without "Ascend" and dashes. UserError: not known."""
    known = {_plain(each): each for each in HARDWARE}
    if found := known.get(_plain(name)):
        return HARDWARE[found]
    begun = [
        each for plain, each in known.items() if _plain(name) and plain.startswith(_plain(name))
    ]
    near = begun or [known[each] for each in difflib.get_close_matches(_plain(name), known, 2, 0.6)]
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise UserError(
        f"--hardware {name[:60]!r} is not known.{hint} Known are {', '.join(HARDWARE)}. For anything "
        "else run ftlaunch plan on a machine that has it, without --hardware."
    )


def _plain(name: str) -> str:
    return re.sub(r"^(nvidia|geforce|ascend|atlas)", "", re.sub(r"[\s_-]+", "", name.lower()))


def assumed_machine(hardware: Hardware, num_devices: int) -> Machine:
    """A machine that nobody has looked at: whatever a strategy needs is taken as installed on it, and its
    host to have twice the memory of its devices.
    """
    versions = {"python": "3", "transformers": "5", "peft": "0", "torch": "2"}
    for each in STRATEGIES.values():
        if hardware.accelerator in each.accelerators:
            versions |= {each.package: each.at_least, **dict.fromkeys(each.also, "0")}
    if hardware.accelerator == "cuda":
        versions["torch_cuda"] = "12"
    else:
        versions |= {"mindspore_ascend": "1", "cann": "8"}
    return Machine(
        hostname="an assumed machine",
        accelerator=hardware.accelerator,
        device_name=hardware.device_name,
        num_devices=num_devices,
        device_memory_bytes=hardware.memory_bytes,
        fast_bf16=hardware.fast_bf16,
        cpu_cores=_CORES_A_DEVICE * num_devices,
        memory_bytes=_HOST_MEMORY * num_devices * hardware.memory_bytes,
        versions=versions,
        code_fingerprint="",
        notes=(),
    )


def assume(cluster: ClusterOptions, hardware: Hardware) -> tuple[Site, Sequence[Machine]]:
    """The nodes that were asked for, each with this hardware. Opens nothing but a host file.

    UserError for a host file that cannot be used.
    """
    if cluster.hostfile is not None or cluster.hosts is not None:
        hosts = find_site(cluster, {}).hosts
    else:
        nodes = cluster.nodes or 1
        if nodes > MAX_HOSTS:
            raise UserError(f"--nodes {nodes}: a plan is made for {MAX_HOSTS} nodes at most.")
        hosts = tuple(Host(name=f"node{number}", slots=None) for number in range(nodes))
    counts = [cluster.devices or host.slots or hardware.num_devices for host in hosts]
    kinds = {count: assumed_machine(hardware, count) for count in counts}
    site = Site(
        kind="assumed", hosts=hosts, why="nobody was asked; all packages are taken as installed"
    )
    return site, [kinds[count] for count in counts]
