"""The task of guessing tokens of a text that are hidden. Which ones is drawn anew every epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.data.arrangements import supervised_only
from ftlaunch.strategies.data.language_columns import Found, find_columns
from ftlaunch.strategies.data.masks import MaskRule, mask_tokens
from ftlaunch.strategies.data.tasks import UNSUPERVISED, Encoded, ModelLabels, TaskSpec, too_long
from ftlaunch.strategies.data.token_outputs import (
    TokenMetric,
    TokenOutputs,
    perplexity,
    sample_records,
    token_accuracy,
)
from ftlaunch.strategies.data.token_samples import TokenSample
from ftlaunch.strategies.options import DataOptions

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from ftlaunch.strategies.data.sources import Splits
    from ftlaunch.strategies.data.token_samples import TokenSamples
    from ftlaunch.strategies.data.token_table import TokenTable


class MaskedLm:
    """`TokenTask` for language models that read in both directions.

    The cache has the number of the word at every token that may be hidden; `draw` makes of it what is
    hidden in one epoch.
    """

    def inspect(self, splits: Splits, options: DataOptions) -> TaskSpec:
        """See `Task.inspect`."""
        parts = {"training": splits.train}
        if splits.eval is not None:
            parts["evaluation"] = splits.eval
        return _make_spec(find_columns(parts, options, kinds=("text",)), options)

    def inspect_for_model(
        self, splits: Splits, options: DataOptions, labels: ModelLabels
    ) -> TaskSpec:
        """See `Task.inspect_for_model`."""
        parts = {"evaluation": splits.train}
        return _make_spec(find_columns(parts, options, kinds=("text",)), options)

    def cache_key(self, options: DataOptions) -> Mapping[str, Any]:
        """See `Task.cache_key`. The cached details have it all, the cached tokens the last alone."""
        return {
            "mlm_probability": options.mlm_probability,
            "whole_word_masking": options.whole_word_masking,
            "long_samples": options.long_samples,
        }

    def fit_tokenizer(
        self, spec: TaskSpec, tokenizer: PreTrainedTokenizerBase, options: DataOptions
    ) -> TaskSpec:
        """See `Task.fit_tokenizer`."""
        if tokenizer.mask_token_id is None:
            raise UserError(
                "The tokenizer has no mask token: masked-lm hides tokens behind it. Use a model that was "
                "trained to guess hidden tokens, such as BERT (or --task causal-lm), or set "
                "model.tokenizer to a tokenizer that has one."
            )
        if options.whole_word_masking and not tokenizer.is_fast:
            raise UserError(
                f"The tokenizer is a {type(tokenizer).__name__}, which does not tell to which word a "
                "token belongs: data.whole_word_masking needs a fast one, with a tokenizer.json. Leave "
                "it out, or set model.tokenizer."
            )
        vocabulary = len(tokenizer)
        details = {
            "mask_token_id": int(tokenizer.mask_token_id),
            "vocabulary": vocabulary,
            # Any of them may be drawn.
            "max_token_id": vocabulary - 1,
        }
        return replace(spec, details={**spec.details, **details})

    def encode(
        self,
        rows: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        spec: TaskSpec,
        max_length: int,
    ) -> Encoded:
        """See `Task.encode`. Labels are numbers of words."""
        texts = list(rows[spec.text_columns[0]])
        wants_types = "token_type_ids" in tokenizer.model_input_names
        ids, types, words = _tokenize(tokenizer, texts, wants_types)
        long = [i for i, row in enumerate(ids) if len(row) > max_length]
        policy = spec.details["long_samples"]
        if long and policy == "error":
            raise too_long(long[0], len(ids[long[0]]), max_length)
        if long and policy == "truncate":
            cut = _tokenize(tokenizer, [texts[i] for i in long], wants_types, max_length)
            for position, i in enumerate(long):
                ids[i], types[i], words[i] = (column[position] for column in cut)
        elif long:
            for i in long:
                ids[i], types[i], words[i] = [], [], []
        return Encoded(
            input_ids=ids,
            token_type_ids=types if wants_types else None,
            labels=words,
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
        """See `TokenTask.draw`."""
        rule = MaskRule(
            probability=spec.details["mlm_probability"],
            whole_words=spec.details["whole_words"],
            mask_token_id=spec.details["mask_token_id"],
            vocabulary=spec.details["vocabulary"],
        )
        seen, wanted = mask_tokens(sample.input_ids, sample.labels, rule, generator)
        return TokenSample(input_ids=seen, token_type_ids=sample.token_type_ids, labels=wanted)

    def default_metrics(self, spec: TaskSpec) -> tuple[str, ...]:
        """See `Task.default_metrics`."""
        return ("perplexity", "token_accuracy")

    def metrics(self, spec: TaskSpec) -> Mapping[str, TokenMetric]:
        """See `TokenTask.metrics`: of the hidden tokens."""
        return {"perplexity": perplexity, "token_accuracy": token_accuracy}

    def predictions(self, outputs: TokenOutputs, spec: TaskSpec) -> list[dict[str, Any]]:
        """See `TokenTask.predictions`: index, loss, num_tokens, token_accuracy."""
        return sample_records(outputs)


def _make_spec(found: Found, options: DataOptions) -> TaskSpec:
    return TaskSpec(
        task="masked-lm",
        text_columns=found.text_columns,
        label_column="",
        problem="tokens",
        label_names=(),
        num_outputs=0,
        loss="token_cross_entropy",
        head="masked-lm",
        drawn=True,
        details={
            "mlm_probability": options.mlm_probability,
            "whole_words": options.whole_word_masking,
            "long_samples": options.long_samples,
        },
        notes=found.notes,
    )


def _tokenize(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    wants_types: bool,
    max_length: int | None = None,
) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """(token ids, token types, numbers of words) of each text."""
    encoded = tokenizer(
        texts,
        truncation=max_length is not None,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=wants_types,
        verbose=False,
    )
    ids = [list(row) for row in encoded["input_ids"]]
    types = [list(row) for row in encoded["token_type_ids"]] if wants_types else [[] for _ in ids]
    # Those of the text itself too: nobody would have to guess them.
    special = set(tokenizer.all_special_ids)
    words = []
    for i, row in enumerate(ids):
        numbers = encoded.word_ids(i) if tokenizer.is_fast else range(len(row))
        words.append(
            [
                UNSUPERVISED if token in special or number is None else number
                for token, number in zip(row, numbers, strict=True)
            ]
        )
    return ids, types, words
