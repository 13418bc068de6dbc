"""What the user asked for: defaults, then the YAML file, then flags, then `key=value`, validated.

Nothing is detected and nothing derived here: that is `launcher.plan`.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from annotated_types import Ge, Gt, Le

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.rank_table import RankTable
from ftlaunch.launcher.lora_mistakes import lora_mistakes
from ftlaunch.launcher.slurm_options import SlurmOptions, slurm_mistakes, with_free_keys
from ftlaunch.strategies.deepspeed_config import read_deepspeed_config
from ftlaunch.strategies.model_config import absolute_path, looks_local
from ftlaunch.strategies.options import (
    BenchOptions,
    CheckpointOptions,
    DataOptions,
    DeepSpeedOptions,
    JobOptions,
    LoraOptions,
    ModelOptions,
    NonNegativeFloat,
    TrainOptions,
)

_STRICT = {"extra": "forbid", "allow_inf_nan": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """Where the job runs, and how its processes are treated."""

    __pydantic_config__ = _STRICT

    kind: Literal["auto", "local", "ssh", "slurm"] = "auto"
    # None: all hosts that are named or allocated; one without any.
    nodes: Annotated[int, Gt(0)] | None = None
    # A job that loses nodes goes on with the others as long as there are so many. None: all.
    min_nodes: Annotated[int, Gt(0)] | None = None
    # Ranks on each node; None: every accelerator that is visible, one rank on a CPU.
    devices: Annotated[int, Gt(0)] | None = None
    hostfile: str | None = None
    # Reached over ssh; each may be a node set, such as n[1-4].
    hosts: tuple[str, ...] | None = None
    # The interpreter on other nodes: a path or a name. None: the path of this one.
    python: str | None = None
    # Variables that nodes are given over ssh beside those that are known; * stands for any end.
    export: tuple[str, ...] = ()
    # Shell lines that run on every other node before anything of ours.
    prologue: str | None = None
    max_restarts: Annotated[int, Ge(0)] = 3
    # Of the rendezvous on node 0; 0 lets it choose a free one.
    port: Annotated[int, Ge(0), Le(65535)] = 0
    # fork: imports once a machine; exec: an interpreter for each rank. None: fork for training,
    # exec for a user's script, which may set variables before it imports.
    start_method: Literal["fork", "exec"] | None = None
    # Whose output a script's user sees: rank 0's, everyone's with [node:rank], nobody's. None: rank 0's
    # for a script, nobody's for training. The logs hold it all.
    show_output: Literal["first", "all", "none"] | None = None
    # Silence of an agent or of the coordinator after which it is taken for lost.
    heartbeat_timeout_seconds: Annotated[float, Gt(0)] = 15.0
    # No step for so long means a hang; 0 waits for ever. Loading, evaluating and saving have more.
    stall_timeout_seconds: NonNegativeFloat = 600.0
    # Between SIGTERM and SIGKILL when the ranks of a script are ended; others have nothing to save.
    grace_seconds: NonNegativeFloat = 3.0
    # Time to reach a step boundary and save after a stop was asked for.
    stop_timeout_seconds: Annotated[float, Gt(0)] = 300.0
    # A collective that takes longer means that a rank is lost.
    collective_timeout_seconds: Annotated[float, Gt(0)] = 1800.0
    # Which NPU is which rank: a path, or what launcher/npus.py has read there.
    rank_table: str | RankTable | None = None
    # Share devices that other processes use.
    allow_busy_devices: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One run as asked for. `strategy` and `precision` may be "auto"."""

    __pydantic_config__ = _STRICT

    task: str = "text-classification"
    strategy: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    output_dir: str | None = None
    cluster: ClusterOptions = field(default_factory=ClusterOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    deepspeed: DeepSpeedOptions = field(default_factory=DeepSpeedOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    slurm: SlurmOptions = field(default_factory=SlurmOptions)
    bench: BenchOptions = field(default_factory=BenchOptions)

    @property
    def is_demo(self) -> bool:
        """Neither a model nor data was named."""
        return self.model.name_or_path is None and self.data.name_or_path is None

    def job_options(self) -> JobOptions:
        return JobOptions(
            task=self.task,
            model=self.model,
            data=self.data,
            train=self.train,
            checkpoint=self.checkpoint,
            deepspeed=self.deepspeed,
            lora=self.lora,
            bench=self.bench,
        )


# A flag may stand in YAML under its own name, too.
ALIASES: dict[str, str] = {
    "nodes": "cluster.nodes",
    "devices": "cluster.devices",
    "cluster": "cluster.kind",
    "hostfile": "cluster.hostfile",
    "max_restarts": "cluster.max_restarts",
    "model": "model.name_or_path",
    "dataset": "data.name_or_path",
    "data": "data.name_or_path",
}


def load_config(
    *,
    file: Path | None,
    flags: Mapping[str, Any],
    overrides: Sequence[str],
    defaults: Mapping[str, Any] | None = None,
    data_optional: bool = False,
) -> RunConfig:
    """`defaults` (dotted keys) give way to everything. UserError that lists every mistake at once.

    data_optional   a model may be named without data
    """
    settings: dict[str, Any] = {}
    for key, value in (defaults or {}).items():
        _set(settings, key, value)
    if file is not None:
        for key, value in _read_yaml(file).items():
            _set(settings, key, value)
    for key, value in flags.items():
        _set(settings, ALIASES.get(key, key), value)
    mistakes = []
    for text in overrides:
        try:
            _set(settings, *_parse_override(text))
        except UserError as error:
            mistakes.append(str(error))
    _split_lists(settings)
    if isinstance(settings.get("slurm"), dict):
        settings["slurm"] = with_free_keys(settings["slurm"])
    config: RunConfig | None = None
    try:
        config = pydantic.TypeAdapter(RunConfig).validate_python(settings)
    except pydantic.ValidationError as error:
        mistakes += _mistakes(error)
    if config is not None:
        mistakes += _contradictions(config, data_optional=data_optional)
    if mistakes or config is None:
        raise UserError("\n".join(_once(mistakes)))
    return _with_deepspeed_file(_with_absolute_paths(config))


def all_keys() -> list[str]:
    """Every key that a user can set, dotted, sorted."""
    return sorted(_walk_keys(RunConfig, ""))


def _walk_keys(cls: Any, prefix: str) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for each in dataclasses.fields(cls):
        kind = hints[each.name]
        if dataclasses.is_dataclass(kind):
            yield from _walk_keys(kind, f"{prefix}{each.name}.")
        else:
            yield f"{prefix}{each.name}"


# -- reading ------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 2e-5 is a number, yes, on and 4:00:00 are words, a key stands once."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp) for tag, regexp in resolvers if not tag.endswith((":bool", ":float", ":int"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
# Without the base of 60, by which a time limit of 4:00:00 would be 14,400.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
        r"|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float | bool | None):
            raise yaml.constructor.ConstructorError(
                None, None, "a key must be a plain word", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} stands twice", key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the configuration {path} cannot be read: {error}.") from None
    try:
        content = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the configuration {path} is not valid YAML: {reason}.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(
            f"the configuration {path} must hold `key: value` lines; it holds "
            f"a {type(content).__name__}."
        )
    # `model: {…}` is the section, `model: NAME` the flag.
    return {
        str(key) if isinstance(value, dict) else ALIASES.get(str(key), str(key)): value
        for key, value in content.items()
    }


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise UserError(
            f"{text!r} is neither a flag nor key=value. Write for example train.learning_rate=2e-5."
        )
    try:
        value = yaml.load(raw, Loader=_Loader)
    except (yaml.YAMLError, RecursionError):
        value = raw
    # YAML would fold the lines of a text into one.
    return key.strip(), raw if isinstance(value, str) and "\n" in raw else value


def _set(settings: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; sections in `value` are merged into what is there."""
    *sections, name = key.split(".")
    place = settings
    for section in sections:
        inner = place.setdefault(section, {})
        if not isinstance(inner, dict):
            inner = place[section] = {}
        place = inner
    if isinstance(value, dict):
        section_values = place.setdefault(name, {})
        if isinstance(section_values, dict):
            for inner_name, inner_value in value.items():
                _set(section_values, str(inner_name), inner_value)
            return
    place[name] = value


# A comma within brackets belongs to a node set: n[1,3-4].
_WORD_ENDS = re.compile(r",(?![^\[]*\])")


def _split_lists(settings: dict[str, Any]) -> None:
    """`data.text_columns=a,b` and a single word stand for a list."""
    kinds: dict[str, Any] = {
        "cluster": ClusterOptions,
        "model": ModelOptions,
        "data": DataOptions,
        "train": TrainOptions,
        "lora": LoraOptions,
    }
    for section, kind in kinds.items():
        values = settings.get(section)
        if not isinstance(values, dict):
            continue
        hints = typing.get_type_hints(kind)
        for name, value in values.items():
            if isinstance(value, str) and _takes_words(hints.get(name)):
                values[name] = [word.strip() for word in _WORD_ENDS.split(value) if word.strip()]


def _takes_words(hint: Any) -> bool:
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0] is str
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_takes_words(part) for part in typing.get_args(hint))
    return False


# -- mistakes -----------------------------------------------------------------------------------


def _mistakes(error: pydantic.ValidationError) -> list[str]:
    lines: list[str] = []
    for each in error.errors(include_url=False):
        known = _known_part(each["loc"])
        if each["type"] == "unexpected_keyword_argument":
            lines += map(_unknown_key, _names_in(".".join(map(str, each["loc"])), each["input"]))
        elif each["type"] in ("dataclass_type", "dataclass_exact_type"):
            lines.append(
                f"{known} is a section: write {known}.KEY=VALUE. It was {each['input']!r}."
            )
        else:
            message = each["msg"].removeprefix("Input ")
            lines.append(f"{known} is {_short(each['input'])}: it {message}.")
    return lines


def _known_part(location: Sequence[int | str]) -> str:
    """The dotted key of an error, without what pydantic appends for members of a union."""
    keys = all_keys()
    parts = [str(part) for part in location]
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in keys or any(key.startswith(f"{name}.") for key in keys):
            return name
    return ".".join(parts)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _names_in(name: str, value: Any) -> list[str]:
    """The dotted keys that were set under `name`: of a section that does not exist, each is named."""
    if not isinstance(value, dict) or not value:
        return [name]
    return [inner for key in value for inner in _names_in(f"{name}.{key}", value[key])]


def _unknown_key(name: str) -> str:
    keys = all_keys()
    near = difflib.get_close_matches(name, [*keys, *ALIASES], n=3, cutoff=0.6)
    last = name.rpartition(".")[2]
    near += [key for key in keys if key.rpartition(".")[2] == last and key not in near]
    if not near:
        near = difflib.get_close_matches(last, [k.rpartition(".")[2] for k in keys], n=3)
        near = [key for key in keys if key.rpartition(".")[2] in near][:3]
    hint = f" Did you mean {' or '.join(near[:3])}?" if near else ""
    return f"{name} is not a key.{hint} All keys are listed in docs/configuration.md."


def _contradictions(config: RunConfig, *, data_optional: bool = False) -> list[str]:
    """What no single value shows to be wrong."""
    train, checkpoint = config.train, config.checkpoint
    lines = []
    if isinstance(config.cluster.rank_table, RankTable):
        lines.append("cluster.rank_table is a mapping: it is the path of a rank table's file.")
    nodes, least = config.cluster.nodes, config.cluster.min_nodes
    if nodes is not None and least is not None and least > nodes:
        lines.append(f"cluster.min_nodes is {least}: the job has {nodes} nodes, not more.")
    if config.model.name_or_path is None and config.data.name_or_path is not None:
        lines.append("--dataset is given without --model. Name the model that is to be trained.")
    without_data = config.data.name_or_path is None and config.model.name_or_path is not None
    if without_data and not data_optional:
        lines.append(
            "--model is given without --dataset. Name the data that it is to be trained on."
        )
    if train.eval_strategy == "steps" and train.eval_steps is None:
        lines.append("train.eval_strategy is 'steps': set train.eval_steps to how many.")
    if train.eval_strategy == "no":
        if checkpoint.load_best_model_at_end:
            lines.append(
                "checkpoint.load_best_model_at_end is true, but train.eval_strategy is 'no': "
                "without evaluations none is best. Set train.eval_strategy to epoch or steps."
            )
        if train.early_stopping_patience is not None:
            lines.append(
                "train.early_stopping_patience is set, but train.eval_strategy is 'no': there is "
                "nothing to be patient with. Set train.eval_strategy to epoch or steps."
            )
    if train.warmup_steps >= 1 and train.warmup_steps != int(train.warmup_steps):
        lines.append(
            f"train.warmup_steps is {train.warmup_steps}: it is a whole number of steps, or a "
            "fraction of all steps below 1."
        )
    return lines + lora_mistakes(config.lora, config.model) + slurm_mistakes(config.slurm)


def _once(lines: Sequence[str]) -> list[str]:
    """Without repetitions: a union reports the same value once for each of its members."""
    kept: dict[str, str] = {}
    for line in lines:
        kept.setdefault(line.partition(":")[0], line)
    return list(kept.values())


def _with_deepspeed_file(config: RunConfig) -> RunConfig:
    """Read where the user typed it: what runs is what was in the file then."""
    path = config.deepspeed.config
    if not isinstance(path, str):
        return config
    content = read_deepspeed_config(str(absolute_path(path)))
    deepspeed = dataclasses.replace(config.deepspeed, config=content)
    return dataclasses.replace(config, deepspeed=deepspeed)


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    """Workers may start in another folder: paths are made absolute where the user typed them."""

    def absolute(name: str | None) -> str | None:
        return str(absolute_path(name)) if name is not None and looks_local(name) else name

    def always(name: str | None) -> str | None:
        return None if name is None else str(absolute_path(name))

    table = config.cluster.rank_table
    return dataclasses.replace(
        config,
        output_dir=always(config.output_dir),
        cluster=dataclasses.replace(
            config.cluster,
            hostfile=always(config.cluster.hostfile),
            rank_table=table if isinstance(table, RankTable) else always(table),
        ),
        model=dataclasses.replace(
            config.model,
            name_or_path=absolute(config.model.name_or_path),
            tokenizer=absolute(config.model.tokenizer),
        ),
        data=dataclasses.replace(
            config.data,
            name_or_path=absolute(config.data.name_or_path),
            cache_dir=always(config.data.cache_dir),
        ),
    )
