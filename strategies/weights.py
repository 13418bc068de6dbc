"""First values of weights that no file provides, drawn with numpy so that every framework and
every rank starts from the same numbers. Knows names and shapes, no framework.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

# Families whose random initialisation is exactly this rule: normal matrices and embeddings,
# ones for norm weights, zeros for biases.
RANDOM_WEIGHT_FAMILIES = (
    "bert",
    "distilbert",
    "roberta",
    "xlm-roberta",
    "electra",
    "modernbert",
    "qwen2",
    "llama",
)


def draw_weight(
    name: str, shape: tuple[int, ...], *, seed: int, initializer_range: float
) -> NDArray[np.float32]:
    """The first value of one parameter: depends on its name, its shape and the seed alone."""
    if name.endswith("bias"):
        return np.zeros(shape, dtype=np.float32)
    if len(shape) < 2:
        return np.ones(shape, dtype=np.float32)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype="<u8")))
    values: NDArray[np.float32] = generator.standard_normal(shape, dtype=np.float32)
    values *= np.float32(initializer_range)
    return values
