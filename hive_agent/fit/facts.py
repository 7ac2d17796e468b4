"""What a prediction needs to know of a model, from a GGUF header or a ``config.json``.

Both come from strangers: every number is held against limits that no real model comes near.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from hive_agent.models.gguf import MAX_LAYERS, GGUFHeader, TensorBytes
from operations.errors import InvalidRequest

_MOST: Final = 2**32

WINDOW_PERIODS: Final = {
    "cohere2": 4,
    "exaone4": 4,
    "gemma2": 2,
    "gemma3": 6,
    "gemma3_text": 6,
    "gemma3n": 5,
    "gpt-oss": 2,
    "gpt_oss": 2,
    "olmo2": 4,
}
"""Of so many blocks, the last sees the whole context, where the file does not say which:
llama.cpp's ``set_swa_pattern`` (src/models), and transformers' default configurations."""

_WINDOWS: Final = {"gemma2": 4096}
"""Windows that llama.cpp assumes where the header names none."""

_WINDOWLESS: Final = ("phi3",)
"""Architectures whose window llama.cpp does not use ("Phi SWA is currently disabled")."""

_GEMMA3: Final = {
    "head_dim": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 262_208,
}
_DEFAULTS: Final[Mapping[str, Mapping[str, int]]] = {"gemma3_text": _GEMMA3}
"""What a ``config.json`` leaves out because it is transformers' default."""

_RECURRENT: Final = ("mamba", "rwkv", "jamba", "zamba", "bamba", "falcon_h1", "falcon-h1")
_HYBRID_NOTE: Final = (
    "Some blocks keep a recurrent state in place of keys and values; they are counted as attention "
    "over the whole context, which is more than they need."
)
_WINDOW_NOTE: Final = (
    "Which blocks use the sliding window is not known for this architecture; all are counted with "
    "the whole context."
)


@dataclass(frozen=True)
class Layer:
    """One block of a transformer.

    :param weights: bytes, all experts included
    :param kv_heads: 0 where it keeps no keys and values of its own
    :param key: elements of keys kept per token, all heads together
    :param value: elements of values kept per token; 0 where they are part of the keys (MLA)
    :param window: tokens that it looks back; None is the whole context
    """

    weights: int
    kv_heads: int
    key: int
    value: int
    window: int | None = None


@dataclass(frozen=True)
class ModelFacts:
    """A model as the engines see it.

    :param embedding: bytes of the table of token embeddings
    :param head: bytes of the output head; 0 where it is the embedding's table (tied)
    :param other: bytes of all other weights outside the blocks
    :param width: elements of a token's state between blocks
    :param heads: heads that ask (query heads)
    :param query: elements of a token's queries, all heads together
    :param feed_forward: elements of a token's feed-forward state, all experts that it uses together
    :param experts_used: experts that one token passes through; 0 where there are none
    :param latent: keys and values are one compressed vector for all heads (MLA)
    :param notes: sentences about what is not known exactly
    """

    architecture: str
    layers: tuple[Layer, ...]
    embedding: int
    head: int
    other: int
    width: int
    heads: int
    query: int
    feed_forward: int
    vocabulary: int
    experts_used: int = 0
    latent: bool = False
    quantization: str | None = None
    digest: str = ""
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """Bytes of all weights, each counted once."""
        return sum(layer.weights for layer in self.layers) + self.embedding + self.head + self.other

    def requantized(self, quantization: str, weights: int) -> ModelFacts:
        """The same model in another file, whose weights take that many bytes."""

        def scaled(part: int) -> int:
            return -(-part * weights // max(1, self.weights))

        return replace(
            self,
            layers=tuple(replace(one, weights=scaled(one.weights)) for one in self.layers),
            embedding=scaled(self.embedding),
            head=scaled(self.head),
            other=scaled(self.other),
            quantization=quantization,
            digest="",
        )


def from_gguf(headers: Sequence[GGUFHeader], digest: str = "") -> ModelFacts:
    """Facts from the headers of all parts of a GGUF, the first of which holds the metadata.

    :raises InvalidRequest: the header does not say enough, or something impossible
    """
    first = headers[0]
    numbers = _Numbers(first.architecture, first.numbers)
    count = _layers(numbers.need("block_count"))
    width = numbers.need("embedding_length")
    heads = numbers.need("attention.head_count")
    tensors = [header.tensors for header in headers]
    key = numbers.get("attention.key_length") or width // heads
    experts = numbers.get("expert_used_count") if numbers.get("expert_count") else 0
    kv, notes = _gguf_layers(numbers, count, width, heads)
    blocks = _gguf_weights(tensors, count)
    return ModelFacts(
        architecture=first.architecture,
        layers=tuple(replace(kv[i], weights=blocks[i]) for i in range(count)),
        embedding=sum(one.embedding for one in tensors),
        head=sum(one.output for one in tensors),
        other=sum(one.other for one in tensors),
        width=width,
        heads=heads,
        query=heads * key,
        feed_forward=_gguf_feed_forward(numbers, width, experts),
        vocabulary=max(one.vocabulary for one in tensors),
        experts_used=experts,
        latent=_gguf_latent(numbers),
        quantization=first.quantization,
        digest=digest,
        notes=notes,
    )


def from_config(config: Mapping[str, Any], weight_bytes: int, digest: str = "") -> ModelFacts:
    """Facts from a ``config.json`` and the size of the safetensors beside it.

    The table of embeddings and the head are taken to have 16 bits, as quantized checkpoints leave
    them; the rest of the weights lies in the blocks, evenly.

    :param weight_bytes: of all safetensors of the model together
    :raises InvalidRequest: the configuration does not say enough, or something impossible
    """
    nested = config.get("text_config")
    text = {**config, **nested} if isinstance(nested, Mapping) else dict(config)
    name = str(text.get("model_type", "unknown"))[:64]
    numbers = _Numbers(name, {**_DEFAULTS.get(name, {}), **text})
    width = numbers.need("hidden_size")
    heads = numbers.need("num_attention_heads")
    vocabulary = numbers.need("vocab_size")
    count = _layers(numbers.need("num_hidden_layers"))
    if _is_single(text):
        weight_bytes //= 2  # vLLM's dtype "auto" loads 32-bit checkpoints with 16 bits
    table = 2 * vocabulary * width
    head = 0 if _is_tied(config, text, name) else table
    rest = max(0, weight_bytes - table - head)
    latent = bool(numbers.get("kv_lora_rank"))
    experts = numbers.get("num_experts_per_tok") if _expert_count(numbers) else 0
    kv = _config_kv(numbers, width // heads, heads)
    windows, notes = _config_windows(numbers, text, count)
    key = kv.key if latent else numbers.get("head_dim") or width // heads
    return ModelFacts(
        architecture=name,
        layers=tuple(replace(kv, weights=rest // count, window=windows[i]) for i in range(count)),
        embedding=table,
        head=head,
        other=rest % count,
        width=width,
        heads=heads,
        query=heads * key,
        feed_forward=_config_feed_forward(numbers, width, experts),
        vocabulary=vocabulary,
        experts_used=experts,
        latent=latent,
        quantization=_config_quantization(text),
        digest=digest,
        notes=notes,
    )


@dataclass(frozen=True)
class _Numbers:
    """Whole numbers by name, none of them believed beyond ``_MOST``."""

    architecture: str
    values: Mapping[str, Any]

    def get(self, name: str) -> int:
        """The number, the largest of a list, or 0."""
        value = self.values.get(name)
        if isinstance(value, tuple | list):
            value = max((v for v in value if type(v) is int), default=0)
        return value if type(value) is int and 0 <= value < _MOST else 0

    def at(self, name: str, index: int) -> int:
        """The number of one block, where each has its own."""
        value = self.values.get(name)
        if not isinstance(value, tuple | list) or index >= len(value):
            return self.get(name)
        one = value[index]
        return one if type(one) is int and 0 <= one < _MOST else 0

    def need(self, name: str) -> int:
        if not (number := self.get(name)):
            raise InvalidRequest(
                f"Whether this model fits cannot be told: its architecture {self.architecture} "
                f"does not say its '{name}'. Load it on a device with room to spare.",
                code="fit_unknown",
                param="model",
            )
        return number


def _layers(count: int) -> int:
    if count > MAX_LAYERS:
        raise InvalidRequest(
            f"A model of {count} blocks cannot be. Fetch or convert it again.",
            code="fit_unknown",
            param="model",
        )
    return count


def _gguf_weights(tensors: Sequence[TensorBytes], count: int) -> list[int]:
    """Bytes of each block; what could not be measured is spread over all of them."""
    known = [sum(one.layers[i] for one in tensors if i < len(one.layers)) for i in range(count)]
    beyond = sum(sum(one.layers[count:]) for one in tensors)
    outside = sum(one.embedding + one.output + one.other for one in tensors)
    data = sum(one.data for one in tensors)
    measured = sum(known) + beyond + outside
    unmeasured = max(0, data - measured) if data > measured * 1.01 else 0
    share = -(-(beyond + unmeasured) // count)
    return [block + share for block in known]


def _gguf_latent(numbers: _Numbers) -> bool:
    """llama.cpp's ``hparams.is_mla()``; such models keep no values (src/llama-kv-cache.cpp)."""
    return bool(
        numbers.get("attention.key_length_mla") and numbers.get("attention.value_length_mla")
    )


def _gguf_layers(
    numbers: _Numbers, count: int, width: int, heads: int
) -> tuple[list[Layer], tuple[str, ...]]:
    periodic = numbers.values.get("attention.sliding_window_pattern")
    window = numbers.get("attention.sliding_window") or _WINDOWS.get(numbers.architecture)
    sliding = [_slides(periodic, numbers.architecture, i) for i in range(count)]
    own = count - min(count - 1, numbers.get("attention.shared_kv_layers"))
    layers = []
    for i in range(count):
        suffix = "_swa" if sliding[i] and numbers.get("attention.key_length_swa") else ""
        kv_heads = numbers.at("attention.head_count_kv", i)
        if "attention.head_count_kv" not in numbers.values:
            kv_heads = heads
        if i >= own:
            kv_heads = 0
        key = numbers.get(f"attention.key_length{suffix}") or width // heads
        value = numbers.get(f"attention.value_length{suffix}") or width // heads
        value = 0 if _gguf_latent(numbers) else value
        layers.append(
            Layer(0, kv_heads, kv_heads * key, kv_heads * value, window if sliding[i] else None)
        )
    notes = []
    if window and not any(sliding) and numbers.architecture not in _WINDOWLESS:
        notes.append(_WINDOW_NOTE)
    if numbers.get("ssm.state_size") or any(n in numbers.architecture for n in _RECURRENT):
        notes.append(_HYBRID_NOTE)
    return layers, tuple(notes)


def _slides(pattern: object, architecture: str, index: int) -> bool:
    """Whether llama.cpp gives a block a window: a list says it, or every ``n``-th one is whole.

    Architectures of which nothing is said are not windowed: llama.cpp ignores the window of
    ``phi3``, and GGUFs of Mistral 7B (``llama``) carry none.
    """
    if isinstance(pattern, tuple) and pattern:
        return bool(pattern[index % len(pattern)])
    period = pattern if type(pattern) is int else WINDOW_PERIODS.get(architecture)
    return period is not None and (period == 0 or index % period < period - 1)


def _gguf_feed_forward(numbers: _Numbers, width: int, experts: int) -> int:
    dense = numbers.get("feed_forward_length") or 4 * width
    if not experts:
        return dense
    one = numbers.get("expert_feed_forward_length") or dense
    return max(experts * one, dense if numbers.get("leading_dense_block_count") else 0)


def _config_kv(numbers: _Numbers, default_head: int, heads: int) -> Layer:
    """Keys and values of one block. MLA keeps ``kv_lora_rank + qk_rope_head_dim`` elements for all
    heads together (DeepSeek-V2, arXiv 2405.04434, 2.1; vLLM's ``MLAAttentionSpec``)."""
    if rank := numbers.get("kv_lora_rank"):
        return Layer(0, 1, rank + numbers.get("qk_rope_head_dim"), 0)
    head = numbers.get("head_dim") or default_head
    kv_heads = numbers.get("num_key_value_heads") or heads
    return Layer(0, kv_heads, kv_heads * head, kv_heads * head)


def _config_windows(
    numbers: _Numbers, text: Mapping[str, Any], count: int
) -> tuple[list[int | None], tuple[str, ...]]:
    """The window of each block, as vLLM reads it."""
    window = numbers.get("sliding_window") or None
    kinds = text.get("layer_types")
    notes: list[str] = []
    hybrid = any(name in numbers.architecture for name in _RECURRENT)
    if isinstance(kinds, list) and len(kinds) == count:
        hybrid = hybrid or any("linear" in str(k) or "mamba" in str(k) for k in kinds)
        windows = [window if kind == "sliding_attention" else None for kind in kinds]
    else:
        period = numbers.get("sliding_window_pattern") or WINDOW_PERIODS.get(numbers.architecture)
        on = window if text.get("use_sliding_window", True) is True else None
        if on and numbers.get("max_window_layers"):
            on, notes = None, [_WINDOW_NOTE]
        windows = [on if not period or i % period < period - 1 else None for i in range(count)]
    if hybrid or any(name in text for name in ("mamba_d_state", "linear_num_value_heads")):
        notes.append(_HYBRID_NOTE)
    return windows, tuple(notes)


def _expert_count(numbers: _Numbers) -> int:
    names = ("num_local_experts", "n_routed_experts", "num_experts")
    return max(numbers.get(name) for name in names)


def _config_feed_forward(numbers: _Numbers, width: int, experts: int) -> int:
    dense = numbers.get("intermediate_size") or 4 * width
    if not experts:
        return dense
    one = numbers.get("moe_intermediate_size") or dense
    return max(experts * one, dense if numbers.get("first_k_dense_replace") else 0)


def _is_tied(config: Mapping[str, Any], text: Mapping[str, Any], name: str) -> bool:
    """Where nothing is said, Gemma ties and others do not (transformers' defaults)."""
    said = text.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    return said if isinstance(said, bool) else name.startswith("gemma")


def _is_single(text: Mapping[str, Any]) -> bool:
    dtype = text.get("dtype") or text.get("torch_dtype")
    return dtype == "float32" and not isinstance(text.get("quantization_config"), Mapping)


def _config_quantization(text: Mapping[str, Any]) -> str | None:
    quantized = text.get("quantization_config")
    method = quantized.get("quant_method") if isinstance(quantized, Mapping) else None
    return method[:64] if isinstance(method, str) else None
