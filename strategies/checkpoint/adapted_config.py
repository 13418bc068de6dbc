"""config.json of a base with an adapter in it: whether the two belong together, and what it says then.

Knows configurations, names and shapes; how tensors fit is `adapter_weights`'.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.adapter import MODEL_CONFIG, AdapterConfig
from ftlaunch.strategies.checkpoint.adapter_weights import Fitted, is_output, unfitting
from ftlaunch.strategies.checkpoint.model_files import CONFIG_NAME, EMBEDDINGS, read_config
from ftlaunch.strategies.checkpoint.weights import Weight
from ftlaunch.strategies.files import replace_file

# What two configurations of one model say alike, under any family's names.
_SIZES = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
    "n_embd",
    "n_layer",
    "n_head",
    "n_positions",
    "dim",
    "n_layers",
    "n_heads",
    "hidden_dim",
)
# The last matrix of a classification: it has a row for each label.
_LABELS = ("classifier.weight", "score.weight", "classifier.out_proj.weight")
# Ends of the classes whose output is the vocabulary; peft's names of their tasks.
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")
_LANGUAGE_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def check_sizes(
    own: Mapping[str, Any], config: Mapping[str, Any], *, adapter: str, base: str
) -> None:
    """UserError where what the adapter was trained on has other sizes than the base.

    An adapter need not touch the tensors that show it.
    own      the adapter's model_config.json
    config   the base's config.json
    """
    inner = config.get("text_config")
    if isinstance(inner, dict) and "text_config" not in own:
        config = inner
    for key in _SIZES:
        said, there = own.get(key), config.get(key)
        if said is not None and there is not None and said != there:
            problem = (
                f"{key} is {said!r} in the adapter's {MODEL_CONFIG}, {there!r} in the base's "
                f"{CONFIG_NAME}, and must be the same"
            )
            raise unfitting(adapter, base, problem)


def config_changes(
    weights: Sequence[Weight],
    fitted: Fitted,
    config: AdapterConfig,
    says: Mapping[str, Any],
    *,
    adapter: str,
    base: str,
) -> dict[str, Any]:
    """What config.json has to say other than the base's, so that the merged weights are loaded as they are.

    weights   of the base
    says      what it says as it stands: the adapter's model_config.json, else the base's config.json
    UserError when no configuration would make it what peft has trained.
    """
    changes: dict[str, Any] = {}
    shapes = {w.name: w.shape for w in weights} | {n: w.shape for n, w in fitted.replaced.items()}
    shapes = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    words = [name for name in shapes if name.endswith(EMBEDDINGS)]
    outputs = [name for name in shapes if is_output(name)]
    if not _is_language_model(config, says):
        # What is trained leaves the base's own output out.
        outputs = [name for name in outputs if name in fitted.replaced or name in fitted.changed]
    before = {weight.name: weight.shape[0] for weight in weights if weight.shape}
    known = {before[name] for name in words if name in before}
    resized = []
    for name in (*words, *outputs):
        there = {before[name]} if name in before else known
        if name in fitted.replaced and there and shapes[name][0] not in there:
            resized.append(name)
    if resized:
        rows = shapes[resized[0]][0]
        for name in (*words, *outputs):
            if shapes[name][0] != rows:
                problem = (
                    f"{resized[0]} has {rows} rows, {name} {shapes[name][0]}, and each needs one for "
                    "every word"
                )
                raise unfitting(adapter, base, problem)
        changes["vocab_size"] = rows
    touched = [n for n in words if n in fitted.replaced or n in fitted.changed]
    if any(touched or name in fitted.replaced or name in fitted.changed for name in outputs):
        changes["tie_word_embeddings"] = False
    elif (
        touched
        and _is_language_model(config, says)
        and says.get("tie_word_embeddings") is not False
    ):
        raise tied(touched[0], adapter)
    return changes


def tied(name: str, adapter: str) -> UserError:
    return UserError(
        f"the adapter {adapter} changes {name}, which is the model's output, too "
        "(tie_word_embeddings): peft leaves the output what it was, so that the result is no model with "
        "one matrix for both. Train it with modules_to_save of both, or with peft's ensure_weight_tying and "
        "its own merge_and_unload."
    )


def _is_language_model(config: AdapterConfig, says: Mapping[str, Any]) -> bool:
    if config.task is not None:
        return config.task in _LANGUAGE_TASKS
    names = says.get("architectures")
    return isinstance(names, list) and any(str(name).endswith(_LANGUAGE_MODELS) for name in names)


def change_config(folder: Path, changes: Mapping[str, Any]) -> None:
    """Have the config.json in `folder` say `changes`, where a part of it is the text's there."""
    if not changes:
        return
    config: dict[str, Any] = read_config(folder)
    inner = config.get("text_config")
    if isinstance(inner, dict):
        config["text_config"] = {**inner, **changes}
        whole = {*config, "tie_word_embeddings"}
        changes = {key: value for key, value in changes.items() if key in whole}
    _write(folder, {**config, **changes})


def fit_labels(folder: Path, weights: Sequence[Weight]) -> None:
    """The base's config.json knows nothing of the adapter's head: have it say as many labels."""
    config: dict[str, Any] = read_config(folder)
    rows = [w.shape[0] for w in weights if w.name in _LABELS and len(w.shape) == 2]
    labels = config.get("id2label")
    known = len(labels) if isinstance(labels, dict) else None
    if len(rows) != 1 or rows[0] == known:
        return
    names = {str(i): f"LABEL_{i}" for i in range(rows[0])}
    config["id2label"] = names
    config["label2id"] = {name: int(i) for i, name in names.items()}
    _write(folder, config)


def _write(folder: Path, config: Mapping[str, Any]) -> None:
    with replace_file(folder / CONFIG_NAME) as file:
        file.write(json.dumps(config, indent=2).encode() + b"\n")
