"""Writes a ZeRO-2 or ZeRO-3 checkpoint in DeepSpeed's file layout, a rank at a time, without an engine.

The keys, classes and tensors are those that DeepSpeed 0.19 saves (`runtime/engine.py` and
`runtime/zero/`); the numbers are random. Run it by itself, so that its memory is its own:

    python -m benchmarks.zero_files FOLDER --stage 3 --parameters 5e8 --ranks 4
"""

from __future__ import annotations

import argparse
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_VERSION = "0.19.8"
_STEP = 100
_TAG = f"global_step{_STEP}"
_ALIGNMENT = 2


def decoder_shapes(parameters: float) -> list[dict[str, torch.Size]]:
    """Two groups, weights with and without decay, of a decoder with about so many parameters."""
    width = 1024 if parameters < 1e9 else 2048
    vocabulary, inner = 50_000, 4 * width
    of_layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (width, width),
        "self_attn.k_proj.weight": (width, width),
        "self_attn.v_proj.weight": (width, width),
        "self_attn.o_proj.weight": (width, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
        "self_attn.q_proj.bias": (width,),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    layers = round((parameters - vocabulary * width) / (12 * width * width))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    shapes["model.norm.weight"] = (width,)
    groups = [
        {n: s for n, s in shapes.items() if (len(s) > 1) == decayed} for decayed in (True, False)
    ]
    return [OrderedDict((n, torch.Size(s)) for n, s in group.items()) for group in groups]


def write_checkpoint(
    folder: Path, *, stage: int, parameters: float, ranks: int, moments: bool
) -> int:
    """Into a new folder, with `latest`. The number of parameters."""
    tag = folder / _TAG
    tag.mkdir(parents=True)
    groups = decoder_shapes(parameters)
    for rank in range(ranks):
        _write_rank(tag, stage, groups, rank, ranks, moments)
    if stage == 2:
        module = OrderedDict(
            (name, torch.zeros(shape, dtype=torch.bfloat16))
            for group in groups
            for name, shape in group.items()
        )
        torch.save(_model_state(module, groups, ranks), tag / "mp_rank_00_model_states.pt")
    (folder / "latest").write_text(_TAG)
    return sum(shape.numel() for group in groups for shape in group.values())


def _write_rank(
    tag: Path,
    stage: int,
    groups: Sequence[dict[str, torch.Size]],
    rank: int,
    ranks: int,
    moments: bool,
) -> None:
    # The classes that real files name, so that readers have to cope with them.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    torch.manual_seed(rank)
    sizes = [[shape.numel() for shape in group.values()] for group in groups]
    if stage == 3:
        lengths = [sum(-(-size // ranks) for size in group) for group in sizes]
        lean = lengths
    else:
        unit = _ALIGNMENT * ranks
        lengths = [-(-sum(group) // unit) * unit // ranks for group in sizes]
        lean = [
            max(0, min(length, sum(group) - rank * length))
            for length, group in zip(lengths, sizes, strict=True)
        ]
    flat = [torch.randn(length) for length in lengths]
    state = {
        group: {
            "step": torch.tensor(float(_STEP)),
            **({n: torch.zeros(length) for n in ("exp_avg", "exp_avg_sq")} if moments else {}),
        }
        for group, length in enumerate(lengths)
    }
    inner = {
        "state": state,
        "param_groups": [{"lr": 1e-5, "params": [g]} for g in range(len(groups))],
    }
    optimizer: dict[str, Any] = {
        "zero_stage": ZeroStageEnum(stage),
        "loss_scaler": LossScaler(scale=1.0),
        "dynamic_loss_scale": False,
        "overflow": False,
    }
    if stage == 3:
        optimizer |= {
            "partition_count": ranks,
            "optimizer_state_dict": inner,
            "fp32_flat_groups": flat,
        }
    else:
        optimizer |= {
            "base_optimizer_state": inner,
            "single_partition_of_fp32_groups": [f[:n] for f, n in zip(flat, lean, strict=True)],
            "group_paddings": [a - b for a, b in zip(lengths, lean, strict=True)],
            "param_alignment_paddings": [[0] * len(group) for group in groups],
            "partition_count": [ranks] * len(groups),
            "ds_version": _VERSION,
            "param_slice_mappings": [
                _fragments(group, rank, length)
                for group, length in zip(groups, lengths, strict=True)
            ],
        }
    name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    file = {"optimizer_state_dict": optimizer, "ds_config": {}, "ds_version": _VERSION}
    torch.save(file, tag / name)
    if stage == 3:
        module = OrderedDict(
            (name, torch.empty(0, dtype=torch.bfloat16)) for group in groups for name in group
        )
        name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        torch.save(_model_state(module, groups, ranks), tag / name)


def _model_state(
    module: OrderedDict[str, torch.Tensor],
    groups: Sequence[dict[str, torch.Size]],
    ranks: int,
) -> dict[str, Any]:
    return {
        "module": module,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": list(groups),
        "frozen_param_shapes": OrderedDict(),
        "shared_params": {},
        "frozen_param_fragments": OrderedDict(),
        "lr_scheduler": None,
        "skipped_steps": 0,
        "global_steps": _STEP,
        "global_samples": _STEP * ranks,
        "dp_world_size": ranks,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": _VERSION,
    }


def _fragments(group: dict[str, torch.Size], rank: int, length: int) -> dict[str, Any]:
    """Which run of which parameter lies in a rank's part of the group's flat vector."""
    from deepspeed.utils.tensor_fragment import fragment_address

    found, begin = OrderedDict(), 0
    for name, shape in group.items():
        first = max(begin, rank * length)
        last = min(begin + shape.numel(), (rank + 1) * length)
        if first < last:
            found[name] = fragment_address(numel=last - first, start=first - rank * length)
        begin += shape.numel()
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stage", type=int, choices=(2, 3), required=True)
    parser.add_argument("--parameters", type=float, required=True)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--moments", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    count = write_checkpoint(
        options.folder,
        stage=options.stage,
        parameters=options.parameters,
        ranks=options.ranks,
        moments=options.moments,
    )
    print(count)


if __name__ == "__main__":
    main()
