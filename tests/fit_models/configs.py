"""Public models as their ``config.json`` describes them, as far as a prediction looks.

``weights`` are bytes of the safetensors, each weight counted once: parameters times bytes of each.
They were held against the ``total_size`` of each ``model.safetensors.index.json``, or the number of
parameters where there is no index, as public repositories quote them; of DeepSeek V3 against all
its files. What the configurations say was held against transformers' defaults, which are those of
Mixtral 8x7B, DeepSeek V3, Mistral 7B and Phi 3 mini, and against quoted copies of the others. The
AWQ file is worked out, not quoted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Public:
    config: dict[str, Any]
    weights: int


def _config(
    model_type: str,
    width: int,
    layers: int,
    heads: int,
    kv_heads: int,
    feed_forward: int,
    vocabulary: int,
    **more: Any,
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": feed_forward,
        "vocab_size": vocabulary,
        "torch_dtype": "bfloat16",
        **more,
    }


_LLAMA_8B = _config("llama", 4096, 32, 32, 8, 14336, 128_256, tie_word_embeddings=False)

PUBLIC = {
    "Llama-3.1-8B": Public(_LLAMA_8B, 2 * 8_030_261_248),
    "Llama-3.2-1B": Public(
        _config("llama", 2048, 16, 32, 8, 8192, 128_256, head_dim=64, tie_word_embeddings=True),
        2 * 1_235_814_400,
    ),
    "Llama-3.3-70B": Public(
        _config("llama", 8192, 80, 64, 8, 28672, 128_256, tie_word_embeddings=False),
        2 * 70_553_706_496,
    ),
    "Qwen2.5-7B": Public(
        _config(
            "qwen2",
            3584,
            28,
            28,
            4,
            18944,
            152_064,
            tie_word_embeddings=False,
            use_sliding_window=False,
            sliding_window=131_072,
            max_window_layers=28,
        ),
        2 * 7_615_616_512,
    ),
    "Qwen3-0.6B": Public(
        _config(
            "qwen3",
            1024,
            28,
            16,
            8,
            3072,
            151_936,
            head_dim=128,
            tie_word_embeddings=True,
            sliding_window=None,
        ),
        2 * 596_049_920,
    ),
    "Qwen3-30B-A3B": Public(
        _config(
            "qwen3_moe",
            2048,
            48,
            32,
            4,
            6144,
            151_936,
            head_dim=128,
            tie_word_embeddings=False,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            sliding_window=None,
        ),
        2 * 30_532_122_624,
    ),
    "Mixtral-8x7B": Public(
        _config(
            "mixtral",
            4096,
            32,
            32,
            8,
            14336,
            32_000,
            tie_word_embeddings=False,
            num_local_experts=8,
            num_experts_per_tok=2,
            sliding_window=None,
        ),
        2 * 46_702_792_704,
    ),
    "DeepSeek-V3": Public(
        _config(
            "deepseek_v3",
            7168,
            61,
            128,
            128,
            18432,
            129_280,
            tie_word_embeddings=False,
            n_routed_experts=256,
            n_shared_experts=1,
            num_experts_per_tok=8,
            moe_intermediate_size=2048,
            first_k_dense_replace=3,
            kv_lora_rank=512,
            q_lora_rank=1536,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            quantization_config={"quant_method": "fp8"},
        ),
        688_586_727_753,
    ),
    "gemma-2-9b": Public(
        _config("gemma2", 3584, 42, 16, 8, 14336, 256_000, head_dim=256, sliding_window=4096),
        2 * 9_241_705_984,
    ),
    "gemma-3-27b": Public(
        {
            "model_type": "gemma3",
            "text_config": _config(
                "gemma3_text", 5376, 62, 32, 16, 21504, 262_208, head_dim=128, sliding_window=1024
            ),
        },
        2 * 27_432_406_640,
    ),
    "Mistral-7B-v0.1": Public(
        _config(
            "mistral",
            4096,
            32,
            32,
            8,
            14336,
            32_000,
            tie_word_embeddings=False,
            sliding_window=4096,
        ),
        2 * 7_241_732_096,
    ),
    "Phi-3-mini-4k": Public(
        _config(
            "phi3",
            3072,
            32,
            32,
            32,
            8192,
            32_064,
            tie_word_embeddings=False,
            sliding_window=2047,
        ),
        2 * 3_821_079_552,
    ),
    "gpt-oss-20b": Public(
        _config(
            "gpt_oss",
            2880,
            24,
            64,
            8,
            2880,
            201_088,
            head_dim=64,
            tie_word_embeddings=False,
            num_local_experts=32,
            num_experts_per_tok=4,
            sliding_window=128,
            layer_types=["sliding_attention", "full_attention"] * 12,
            quantization_config={"quant_method": "mxfp4"},
        ),
        13_761_264_768,
    ),
    # 6,979,321,856 weights of linear layers at 4 bits, with a 16-bit scale and a 4-bit zero for
    # each 128 of them, 66.5 bytes; table and head, 2 x 128,256 x 4096, and 65 norms of 4096, at 16.
    "Llama-3.1-8B-AWQ-INT4": Public(
        {**_LLAMA_8B, "quantization_config": {"quant_method": "awq", "bits": 4}},
        6_979_321_856 * 133 // 256 + 2 * (2 * 128_256 * 4096 + 65 * 4096),
    ),
}
