"""What the benchmarks print: Markdown tables, and the machine that the figures came from."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("ftlaunch", "torch", "transformers", "accelerate", "datasets")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine_line() -> str:
    """One line: processor, cores this process may use, memory, versions (Linux)."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    return (
        f"{_processor()}, {cores} cores, {memory:.0f} GiB; "
        f"Python {platform.python_version()}, {versions}"
    )


def _processor() -> str:
    """The kernel's model name, with bf16 named where the processor multiplies in it."""
    name, flags = platform.machine(), ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() == "flags":
            flags = value
    words = flags.split()
    units = [unit for unit in ("avx512f", "avx512_bf16", "amx_bf16") if unit in words]
    return f"{name} ({' '.join(units)})" if units else name


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
