"""What the tests need of torch, which lives in another environment: jobs, and the plain computation.

python -m tests.mindspore.torch_side gradient FOLDER STEP OUT.npz
python -m tests.mindspore.torch_side logits MODEL_FOLDER IDS.npy OUT.npy
python -m tests.mindspore.torch_side heads FOLDER
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ftlaunch.cluster.world import World
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


def run_torch(*arguments: object, timeout: float = 120) -> None:
    """Run this file beside torch."""
    python, *_ = torch_command()
    command = [python, "-m", "tests.mindspore.torch_side", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]


def _gradient(folder: Path, step: int, out: Path) -> None:
    """Of torch's own mean loss over one global batch in one piece, by name."""
    import torch
    from torch.nn import functional

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


def _heads(root: Path) -> None:
    """Models with random weights, biases too, and what torch computes of them: see `test_tasks`."""
    import torch
    import transformers

    from tests.mindspore import heads

    classes = {
        "token-classification": transformers.AutoModelForTokenClassification,
        "causal-lm": transformers.AutoModelForCausalLM,
        "masked-lm": transformers.AutoModelForMaskedLM,
        "sequence-classification": transformers.AutoModelForSequenceClassification,
    }
    classifiers = [("sequence-classification", family) for family in heads.CLASSIFIERS]
    for head, family in (*heads.PAIRS, *classifiers):
        config = transformers.AutoConfig.for_model(
            **heads.config_of(family), num_labels=len(heads.TAGS)
        )
        for name, value in config.to_dict().items():
            if "dropout" in name or name.endswith("pdrop"):
                setattr(config, name, 0.0 if value is None else type(value)(0))
        config.classifier_dropout = 0.0
        torch.manual_seed(0)
        model = classes[head].from_config(config).float().train()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                is_norm = parameter.dim() == 1 and "norm" in name.lower() and "weight" in name
                parameter.copy_(float(is_norm) + 0.1 * torch.randn_like(parameter))
        folder = root / f"{head}-{family}"
        model.save_pretrained(folder)
        if head == "sequence-classification":
            _expect_classes(folder / "1.npz", model, family)
            continue
        order = heads.windows(World.alone(), head, pad_token_id=0, micro_batch=1).order
        steps = (0, 1) if (head, family) in heads.WINDOW_PAIRS else (1,)
        for step in steps:
            _expect(folder / f"{step}.npz", model, head, order.global_batch(step))
        if (head, family) == heads.JOINED:
            _expect_joined(folder / "joined.npz", model)


def _expect(out: Path, model: Any, head: str, indices: NDArray[np.int64]) -> None:
    """Logits, losses of the tokens, and gradients of torch's own mean, of these samples in one piece."""
    import torch
    from torch.nn import functional

    from ftlaunch.strategies.torch.model import aliases_of
    from tests.mindspore import heads

    batch = heads.padded(head, indices, int(model.config.pad_token_id))
    ids, mask, labels = (torch.from_numpy(batch[name]) for name in ("ids", "mask", "labels"))
    logits = model(input_ids=ids, attention_mask=mask).logits
    flat, wanted = logits.flatten(0, 1), labels.flatten()
    model.zero_grad()
    torch.autograd.backward(functional.cross_entropy(flat, wanted))
    losses = functional.cross_entropy(flat.detach(), wanted, reduction="none")
    found: dict[str, Any] = {
        "indices": indices,
        "losses": losses.reshape(labels.shape).numpy(),
        "logits": logits.detach().numpy(),
        "aliases": np.array([f"{n} {m}" for n, m in sorted(aliases_of(model).items())], dtype=str),
        **batch,
    }
    np.savez(out, **(found | _named_gradients(model)))


def _expect_classes(out: Path, model: Any, family: str) -> None:
    """Logits, torch's own mean loss and its gradients, of the texts in one piece."""
    import torch
    from torch.nn import functional

    from tests.mindspore import heads

    batch = heads.texts(family, int(model.config.pad_token_id))
    ids, mask, labels = (torch.from_numpy(batch[name]) for name in ("ids", "mask", "labels"))
    logits = model(input_ids=ids, attention_mask=mask).logits
    loss = functional.cross_entropy(logits, labels)
    torch.autograd.backward(loss)
    found: dict[str, Any] = {"loss": loss.detach().numpy(), "logits": logits.detach().numpy()}
    found |= {**batch, **_named_gradients(model)}
    np.savez(out, **found)


def _expect_joined(out: Path, model: Any) -> None:
    """transformers' own loss of one stream of all rows, cut into pieces, and its gradients."""
    import torch

    from tests.mindspore import heads

    batch = {name: torch.from_numpy(values) for name, values in heads.joined().items()}
    labels = torch.where(batch["mask"] == 1, batch["ids"], -100)
    model.zero_grad()
    loss = model(input_ids=batch["ids"], attention_mask=batch["mask"], labels=labels).loss
    loss.backward()
    found: dict[str, Any] = {"loss": loss.detach().numpy()}
    np.savez(out, **(found | _named_gradients(model)))


def _named_gradients(model: Any) -> dict[str, Any]:
    return {
        f"gradient {name}": parameter.grad.numpy()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "gradient":
        _gradient(Path(rest[0]), int(rest[1]), Path(rest[2]))
    elif what == "heads":
        _heads(Path(rest[0]))
    else:
        _logits(*map(Path, rest))
