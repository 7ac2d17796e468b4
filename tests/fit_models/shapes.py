"""Small models of many shapes that llama.cpp loads. All weights are zero: only sizes matter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np

from tests.gguf_files import TINY


@dataclass(frozen=True)
class Shape:
    """A model's measures, under the names of the GGUF format.

    :param head: elements of one attention head
    :param vocabulary: words; filled up with made-up ones beyond the tokenizer's
    :param tied: the output head is the table of embeddings
    :param window: tokens; for architectures that have windowed blocks
    """

    architecture: str = "llama"
    layers: int = 8
    width: int = 512
    heads: int = 8
    kv_heads: int = 8
    head: int = 64
    feed_forward: int = 1408
    vocabulary: int = 1024
    tied: bool = False
    experts: int = 0
    experts_used: int = 0
    window: int = 0
    quantization: Literal["F16", "Q8_0"] = "F16"


def write_shape(path: Path, shape: Shape) -> Path:
    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_name("shape")
    writer.add_context_length(32_768)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head)
    writer.add_value_length(shape.head)
    writer.add_rope_dimension_count(shape.head)
    writer.add_layer_norm_rms_eps(1e-5)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.experts_used)
        writer.add_expert_feed_forward_length(shape.feed_forward)
    if shape.window:
        writer.add_sliding_window(shape.window)
    for key, (value, kind, element) in _vocabulary(shape.vocabulary).items():
        writer.add_key_value(key, value, kind, element)
    stored = [(name, *_stored(name, size, shape)) for name, size in _tensors(shape)]
    for name, size, dtype, raw in stored:
        writer.add_tensor_info(name, size, dtype, prod(size) * dtype.itemsize, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, size, dtype, _ in stored:
        writer.write_tensor_data(np.zeros(size, dtype))
    writer.close()
    return path


def _stored(
    name: str, size: tuple[int, ...], shape: Shape
) -> tuple[tuple[int, ...], np.dtype[Any], gguf.GGMLQuantizationType | None]:
    """How a tensor lies in the file: its size, its numpy type, and its type if quantized."""
    if len(size) == 1 or "gate_inp" in name:
        return size, np.dtype(np.float32), None
    if shape.quantization == "F16":
        return size, np.dtype(np.float16), None
    raw = gguf.GGMLQuantizationType[shape.quantization]
    return gguf.quant_shape_to_byte_shape(size, raw), np.dtype(np.uint8), raw


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner = shape.width, shape.feed_forward
    yield "token_embd.weight", (shape.vocabulary, width)
    yield "output_norm.weight", (width,)
    if not shape.tied:
        yield "output.weight", (shape.vocabulary, width)
    for layer in range(shape.layers):
        for name, size in _attention(shape):
            yield f"blk.{layer}.{name}.weight", size
        if shape.experts:
            count = shape.experts
            yield f"blk.{layer}.ffn_gate_inp.weight", (count, width)
            yield f"blk.{layer}.ffn_gate_exps.weight", (count, inner, width)
            yield f"blk.{layer}.ffn_up_exps.weight", (count, inner, width)
            yield f"blk.{layer}.ffn_down_exps.weight", (count, width, inner)
        else:
            yield f"blk.{layer}.ffn_gate.weight", (inner, width)
            yield f"blk.{layer}.ffn_up.weight", (inner, width)
            yield f"blk.{layer}.ffn_down.weight", (width, inner)


def _attention(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    width = shape.width
    queries, keys = shape.heads * shape.head, shape.kv_heads * shape.head
    yield "attn_norm", (width,)
    yield "attn_q", (queries, width)
    yield "attn_k", (keys, width)
    yield "attn_v", (keys, width)
    yield "attn_output", (width, queries)
    yield "ffn_norm", (width,)
    if shape.architecture in ("gemma3", "qwen3moe"):
        yield "attn_q_norm", (shape.head,)
        yield "attn_k_norm", (shape.head,)
    if shape.architecture == "gemma3":
        yield "post_attention_norm", (width,)
        yield "post_ffw_norm", (width,)


Entry = tuple[Any, gguf.GGUFValueType, gguf.GGUFValueType | None]


def _vocabulary(words: int) -> Mapping[str, Entry]:
    """The shipped model's tokenizer with words added that no text holds."""
    entries: dict[str, Entry] = {}
    for key, entry in gguf.GGUFReader(TINY).fields.items():
        if key.startswith("tokenizer."):
            value = entry.contents()
            missing = words - len(value) if isinstance(value, list) else 0
            if key == "tokenizer.ggml.tokens":
                value = [*value, *(f"<unused{i}>" for i in range(missing))]
            elif key == "tokenizer.ggml.token_type":
                value = [*value, *([int(gguf.TokenType.UNUSED)] * missing)]
            element = entry.types[1] if len(entry.types) > 1 else None
            entries[key] = (value, entry.types[0], element)
    return entries
