"""What a folder of safetensors says about its model: a few fields of ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hive_agent.models.storage import read_json
from operations.errors import InvalidRequest

_MAX_CONFIG_BYTES = 4 * 2**20
_LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "n_ctx")
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Config:
    """:param context_length: tokens that the model was trained for"""

    architecture: str | None
    context_length: int | None
    quantization: str | None


def read_config(path: Path) -> Config:
    """Read the ``config.json`` of a transformers model.

    :raises InvalidRequest: it is unreadable, or no JSON object with a ``model_type``
    """
    try:
        config = read_json(path, _MAX_CONFIG_BYTES)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}.", param="model") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise InvalidRequest(
            f"{path} is no configuration of a model: it has no 'model_type'. Fetch it again.",
            code="bad_config",
            param="model",
        )
    nested = config.get("text_config")
    text = {**config, **nested} if isinstance(nested, dict) else config
    return Config(
        architecture=config["model_type"][:64],
        context_length=next((n for key in _LENGTHS if (n := _whole(text.get(key)))), None),
        quantization=_quantization(text),
    )


def _quantization(config: dict[str, Any]) -> str | None:
    quantized = config.get("quantization_config")
    method = quantized.get("quant_method") if isinstance(quantized, dict) else None
    if isinstance(method, str):
        return method[:64]
    dtype = config.get("dtype") or config.get("torch_dtype")
    return _DTYPES.get(dtype) if isinstance(dtype, str) else None


def _whole(value: object) -> int | None:
    return value if type(value) is int and 0 < value < 2**63 else None
