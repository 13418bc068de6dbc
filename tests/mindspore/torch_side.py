"""What the tests need of torch, which lives in another environment: jobs, and the plain computation.

python -m tests.mindspore.torch_side gradient FOLDER STEP OUT.npz
python -m tests.mindspore.torch_side logits MODEL_FOLDER IDS.npy OUT.npy
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import tiny

ROOT = Path(__file__).parents[2]
TORCH_PYTHON = Path(os.environ.get("FTLAUNCH_TORCH_PYTHON", ROOT / ".venv" / "bin" / "python"))


def torch_command() -> tuple[str, ...]:
    """`ftlaunch` as it is installed beside torch. Skips the test where it is not, but fails in CI."""
    if not TORCH_PYTHON.exists():
        reason = f"there is no environment with torch: {TORCH_PYTHON} (FTLAUNCH_TORCH_PYTHON)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return (str(TORCH_PYTHON), "-m", "ftlaunch.launcher")


def run_torch(*arguments: object) -> None:
    """Run this file beside torch."""
    python, *_ = torch_command()
    command = [python, "-m", "tests.mindspore.torch_side", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def _gradient(folder: Path, step: int, out: Path) -> None:
    """Of torch's own mean loss over one global batch in one piece, by name."""
    import torch
    from torch.nn import functional

    from ftlaunch.cluster.world import World
    from ftlaunch.strategies.torch.ddp import create

    world = World.alone()
    model = create(tiny.request(world, None, folder)).model.train()
    table = tiny.random_table(18)
    indices = tiny.windows(world, table, global_batch=15, micro_batch=15).order.global_batch(step)
    inputs = {k: torch.from_numpy(v) for k, v in tiny.full_batch(table, indices).items()}
    logits = model(**inputs).logits
    torch.autograd.backward(
        functional.cross_entropy(logits, torch.from_numpy(table.labels(indices)))
    )
    np.savez(out, **{n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None})


def _logits(folder: Path, ids: Path, out: Path) -> None:
    """Of rows of token numbers, 0 where they are padded, by the model as transformers loads it."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    rows = torch.from_numpy(np.load(ids))
    with torch.no_grad():
        logits = model.eval()(input_ids=rows, attention_mask=(rows != 0).long()).logits
    np.save(out, logits.numpy())


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "gradient":
        _gradient(Path(rest[0]), int(rest[1]), Path(rest[2]))
    else:
        _logits(*map(Path, rest))
