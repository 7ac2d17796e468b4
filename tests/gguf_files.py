"""GGUF files for tests: small ones in milliseconds, and one large enough to be slow.

python -m tests.gguf_files large /tmp/large.gguf
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import numpy.typing as npt

TINY = Path(__file__).parent.parent / "hive_agent" / "shipped" / "hive-tiny.Q8_0.gguf"
BLOCK = 32  # elements of a Q8_0 block, which is one 16-bit scale and 32 signed bytes

Quantization = Literal["Q8_0", "F16"]
Shape = tuple[int, ...]
Array = npt.NDArray[Any]
_FILE_TYPES = {"F16": gguf.LlamaFileType.MOSTLY_F16, "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    name: str = "test model",
    context_length: int = 512,
    file_type: int | None = 7,
    chat_template: str | None = None,
    metadata: Mapping[str, str | int | float | bool | list[Any]] | None = None,
    tokens: int = 0,
    elements: int = 64,
    seed: int = 0,
) -> Path:
    """A file that is a GGUF and no more: a header that can be read, and one tensor of noise.

    :param metadata: further entries, under their full keys
    :param tokens: words in its vocabulary
    :param elements: 32-bit floats in the tensor
    :param seed: files of different seeds differ
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(name)
    writer.add_context_length(context_length)
    if file_type is not None:
        writer.add_file_type(file_type)
    if tokens:
        writer.add_token_list([f"token-{i}" for i in range(tokens)])
        writer.add_token_scores([0.0] * tokens)
        writer.add_token_merges([f"a{i} b{i}" for i in range(tokens)])
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    for key, value in (metadata or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value), _element_type(value))
    noise = np.random.default_rng(seed).standard_normal(elements, dtype=np.float32)
    writer.add_tensor("blk.0.noise.weight", noise)
    _write(writer)
    return path


def write_llama(
    path: Path,
    *,
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    feed_forward: int = 128,
    context_length: int = 512,
    quantization: Quantization = "Q8_0",
    pooling: bool = False,
    name: str = "random llama",
    tokenizer: Path = TINY,
    seed: int = 0,
) -> Path:
    """A Llama that llama.cpp loads and runs. Its weights are noise, so it babbles.

    It never ends an answer by itself: control tokens are never its best. Written tensor by tensor,
    so memory does not grow with the model.

    :param pooling: an embedding model: mean pooling
    :param tokenizer: a GGUF whose vocabulary and chat template it takes over
    :param seed: the same seed gives the same bytes
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    vocabulary = _tokenizer(tokenizer)
    words = vocabulary["tokenizer.ggml.tokens"][0]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[quantization])
    writer.add_vocab_size(len(words))
    writer.add_context_length(context_length)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(width // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    if pooling:
        writer.add_pooling_type(gguf.PoolingType.MEAN)
    for key, (value, kind, element) in vocabulary.items():
        writer.add_key_value(key, value, kind, element)
    shapes = list(_shapes(layers, width, width // heads * kv_heads, feed_forward, len(words)))
    raw = gguf.GGMLQuantizationType[quantization]
    for tensor, shape in shapes:
        if len(shape) == 1:
            writer.add_tensor_info(tensor, shape, np.dtype(np.float32), shape[0] * 4)
        elif quantization == "F16":
            writer.add_tensor_info(tensor, shape, np.dtype(np.float16), shape[0] * shape[1] * 2)
        else:
            stored = gguf.quant_shape_to_byte_shape(shape, raw)
            count = stored[0] * stored[1]
            writer.add_tensor_info(tensor, stored, np.dtype(np.uint8), count, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(seed)
    speakable = np.array([_is_speakable(word) for word in words])
    for tensor, shape in shapes:
        data = _weights(random, shape, quantization)
        if tensor == "output.weight":
            data.reshape(shape[0], -1)[~speakable] = 0
        writer.write_tensor_data(data)
    writer.close()
    return path


def write_large_llama(path: Path, *, context_length: int = 4096, seed: int = 0) -> Path:
    """About 125 M parameters at 16 bits, 250 MB: slow enough to hang up on.

    A token takes about 35 ms on one core; writing the file takes about two seconds.
    """
    return write_llama(
        path,
        layers=16,
        width=768,
        heads=12,
        kv_heads=12,
        feed_forward=2304,
        context_length=context_length,
        quantization="F16",
        name="large random llama",
        seed=seed,
    )


def write_split(model: Path, folder: Path, parts: int) -> list[Path]:
    """A model in parts, as ``llama-gguf-split`` writes them; the first has all the metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    reader = gguf.GGUFReader(model)
    chunks = np.array_split(np.arange(len(reader.tensors)), parts)
    stem = model.stem
    paths = [folder / f"{stem}-{n + 1:05}-of-{parts:05}.gguf" for n in range(parts)]
    for number, (path, chunk) in enumerate(zip(paths, chunks, strict=True)):
        writer = gguf.GGUFWriter(path, "llama")
        if number:
            writer.kv_data[0].clear()
        else:
            for key, field in reader.fields.items():
                if not key.startswith(("GGUF.", "general.architecture")):
                    element = field.types[1] if len(field.types) > 1 else None
                    writer.add_key_value(key, field.contents(), field.types[0], element)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for index in chunk:
            tensor = reader.tensors[index]
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        _write(writer)
    return paths


def write_lora(
    path: Path,
    *,
    model: Path = TINY,
    rank: int = 4,
    kind: str = "lora",
    architecture: str = "llama",
    seed: int = 0,
) -> Path:
    """A LoRA adapter for a Llama: noise that is added to the queries and outputs of all layers.

    :param kind: ``adapter.type``
    """
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", kind)
    writer.add_float32("adapter.lora.alpha", float(rank))
    for tensor in gguf.GGUFReader(model).tensors:
        if tensor.name.endswith(("attn_q.weight", "attn_output.weight")):
            inputs, outputs = (int(size) for size in tensor.shape)
            for name, shape in (("lora_a", (rank, inputs)), ("lora_b", (outputs, rank))):
                noise = random.standard_normal(shape, dtype=np.float32)
                writer.add_tensor(f"{tensor.name}.{name}", noise * np.float32(shape[-1] ** -0.5))
    _write(writer)
    return path


def write_projector(
    path: Path, *, text_width: int = 256, image: int = 56, patch: int = 14, seed: int = 0
) -> Path:
    """A projector (LLaVA's: a CLIP with a perceptron behind it) that turns an image into 16 tokens.

    :param text_width: of the model that it is for
    :param image: pixels of a side, of which ``patch`` make a token
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    width, layers, inside = 32, 2, 64
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_use_gelu(False)
    writer.add_vision_image_size(image)
    writer.add_vision_patch_size(patch)
    writer.add_vision_embedding_length(width)
    writer.add_vision_feed_forward_length(inside)
    writer.add_vision_projection_dim(text_width)
    writer.add_vision_block_count(layers)
    writer.add_vision_head_count(2)
    writer.add_vision_attention_layernorm_eps(1e-5)
    writer.add_vision_image_mean([0.5] * 3)
    writer.add_vision_image_std([0.5] * 3)
    random = np.random.default_rng(seed)
    for tensor, shape in _projector_shapes(
        width, layers, inside, text_width, (image // patch) ** 2, patch
    ):
        noise = random.standard_normal(shape, dtype=np.float32)
        writer.add_tensor(tensor, noise * np.float32(shape[-1] ** -0.5))
    _write(writer)
    return path


def _projector_shapes(
    width: int, layers: int, inside: int, text_width: int, patches: int, patch: int
) -> Iterator[tuple[str, Shape]]:
    """The tensors of a CLIP that sees and of LLaVA's perceptron, by llama.cpp's names."""

    def layer(name: str, rows: int, columns: int | None = None) -> Iterator[tuple[str, Shape]]:
        yield f"{name}.weight", (rows,) if columns is None else (rows, columns)
        yield f"{name}.bias", (rows,)

    yield "v.class_embd", (width,)
    yield "v.patch_embd.weight", (width, 3, patch, patch)
    yield "v.position_embd.weight", (patches + 1, width)
    yield from layer("v.pre_ln", width)
    yield from layer("v.post_ln", width)
    for number in range(layers):
        block = f"v.blk.{number}"
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            yield from layer(f"{block}.{name}", width, width)
        yield from layer(f"{block}.ln1", width)
        yield from layer(f"{block}.ln2", width)
        yield from layer(f"{block}.ffn_up", inside, width)
        yield from layer(f"{block}.ffn_down", width, inside)
    yield from layer("mm.0", text_width, width)
    yield from layer("mm.2", text_width, text_width)


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _shapes(
    layers: int, width: int, kv_width: int, feed_forward: int, words: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "token_embd.weight", (words, width)
    yield "output_norm.weight", (width,)
    yield "output.weight", (words, width)
    for layer in range(layers):
        block = f"blk.{layer}."
        yield block + "attn_norm.weight", (width,)
        yield block + "attn_q.weight", (width, width)
        yield block + "attn_k.weight", (kv_width, width)
        yield block + "attn_v.weight", (kv_width, width)
        yield block + "attn_output.weight", (width, width)
        yield block + "ffn_norm.weight", (width,)
        yield block + "ffn_gate.weight", (feed_forward, width)
        yield block + "ffn_up.weight", (feed_forward, width)
        yield block + "ffn_down.weight", (width, feed_forward)


def _weights(
    random: np.random.Generator, shape: tuple[int, ...], quantization: Quantization
) -> Array:
    """Noise whose products keep their size from layer to layer: variance 1/inputs."""
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    rows, inputs = shape
    scale = 1.7 / (127 * inputs**0.5)  # uniform in ±127: deviation 73
    if quantization == "F16":
        integers = np.frombuffer(random.bytes(rows * inputs), np.int8).reshape(shape)
        return integers.astype(np.float16) * np.float16(scale)
    blocks = np.empty((rows, inputs // BLOCK, 2 + BLOCK), np.uint8)
    blocks[:, :, :2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    noise = np.frombuffer(random.bytes(rows * inputs), np.uint8)
    blocks[:, :, 2:] = noise.reshape(rows, inputs // BLOCK, BLOCK)
    return blocks.reshape(rows, -1)


def _is_speakable(word: str) -> bool:
    """Whether a token is plain text, so that a babbled answer is valid UTF-8 and never ends."""
    return all(letter.isascii() or letter == "Ġ" for letter in word) and not word.startswith("<|")


@cache
def _tokenizer(path: Path) -> dict[str, tuple[Any, gguf.GGUFValueType, gguf.GGUFValueType | None]]:
    """The ``tokenizer.*`` entries of a GGUF, with their types."""
    entries = {}
    for key, entry in gguf.GGUFReader(path).fields.items():
        if key.startswith("tokenizer."):
            element = entry.types[1] if len(entry.types) > 1 else None
            entries[key] = (entry.contents(), entry.types[0], element)
    return entries


def _element_type(value: object) -> gguf.GGUFValueType | None:
    return gguf.GGUFValueType.get_type(value[0]) if isinstance(value, list) else None


def main(arguments: Iterable[str]) -> None:
    kind, path = arguments
    write = {"large": write_large_llama, "small": write_llama}[kind]
    print(write(Path(path)))


if __name__ == "__main__":
    main(sys.argv[1:])
