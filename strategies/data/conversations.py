"""Conversations as text by the tokenizer's chat template, and which of its tokens the assistant said.

Knows messages and templates; nothing of columns or of what becomes of the tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.data.tasks import BadRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "developer", "user", "assistant", "tool")
# A template that says itself what the assistant generates.
_GENERATION = re.compile(r"\{%-?\s*generation\b")
# Templates that tell the date would give other tokens tomorrow, or on another rank after midnight.
_NOW = {
    **{"%Y": "2024", "%y": "24", "%m": "07", "%-m": "7", "%d": "26", "%-d": "26", "%e": "26"},
    **{"%B": "July", "%b": "Jul", "%A": "Friday", "%a": "Fri", "%H": "00", "%M": "00", "%S": "00"},
}
# The line's end belongs to the macro: it is what the template's own beginning is rendered as without it.
_NO_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{mark}', '{value}')" for mark, value in _NOW.items())
    + " }}{% endmacro %}\n"
)
# A text that no message begins with.
_NOTHING_ELSE = "\0"


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """UserError for a tokenizer that cannot render conversations."""
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        template = None
    if not template:
        raise UserError(
            "The tokenizer has no chat template, and the data holds conversations: the template says how "
            "messages become text. Set model.tokenizer to one that has it (mostly that of the model's "
            "chat version), or add chat_template to its tokenizer_config.json."
        )
    if not tokenizer.is_fast:
        raise UserError(
            "The tokenizer is one of Python alone, which does not tell where in a text a token stands: "
            "the assistant's turns could not be found. Set model.tokenizer to one with tokenizer.json."
        )


def encode_conversation(
    messages: Any, index: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """(token ids, whether each is the assistant's). BadRow with `index` for what is no conversation."""
    turns = _check(messages, index)
    if _GENERATION.search(tokenizer.get_chat_template()):
        encoded = _render(turns, index, tokenizer, tokenize=True, return_assistant_tokens_mask=True)
        return list(encoded["input_ids"]), [bool(m) for m in encoded["assistant_masks"]]
    spans, text = _spans(turns, index, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    said = [
        any(begin < stop and start < end for begin, end in spans)
        for start, stop in encoded["offset_mapping"]
    ]
    return list(encoded["input_ids"]), said


def _check(messages: Any, index: int) -> list[dict[str, str]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise BadRow(
            index, "holds no messages: a list of role and content is needed. Remove the row."
        )
    turns = []
    for number, message in enumerate(messages, start=1):
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if role not in ROLES:
            raise BadRow(
                index,
                f"has the role {role!r} in message {number}: it must be one of {', '.join(ROLES)}. "
                "Rename it.",
            )
        if not isinstance(content, str):
            raise BadRow(
                index,
                f"has no text in message {number}: content must be a string. Fill or remove it.",
            )
        # Columns hold every key that any message has.
        turns.append({key: value for key, value in message.items() if value is not None})
    return turns


def _spans(
    turns: list[dict[str, str]], index: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[tuple[int, int]], str]:
    """The characters that each of the assistant's turns adds to the text before it, and the text."""
    text = _render(turns, index, tokenizer)
    spans = []
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        until = _render(turns[: number + 1], index, tokenizer)
        if number:
            before = _render(turns[:number], index, tokenizer, add_generation_prompt=True)
            if not until.startswith(before):
                before = _render(turns[:number], index, tokenizer)
        else:
            # Whatever it says, this is before it: the template's own system message and the header.
            other = _render([{**turn, "content": _NOTHING_ELSE}], index, tokenizer)
            before = until[: _num_equal(until, other)]
        if not text.startswith(until) or not until.startswith(before):
            raise BadRow(
                index,
                f"cannot be divided into turns: with this chat template, message {number + 1} changes "
                "the text of others. Add {% generation %} to the template, around what the assistant "
                "says.",
            )
        spans.append((len(before), len(until)))
    return spans, text


def _num_equal(text: str, other: str) -> int:
    """Characters that both begin with."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)))


def _render(
    turns: list[dict[str, str]], index: int, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> Any:
    """Text, or tokens where `options` say so. BadRow for what the template refuses."""
    arguments = {
        "tokenize": False,
        "return_dict": bool(options.get("tokenize")),
        "chat_template": _NO_CLOCK + tokenizer.get_chat_template(),
        **options,
    }
    try:
        return tokenizer.apply_chat_template(turns, **arguments)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 (a template is a program of somebody else)
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadRow(
            index,
            f"is refused by the tokenizer's chat template: {reason}. Correct or remove the row.",
        ) from None
