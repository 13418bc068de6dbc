"""What makes two runs the same job: a checkpoint is continued by its own job only.

Topology, strategy, precision and framework are free, and so is the schedule.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.data.token_cache import Tokens
from ftlaunch.strategies.options import JobOptions, LoraOptions

_SAMPLE_BYTES = 1 << 16
_NUM_SAMPLES = 16
_WEIGHT_SUFFIXES = (".safetensors", ".bin")


def job_identity(options: JobOptions, tokens: Tokens) -> dict[str, Any]:
    """The identity as it stands in a manifest; every value is plain JSON."""
    identity: dict[str, Any] = {
        "task": options.task,
        "model": model_fingerprint(options),
        "data": tokens.key,
        "labels": list(tokens.spec.label_names),
        "max_length": tokens.max_length,
        "seed": options.train.seed,
        "global_batch_size": options.train.global_batch_size,
        "freeze": list(options.model.freeze),
    }
    if options.lora.r is not None:
        identity["lora"] = _adapter_identity(options.lora)
    return identity


def _adapter_identity(lora: LoraOptions) -> dict[str, Any]:
    """All but the dropout, which may change as the model's own may."""
    return {
        "r": lora.r,
        "alpha": lora.alpha if lora.alpha is not None else lora.r,
        "target_modules": sorted(lora.target_modules),
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "modules_to_save": sorted(lora.modules_to_save),
    }


def model_fingerprint(options: JobOptions) -> str:
    """Of a folder: its configuration and its weights (sizes and samples of their bytes).

    Hashing 140 GB would take minutes at every start; weights that were trained further differ in
    every sample, so sixteen of them tell.
    """
    name = str(options.model.name_or_path)
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{options.model.revision or 'main'}"
    digest = hashlib.blake2b(digest_size=8)
    digest.update(b"random" if options.model.random_weights else b"pretrained")
    for path in sorted(folder.iterdir()):
        if path.name == "config.json":
            digest.update(path.read_bytes())
        elif path.suffix in _WEIGHT_SUFFIXES:
            _hash_samples(digest, path)
    return digest.hexdigest()


def _hash_samples(digest: Any, path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name}:{size}".encode())
    with open(path, "rb") as file:
        for number in range(_NUM_SAMPLES):
            file.seek(size * number // _NUM_SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))


_MEANINGS = {
    "model": "another model, or the same one with other weights",
    "data": "other data, another tokenizer, other columns or another selection of samples",
}


def check_same_job(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """UserError that lists every difference."""
    differences = [
        f"{key}: {_MEANINGS.get(key) or f'{found.get(key)!r} there, {value!r} now'}"
        # A job without an adapter does not name it.
        for key, value in {"lora": None, **wanted}.items()
        if found.get(key) != value
    ]
    if differences:
        raise UserError(
            f"{folder} holds the checkpoints of another job ({'; '.join(differences)}). A job is "
            "continued with the same model, data, labels, seed, global batch, freezing and adapter. Choose "
            "another --output-dir, or --overwrite to delete what is there."
        )
