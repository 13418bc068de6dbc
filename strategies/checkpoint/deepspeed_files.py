"""Which files a DeepSpeed checkpoint consists of, by their names. Opens `latest` and nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ftlaunch.cluster.errors import UserError

_STATES = "_states.pt"
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_FOREIGN = {
    "layer_": "a pipeline-parallel or mixture-of-experts model",
    "expp_rank_": "an expert-parallel model",
    "expert_": "an expert-parallel model",
}
_SUPPORTED = "Data-parallel checkpoints of ZeRO-0, 1, 2 and 3 can be merged; others cannot yet."


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSpeedFiles:
    """The files of one tag folder, by rank.

    model      ZeRO-3: of every rank; otherwise of rank 0 only, `sharded` False
    optimizer  of every rank; empty without ZeRO
    """

    folder: Path
    model: Mapping[int, Path]
    optimizer: Mapping[int, Path]
    sharded: bool
    prefix: str

    def optimizer_name(self, rank: int) -> str:
        return f"{self.prefix}zero_pp_rank_{rank}_mp_rank_00_optim{_STATES}"

    def model_name(self, rank: int) -> str:
        rank_part = f"zero_pp_rank_{rank}_" if self.sharded else ""
        return f"{rank_part}mp_rank_00_model{_STATES}"


def find_tag_folder(folder: Path) -> Path | None:
    """The folder with the files: `folder`, what its `latest` names, or its only global_stepN.

    None when nothing of DeepSpeed is there; UserError when it is not clear or not supported.
    """
    has_files = any(folder.glob(f"*{_STATES}"))
    if (folder / "latest_universal").is_file() or (has_files and (folder / "zero").is_dir()):
        raise UserError(
            f"{folder} holds a universal checkpoint of DeepSpeed. {_SUPPORTED} Merge the checkpoint "
            "that it was made from."
        )
    if has_files:
        return folder
    latest = folder / "latest"
    if latest.is_file():
        with open(latest, encoding="utf-8", errors="replace") as file:
            tag = file.read(256).strip()
        if not tag or Path(tag).name != tag or tag == "..":
            raise UserError(
                f"{latest} names the folder {tag!r}; it has to name one beside it, such as "
                "global_step100. Pass the folder with the *_states.pt files itself."
            )
        if not (folder / tag).is_dir():
            raise UserError(
                f"{latest} names {tag}, but there is no folder {folder / tag}. Copy the checkpoint "
                "anew, or pass a folder with *_states.pt files."
            )
        return find_tag_folder(folder / tag) or folder / tag
    tags = sorted(path for path in folder.glob("global_step*") if any(path.glob(f"*{_STATES}")))
    if len(tags) > 1:
        names = ", ".join(path.name for path in tags[:5])
        raise UserError(
            f"{folder} holds {len(tags)} checkpoints ({names}) and no file `latest` that says which. "
            "Pass the one that is meant."
        )
    return tags[0] if tags else None


def list_files(folder: Path) -> DeepSpeedFiles:
    """UserError for files of what is not supported, and of two jobs as far as names tell."""
    model: dict[int, Path] = {}
    optimizer: dict[int, Path] = {}
    sharded, prefixes = set(), set()
    for path in sorted(folder.glob(f"*{_STATES}")):
        for start, what in _FOREIGN.items():
            if path.name.startswith(start):
                raise UserError(f"{path} is part of {what}. {_SUPPORTED}")
        if found := _MODEL.fullmatch(path.name):
            rank, parallel = int(found[1] or 0), int(found[2])
            sharded.add(found[1] is not None)
            model[rank] = path
        elif found := _OPTIMIZER.fullmatch(path.name):
            prefix, rank, parallel = found[1] or "", int(found[2]), int(found[3])
            prefixes.add(prefix)
            optimizer[rank] = path
        else:
            raise UserError(f"{path}: what wrote a file of this name is not known. {_SUPPORTED}")
        if parallel != 0:
            raise UserError(
                f"{path} is part of a model-parallel checkpoint: it is of mp_rank {parallel}. {_SUPPORTED}"
            )
    if len(sharded) > 1 or len(prefixes) > 1:
        raise UserError(
            f"{folder} holds files of two jobs: {_both(sharded, prefixes)}. A checkpoint has one "
            "kind. Move the files of the other job away."
        )
    is_sharded = sharded == {True}
    if not model:
        name = (
            "mp_rank_00_model_states.pt, or zero_pp_rank_0_mp_rank_00_model_states.pt under ZeRO-3,"
        )
        raise UserError(f"{folder} lacks {name} so its parameters have no names. Copy it anew.")
    return DeepSpeedFiles(
        folder=folder,
        model=model,
        optimizer=optimizer,
        sharded=is_sharded,
        prefix=prefixes.pop() if prefixes else "",
    )


def _both(sharded: set[bool], prefixes: set[str]) -> str:
    if len(sharded) > 1:
        return "mp_rank_00_model_states.pt and zero_pp_rank_N_mp_rank_00_model_states.pt"
    names = sorted(f"{prefix}zero_pp_rank_N_mp_rank_00_optim_states.pt" for prefix in prefixes)
    return " and ".join(names)
