"""The sizes of the model, and what its weights are kept in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Weights = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Shape:
    """The sizes of the model; every row that is quantized is a multiple of 32 long (q8_0)."""

    vocabulary: int = 768
    context: int = 1024  # tokens
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    feed_forward: int = 704
    norm_epsilon: float = 1e-5
    rope_base: float = 10000.0
