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
