"""What the forward pass keeps for the backward pass, by the order of a family's operations."""

from __future__ import annotations

from dataclasses import dataclass

from ftlaunch.strategies.memory.architecture import Architecture

# Logits that exist at a time (`strategies/torch/chunked_loss.py`).
CHUNK_ELEMENTS = 1 << 25


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """Bytes on one device.

    layer        what a layer keeps for the backward pass
    boundary     what of it is kept under gradient checkpointing: its input
    ends         kept outside of the layers: embeddings, the last norm, the head
    working      exists for a moment only, in the widest place of a layer's backward pass
    logits       of the head, with what their gradients take
    """

    layer: int
    boundary: int
    ends: int
    working: int
    logits: int


def activations(
    architecture: Architecture,
    *,
    rows: int,
    length: int,
    precision: str,
    is_autocast: bool,
    keeps_attention: bool,
    chunks_logits: bool,
) -> Activations:
    """Of a micro-batch of `rows` rows, padded to `length` tokens.

    keeps_attention   the kernel keeps matrices of rows × heads × length × length
    chunks_logits     logits of language models never exist whole
    """
    tokens = rows * length
    width = 4 if precision == "fp32" else 2
    residual = 4 if is_autocast else width
    hidden = architecture.hidden_size
    heads = architecture.num_heads * architecture.head_size
    kv = architecture.num_kv_heads * architecture.head_size
    inner = architecture.intermediate_size * max(1, architecture.experts_per_token)
    masks = 2 if architecture.hidden_dropout else 0
    layer = tokens * hidden * residual * (4 + masks)
    layer += tokens * (2 * heads + 2 * kv) * width
    layer += tokens * inner * width * (3 if architecture.gated_mlp else 2)
    if architecture.head_norms:
        layer += tokens * (heads + kv) * width
    if keeps_attention:
        matrices = 2 if architecture.attention_dropout else 1
        layer += matrices * rows * architecture.num_heads * length * length * width
    if not architecture.known:
        layer *= 2
    elements = tokens * architecture.vocab_size
    if architecture.head in ("causal-lm", "masked-lm"):
        logits = 4 * min(elements, CHUNK_ELEMENTS) * 2 if chunks_logits else 12 * elements
    else:
        per_row = length if architecture.head == "token-classification" else 1
        logits = 12 * rows * per_row * architecture.num_outputs
    return Activations(
        layer=layer,
        boundary=tokens * hidden * residual,
        ends=tokens * hidden * residual * 4,
        working=tokens * (architecture.intermediate_size + hidden) * 4,
        logits=logits,
    )
