"""Makes a Hugging Face folder of the shipped GGUF: `python -m tools.hive_tiny.safetensors OUT_DIR`.

For engines that do not read GGUF (vLLM, transformers). The weights are the float32 numbers that the
q8_0 blocks stand for, so every engine runs the same model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from tools.hive_tiny import gguf_file, tokenizer
from tools.hive_tiny.gguf_file import ModelFile

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}


def hugging_face_name(name: str) -> str:
    """The name of a tensor in transformers' Llama, e.g. of "blk.0.attn_q.weight"."""
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"


def halved(rows: npt.NDArray[np.float32], head_size: int) -> npt.NDArray[np.float32]:
    """Query or key rows as transformers rotates them: row i of a head with row i + head_size / 2.

    GGUF's llama rotates row 2i with row 2i + 1. rows: (heads * head_size, hidden).
    """
    pairs = rows.reshape(-1, head_size // 2, 2, rows.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows.shape))


def _config(content: ModelFile) -> dict[str, Any]:
    shape = content.shape
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.context,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rope_base,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        **_special_ids(content),
    }


def _special_ids(content: ModelFile) -> dict[str, int]:
    start, end = (content.tokens.index(token) for token in tokenizer.SPECIAL_TOKENS)
    return {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}


def _tokenizer_config(content: ModelFile) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.TURN_START,
        "eos_token": tokenizer.TURN_END,
        "pad_token": tokenizer.TURN_END,
        "model_max_length": content.shape.context,
        "clean_up_tokenization_spaces": False,
        "chat_template": tokenizer.CHAT_TEMPLATE,
    }


def write_folder(source: Path, folder: Path) -> None:
    """Writes config.json, model.safetensors, the tokenizer's files and generation_config.json."""
    content = gguf_file.read(source)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        hugging_face_name(name): halved(tensor, content.shape.head_size)
        if name.endswith(("attn_q.weight", "attn_k.weight"))
        else tensor
        for name, tensor in content.weights.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.build_tokenizer(content.tokens, content.merges).save(str(folder / "tokenizer.json"))
    files = {
        "config.json": _config(content),
        "generation_config.json": _special_ids(content),
        "tokenizer_config.json": _tokenizer_config(content),
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes a Hugging Face folder of hive-tiny.")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--gguf", type=Path, default=gguf_file.SHIPPED)
    options = parser.parse_args()
    write_folder(options.gguf, options.out)


if __name__ == "__main__":
    main()
