"""Whether a model will fit, told beforehand: against arithmetic, and against llama.cpp itself."""

from __future__ import annotations

import asyncio
import json
import math
import re
import sys
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hive_agent.fit import llamacpp, vllm
from hive_agent.fit.advise import Offer, Options, Resident, advise
from hive_agent.fit.correction import LOADS_OF_ONE, MOST_LOADS, Correction, Load, Setting
from hive_agent.fit.facts import Layer, ModelFacts, from_config, from_gguf
from hive_agent.fit.predict import predict, setting
from hive_agent.fit.verdict import GIB, MIB, Change, FitEngine, Request, Reservation, free_bytes
from hive_agent.kv_types import OFFERED
from hive_agent.models.gguf import GGUFHeader, TensorBytes, read_header
from operations.errors import InvalidRequest
from operations.hosts import Device
from tests.cluster import clean_env
from tests.fit_models.configs import PUBLIC
from tests.fit_models.shapes import Shape, write_shape

ROOT = Path(__file__).parent.parent


def gpu(index: int = 0, free_gib: float = 24, total_gib: float = 24) -> Device:
    return Device(
        id=f"cuda:{index}",
        name="NVIDIA GeForce RTX 4090",
        device_type="gpu",
        vram_total_mb=int(total_gib * 1024),
        vram_free_mb=int(free_gib * 1024),
    )


CPU = Device(
    id="cpu", name="CPU", device_type="cpu", vram_total_mb=64 * 1024, vram_free_mb=48 * 1024
)


def public(name: str, engine: FitEngine = "vllm", **more: object) -> Request:
    known = PUBLIC[name]
    asked: dict[str, object] = {"context_length": 8192, "slots": 4, "devices": (gpu(),), **more}
    facts = from_config(known.config, known.weights, digest=f"sha256:{name}")
    return Request(name, facts, engine, **asked)  # type: ignore[arg-type]


def gguf_request(header: GGUFHeader, **more: object) -> Request:
    asked: dict[str, object] = {"context_length": 8192, "slots": 4, "devices": (gpu(),), **more}
    facts = from_gguf([header], digest="sha256:0")
    return Request("model", facts, "llamacpp", **asked)  # type: ignore[arg-type]


def header(
    architecture: str, numbers: dict[str, int | tuple[int, ...]], tensors: TensorBytes
) -> GGUFHeader:
    return GGUFHeader(
        version=3,
        kind="model",
        architecture=architecture,
        name=None,
        context_length=None,
        quantization=None,
        chat_template=None,
        is_embedding=False,
        pooling=None,
        split_index=0,
        split_count=1,
        parameters=0,
        layers=None,
        embedding_length=None,
        kv_bytes_per_token=None,
        numbers=numbers,
        tensors=tensors,
    )


# --- public models, by arithmetic ------------------------------------------------------------

# Keys and values of 4 sequences of 8,192 tokens in vLLM: blocks x kv heads x head x 2 (keys and
# values) x 2 bytes for each token, from each config.json. A windowed block keeps
# min(window - 1 + 2,048 tokens of a batch, context) rounded up to pages of 16, and one page more.
KV_CACHE = {
    "Llama-3.1-8B": 32 * 8 * 128 * 4 * 4 * 8192,  # 131,072 a token: 4 GiB
    "Llama-3.2-1B": 16 * 8 * 64 * 4 * 4 * 8192,  # 32,768 a token: 1 GiB
    "Llama-3.3-70B": 80 * 8 * 128 * 4 * 4 * 8192,  # 327,680 a token: 10 GiB
    "Qwen2.5-7B": 28 * 4 * 128 * 4 * 4 * 8192,  # its window is off: 57,344 a token
    "Qwen3-0.6B": 28 * 8 * 128 * 4 * 4 * 8192,  # head_dim is 128, not 1,024 / 16
    "Qwen3-30B-A3B": 48 * 4 * 128 * 4 * 4 * 8192,
    "Mixtral-8x7B": 32 * 8 * 128 * 4 * 4 * 8192,
    # MLA: 512 + 64 elements for all heads together, once (DeepSeek-V2, arXiv 2405.04434)
    "DeepSeek-V3": 61 * 576 * 2 * 4 * 8192,
    # 21 whole blocks, and 21 with a window: 4,095 + 2,048 tokens are 384 pages, and one more
    "gemma-2-9b": 21 * 8 * 256 * 4 * (8192 + 385 * 16) * 4,
    # 10 whole blocks; 52 windowed ones make groups of 10, so 60: 1,023 + 2,048 are 192 pages
    "gemma-3-27b": 16 * 128 * 4 * (10 * 8192 + 60 * 193 * 16) * 4,
    "Mistral-7B-v0.1": 32 * 8 * 128 * 4 * 385 * 16 * 4,  # all blocks windowed, 4,096 tokens
    "Phi-3-mini-4k": 32 * 32 * 96 * 4 * 257 * 16 * 4,  # 2,046 + 2,048 tokens are 256 pages
    # 12 whole blocks and 12 with a window of 128: 127 + 2,048 tokens are 136 pages
    "gpt-oss-20b": 12 * 8 * 64 * 4 * (8192 + 137 * 16) * 4,
    "Llama-3.1-8B-AWQ-INT4": 32 * 8 * 128 * 4 * 4 * 8192,  # quantized weights, 16-bit cache
}

# What the files take, GB: https://huggingface.co/<repo>/tree/main
WEIGHTS_GB = {
    "Llama-3.1-8B": 16.06,
    "Llama-3.2-1B": 2.47,
    "Llama-3.3-70B": 141.1,
    "Qwen2.5-7B": 15.23,
    "Qwen3-0.6B": 1.19,
    "Qwen3-30B-A3B": 61.06,  # all 128 experts, though a token uses 8
    "Mixtral-8x7B": 93.4,
    "DeepSeek-V3": 688.6,  # 671 B parameters at 8 bits, 14 B of them for MTP, tables at 16
    "gemma-2-9b": 18.48,
    "gemma-3-27b": 54.86,
    "Mistral-7B-v0.1": 14.48,
    "Phi-3-mini-4k": 7.64,
    "gpt-oss-20b": 13.76,  # experts at 4.25 bits (MXFP4), the rest at 16
    "Llama-3.1-8B-AWQ-INT4": 5.73,
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_model_needs_what_its_config_json_says(name: str) -> None:
    context = 4096 if name == "Phi-3-mini-4k" else 8192  # the most that it can do
    (need,) = predict(public(name, context_length=context)).plan.needs
    assert need.weights == pytest.approx(WEIGHTS_GB[name] * 1e9, rel=0.1)
    assert need.kv_cache == pytest.approx(KV_CACHE[name], rel=0.1)


def test_activations_agree_with_what_vllm_reported() -> None:
    """vLLM's "PyTorch activation peak memory" with 256 sequences: 1.26 GiB for Llama 3 8B (its
    pull request 10511, from which ``SCORE_BYTES`` was taken), and 1.26 GiB for Qwen2.5 32B on two
    L40S (its issue 15815), which is the one that tests it."""
    llama = public("Llama-3.1-8B", slots=256, devices=(gpu(total_gib=80),))
    assert vllm.compute_bytes(llama) == pytest.approx(1.26 * GIB, rel=0.1)
    qwen = {**PUBLIC["Qwen2.5-7B"].config, "hidden_size": 5120, "intermediate_size": 27_648}
    qwen |= {"num_hidden_layers": 64, "num_attention_heads": 40, "num_key_value_heads": 8}
    facts = from_config(qwen, 2 * 32_763_876_352)
    two = replace(llama, facts=facts, devices=(gpu(0, total_gib=48), gpu(1, total_gib=48)))
    assert vllm.compute_bytes(two) == pytest.approx(1.26 * GIB, rel=0.1)


def test_q4_k_m_gguf_needs_what_its_tensors_take() -> None:
    """Llama 3.1 8B as Q4_K_M, 4.92 GB: 144 bytes for 256 weights (Q4_K), but 210 (Q6_K) in the
    head and in half of ``attn_v`` and ``ffn_down`` (``llama-quant.cpp``)."""
    q4, q6 = 144 / 256, 210 / 256
    attention = 2 * 4096 * 4096 + 4096 * 1024
    both = 2 * 4096 * 14336
    mixed = 4096 * 1024 + 4096 * 14336
    block = int((attention + both) * q4 + mixed * (q4 + q6) / 2)
    table = 128_256 * 4096
    tensors = TensorBytes(
        layers=(block,) * 32,
        embedding=int(table * q4),
        output=int(table * q6),
        vocabulary=128_256,
    )
    numbers: dict[str, int | tuple[int, ...]] = {
        "block_count": 32,
        "embedding_length": 4096,
        "attention.head_count": 32,
        "attention.head_count_kv": 8,
        "feed_forward_length": 14336,
    }
    request = gguf_request(header("llama", numbers, tensors))
    on_cpu = predict(replace(request, devices=(CPU,))).plan
    assert on_cpu.needs[0].weights == pytest.approx(4.92e9, rel=0.1)
    on_gpu = predict(request).plan
    # The table of embeddings stays in the machine's memory: 0.3 GB less.
    assert on_gpu.needs[0].weights == on_cpu.needs[0].weights - int(table * q4)
    assert on_gpu.host >= int(table * q4)
    assert on_gpu.needs[0].kv_cache == 32 * 8 * 128 * 4 * 4 * 8192  # as in any other file of it
    # 512 tokens x 4 bytes x (5 x 4,096 + 3 x 14,336), and a mask of 16 bits: 138.4 MB
    assert on_gpu.needs[0].compute == pytest.approx(138.4e6, rel=0.1)


def test_llamacpp_keeps_one_batch_more_than_the_window() -> None:
    """Gemma 3 27B: blocks 5, 11, … of 62 are whole; the other 52 keep 1,024 + 512 tokens, which is
    a multiple of 256 already (``llama-kv-cache-iswa.cpp``)."""
    numbers: dict[str, int | tuple[int, ...]] = {
        "block_count": 62,
        "embedding_length": 5376,
        "attention.head_count": 32,
        "attention.head_count_kv": 16,
        "attention.key_length": 128,
        "attention.value_length": 128,
        "attention.sliding_window": 1024,
        "feed_forward_length": 21504,
    }
    request = gguf_request(header("gemma3", numbers, TensorBytes(vocabulary=262_208)))
    kept = 10 * 8192 + 52 * 1536
    assert predict(request).plan.needs[0].kv_cache == pytest.approx(16 * 128 * 4 * kept * 4)


def test_llamacpp_keeps_one_compressed_vector_a_token_for_mla() -> None:
    """DeepSeek V3 as newer GGUFs say it: 1 head of 576 elements, and no values
    (``llama-kv-cache.cpp``: ``has_v = !is_mla``); as older ones did, 128 heads of 192 and 128."""
    new: dict[str, int | tuple[int, ...]] = {
        "block_count": 61,
        "embedding_length": 7168,
        "attention.head_count": 128,
        "attention.head_count_kv": 1,
        "attention.key_length": 576,
        "attention.value_length": 512,
        "attention.key_length_mla": 192,
        "attention.value_length_mla": 128,
    }
    old = {k: v for k, v in new.items() if not k.endswith("_mla")}
    old |= {"attention.head_count_kv": 128, "attention.key_length": 192}
    old |= {"attention.value_length": 128}

    def cache(numbers: dict[str, int | tuple[int, ...]]) -> int:
        request = gguf_request(header("deepseek2", numbers, TensorBytes()))
        return predict(request).plan.needs[0].kv_cache

    assert cache(new) == pytest.approx(61 * 576 * 2 * 4 * 8192, rel=0.1)
    assert cache(old) == pytest.approx(61 * 128 * (192 + 128) * 2 * 4 * 8192, rel=0.1)


def test_llamacpp_ignores_the_window_of_phi3() -> None:
    numbers: dict[str, int | tuple[int, ...]] = {
        "block_count": 32,
        "embedding_length": 3072,
        "attention.head_count": 32,
        "attention.head_count_kv": 32,
        "attention.sliding_window": 2047,
    }
    request = gguf_request(header("phi3", numbers, TensorBytes()), context_length=4096)
    # 32 blocks x 32 heads x 96 elements x 2 x 2 bytes x 4 x 4,096 tokens: 6 GiB
    assert predict(request).plan.needs[0].kv_cache == 6 * GIB


def test_llamacpp_takes_its_buffers_of_every_gpu_that_it_is_given() -> None:
    empty_and_full = (gpu(0), gpu(1, free_gib=0))
    verdict = predict(public("Llama-3.2-1B", "llamacpp", devices=empty_and_full))
    assert not verdict.fits
    assert verdict.missing[0] == 0
    assert verdict.missing[1] > llamacpp.GPU_OVERHEAD
    assert all(verdict.plan.layers)


def test_more_gpus_than_a_model_has_parts_are_refused() -> None:
    asked = public("Llama-3.2-1B", "llamacpp")
    parts = len(asked.facts.layers) + 1
    assert predict(replace(asked, devices=tuple(gpu(i) for i in range(parts)))).fits
    refused = predict(replace(asked, devices=tuple(gpu(i) for i in range(parts + 1))))
    assert not refused.fits
    assert f"{parts} parts at most" in refused.sentence


def test_a_full_gpu_is_not_suggested_beside_one_that_has_too_little() -> None:
    asked = public("Llama-3.2-1B", "llamacpp", devices=(gpu(0, free_gib=1),))
    verdict = advise(asked, Options(spare=(gpu(1, free_gib=0),)))
    assert not verdict.fits
    assert "devices" not in {one.change for one in verdict.suggestions}


def test_a_spread_leaves_a_large_block_to_the_gpu_that_has_room_for_it() -> None:
    """Where as many blocks as go on the first would leave none for the second."""
    assert llamacpp.spread([2, 2, 100, 2], 1, [6, 3, 110]) == [1, 1, 2]


def test_a_quantized_cache_takes_its_blocks() -> None:
    """q8_0: 34 bytes for 32 elements; q4_0: 18; fp8: 1 for each."""
    full = 32 * 8 * 128 * 4 * 4 * 8192
    for engine, kv_type, part in (
        ("llamacpp", "q8_0", 34 / 64),
        ("llamacpp", "q4_0", 18 / 64),
        ("vllm", "fp8", 1 / 2),
    ):
        request = public("Llama-3.1-8B", engine, kv_type=kv_type)  # type: ignore[arg-type]
        assert predict(request).plan.needs[0].kv_cache == full * part


def test_tensor_parallel_devices_share_heads_and_weights() -> None:
    four = tuple(gpu(i, free_gib=80, total_gib=80) for i in range(4))
    plan = predict(public("Llama-3.3-70B", devices=four)).plan
    assert [need.weights for need in plan.needs] == [2 * 70_553_706_496 // 4] * 4
    assert [need.kv_cache for need in plan.needs] == [10 * GIB // 4] * 4
    # MLA has one head, which every device keeps: DeepSeek-V3's cache is not shared.
    eight = tuple(gpu(i, free_gib=140, total_gib=140) for i in range(8))
    one = predict(public("DeepSeek-V3")).plan.needs[0].kv_cache
    assert predict(public("DeepSeek-V3", devices=eight)).plan.needs[0].kv_cache == one


def test_a_number_of_devices_that_does_not_divide_the_heads_is_refused() -> None:
    three = tuple(gpu(i) for i in range(3))
    verdict = predict(public("Llama-3.1-8B", devices=three))
    assert not verdict.fits
    assert "32 attention heads cannot be shared evenly by 3 devices" in verdict.sentence


def test_a_recurrent_model_is_estimated_with_a_note() -> None:
    config = {**PUBLIC["Llama-3.2-1B"].config, "model_type": "qwen3_next"}
    config["layer_types"] = ["linear_attention"] * 12 + ["full_attention"] * 4
    assert "recurrent" in from_config(config, 10**9).notes[0]
    assert "recurrent" not in "".join(from_config(PUBLIC["Llama-3.2-1B"].config, 10**9).notes)


def test_a_model_that_does_not_say_enough_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="'num_hidden_layers'"):
        from_config(
            {"model_type": "x", "hidden_size": 8, "num_attention_heads": 1} | {"vocab_size": 5},
            10**9,
        )
    with pytest.raises(InvalidRequest, match="'embedding_length'"):
        from_gguf([header("mamba", {"block_count": 4}, TensorBytes())])
    huge: dict[str, int | tuple[int, ...]] = {"block_count": 2**31, "embedding_length": 1}
    with pytest.raises(InvalidRequest, match="cannot be"):
        from_gguf([header("llama", huge, TensorBytes())])


def test_tensors_of_types_unknown_here_are_counted_by_the_size_of_the_file() -> None:
    numbers: dict[str, int | tuple[int, ...]] = {
        "block_count": 4,
        "embedding_length": 64,
        "attention.head_count": 4,
    }
    tensors = TensorBytes(layers=(100,) * 4, embedding=50, output=50, data=4500)
    assert from_gguf([header("llama", numbers, tensors)]).weights == 4500


def test_a_header_may_claim_any_block_without_costing_much(tmp_path: Path) -> None:
    """Block 4,095 is the last that is counted apart; what lies beyond is counted all the same."""
    for block, blocks in ((4095, 4096), (4096, 0), (99_999_999, 0)):
        path = tmp_path / f"{block}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_key_value("llama.block_count", 2**62, gguf.GGUFValueType.UINT64)
        writer.add_tensor(f"blk.{block}.noise.weight", np.zeros(64, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        read = read_header(path)
        assert len(read.tensors.layers) == blocks
        assert sum(read.tensors.layers) + read.tensors.other == 256
        with pytest.raises(InvalidRequest, match="block_count"):
            from_gguf([read])


# --- what vLLM is told to take ---------------------------------------------------------------

CONTEXT = vllm.CONTEXT_BYTES


def reserved(request: Request, *, spread: bool = True) -> tuple[float | None, int]:
    """The share of each GPU, and the bytes promised on all devices together."""
    verdict = predict(request)
    told = vllm.reservation(verdict.request, verdict.plan, spread=spread)
    assert told is not None
    plan = vllm.filled(verdict.plan, request, told.share)
    return told.share, sum(need.total for need in plan.needs)


def test_vllm_takes_most_of_an_empty_gpu_and_its_need_of_one_that_others_use() -> None:
    empty = public("Llama-3.1-8B", devices=(gpu(free_gib=79, total_gib=80),))
    need = predict(empty).plan.needs[0].inside
    assert reserved(empty) == (0.9, 0.9 * 80 * GIB + CONTEXT)
    used = replace(empty, devices=(gpu(free_gib=60, total_gib=80),))
    for request, spread in ((used, True), (empty, False)):
        share, promised = reserved(request, spread=spread)
        assert share == pytest.approx(need / (80 * GIB), abs=1e-4)
        assert need <= math.ceil(share * 80 * GIB)
        assert promised == pytest.approx(need + CONTEXT, abs=0.0001 * 80 * GIB)


def starts(request: Request, reserved: Reservation) -> bool:
    """Whether vLLM would: its share must be free when CUDA's context and NCCL's buffers are there
    (``request_memory`` in ``vllm/v1/worker/utils.py``)."""
    assert reserved.share is not None
    here = CONTEXT + (vllm.NCCL_BYTES if len(request.devices) > 1 else 0)
    return all(
        free_bytes(one) - here >= math.ceil(one.vram_total_mb * MIB * reserved.share)
        for one in request.devices
    )


def test_a_gpu_with_too_little_left_for_cudas_context_beside_most_of_it_is_not_empty() -> None:
    card = gpu().model_copy(update={"vram_total_mb": 24_564, "vram_free_mb": 22_200})
    request = public("Qwen3-0.6B", devices=(card,))
    told = vllm.reservation(request, predict(request).plan, spread=True)
    assert told is not None
    assert told.share is not None
    assert told.share < 0.9
    assert starts(request, told)
    emptier = replace(request, devices=(card.model_copy(update={"vram_free_mb": 24_200}),))
    assert reserved(emptier)[0] == 0.9


def test_what_fits_to_the_last_mebibyte_starts() -> None:
    wide = public("Qwen3-0.6B", devices=(gpu(free_gib=24, total_gib=24),))
    for slots in range(1, 40):
        request = replace(wide, slots=slots)
        least = -(-predict(request).needed // MIB)
        card = gpu().model_copy(update={"vram_free_mb": least})
        tight = replace(request, devices=(card,))
        told = vllm.reservation(tight, predict(tight).plan, spread=True)
        assert predict(tight).fits
        assert told is not None
        assert starts(tight, told)


def test_a_share_that_was_asked_for_is_what_is_promised_and_what_bounds() -> None:
    half = public("Llama-3.1-8B", devices=(gpu(free_gib=79, total_gib=80),), share=0.5)
    assert reserved(half) == (0.5, 40 * GIB + CONTEXT)
    assert predict(half).needed == 40 * GIB + CONTEXT
    small = predict(replace(half, share=0.2))
    assert not small.fits
    assert small.missing[0] == predict(replace(half, share=None)).needed - 16 * GIB - CONTEXT
    taught_much = Correction().after(Load(setting(half), 1, 1 + GIB))
    assert predict(half, taught_much).fits  # what was learned lies within the share


def test_unequal_gpus_give_the_same_share() -> None:
    """vLLM's ``gpu_memory_utilization`` is one number: what the smaller needs, the larger gives."""
    two = (gpu(0, free_gib=23, total_gib=24), gpu(1, free_gib=79, total_gib=80))
    small, large = predict(public("Llama-3.1-8B", devices=two)).plan.needs
    assert large.inside / 80 == pytest.approx(small.inside / 24, rel=0.01)
    assert large.weights == small.weights
    crowded = (two[0], gpu(1, free_gib=20, total_gib=80))
    assert predict(public("Llama-3.1-8B", devices=crowded)).missing[1] > 0


def test_float32_takes_twice_as_much_of_all_but_quantized_weights() -> None:
    narrow = public("Llama-3.1-8B", devices=(CPU,))
    wide = replace(narrow, number_bytes=4)
    (two,), (four,) = vllm.plan(narrow).needs, vllm.plan(wide).needs
    assert (four.weights, four.kv_cache) == (2 * two.weights, 2 * two.kv_cache)
    awq = public("Llama-3.1-8B-AWQ-INT4", devices=(CPU,))
    more = vllm.plan(replace(awq, number_bytes=4)).needs[0].weights
    assert more - awq.facts.weights == awq.facts.embedding + awq.facts.head


def test_weights_may_be_quantized_while_they_are_loaded() -> None:
    """Llama 3.1 8B: of 16.06 GB, 2.1 GB of tables stay at 16 bits, the rest halves: 9.08 GB."""
    facts = public("Llama-3.1-8B").facts
    assert vllm.quantized(facts, "fp8").weights == pytest.approx(9.08e9, rel=0.01)
    assert vllm.quantized(facts, "awq") == vllm.quantized(facts, None) == facts
    already = public("Llama-3.1-8B-AWQ-INT4").facts
    assert vllm.quantized(already, "fp8") == already


def test_adapters_take_their_buffers_whatever_their_rank() -> None:
    """Rank 64 in Llama 3.1 8B: 64 x 2 bytes x 32 blocks x 81,920 rows and columns of seven linear
    layers (2 x 8,192 of q and o, 2 x 5,120 of k and v, 3 x 18,432 of gate, up and down)."""
    plain = public("Llama-3.1-8B")
    with_two = replace(plain, adapters=2)
    more = vllm.plan(with_two).needs[0].weights - vllm.plan(plain).needs[0].weights
    assert more == pytest.approx(2 * 64 * 2 * 32 * 81_920, rel=0.1)


def test_on_the_cpu_vllm_takes_whole_gibibytes_for_keys_and_values() -> None:
    request = public("Qwen3-0.6B", slots=1, context_length=1024, devices=(CPU,))
    (need,) = predict(request).plan.needs
    assert need.kv_cache == GIB
    told = vllm.reservation(request, predict(request).plan, spread=True)
    assert told is not None
    assert (told.share, told.kv_cache) == (None, GIB)


# --- real llama.cpp --------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    shape: Shape
    context: int = 2048
    slots: int = 4
    kv_type: str = "f16"


SHAPES = {
    "multi-head": Case(Shape()),
    "grouped": Case(Shape(kv_heads=2, width=768, heads=12, quantization="Q8_0"), kv_type="q8_0"),
    "experts": Case(Shape(experts=8, experts_used=2, feed_forward=704, layers=4)),
    "windowed": Case(Shape("gemma3", layers=12, tied=True, window=512), context=8192, slots=2),
    "tied": Case(Shape(tied=True, vocabulary=32_000), slots=2),
    "large-vocabulary": Case(Shape(layers=4, vocabulary=100_000, kv_heads=4), slots=8),
}


@dataclass(frozen=True)
class Reported:
    """Bytes that llama.cpp said it allocated."""

    weights: int
    kv_cache: int
    compute: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.compute


async def reported(model: Path, case: Case) -> Reported:
    arguments = [str(model), str(model.with_name("e.sock")), str(case.context), str(case.slots)]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.fit_models.load", *arguments, case.kv_type),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**clean_env(), "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    output, _ = await process.communicate()
    log = output.decode("utf-8", "replace")
    assert process.returncode == 0, log[-2000:]
    sizes = {"model": 0.0, "KV": 0.0, "compute": 0.0, "output": 0.0}
    for kind, size in re.findall(r"(\w+) buffer size = +([\d.]+) MiB", log):
        sizes[kind] += float(size)
    assert all(sizes[kind] for kind in ("model", "KV", "compute")), log[-2000:]
    return Reported(
        round(sizes["model"] * MIB),
        round(sizes["KV"] * MIB),
        round((sizes["compute"] + sizes["output"]) * MIB),
    )


@pytest.mark.parametrize("name", SHAPES)
async def test_prediction_meets_what_llamacpp_allocates(name: str, tmp_path: Path) -> None:
    case = SHAPES[name]
    path = write_shape(tmp_path / "m.gguf", case.shape)
    request = gguf_request(
        read_header(path),
        context_length=case.context,
        slots=case.slots,
        kv_type=case.kv_type,
        devices=(CPU,),
    )
    (need,) = predict(request).plan.needs
    real = await reported(path, case)
    print(f"{name}: {need} reported {real}")
    assert real.total > 50 * MIB
    assert need.weights == pytest.approx(real.weights, rel=0.15)
    assert need.kv_cache == pytest.approx(real.kv_cache, rel=0.15)
    assert need.compute == pytest.approx(real.compute, rel=0.15)
    assert need.total - need.overhead == pytest.approx(real.total, rel=0.15)

    measured = real.total + llamacpp.CPU_OVERHEAD
    learned = Correction().after(Load(setting(request), need.total, measured))
    (better,) = predict(request, learned).plan.needs
    error, rest = abs(need.total - measured), abs(better.total - measured)
    assert rest < error or error <= 1


# --- what would help -------------------------------------------------------------------------

LLAMA = "Llama-3.1-8B"
IDLE = Resident("w-idle", (("cuda:0", 9 * GIB),))
BUSY = Resident("w-busy", (("cuda:0", 14 * GIB),), busy=True)


@pytest.mark.parametrize(
    ("free_gib", "asked", "options", "changes", "cheapest"),
    [
        # 15.0 weights + 4 cache + 0.3 + 1.5 GiB: it fits, and nothing is suggested
        (24, {}, Options(), (), None),
        # 19 GiB: 2 GiB of fp8 cache are enough, as are 2 of 4 slots, or 4,096 tokens
        (19, {}, Options(), ("kv_type", "slots", "context"), ("kv_type", "fp8")),
        # an idle GPU costs nobody anything
        (19, {}, Options(spare=(gpu(1),)), ("devices", "kv_type", "slots", "context"),
         ("devices", 2)),
        # 20 - 14.96 - 0.28 - 1.5 leave 3.26 GiB: 3 slots of 1 GiB, or 26,711 tokens of 128 KiB;
        # fp8 alone still takes half of 16
        (20, {"slots": 16}, Options(), ("slots", "context"), ("slots", 3)),
        (20, {"slots": 1, "context_length": 131_072}, Options(), ("context",), ("context", 26_624)),
        # too little for 16-bit weights: another file (6.5 + 4 + 0.28 + 1.5), or another's place
        (12.5, {}, Options(offers=(Offer("awq", 6 * 10**9), Offer("gptq", 7 * 10**9))),
         ("quantization",), ("quantization", "gptq")),
        (12, {}, Options(residents=(IDLE, BUSY)), ("evict",), ("evict", ("w-idle",))),
        # neither fewer slots nor fp8 alone, but both
        (18, {"slots": 64, "context_length": 16_384}, Options(), ("several",), ("several", 1)),
        (4, {}, Options(), (), None),
    ],
)  # fmt: skip
def test_the_cheapest_change_that_helps_comes_first(
    free_gib: float,
    asked: dict[str, object],
    options: Options,
    changes: tuple[Change, ...],
    cheapest: tuple[Change, object] | None,
) -> None:
    verdict = advise(public(LLAMA, devices=(gpu(free_gib=free_gib),), **asked), options)
    assert tuple(one.change for one in verdict.suggestions) == changes
    if cheapest is None:
        return
    first = verdict.suggestions[0]
    values: dict[Change, object] = {
        "devices": len(first.request.devices),
        "kv_type": first.request.kv_type,
        "slots": first.request.slots,
        "context": first.request.context_length,
        "several": first.request.slots,
        "quantization": first.request.facts.quantization,
        "evict": first.evict,
    }
    assert (first.change, values[first.change]) == cheapest
    assert verdict.sentence.endswith(first.text)


def test_a_mig_instance_is_never_to_be_used_together_with_others() -> None:
    whole = (gpu(free_gib=19), gpu(1))
    sliced = tuple(one.model_copy(update={"parent": "GPU-0"}) for one in whole)
    for asked, spare, together in ((0, whole, True), (0, sliced, False), (1, sliced, False)):
        request = public(LLAMA, devices=((whole, sliced)[asked][0],))
        changes = {one.change for one in advise(request, Options(spare=spare[1:])).suggestions}
        assert ("devices" in changes) is together
        assert "slots" in changes
    request = public(LLAMA, devices=(sliced[0],))
    changes = {one.change for one in advise(request, Options(spare=whole[1:])).suggestions}
    assert "devices" not in changes


def test_the_sentence_says_what_is_needed_and_what_lacks() -> None:
    verdict = advise(public(LLAMA, devices=(gpu(free_gib=19),)))
    assert verdict.sentence == (
        "Llama-3.1-8B with 4 × 8,192 tokens needs 20.7 GiB on cuda:0, where 19.0 GiB are free: "
        "it lacks 1.7 GiB on cuda:0. Keep keys and values as fp8: 18.7 GiB of 19.0 GiB free."
    )
    assert predict(public(LLAMA)).sentence.endswith("where 24.0 GiB are free: it fits.")


def test_memory_of_other_programs_is_not_ours() -> None:
    used = predict(public(LLAMA, devices=(gpu(free_gib=10),)))
    assert used.missing[0] == used.needed - 10 * GIB
    assert predict(public(LLAMA, devices=(gpu(free_gib=24),))).fits


# --- learning --------------------------------------------------------------------------------

HERE = Setting("sha256:a", "llamacpp", "NVIDIA H100", 1, 4096, 4, "f16", 2, "", 0, 0)


def taught(*differences: int, here: Setting = HERE) -> Correction:
    learned = Correction()
    for difference in differences:
        learned = learned.after(Load(here, 1000, 1000 + difference))
    return learned


def test_one_load_moves_the_prediction_half_way_and_a_second_all_the_way() -> None:
    assert taught(100).adjustment(HERE, 1000) == 50
    assert taught(100, 100).adjustment(HERE, 1000) == 100


def test_one_odd_load_changes_nothing() -> None:
    assert taught(20, 20, 400_000, 20).adjustment(HERE, 1000) == 20


def test_a_correction_is_bounded() -> None:
    assert taught(9000, 9000, 9000).adjustment(HERE, 1000) == 500
    assert taught(-1000, -1000, -1000).adjustment(HERE, 1000) == -500


def test_loads_in_other_settings_teach_only_where_there_are_none_in_the_same() -> None:
    longer = replace(HERE, context_length=8192)
    learned = taught(100, 100, here=longer)
    assert learned.adjustment(HERE, 1000) == 100
    assert learned.after(Load(HERE, 1000, 1000)).adjustment(HERE, 1000) == 0
    assert learned.adjustment(replace(HERE, digest="sha256:b"), 1000) == 0
    assert learned.adjustment(replace(HERE, device="cpu"), 1000) == 0


@pytest.mark.parametrize(
    "changed", [{"number_bytes": 4}, {"batch": 2048}, {"adapters": 2}, {"kv_type": "fp8"}]
)
def test_what_one_load_held_is_not_told_of_another_that_takes_more(
    changed: dict[str, Any],
) -> None:
    once = public(LLAMA)
    learned = Correction().after(Load(setting(once), GIB, 2 * GIB))
    assert learned.last(setting(once)) is not None
    assert learned.last(setting(replace(once, **changed))) is None
    smaller = replace(once, facts=vllm.quantized(once.facts, "fp8"))
    assert learned.last(setting(smaller)) is None


def test_many_remembered_loads_do_not_slow_a_prediction() -> None:
    """Which is made some hundred times for one advice, in the agent's loop."""

    def seconds(learned: Correction) -> float:
        def once() -> float:
            began = time.perf_counter()
            for _ in range(300):
                learned.adjustment(HERE, 1000)
            return time.perf_counter() - began

        return min(once() for _ in range(5))

    many = Correction(
        tuple(Load(replace(HERE, context_length=n), 1000, 1100) for n in range(MOST_LOADS))
    )
    assert seconds(many) < 10 * seconds(taught(100))


def test_what_was_learned_survives_json_and_strangers_do_not() -> None:
    learned = taught(100, 300)
    stored = json.loads(json.dumps(learned.to_json()))
    assert Correction.from_json(stored) == learned
    bad = [None, {}, {"setting": {}}, {"setting": stored[0]["setting"], "predicted": "1"}, 5]
    assert Correction.from_json([*bad, *stored]) == learned
    assert Correction.from_json("nonsense") == Correction()


def test_only_the_latest_loads_of_a_setting_count() -> None:
    learned = taught(*[900] * 5, *[10] * LOADS_OF_ONE)
    assert len(learned.loads) == LOADS_OF_ONE
    assert learned.adjustment(HERE, 1000) == 10


# --- what always holds -----------------------------------------------------------------------


@st.composite
def models(draw: st.DrawFn) -> ModelFacts:
    """Any model, windows and experts included."""
    heads = draw(st.sampled_from([4, 8, 16, 32]))
    kv_heads = draw(st.sampled_from([1, 2, 4, heads]))
    head = draw(st.sampled_from([64, 128, 256]))
    latent = draw(st.booleans())
    window = draw(st.none() | st.integers(64, 8192))
    period = draw(st.integers(1, 6))
    layer = Layer(
        weights=draw(st.integers(10**6, 10**9)),
        kv_heads=1 if latent else kv_heads,
        key=576 if latent else kv_heads * head,
        value=0 if latent else kv_heads * head,
    )
    count = draw(st.integers(1, 40))
    table = draw(st.integers(10**6, 10**9))
    return ModelFacts(
        architecture="any",
        layers=tuple(
            replace(layer, window=window if i % period < period - 1 else None) for i in range(count)
        ),
        embedding=table,
        head=draw(st.sampled_from([0, table])),
        other=1000,
        width=heads * 64,
        heads=heads,
        query=heads * head,
        feed_forward=draw(st.integers(128, 30_000)),
        vocabulary=draw(st.integers(1000, 260_000)),
        experts_used=draw(st.sampled_from([0, 2, 8])),
        latent=latent,
        digest="sha256:0",
    )


@st.composite
def requests(draw: st.DrawFn, most_devices: int = 4) -> Request:
    engine: FitEngine = draw(st.sampled_from(["llamacpp", "vllm"]))
    count = draw(st.integers(1, most_devices))
    free = draw(st.lists(st.floats(0, 80), min_size=count, max_size=count))
    return Request(
        model="m",
        facts=draw(models()),
        engine=engine,
        context_length=draw(st.integers(64, 200_000)),
        slots=draw(st.integers(1, 64)),
        kv_type=draw(st.sampled_from(OFFERED[engine])),
        devices=tuple(gpu(i, free_gib=f, total_gib=80) for i, f in enumerate(free)),
    )


always = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@always
@given(requests(), st.integers(1, 50_000), st.integers(1, 16))
def test_more_context_or_slots_never_need_less(request: Request, tokens: int, slots: int) -> None:
    assume(predict(request).refused is None)
    longer = replace(request, context_length=request.context_length + tokens)
    wider = replace(request, slots=request.slots + slots)
    for more in (longer, wider):
        now, then = predict(request).plan, predict(more).plan
        caches = [sum(need.kv_cache for need in plan.needs) for plan in (now, then)]
        computes = [max(need.compute for need in plan.needs) for plan in (now, then)]
        assert caches[0] <= caches[1]
        assert computes[0] <= computes[1]
        if len(request.devices) == 1 or request.engine == "vllm":
            assert now.needs[0].total <= then.needs[0].total


@always
@given(requests(most_devices=1), st.integers(1, 80))
def test_more_equal_devices_never_need_more_on_any(request: Request, free_gib: int) -> None:
    """Buffers for talking to each other, which one device alone does not have, are left out."""
    largest = []
    for count in range(1, 9):
        devices = tuple(gpu(i, free_gib=free_gib, total_gib=80) for i in range(count))
        verdict = predict(replace(request, devices=devices))
        if verdict.refused is None:
            largest.append(max(n.inside - n.overhead for n in verdict.plan.needs))
    assert all(more <= fewer for fewer, more in pairwise(largest))


@always
@given(requests(), st.booleans())
def test_vllm_starts_where_it_fits(request: Request, spread: bool) -> None:
    request = replace(request, engine="vllm", kv_type="f16")
    verdict = predict(request)
    assume(verdict.fits)
    told = vllm.reservation(request, verdict.plan, spread=spread)
    assert told is not None
    assert starts(request, told)
    promised = vllm.filled(verdict.plan, request, told.share)
    pairs = zip(promised.needs, request.devices, strict=True)
    assert all(need.total <= free_bytes(device) for need, device in pairs)


@always
@given(requests(), st.lists(st.integers(0, 20_000), min_size=4, max_size=4))
def test_what_fits_still_fits_with_more_free_memory(request: Request, more_mb: list[int]) -> None:
    assume(predict(request).fits)
    roomier = tuple(
        device.model_copy(update={"vram_free_mb": device.vram_free_mb + more})
        for device, more in zip(request.devices, more_mb, strict=False)
    )
    assert predict(replace(request, devices=roomier)).fits


@always
@given(requests(), st.lists(st.floats(0, 80), max_size=3), st.integers(10**6, 10**10))
def test_suggestions_fit_when_followed(request: Request, spare: list[float], weights: int) -> None:
    options = Options(
        offers=(Offer("small", weights), Offer("smaller", weights // 2)),
        spare=tuple(gpu(10 + i, free_gib=f, total_gib=80) for i, f in enumerate(spare)),
        residents=(IDLE, BUSY, Resident("w-far", (("cuda:9", GIB),))),
    )
    verdict = advise(request, options)
    assert verdict.fits or verdict.missing or verdict.refused
    assert not (verdict.fits and verdict.suggestions)
    for one in verdict.suggestions:
        followed = predict(one.request)
        assert followed.fits
        assert followed.needed == one.needed


@always
@given(requests())
def test_blocks_are_all_laid_somewhere_and_counted_once(request: Request) -> None:
    verdict = predict(request)
    assume(verdict.refused is None and request.engine == "llamacpp")
    assert sum(verdict.plan.layers) == len(request.facts.layers) + 1
    assert all(verdict.plan.layers)
    facts = request.facts
    on_gpus = facts.weights - (facts.embedding if facts.head else 0)
    assert sum(need.weights for need in verdict.plan.needs) == on_gpus
    if verdict.fits:
        pairs = zip(verdict.plan.needs, request.devices, strict=True)
        assert all(need.total <= free_bytes(device) for need, device in pairs)
