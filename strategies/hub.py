"""What a job needs of the Hugging Face hub, fetched before it is queued, with its revision.

Compute nodes often reach no network: afterwards everything is in the cache. Loads no framework.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.model_config import looks_local
from ftlaunch.strategies.options import DataOptions, ModelOptions

_COMMIT = re.compile(r"[0-9a-f]{40}")
# Weights of other frameworks and formats.
_NOT_OURS = (
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.ot",
    "*.tflite",
    "*.gguf",
    "*.pt",
    "*.pth",
    "*.mlmodel",
)
_NOT_FIRST = ("*.bin", "onnx/*", "openvino/*", "coreml/*", "original/*", "*/*.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """One thing of the hub as the job will use it."""

    what: str
    name: str
    revision: str


def fetch_model(
    options: ModelOptions, say: Callable[[str], None]
) -> tuple[ModelOptions, list[Fetched]]:
    """The options with their revisions sealed, and what was fetched. UserError when it cannot be."""
    fetched = []
    name = options.name_or_path
    if name is not None and not looks_local(name):
        say(f"fetching the model {name} from the hub, or its cache")
        folder = _snapshot(name, options.revision, "model", [*_NOT_OURS, *_NOT_FIRST])
        if not (options.random_weights or list(folder.glob("*.safetensors"))):
            _snapshot(name, folder.name, "model", [*_NOT_OURS, *_NOT_FIRST[1:]])
        fetched.append(Fetched(what="model", name=name, revision=folder.name))
        options = replace(options, revision=folder.name)
    name = options.tokenizer
    if name is not None and not looks_local(name):
        say(f"fetching the tokenizer {name} from the hub, or its cache")
        folder = _snapshot(name, None, "model", ["*.safetensors", "*.bin", *_NOT_OURS])
        fetched.append(Fetched(what="tokenizer", name=name, revision=folder.name))
        # A tokenizer has no revision of its own: the snapshot is one.
        options = replace(options, tokenizer=str(folder))
    return options, fetched


def fetch_data(
    options: DataOptions, say: Callable[[str], None]
) -> tuple[DataOptions, list[Fetched]]:
    """Like `fetch_model`; the rows are read once, which leaves them in the cache."""
    name = options.name_or_path
    if name is None or looks_local(name):
        return options, []
    from ftlaunch.strategies.data.sources import load_splits

    say(f"fetching the data set {name} from the hub, or its cache")
    revision = _commit_of(name, options.revision)
    if revision is not None:
        options = replace(options, revision=revision)
    load_splits(options, seed=0)
    return options, [Fetched(what="data set", name=name, revision=revision or "as cached")]


def _snapshot(name: str, revision: str | None, kind: str, ignored: list[str]) -> Path:
    """The local folder of a commit; its name is the commit."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, repo_type=kind, ignore_patterns=ignored
            )
        )
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as error:
        wanted = f"{name!r}" + (f", revision {revision!r}," if revision else "")
        raise UserError(
            f"the {kind} {wanted} is no path here, and could not be had from the hub: "
            f"{_first_line(error)}. What a queued job needs is fetched when it is submitted, since "
            "compute nodes may have no network. Check the name and the network, or pass a folder."
        ) from None
    if not _COMMIT.fullmatch(folder.name):
        raise UserError(
            f"the {kind} {name!r} is in {folder}, which is named after no commit: its revision "
            "cannot be sealed. Pass that folder itself as a path."
        )
    return folder


def _commit_of(name: str, revision: str | None) -> str | None:
    """Of a data set; None where only the cache can be asked, which keeps it by a name of its own."""
    import huggingface_hub
    from huggingface_hub import errors

    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    try:
        return huggingface_hub.HfApi().dataset_info(name, revision=revision).sha
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError):
        # Whether the data can be had without is found out by reading it.
        return None


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300].rstrip(".")
