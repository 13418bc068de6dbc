"""What a forward pass keeps for the backward pass, by the order of a family's operations.

Counted in tensors that autograd saves, each storage once, as torch 2.13 and transformers 5 run the models:
`benchmarks/memory.py` compares the sums with an allocator's.
"""

from __future__ import annotations

from dataclasses import dataclass

from ftlaunch.strategies.memory.architecture import Architecture

# tanh approximations that are written out in Python keep each of their steps.
_SPELT_OUT = ("gelu_new", "gelu_fast", "gelu_python_tanh")
_ROTARY = ("gpt_neox", "phi")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How a micro-batch is computed.

    width      bytes of what matrix products give and take
    residual   bytes of what the layers hand on to one another
    noise      bytes of an element of a dropout's mask
    matrix, matrix_noise   the same of attention's matrices, and of the mask of their dropout
    kernel     of attention: "matrices" keeps rows × heads × length × length, "fused" does not, "varlen"
               does without a mask of rows × length × length, too
    padded     rows differ in length, so that there is a mask
    """

    rows: int
    length: int
    width: int
    residual: int
    noise: int
    matrix: int
    matrix_noise: int
    kernel: str
    padded: bool

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """Bytes on one device.

    attention, mlp   what the two halves of a layer keep
    attention_work, mlp_work   what their backward passes have beside it, at most
    boundary         what a layer hands on: all that gradient checkpointing keeps of it
    ends             kept outside of the layers: embeddings, masks, the last norm
    behind           of these, what is free once the backward pass has reached the last layer
    front            of these, what is kept for the weights of the embeddings alone
    mlp_inputs       of both halves, what the gradients of the MLP's matrices alone read
    norm_inputs      the same of the norms' weights
    """

    attention: int
    mlp: int
    attention_work: int
    mlp_work: int
    boundary: int
    ends: int
    behind: int = 0
    front: int = 0
    mlp_inputs: int = 0
    norm_inputs: int = 0

    @property
    def layer(self) -> int:
        return self.attention + self.mlp


def activations(architecture: Architecture, setting: Setting) -> Activations:
    """Of one micro-batch. An unknown family has twice what a known one would: a bound."""
    if architecture.block == "bert":
        found = _bert(architecture, setting)
    elif architecture.block == "llama":
        found = _llama(architecture, setting)
    else:
        found = _before_norm(architecture, setting)
    if architecture.known:
        return found
    return Activations(
        attention=2 * found.attention,
        mlp=2 * found.mlp,
        attention_work=2 * found.attention_work,
        mlp_work=2 * found.mlp_work,
        boundary=found.boundary,
        ends=2 * found.ends,
        behind=found.behind,
        front=found.front,
        mlp_inputs=found.mlp_inputs,
        norm_inputs=found.norm_inputs,
    )


def _attention(a: Architecture, s: Setting, *, expanded: bool = False) -> tuple[int, int]:
    """(kept, work) of the product of queries, keys and values, its output included.

    expanded   keys and values are copied for every head that shares them
    """
    heads = s.tokens * a.num_heads * a.head_size * s.width
    shared = s.tokens * a.num_kv_heads * a.head_size * s.width
    matrix = s.rows * a.num_heads * s.length * s.length
    if s.kernel == "matrices":
        # Of keys and values for every head.
        exact = s.matrix * s.tokens * a.num_heads * a.head_size
        kept = 3 * exact + heads + s.matrix * matrix
        if a.attention_dropout:
            kept += matrix * (s.matrix_noise + s.matrix)
        if a.family == "gemma2":
            kept += s.width * matrix  # the tangent that caps its scores
        return kept, s.matrix * matrix
    kept = heads + 2 * (heads if expanded else shared) + heads
    kept += 4 * s.rows * a.num_heads * s.length
    if s.padded and s.kernel == "fused":
        kept += s.rows * s.length * s.length * s.width
    return kept, 0


def _mlp(a: Architecture, s: Setting) -> tuple[int, int]:
    """(kept, work) between the norm and the output."""
    inner = s.tokens * a.intermediate_size * s.width
    if a.num_experts:
        hidden = s.tokens * a.hidden_size * s.width
        chosen = max(1, a.experts_per_token)
        return chosen * (4 * inner + 3 * hidden), 2 * chosen * inner
    if a.gated_mlp:
        return 4 * inner, 2 * inner
    if a.activation in _SPELT_OUT:
        return 5 * inner, 2 * inner
    return (1 if a.activation == "relu" else 2) * inner, inner


def _mlp_inputs(a: Architecture, s: Setting) -> int:
    """Of the first product and of the last. relu keeps what it gives, whoever else reads it."""
    if a.num_experts:
        return 0
    inner = 0 if a.activation == "relu" else a.intermediate_size
    return s.tokens * (a.hidden_size + inner) * s.width


def _bert(a: Architecture, s: Setting) -> Activations:
    """Norms behind the residuals: their inputs are kept, and their outputs by the next products."""
    hidden = s.tokens * a.hidden_size
    noise = hidden * s.noise if a.hidden_dropout else 0
    norm = hidden * (s.residual + s.width)
    core, work = _attention(a, s)
    if a.position_products:
        # Of DeBERTa: those of content with positions, all of them before the right ones are gathered.
        positions = s.rows * a.num_heads * a.position_products * s.width
        core += positions * (s.length + a.head_size) + hidden * s.width
        work += positions * s.length + 2 * s.tokens * a.num_heads * s.length * s.width
    inner, mlp_work = _mlp(a, s)
    return Activations(
        attention=core + noise + norm,
        mlp=inner + noise + norm,
        attention_work=work,
        mlp_work=mlp_work,
        boundary=hidden * s.residual,
        ends=2 * hidden * s.residual + noise,
        front=hidden * s.residual + noise,
        mlp_inputs=_mlp_inputs(a, s),
    )


def _before_norm(a: Architecture, s: Setting) -> Activations:
    """GPT-2, GPT-NeoX, Phi, OPT, ModernBERT: norms before attention and MLP."""
    hidden = s.tokens * a.hidden_size
    noise = hidden * s.noise if a.hidden_dropout else 0
    norm = hidden * (s.residual + s.width)
    core, work = _attention(a, s)
    if a.family in _ROTARY or a.block == "modernbert":
        core += s.tokens * a.num_heads * a.head_size * s.width
    inner, mlp_work = _mlp(a, s)
    return Activations(
        attention=core + noise + norm,
        mlp=inner + noise + norm,
        attention_work=work,
        mlp_work=mlp_work,
        boundary=hidden * s.residual,
        ends=2 * hidden * s.residual + noise,
        behind=hidden * s.residual,
        front=hidden * s.residual + noise,
        mlp_inputs=_mlp_inputs(a, s),
    )


def _llama(a: Architecture, s: Setting) -> Activations:
    """RMS norms, written out: what is normalised and what it gives are kept."""
    hidden = s.tokens * a.hidden_size
    expanded = a.num_kv_heads < a.num_heads and s.padded and s.kernel != "varlen"
    core, work = _attention(a, s, expanded=expanded)
    norm = 2 * hidden * s.width
    if s.width < 4:
        norm += 4 * hidden  # it is computed in fp32
    four = a.family in ("gemma2", "gemma3_text")
    norms = norm * (2 if four else 1)
    if a.head_norms:
        core += 2 * s.tokens * (a.num_heads + a.num_kv_heads) * a.head_size * s.width
    inner, mlp_work = _mlp(a, s)
    return Activations(
        attention=core + norms + hidden * s.residual,
        mlp=inner + norms + hidden * s.residual,
        attention_work=work,
        mlp_work=mlp_work,
        boundary=hidden * s.residual,
        ends=hidden * s.residual + norm,
        behind=hidden * s.residual + norm,
        mlp_inputs=_mlp_inputs(a, s),
        norm_inputs=(4 if four else 2) * hidden * s.width,
    )
