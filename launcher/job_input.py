"""What a job is made from: model and data, and the demo's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ftlaunch.cluster.errors import UserError
from ftlaunch.launcher.config import RunConfig
from ftlaunch.launcher.output_folder import OWN_NAMES
from ftlaunch.strategies.data.demo import write_demo
from ftlaunch.strategies.model_config import check_model_folder


def check_input(config: RunConfig, *, or_adapter: bool = False) -> None:
    """What can be seen to be missing without reading it. UserError."""
    if not config.is_demo:
        check_model_folder(config.model, or_adapter=or_adapter)


def needed_paths(config: RunConfig) -> list[str]:
    """The files and folders that every node has to have."""
    return [name for name in _named(config) if Path(name).is_absolute()]


def keep_input(config: RunConfig, folder: Path) -> None:
    """UserError when --overwrite would delete what the job is to be made from."""
    for name in _named(config):
        if any(Path(name).is_relative_to(folder / own) for own in OWN_NAMES):
            raise UserError(
                f"--overwrite would delete {name}, which this job needs. Choose another "
                "--output-dir, or move it elsewhere first."
            )


def prepare_demo(config: RunConfig) -> RunConfig:
    """The embedded demo: its model and data are made where tokens are cached, once."""
    from ftlaunch.strategies.data.cache_folder import cache_root, writing_to_cache

    root = cache_root(config.data)
    folder = root / "demo-1"
    with writing_to_cache(root):
        write_demo(folder)
    return replace(
        config,
        model=replace(config.model, name_or_path=str(folder / "model"), random_weights=True),
        data=replace(config.data, name_or_path=str(folder / "data")),
    )


def _named(config: RunConfig) -> list[str]:
    names = (config.model.name_or_path, config.model.tokenizer, config.data.name_or_path)
    return [name for name in names if name is not None]
