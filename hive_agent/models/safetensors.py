"""What a folder of safetensors says about its model: a few fields of ``config.json``, and whether
its weights are whole."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hive_agent.models.storage import read_json
from operations.errors import InvalidRequest
from wire.files import open_regular

MAX_CONFIG_BYTES = 4 * 2**20
_MAX_HEADER_BYTES = 100_000_000  # as safetensors itself has it
PARSED_HEADER_BYTES = 2 * 2**20
"""Longer headers are not parsed: what they hold may take thirty times as much memory, and all other
threads wait meanwhile. So many bytes tell of 15,000 tensors; models that have more come in several
files, each with a header of its own."""
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
    return told(read_raw(path), str(path))


def read_raw(path: Path) -> dict[str, Any]:
    """All that a ``config.json`` says; nothing where it is no JSON object.

    :raises InvalidRequest: it is unreadable
    """
    try:
        config = read_json(path, MAX_CONFIG_BYTES)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}.", param="model") from None
    return config if isinstance(config, dict) else {}


def told(config: dict[str, Any], where: str) -> Config:
    """What a decoded ``config.json`` tells.

    :raises InvalidRequest: it has no ``model_type``
    """
    if not isinstance(config.get("model_type"), str):
        raise InvalidRequest(
            f"{where} is no configuration of a model: it has no 'model_type'. Fetch it again.",
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


def check_weights(folder: Path) -> None:
    """See that a folder's safetensors are whole: engines fail late, or blame memory, if not.

    Format: 8 bytes, the little-endian length of a header; the header, a JSON object of tensors
    with their ``data_offsets``; the data (huggingface/safetensors, README, "Format"). Of a file
    whose header is too long to be parsed here only the header's length is seen to.

    :raises InvalidRequest: one is damaged, or shorter than its header says
    """
    for path in sorted(folder.glob("*.safetensors")):
        try:
            if (problem := _damage(path)) is not None:
                raise InvalidRequest(
                    f"{path.name} is no whole file of safetensors: {problem}. Fetch it again.",
                    code="bad_model_file",
                    param="model",
                )
        except OSError as error:
            raise InvalidRequest(
                f"{path} cannot be read: {error.strerror}.", param="model"
            ) from None


def _damage(path: Path) -> str | None:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            return "its header has no sensible length"
        if length > PARSED_HEADER_BYTES:
            return None
        try:
            header = json.loads(file.read(length))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name[0] != "_"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return "its header makes no sense"
    if size != expected:
        return f"it has {size} bytes, and its header speaks of {expected}"
    return None


def _quantization(config: dict[str, Any]) -> str | None:
    quantized = config.get("quantization_config")
    method = quantized.get("quant_method") if isinstance(quantized, dict) else None
    if isinstance(method, str):
        return method[:64]
    dtype = config.get("dtype") or config.get("torch_dtype")
    return _DTYPES.get(dtype) if isinstance(dtype, str) else None


def _whole(value: object) -> int | None:
    return value if type(value) is int and 0 < value < 2**63 else None
