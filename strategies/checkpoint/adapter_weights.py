"""The tensors of a LoRA adapter: their names in peft's layout, and how they fit the model below.

Reads headers alone; the numbers are `low_rank`'s. What peft does not name here is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterConfig
from ftlaunch.strategies.checkpoint.conversion import SAVE_DTYPES
from ftlaunch.strategies.checkpoint.model_files import EMBEDDINGS, ModelShapes
from ftlaunch.strategies.checkpoint.torch_zip import ITEM_BYTES
from ftlaunch.strategies.checkpoint.weights import LowRank, Run, Weight
from ftlaunch.strategies.safetensors_file import FileDamaged, read_places

_PREFIX = "base_model.model."
# What stands behind a module's name → which part of its adapter it is.
_PARTS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A of an embedding",
    ".lora_embedding_B": "B of an embedding",
    ".lora_magnitude_vector": "magnitude",
}
# The matrix of the words' logits, as the families call it; and the end of its name in parts of a model.
_OUTPUTS = (
    "lm_head.weight",
    "lm_head.decoder.weight",
    "cls.predictions.decoder.weight",
    "predictions.decoder.weight",
    "decoder.weight",
    "vocab_projector.weight",
    "generator_lm_head.weight",
    "embed_out.weight",
)
_OUTPUT = ".lm_head.weight"
# For a classification of any family.
_HEADS = ("classifier", "score")
_FLOATS = ("F64", *SAVE_DTYPES.values())


@dataclass(slots=True)
class _Parts:
    """Of one module's adapter."""

    a: Weight | None = None
    b: Weight | None = None
    magnitude: Weight | None = None
    embedding: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """What an adapter does to a model, by the names that the model's weights have.

    replaced  weights that the adapter has whole (the head); also those that the model lacks
    changed   matrices to which something is added
    prefix    what the model's own names lack in front, with the dot: "bert."
    """

    replaced: Mapping[str, Weight]
    changed: Mapping[str, LowRank]
    prefix: str = field(default="")


def adapter_key(name: str) -> str:
    """peft's name of a parameter that is called `name` in a model with an adapter."""
    for part in ("lora_A", "lora_B"):
        name = name.replace(f".{part}.default.", f".{part}.")
    return _PREFIX + name.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector")


def with_adapter_keys(weights: Iterable[Weight]) -> tuple[Weight, ...]:
    """The weights of a checkpoint under peft's names. UserError when there is no adapter among them."""
    found = tuple(replace(weight, name=adapter_key(weight.name)) for weight in weights)
    if not any(".lora_A." in weight.name for weight in found):
        raise UserError("the checkpoint has no adapter's weights. Pass another checkpoint.")
    return found


def read_adapter_weights(folder: Path) -> tuple[Weight, ...]:
    """Of an adapter's folder. UserError when they are missing or damaged."""
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise UserError(
            f"the adapter {folder} has no {ADAPTER_WEIGHTS}. Pass a folder that peft or ftlaunch wrote; "
            "older formats are not read."
        )
    try:
        return weights_of_file(path)
    except FileDamaged as error:
        raise UserError(f"{error}. Copy the adapter anew.") from None


def weights_of_file(path: Path) -> tuple[Weight, ...]:
    """Every tensor of a safetensors file. FileDamaged; UserError for a dtype that is not understood."""
    found = []
    for name, place in read_places(path).items():
        if place.dtype not in ITEM_BYTES:
            raise UserError(
                f"{path}: {name} is {place.dtype}, which is not understood here. Pass weights that are "
                "not quantized."
            )
        runs = (Run(path, place.offset, place.nbytes),)
        found.append(Weight(name=name, dtype=place.dtype, shape=place.shape, runs=runs))
    return tuple(found)


def fit_adapter(
    weights: Sequence[Weight], config: AdapterConfig, known: ModelShapes, *, adapter: str, base: str
) -> Fitted:
    """Which weights of the model `known` the adapter changes, and how.

    adapter, base   what to call them in messages
    UserError that names the tensor when they do not belong together.
    """
    modules: dict[str, _Parts] = {}
    whole: dict[str, Weight] = {}
    for weight in weights:
        _check_tensor(weight, adapter)
        name = weight.name.removeprefix(_PREFIX)
        part = next((part for end, part in _PARTS.items() if name.endswith(end)), None)
        if part is None:
            whole[name.replace(".base_layer.", ".")] = weight
        else:
            end = next(end for end, each in _PARTS.items() if each == part)
            _take(modules.setdefault(name.removesuffix(end), _Parts()), part, weight)
    if not modules:
        raise UserError(f"the adapter {adapter} has no lora_A and lora_B. Pass another.")
    _check_whole(config.whole, whole, adapter)
    # Where the body of the model lies, by the modules that are adapted there.
    bodies = {module.partition(".")[0] for module in modules}
    found_at: dict[str, tuple[str, tuple[int, ...]]] = {}
    prefix = ""
    for module in modules:
        name = f"{module}.weight"
        found = known.name(name)
        if found is None:
            raise unfitting(adapter, base, f"it changes {name}, which the base does not have")
        if found == name.partition(".")[2]:
            prefix = name[: -len(found)]
        found_at[module] = (found, whole[name].shape if name in whole else known.exact[found])
    # peft writes of the last module alone whether its rows are inputs.
    if any(_has_rows_of_inputs(modules[m], shape) for m, (_, shape) in found_at.items()):
        config = replace(config, fan_in_fan_out=True)
    changed = {}
    for module, (found, shape) in found_at.items():
        changed[found] = _low_rank(module, modules[module], config, shape, adapter, base)
    replaced = {}
    for name, weight in whole.items():
        there = known.name(name)
        shape = weight.shape if there is None else known.exact[there]
        # A head may have other labels, and an embedding other words.
        first = 1 if _may_have_other_rows(name, bodies) else 0
        if len(shape) != len(weight.shape) or shape[first:] != weight.shape[first:]:
            problem = f"{name} has shape {weight.shape}, in the base {shape}"
            raise unfitting(adapter, base, problem)
        replaced[there or name] = weight
    return Fitted(replaced=replaced, changed=changed, prefix=prefix)


def is_output(name: str) -> bool:
    """Whether a weight is the matrix behind which the words' logits stand."""
    return name in _OUTPUTS or name.endswith(_OUTPUT)


def _may_have_other_rows(name: str, bodies: Collection[str]) -> bool:
    return (
        name.endswith(EMBEDDINGS)
        or is_output(name)
        # What lies outside of the body is a head.
        or name.partition(".")[0] not in bodies
    )


def _has_rows_of_inputs(parts: _Parts, shape: tuple[int, ...]) -> bool:
    if parts.a is None or parts.b is None or parts.embedding:
        return False
    inputs, outputs = parts.a.shape[-1], parts.b.shape[0]
    return inputs != outputs and shape == (inputs, outputs)


def _check_whole(entries: Collection[str], whole: Collection[str], adapter: str) -> None:
    """UserError when a module that the adapter is said to hold whole is not in its file."""
    # peft takes every module whose name ends so: "head" is lm_head, too.
    lacking = {entry for entry in entries if not any(f"{entry}." in name for name in whole)}
    # It adds the names that a head may have: one of them will do, or a head by another name.
    if set(entries) - lacking - set(_HEADS) or not lacking.issuperset({*entries} & {*_HEADS}):
        lacking -= set(_HEADS)
    if lacking:
        raise UserError(
            f"the adapter {adapter}: modules_to_save names {min(lacking)!r} in {ADAPTER_CONFIG}, and its "
            "file has no tensor of such a module. Copy the adapter anew, or save it anew with peft."
        )


def merged_weights(base: Sequence[Weight], fitted: Fitted) -> tuple[Weight, ...]:
    """The base's weights as the adapter makes them. Names are those of the adapter's model."""
    own = {weight.name for weight in base}
    merged = []
    for weight in base:
        name = fitted.prefix + weight.name
        there = fitted.replaced.get(weight.name, weight)
        change = fitted.changed.get(weight.name)
        if change is not None and there.dtype not in _FLOATS:
            raise UserError(
                f"the base's {weight.name} is {there.dtype}: an adapter can only be merged into "
                "floating-point numbers. Pass the base before it was quantized."
            )
        merged.append(replace(there, name=name, change=change))
    merged += [
        replace(weight, name=name) for name, weight in fitted.replaced.items() if name not in own
    ]
    return tuple(merged)


def _check_tensor(weight: Weight, adapter: str) -> None:
    if not weight.name.startswith(_PREFIX):
        raise UserError(
            f"the adapter {adapter} has a tensor {weight.name!r}: names in peft's layout begin with "
            f"{_PREFIX!r}. Save it anew with peft."
        )
    if math.prod(weight.shape) == 0:
        raise UserError(
            f"the adapter {adapter} is empty: {weight.name} has shape {weight.shape}. It was probably saved "
            "under ZeRO-3 from parameters that were not gathered. Save it anew."
        )
    known = any(weight.name.endswith(end) for end in _PARTS)
    if ".lora_" in weight.name and not known:
        raise UserError(
            f"the adapter {adapter} has a tensor {weight.name}, which is not understood here. Merge it "
            "with peft's own merge_and_unload."
        )
    if weight.dtype not in _FLOATS:
        raise UserError(
            f"the adapter {adapter}: {weight.name} is {weight.dtype}, not floating-point."
        )


def _take(parts: _Parts, part: str, weight: Weight) -> None:
    if part.startswith("A"):
        parts.a = weight
    elif part.startswith("B"):
        parts.b = weight
    else:
        parts.magnitude = weight
    parts.embedding |= part.endswith("embedding")


def _low_rank(
    module: str,
    parts: _Parts,
    config: AdapterConfig,
    shape: tuple[int, ...],
    adapter: str,
    base: str,
) -> LowRank:
    a, b = parts.a, parts.b
    if a is None or b is None:
        there, lacking = ("lora_A", "lora_B") if b is None else ("lora_B", "lora_A")
        raise UserError(f"the adapter {adapter} has {there} of {module} and no {lacking}.")
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise UserError(
            f"the adapter {adapter}: lora_A and lora_B of {module} have shapes {a.shape} and {b.shape}, "
            "which cannot be multiplied."
        )
    rank = config.rank_of(module)
    if a.shape[0] != rank:
        raise UserError(
            f"the adapter {adapter}: lora_A of {module} has rank {a.shape[0]}, {ADAPTER_CONFIG} says {rank}."
        )
    inputs, outputs = a.shape[1], b.shape[0]
    straight, transposed = (outputs, inputs), (inputs, outputs)
    if shape not in (straight, transposed):
        problem = f"{module}.weight has shape {shape} there, and what is to be added {straight}"
        raise unfitting(adapter, base, problem)
    magnitude = parts.magnitude
    if config.use_dora != (magnitude is not None):
        state = "none" if magnitude is None else "one"
        raise UserError(
            f"the adapter {adapter}: {ADAPTER_CONFIG} has use_dora={config.use_dora}, and there is "
            f"{state} of the magnitudes of {module}."
        )
    if magnitude is not None and magnitude.shape != (outputs,):
        problem = f"the magnitudes of {module} have shape {magnitude.shape}, not {(outputs,)}"
        raise unfitting(adapter, base, problem)
    # A square matrix does not show it.
    flipped = parts.embedding or (
        config.fan_in_fan_out if straight == transposed else shape == transposed
    )
    return LowRank(
        left=a if flipped else b,
        right=b if flipped else a,
        scale=config.scale_of(module),
        magnitude=magnitude,
        transposed=flipped,
    )


def unfitting(adapter: str, base: str, problem: str) -> UserError:
    return UserError(
        f"the adapter {adapter} does not fit the base {base}: {problem}. Pass the base that it was "
        f"trained on ({ADAPTER_CONFIG} names it)."
    )
