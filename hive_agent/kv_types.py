"""The numbers in which engines can keep keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from operations.operations import Engine, KvType

KV_TYPES: Final[Mapping[Engine, tuple[KvType, ...]]] = {
    "llamacpp": ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"),
    "vllm": ("f16", "bf16", "fp8"),
}
"""All that an engine has. An engine that is not here takes no such option."""

OFFERED: Final[Mapping[Engine, tuple[KvType, ...]]] = {
    "llamacpp": ("f16", "q8_0", "q4_0"),
    "vllm": ("f16", "fp8"),
}
"""Those worth offering, the most precise first."""
