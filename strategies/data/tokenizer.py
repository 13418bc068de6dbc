"""Finds, hashes and loads a tokenizer. Hashing needs no transformers; loading does."""

from __future__ import annotations

import importlib
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ftlaunch.cluster.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILE_PATTERNS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "chat_template*",
)
# Without a tokenizer_class of its own, a tokenizer's class follows from these keys of the model.
_CONFIG_KEYS = ("model_type", "tokenizer_class")
# What transformers sets when a tokenizer states no limit is 1e30.
_NO_LIMIT = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSource:
    """A folder or a name on the Hugging Face hub."""

    name_or_path: str
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTokenizer:
    """A tokenizer and what padding needs of it. `max_length` is its own limit, None for none."""

    tokenizer: PreTrainedTokenizerBase
    pad_token_id: int
    padding_side: Literal["left", "right"]
    max_length: int | None
    notes: tuple[str, ...]


def locate_tokenizer(source: TokenizerSource) -> Path:
    """The local folder, or for a name of the hub its snapshot (offline: the cached one)."""
    path = Path(source.name_or_path).expanduser()
    if path.is_dir():
        folder = path
    elif path.exists() or source.name_or_path.startswith((".", "/", "~")):
        raise UserError(
            f"There is no tokenizer at {path}: it must be a folder with tokenizer.json or a "
            "vocabulary, or a name on the Hugging Face hub. Set model.tokenizer or "
            "model.name_or_path."
        )
    else:
        folder = _download(source)
    if not tokenizer_files(folder):
        raise UserError(
            f"There is no tokenizer in {source.name_or_path}: none of {', '.join(_FILE_PATTERNS)} "
            "is there. The model's folder must hold its tokenizer. Set model.tokenizer to a folder "
            "or name that has one."
        )
    return folder


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """Every file that makes up the tokenizer, sorted by name."""
    found = {file for pattern in _FILE_PATTERNS for file in folder.glob(pattern) if file.is_file()}
    return tuple(sorted(found))


def tokenizer_fingerprint(folder: Path, source: TokenizerSource) -> str:
    """xxh3_128 of all that decides which tokens a text becomes."""
    import xxhash

    code = sorted(folder.glob("*.py")) if source.trust_remote_code else []
    digest = xxhash.xxh3_128(json.dumps(_config_values(folder)).encode())
    try:
        for file in (*tokenizer_files(folder), *code):
            content = file.read_bytes()
            digest.update(os.fsencode(file.name) + b"\0%d\0" % len(content))
            digest.update(content)
    except OSError as error:
        raise _broken(source, error) from None
    return digest.hexdigest()


def load_tokenizer(folder: Path, source: TokenizerSource) -> LoadedTokenizer:
    """UserError for a tokenizer that is broken or cannot pad."""
    import transformers

    level = transformers.logging.get_verbosity()
    try:
        transformers.logging.set_verbosity_error()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=source.trust_remote_code, use_fast=True
            )
    except MemoryError:
        raise
    # The libraries raise whatever their parsers raise, down to bare Exception from Rust.
    except Exception as error:
        raise _broken(source, error) from error
    finally:
        transformers.logging.set_verbosity(level)
    return _describe(tokenizer, source)


def _describe(tokenizer: PreTrainedTokenizerBase, source: TokenizerSource) -> LoadedTokenizer:
    notes: list[str] = []
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"The tokenizer {source.name_or_path} has neither a padding nor an end-of-text "
                "token: rows of different length cannot be put into one batch without. Add "
                "pad_token to its tokenizer_config.json, or set model.tokenizer to another."
            )
        notes.append(
            f"tokenizer: it has no padding token, so {tokenizer.eos_token!r} is used for padding"
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    limit = tokenizer.model_max_length
    return LoadedTokenizer(
        tokenizer=tokenizer,
        pad_token_id=int(pad),
        padding_side="left" if tokenizer.padding_side == "left" else "right",
        max_length=int(limit) if limit and 0 < limit < _NO_LIMIT else None,
        notes=tuple(notes),
    )


def _config_values(folder: Path) -> dict[str, object]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {k: config[k] for k in _CONFIG_KEYS if k in config} if isinstance(config, dict) else {}


def _download(source: TokenizerSource) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    utils = importlib.import_module("huggingface_hub.utils")
    bars_were_disabled = utils.are_progress_bars_disabled()
    patterns = [*_FILE_PATTERNS, "config.json"]
    try:
        utils.disable_progress_bars()
        return Path(
            huggingface_hub.snapshot_download(
                source.name_or_path,
                revision=source.revision,
                allow_patterns=[*patterns, "*.py"] if source.trust_remote_code else patterns,
            )
        )
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".")
        raise UserError(
            f"The tokenizer {source.name_or_path!r} cannot be found: it is no local folder, and "
            f"the Hugging Face hub gave none ({reason}). Offline, it must be a local folder or "
            "downloaded before. Set model.tokenizer or model.name_or_path, or check the network."
        ) from error
    finally:
        if not bars_were_disabled:
            utils.enable_progress_bars()


def _broken(source: TokenizerSource, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".")
    return UserError(
        f"The tokenizer {source.name_or_path} cannot be loaded: {reason}. Its files must be whole "
        "and of a kind that the installed transformers knows. Save or download it again, or set "
        "model.tokenizer."
    )
