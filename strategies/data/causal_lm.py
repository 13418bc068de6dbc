"""The task of predicting the next token: of a text, of a completion, or of the assistant's turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.data.arrangements import supervised_only
from ftlaunch.strategies.data.conversations import check_template, encode_conversation
from ftlaunch.strategies.data.language_columns import Found, find_columns
from ftlaunch.strategies.data.packing import Blocks, PackedSamples
from ftlaunch.strategies.data.tasks import UNSUPERVISED, Encoded, ModelLabels, TaskSpec, too_long
from ftlaunch.strategies.data.token_outputs import (
    TokenMetric,
    TokenOutputs,
    perplexity,
    sample_records,
    token_accuracy,
)
from ftlaunch.strategies.options import DataOptions

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from ftlaunch.strategies.data.sources import Splits
    from ftlaunch.strategies.data.token_samples import TokenSample, TokenSamples
    from ftlaunch.strategies.data.token_table import TokenTable


class CausalLm:
    """`TokenTask` for language models that read from left to right."""

    def inspect(self, splits: Splits, options: DataOptions) -> TaskSpec:
        """See `Task.inspect`."""
        parts = {"training": splits.train}
        if splits.eval is not None:
            parts["evaluation"] = splits.eval
        return _make_spec(find_columns(parts, options), options, options.packing)

    def inspect_for_model(
        self, splits: Splits, options: DataOptions, labels: ModelLabels
    ) -> TaskSpec:
        """See `Task.inspect_for_model`: whole samples are told of one by one, packed or not."""
        found = find_columns({"evaluation": splits.train}, options)
        packing = "none" if options.packing == "samples" else options.packing
        return _make_spec(found, options, packing)

    def cache_key(self, options: DataOptions) -> Mapping[str, Any]:
        """See `Task.cache_key`."""
        return {"packing": options.packing, "long_samples": options.long_samples}

    def fit_tokenizer(
        self, spec: TaskSpec, tokenizer: PreTrainedTokenizerBase, options: DataOptions
    ) -> TaskSpec:
        """See `Task.fit_tokenizer`."""
        if spec.details["input"] == "messages":
            check_template(tokenizer)
        return spec

    def encode(
        self,
        rows: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        spec: TaskSpec,
        max_length: int,
    ) -> Encoded:
        """See `Task.encode`. An end-of-text token ends each text and each completion."""
        ids, learned = _tokenize(rows, tokenizer, spec)
        if spec.details["packing"] == "concatenate":
            labels = [_next_tokens(row, which) for row, which in zip(ids, learned, strict=True)]
            return Encoded(input_ids=ids, token_type_ids=None, labels=labels, num_truncated=0)
        long = [i for i, row in enumerate(ids) if len(row) > max_length]
        policy = spec.details["long_samples"]
        if long and policy == "error":
            raise too_long(long[0], len(ids[long[0]]), max_length)
        for i in long:
            kept = max_length if policy == "truncate" else 0
            ids[i], learned[i] = ids[i][:kept], learned[i][:kept]
        return Encoded(
            input_ids=ids,
            token_type_ids=None,
            labels=[_next_tokens(row, which) for row, which in zip(ids, learned, strict=True)],
            num_truncated=len(long) if policy == "truncate" else 0,
            num_too_long=len(long) if policy == "drop" else 0,
        )

    def arrange(
        self, table: TokenTable, split: str, spec: TaskSpec, max_length: int
    ) -> tuple[TokenSamples, tuple[str, ...]]:
        """See `TokenTask.arrange`."""
        if spec.details["packing"] == "concatenate":
            blocks = Blocks(table, max_length)
            return blocks, (f"{split}: {len(table)} texts as {len(blocks)} blocks of {max_length}",)
        samples, notes = supervised_only(table, split, num_too_long=table.num_too_long)
        if spec.details["packing"] == "none" or not len(samples):
            return samples, notes
        packed = PackedSamples(samples, max_length)
        note = f"{split}: {len(samples)} samples packed into {len(packed)} rows of {max_length}"
        return packed, (*notes, note)

    def draw(
        self, sample: TokenSample, spec: TaskSpec, generator: np.random.Generator
    ) -> TokenSample:
        """See `TokenTask.draw`: the same in every epoch."""
        return sample

    def default_metrics(self, spec: TaskSpec) -> tuple[str, ...]:
        """See `Task.default_metrics`."""
        return ("perplexity", "token_accuracy")

    def metrics(self, spec: TaskSpec) -> Mapping[str, TokenMetric]:
        """See `TokenTask.metrics`."""
        return {"perplexity": perplexity, "token_accuracy": token_accuracy}

    def predictions(self, outputs: TokenOutputs, spec: TaskSpec) -> list[dict[str, Any]]:
        """See `TokenTask.predictions`: index, loss, num_tokens, token_accuracy."""
        return sample_records(outputs)


def _make_spec(found: Found, options: DataOptions, packing: str) -> TaskSpec:
    if packing == "concatenate" and found.kind != "text":
        raise UserError(
            f"data.packing is concatenate, and the data holds {found.describe()}: only plain texts can "
            "be joined and cut anywhere. Set data.packing to samples or none."
        )
    if packing == "concatenate" and options.long_samples != "truncate":
        raise UserError(
            f"data.long_samples is {options.long_samples}, and data.packing is concatenate: texts that "
            "are joined and cut are never too long. Leave one of them out."
        )
    return TaskSpec(
        task="causal-lm",
        text_columns=found.text_columns,
        label_column=found.label_column,
        problem="tokens",
        label_names=(),
        num_outputs=0,
        loss="token_cross_entropy",
        head="causal-lm",
        details={"input": found.kind, "packing": packing, "long_samples": options.long_samples},
        notes=found.notes,
    )


def _tokenize(
    rows: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, spec: TaskSpec
) -> tuple[list[list[int]], list[list[bool]]]:
    """For each row its token ids, and which of them are to be predicted."""
    first = rows[spec.text_columns[0]]
    if spec.details["input"] == "messages":
        pairs = [encode_conversation(each, i, tokenizer) for i, each in enumerate(first)]
        return [ids for ids, _ in pairs], [said for _, said in pairs]
    begins = _open_ended(list(first), tokenizer)
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if spec.details["input"] == "text":
        ids = [[*row, *end] for row in begins]
        return ids, [[True] * len(row) for row in ids]
    completions = _plain(list(rows[spec.label_column]), tokenizer)
    ids, learned = [], []
    for begin, completion in zip(begins, completions, strict=True):
        ids.append([*begin, *completion, *end])
        learned.append([False] * len(begin) + [True] * (len(completion) + len(end)))
    return ids, learned


def _open_ended(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokens of each text, without what the tokenizer puts after it."""
    encoded = tokenizer(
        texts, return_special_tokens_mask=True, return_attention_mask=False, verbose=False
    )
    rows = []
    for ids, special in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
        end = len(ids)
        while end and special[end - 1] and any(not mark for mark in special[:end]):
            end -= 1
        rows.append(list(ids[:end]))
    return rows


def _plain(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def _next_tokens(ids: Sequence[int], learned: Sequence[bool]) -> list[int]:
    """At each place the next token if it is to be predicted; nothing at the last."""
    if not ids:
        return []
    labels = [
        token if wanted else UNSUPERVISED
        for token, wanted in zip(ids[1:], learned[1:], strict=True)
    ]
    return [*labels, UNSUPERVISED]
