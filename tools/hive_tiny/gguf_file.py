"""Writes the model as a GGUF file of q8_0 and reads it back.

Format: the `gguf` package and llama.cpp's docs (ggml: docs/gguf.md). Matrices are q8_0 (blocks of
32 int8 under one float16 scale), norms stay float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tools.hive_tiny import tokenizer as vocabulary
from tools.hive_tiny.shape import Shape, Weights

SHIPPED = Path(__file__).parents[2] / "hive_agent" / "shipped" / "hive-tiny.Q8_0.gguf"


@dataclass(frozen=True)
class ModelFile:
    """What a GGUF file of `hive-tiny` holds; tensors bear GGUF's names, matrices are (out, in)."""

    shape: Shape
    tokens: list[str]
    merges: list[tuple[str, str]]
    weights: Weights


def write(path: Path, content: ModelFile) -> None:
    """Writes the file, quantizing the matrices."""
    writer = gguf.GGUFWriter(path, "llama")
    _describe(writer, content.shape)
    _add_vocabulary(writer, content.tokens, content.merges)
    for name, tensor in content.weights.items():
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor)
            continue
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_name("hive-tiny")
    writer.add_description("A very small chat model for trying and testing Hive.")
    writer.add_license("mit")
    writer.add_languages(["en"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_size)
    writer.add_value_length(shape.head_size)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)


def _add_vocabulary(
    writer: gguf.GGUFWriter, tokens: list[str], merges: list[tuple[str, str]]
) -> None:
    special = vocabulary.SPECIAL_TOKENS
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.PRE_TOKENIZER)
    writer.add_token_list(tokens)
    writer.add_token_types([control if token in special else normal for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    end = tokens.index(vocabulary.TURN_END)
    writer.add_bos_token_id(tokens.index(vocabulary.TURN_START))
    writer.add_eos_token_id(end)
    writer.add_eot_token_id(end)
    writer.add_pad_token_id(end)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(vocabulary.CHAT_TEMPLATE)


def read(path: Path) -> ModelFile:
    """Reads a file that `write` wrote; the matrices come back as the float32 they stand for."""
    reader = gguf.GGUFReader(path)

    def field(name: str) -> Any:
        found = reader.get_field(name)
        if found is None:
            raise KeyError(f"{path} has no field {name}: it is not a file of hive-tiny")
        return found.contents()

    return ModelFile(
        Shape(
            vocabulary=field("llama.vocab_size"),
            context=field("llama.context_length"),
            hidden=field("llama.embedding_length"),
            layers=field("llama.block_count"),
            heads=field("llama.attention.head_count"),
            kv_heads=field("llama.attention.head_count_kv"),
            head_size=field("llama.attention.key_length"),
            feed_forward=field("llama.feed_forward_length"),
            norm_epsilon=field("llama.attention.layer_norm_rms_epsilon"),
            rope_base=field("llama.rope.freq_base"),
        ),
        field("tokenizer.ggml.tokens"),
        [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")],
        {
            tensor.name: np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
            for tensor in reader.tensors
        },
    )
