"""Hosts that are played: an npu-smi that prints what was recorded elsewhere, and no GPU."""

from __future__ import annotations

import os
import stat
from pathlib import Path

MIB = 1024 * 1024
GIB = 1024 * MIB
RECORDED = Path(__file__).parent / "data" / "npu_smi"
# On a host that has NVIDIA GPUs they must not win over the played NPUs.
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def install_npu_smi(folder: Path, script: str) -> dict[str, str]:
    program = folder / "bin" / "npu-smi"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return {**NO_GPU, "PATH": f"{program.parent}:{os.environ['PATH']}"}


def play(folder: Path, recording: str) -> dict[str, str]:
    return install_npu_smi(folder, f"[ \"$*\" = info ] && cat '{RECORDED / recording}'")
