"""Groups of tensors that many families share: linear layers, norms, repeated layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ftlaunch.strategies.memory.architecture import TensorSpec

Tensors = Iterable[TensorSpec]


def tensor(name: str, *shape: int) -> Iterator[TensorSpec]:
    yield TensorSpec(name=name, shape=shape)


def linear(name: str, inputs: int, outputs: int, *, bias: bool = True) -> Iterator[TensorSpec]:
    """As torch has it: a row for each output."""
    yield TensorSpec(name=f"{name}.weight", shape=(outputs, inputs))
    if bias:
        yield TensorSpec(name=f"{name}.bias", shape=(outputs,))


def conv1d(name: str, inputs: int, outputs: int) -> Iterator[TensorSpec]:
    """As GPT-2 has it: a row for each input."""
    yield TensorSpec(name=f"{name}.weight", shape=(inputs, outputs))
    yield TensorSpec(name=f"{name}.bias", shape=(outputs,))


def norm(name: str, width: int, *, bias: bool = True) -> Iterator[TensorSpec]:
    yield TensorSpec(name=f"{name}.weight", shape=(width,))
    if bias:
        yield TensorSpec(name=f"{name}.bias", shape=(width,))


def layers(prefix: str, number: int, make: Callable[[str, int], Tensors]) -> Iterator[TensorSpec]:
    """make(prefix of the names with the number and a dot, number) for each layer."""
    for index in range(number):
        yield from make(f"{prefix}{index}.", index)


def decoder_head(
    head: str,
    classifier: str,
    hidden: int,
    vocabulary: int,
    num_outputs: int,
    tied: bool,
    *,
    name: str = "lm_head",
    bias: bool = False,
) -> Tensors:
    """classifier   the name of the layer that classifies tokens; `name` of the one that gives logits"""
    if head == "sequence-classification":
        return linear("score", hidden, num_outputs, bias=False)
    if head == "token-classification":
        return linear(classifier, hidden, num_outputs)
    if not tied:
        return linear(name, hidden, vocabulary, bias=bias)
    return tensor(f"{name}.bias", vocabulary) if bias else ()


def tied_decoder_head(head: str, embeddings: str) -> dict[str, str]:
    """`Architecture.tied` of a language model whose logits are products with its embeddings."""
    return {"lm_head.weight": f"{embeddings}.weight"} if head == "causal-lm" else {}
