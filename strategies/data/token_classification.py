"""The task of giving each word a tag: entities, parts of speech. Knows columns, labels and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.data.arrangements import supervised_only
from ftlaunch.strategies.data.entity_scores import (
    ENTITY_SCORES,
    are_entities,
    entity_metric,
    tag_names,
)
from ftlaunch.strategies.data.local_files import list_names
from ftlaunch.strategies.data.tag_columns import Tagged, find_tagged
from ftlaunch.strategies.data.tasks import Encoded, ModelLabels, TaskSpec, too_long
from ftlaunch.strategies.data.token_outputs import TokenMetric, TokenOutputs, token_accuracy
from ftlaunch.strategies.data.word_tags import Range, join_words, label_tokens, words_of_spans
from ftlaunch.strategies.options import DataOptions

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from ftlaunch.strategies.data.sources import Splits
    from ftlaunch.strategies.data.token_samples import TokenSample, TokenSamples
    from ftlaunch.strategies.data.token_table import TokenTable


class TokenClassification:
    """`TokenTask` for tags of words, given word by word or as spans of characters.

    The first token of a word carries its tag; nothing is learned at the others.
    """

    def inspect(self, splits: Splits, options: DataOptions) -> TaskSpec:
        """See `Task.inspect`."""
        parts = {"training": splits.train}
        if splits.eval is not None:
            parts["evaluation"] = splits.eval
        found = find_tagged(parts, options, splits.whole_train)
        if len(found.tags) < 2:
            raise UserError(
                f"All tags in {found.label_column!r} are {list_names(found.tags)}: at least two different "
                "ones are needed. Add rows with others, or choose another column with data.label_column."
            )
        return _make_spec(found, found.tags, bool(found.label_names), options)

    def inspect_for_model(
        self, splits: Splits, options: DataOptions, labels: ModelLabels
    ) -> TaskSpec:
        """See `Task.inspect_for_model`."""
        found = find_tagged({"evaluation": splits.train}, options, None)
        return _make_spec(found, labels.label_names, _holds_ids(found, labels), options)

    def cache_key(self, options: DataOptions) -> Mapping[str, Any]:
        """See `Task.cache_key`."""
        return {"long_samples": options.long_samples}

    def fit_tokenizer(
        self, spec: TaskSpec, tokenizer: PreTrainedTokenizerBase, options: DataOptions
    ) -> TaskSpec:
        """See `Task.fit_tokenizer`."""
        if not tokenizer.is_fast:
            raise UserError(
                f"The tokenizer is a {type(tokenizer).__name__}, which does not tell where in a text "
                "its tokens lie: token-classification needs a fast one, with a tokenizer.json. Set "
                "model.tokenizer to a folder or name that has one."
            )
        return spec

    def encode(
        self,
        rows: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        spec: TaskSpec,
        max_length: int,
    ) -> Encoded:
        """See `Task.encode`."""
        texts, words, tags = _read(rows, spec)
        wants_types = "token_type_ids" in tokenizer.model_input_names
        keys = ("input_ids", "token_type_ids") if wants_types else ("input_ids",)
        encoded = _tokenize(tokenizer, texts, wants_types)
        long = [i for i, ids in enumerate(encoded["input_ids"]) if len(ids) > max_length]
        policy = spec.details["long_samples"]
        if long and policy == "error":
            raise too_long(long[0], len(encoded["input_ids"][long[0]]), max_length)
        if long:
            cut = _tokenize(tokenizer, [texts[i] for i in long], wants_types, max_length)
            for position, i in enumerate(long):
                for key in (*keys, "offset_mapping"):
                    encoded[key][i] = cut[key][position] if policy == "truncate" else []
        labels = [
            label_tokens(text, offsets, ranges, ids)
            for text, offsets, ranges, ids in zip(
                texts, encoded["offset_mapping"], words, tags, strict=True
            )
        ]
        return Encoded(
            input_ids=encoded["input_ids"],
            token_type_ids=encoded["token_type_ids"] if wants_types else None,
            labels=labels,
            num_truncated=len(long) if policy == "truncate" else 0,
            num_too_long=len(long) if policy == "drop" else 0,
        )

    def arrange(
        self, table: TokenTable, split: str, spec: TaskSpec, max_length: int
    ) -> tuple[TokenSamples, tuple[str, ...]]:
        """See `TokenTask.arrange`."""
        return supervised_only(table, split, num_too_long=table.num_too_long)

    def draw(
        self, sample: TokenSample, spec: TaskSpec, generator: np.random.Generator
    ) -> TokenSample:
        """See `TokenTask.draw`: the same in every epoch."""
        return sample

    def default_metrics(self, spec: TaskSpec) -> tuple[str, ...]:
        """See `Task.default_metrics`: accuracy alone where tags mark no entities."""
        return tuple(self.metrics(spec))

    def metrics(self, spec: TaskSpec) -> Mapping[str, TokenMetric]:
        """See `TokenTask.metrics`. Accuracy is that of words."""
        scores = ENTITY_SCORES if are_entities(spec.label_names) else ()
        return {**{name: entity_metric(name) for name in scores}, "accuracy": _accuracy}

    def predictions(self, outputs: TokenOutputs, spec: TaskSpec) -> list[dict[str, Any]]:
        """See `TokenTask.predictions`: index, tags and expected tags of the words."""
        predicted, expected = tag_names(outputs, spec)
        return [
            {"index": index, "tags": tags, "expected": wanted}
            for index, tags, wanted in zip(
                outputs.origins.tolist(), predicted, expected, strict=True
            )
        ]


def _accuracy(outputs: TokenOutputs, spec: TaskSpec) -> dict[str, float]:
    return {"accuracy": token_accuracy(outputs, spec)["token_accuracy"]}


def _make_spec(
    found: Tagged, names: tuple[str, ...], labels_are_ids: bool, options: DataOptions
) -> TaskSpec:
    return TaskSpec(
        task="token-classification",
        text_columns=(found.text_column,),
        label_column=found.label_column,
        problem="tokens",
        label_names=names,
        num_outputs=len(names),
        loss="token_cross_entropy",
        labels_are_ids=labels_are_ids,
        head="token-classification",
        keeps_winners=True,
        details={
            "input": found.kind,
            "span_labels": list(found.label_names) if found.kind == "spans" else [],
            "long_samples": options.long_samples,
        },
        notes=found.notes,
    )


def _holds_ids(found: Tagged, labels: ModelLabels) -> bool:
    """Whether the column holds the model's label ids rather than names. UserError if neither."""
    names = labels.label_names
    if found.kind == "words" and found.label_names:
        if found.label_names == names:
            return True
    elif set(found.tags) <= set(names):
        return found.kind == "spans" and bool(found.label_names)
    # What a model has that was given no names, and ids counted like its own.
    generic = names == tuple(f"LABEL_{i}" for i in range(len(names)))
    if (
        generic
        and found.kind == "words"
        and all(tag in map(str, range(len(names))) for tag in found.tags)
    ):
        return True
    raise UserError(
        f"The tags in {found.label_column!r} are not the model's: the data has "
        f"{list_names(found.tags)}, the model {list_names(names)}, in that order. Evaluate with data "
        "that is tagged alike, or set data.label_column."
    )


def _read(
    rows: Mapping[str, Any], spec: TaskSpec
) -> tuple[list[str], list[list[Range]], list[list[int]]]:
    """For each row its text, where its words lie in it, and the ids of their tags."""
    [column] = spec.text_columns
    ids = {name: i for i, name in enumerate(spec.label_names)}
    texts, words, tags = [], [], []
    for index, (text, given) in enumerate(zip(rows[column], rows[spec.label_column], strict=True)):
        if spec.details["input"] == "spans":
            names = spec.details["span_labels"]
            ranges, marks = words_of_spans(index, text, given, names, spec.label_column)
            texts.append(text)
            tags.append([ids[mark] for mark in marks])
        else:
            joined, ranges = join_words(text)
            texts.append(joined)
            tags.append(list(given) if spec.labels_are_ids else [ids[str(tag)] for tag in given])
        words.append(ranges)
    return texts, words, tags


def _tokenize(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    wants_types: bool,
    max_length: int | None = None,
) -> dict[str, list[Any]]:
    encoded = tokenizer(
        texts,
        truncation=max_length is not None,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=wants_types,
        return_offsets_mapping=True,
        verbose=False,
    )
    return {key: list(encoded[key]) for key in encoded}
