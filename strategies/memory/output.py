"""What a model's head takes: losses of a large vocabulary in pieces, or logits as a whole.

Sources: `strategies/torch/chunked_loss.py`, `strategies/torch/output_head.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ftlaunch.strategies.memory.architecture import Architecture

# Logits that exist at a time (the same names in `chunked_loss`; a test compares them).
CHUNK_ELEMENTS = 1 << 25
ACCELERATOR_CHUNK_ELEMENTS = 1 << 27
# Of a masked language model: the share of tokens that have a label (data.mlm_probability).
_MASKED_SHARE = 0.15
_FP32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Bytes on one device.

    kept     until the backward pass has reached the head
    weight   the gradient of a weight over the vocabulary, which is there before the backward pass
    work     while the loss is computed, beside these
    """

    kept: int
    weight: int
    work: int


def output(
    a: Architecture,
    *,
    rows: int,
    length: int,
    width: int,
    residual: int,
    is_trained: bool,
    in_pieces: bool,
    on_cpu: bool,
) -> Output:
    """Of one micro-batch.

    width, residual   bytes of what products give, and of hidden states
    is_trained        the weight of the head
    in_pieces         logits of a vocabulary never exist as a whole; `on_cpu` in smaller pieces
    """
    tokens = rows * length
    if a.head == "sequence-classification":
        # A pooler and a classifier see one token of each row; decoders score all tokens first.
        scored = tokens if a.is_causal else rows
        return Output(kept=12 * scored * a.num_outputs + 8 * rows * a.hidden_size, weight=0, work=0)
    if a.head == "token-classification":
        noise = tokens * a.hidden_size * width
        return Output(kept=16 * tokens * a.num_outputs + noise, weight=0, work=0)
    chosen = tokens
    kept = 0
    if a.head == "masked-lm":
        chosen = max(1, round(_MASKED_SHARE * tokens))
        kept = 4 * tokens * a.embedding_size * residual  # the transform before the vocabulary
    if not in_pieces:
        whole = _FP32 * chosen * a.vocab_size
        copies = 4 if a.caps_logits else 3
        # The loss's gradient at its own place among all tokens, and what the cap makes of it.
        work = 2 * whole if a.caps_logits else 0
        return Output(kept=kept + copies * whole, weight=0, work=work)
    kept += chosen * a.embedding_size * (residual + width)
    weight = _FP32 * a.vocab_size * a.embedding_size if is_trained else 0
    return Output(kept=kept, weight=weight, work=_pieces(a, chosen, width, on_cpu))


def _pieces(a: Architecture, chosen: int, width: int, on_cpu: bool) -> int:
    """The most that exists of logits: a piece, what its normaliser takes, and the piece before."""
    elements = CHUNK_ELEMENTS if on_cpu else ACCELERATOR_CHUNK_ELEMENTS
    piece = min(chosen, max(1, elements // a.vocab_size))
    number = -(-chosen // piece)
    last = chosen - (number - 1) * piece
    element = _FP32 * a.vocab_size
    if number == 1:
        most = 2 * piece * element
    elif number == 2:
        most = max(2 * piece, piece + 2 * last) * element
    else:
        most = 3 * piece * element
    if width < _FP32:
        # The product itself, and the weight in its dtype.
        most += piece * a.vocab_size * width + a.vocab_size * a.embedding_size * width
    return most
