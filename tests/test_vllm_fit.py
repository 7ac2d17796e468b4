"""Whether the KV cache that is predicted for vLLM is the one that vLLM on the CPU lays out."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from hive_agent.fit import vllm
from hive_agent.fit.facts import from_config
from hive_agent.fit.verdict import MIB, Request
from operations.hosts import Device
from tests.cluster import clean_env

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(180)]

SCRIPT = Path(__file__).parent / "fit_models" / "vllm_cache.py"
SPACE = 256 * MIB
CONTEXT, SLOTS = 4096, 4
CPU = Device(id="cpu", name="CPU", device_type="cpu", vram_total_mb=2**16, vram_free_mb=2**16)

PLAIN: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 704,
    "vocab_size": 1024,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SHAPES: dict[str, dict[str, Any]] = {
    "multi-head": PLAIN,
    "grouped": {**PLAIN, "num_key_value_heads": 2},
    "experts": {
        **PLAIN,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "windowed": {
        **PLAIN,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 1024,
    },
    "whole-and-windowed": {
        **PLAIN,
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "num_hidden_layers": 12,
        "num_key_value_heads": 2,
        "sliding_window": 512,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2,
        "query_pre_attn_scalar": 64,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
    "latent": {
        **PLAIN,
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "kv_lora_rank": 128,
        "q_lora_rank": None,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "first_k_dense_replace": 4,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "n_group": 1,
        "topk_group": 1,
    },
}


async def laid_out(python: Path, folders: list[Path]) -> list[dict[str, float]]:
    """What vLLM allocated for each folder, and the sequences that have room in it."""
    arguments = [str(SPACE), str(CONTEXT), str(SLOTS), "auto", *map(str, folders)]
    process = await asyncio.create_subprocess_exec(
        *(str(python), str(SCRIPT), *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={
            **clean_env(),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": "",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
        },
    )
    output, _ = await process.communicate()
    log = output.decode("utf-8", "replace")
    assert process.returncode == 0, log[-3000:]
    lines = [line.removeprefix("found ") for line in log.splitlines() if line.startswith("found ")]
    return [json.loads(line) for line in lines]


async def test_prediction_meets_the_kv_cache_of_vllm(vllm_python: Path, tmp_path: Path) -> None:
    for name, config in SHAPES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    found = await laid_out(vllm_python, [tmp_path / name for name in SHAPES])
    for (name, config), real in zip(SHAPES.items(), found, strict=True):
        facts = from_config(config, 10**8)
        request = Request(name, facts, "vllm", CONTEXT, SLOTS, (CPU,))
        (need,) = vllm.plan(request).needs
        told = SLOTS * real["allocated"] / real["sequences"]
        print(f"{name}: predicted {need.kv_cache / MIB:.2f} MiB, laid out {told / MIB:.2f} MiB")
        assert real["allocated"] == pytest.approx(SPACE, rel=0.01)
        assert need.kv_cache == pytest.approx(told, rel=0.15)
