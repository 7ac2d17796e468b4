"""How vLLM allocates: a part of every block on each device, and paged keys and values.

Sources: ``vllm/v1/kv_cache_interface.py`` (bytes of a page, pages of a sequence),
``vllm/v1/core/kv_cache_utils.py`` (groups of blocks of different kinds), ``vllm/config/model.py``
(heads of a rank), ``vllm/engine/arg_utils.py`` (tokens of a batch).

vLLM itself starts with less, as long as one sequence of full length has room, and lets the rest
wait. What is asked here is room for all slots at full length, as llama.cpp takes it at once.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from hive_agent.fit.facts import Layer, ModelFacts
from hive_agent.fit.verdict import GIB, MIB, KVType, Need, Plan, Request

PAGE: Final = 16  # tokens; block_size
LARGE_GPU: Final = 70 * GIB
CPU_OVERHEAD: Final = 1536 * MIB  # interpreter, torch and compiled code: 1.75 GB were measured
GPU_OVERHEAD: Final = 1536 * MIB  # CUDA's context, torch and captured graphs: assumed
RANK_OVERHEAD: Final = 512 * MIB  # NCCL's buffers on each of several GPUs: assumed

SCORE_BYTES: Final = 36
"""For each slot and word while sampling is profiled: scores at 16 and 32 bits, their sorted copy
and its 64-bit indices, probabilities, sums and masks. How many of these live at once was taken from
the 1.26 GiB that vLLM reported for 256 sequences and 128,256 words (its pull request 10511)."""

KV_BYTES: Final[dict[str, int]] = {"f16": 2, "bf16": 2, "fp8": 1}
KV_TYPES: Final[tuple[KVType, ...]] = ("f16", "fp8")


def refusal(request: Request) -> str | None:
    """Why vLLM cannot run this whatever the memory."""
    ranks, facts = len(request.devices), request.facts
    if request.kv_type not in KV_BYTES:
        return f"vLLM has no KV cache of type {request.kv_type}; take one of {KV_TYPES}"
    if facts.heads % ranks:
        return f"its {facts.heads} attention heads cannot be shared evenly by {ranks} devices"
    kv_heads = max(layer.kv_heads for layer in facts.layers)
    if not facts.latent and kv_heads % ranks and ranks % kv_heads:
        return f"its {kv_heads} heads of keys and values cannot be shared evenly by {ranks} devices"
    return None


def plan(request: Request) -> Plan:
    """The same on every device."""
    ranks = len(request.devices)
    on_cpu = request.devices[0].device_type == "cpu"
    overhead = CPU_OVERHEAD if on_cpu else GPU_OVERHEAD
    overhead += RANK_OVERHEAD if ranks > 1 else 0
    weights = -(-request.facts.weights // ranks)
    cache = request.slots * sequence_bytes(request)
    compute = compute_bytes(request)
    return Plan(tuple(Need(one.id, weights, cache, compute, overhead) for one in request.devices))


def sequence_bytes(request: Request) -> int:
    """Keys and values of one sequence of full length on one device.

    Blocks of one kind form groups of equal length, filled up with blocks that hold nothing, and
    each group has pages of its own. The length is that of the rarest kind, or of the commonest
    where that is less than half as many again.
    """
    kinds = Counter(_kind(layer) for layer in request.facts.layers if layer.kv_heads)
    if not kinds:
        return 0
    if len({(key, value, heads) for key, value, heads, _ in kinds}) > 1:
        length = 1  # pages of different sizes: counted exactly, vLLM pads a little
    else:
        length = min(kinds.values())
        if max(kinds.values()) < 1.5 * length:
            length = max(kinds.values())
    total = 0
    for (key, value, heads, window), count in kinds.items():
        blocks = -(-count // length) * length
        page = PAGE * _token_bytes(key, value, heads, request)
        total += blocks * _pages(window, request) * page
    return total


def compute_bytes(request: Request) -> int:
    """The peak of activations on one device: of a full batch in a block, or of sampling.

    In a block at 16 bits: six states of the model's width, gate, up and product of the feed-forward
    part, the outputs of the experts, and queries, keys and values; tensors inside are shared by the
    devices, states are not.
    """
    facts, ranks, tokens = request.facts, len(request.devices), batch(request)
    inner = 3 * facts.feed_forward + facts.query + _kv_elements(facts)
    outer = (6 + facts.experts_used) * facts.width
    block = 2 * tokens * (outer + -(-inner // ranks))
    sampling = SCORE_BYTES * request.slots * facts.vocabulary + 4 * tokens * facts.width
    return max(block, sampling)


def batch(request: Request) -> int:
    """Tokens computed at once: the server's default is larger on large GPUs other than the A100."""
    large = all(
        one.vram_total_mb * MIB >= LARGE_GPU and "a100" not in one.name.lower()
        for one in request.devices
    )
    return request.batch or (8192 if large else 2048)


def _kind(layer: Layer) -> tuple[int, int, int, int | None]:
    return (layer.key, layer.value, layer.kv_heads, layer.window)


def _pages(window: int | None, request: Request) -> int:
    if window is None:
        return -(-request.context_length // PAGE)
    tokens = min(window - 1 + batch(request), request.context_length)
    return -(-tokens // PAGE) + 1


def _token_bytes(key: int, value: int, kv_heads: int, request: Request) -> int:
    """Heads are shared by the devices; where they are fewer, and for MLA, each device has one."""
    ranks = 1 if request.facts.latent else min(len(request.devices), kv_heads)
    return -(-(key + value) // ranks) * KV_BYTES[request.kv_type]


def _kv_elements(facts: ModelFacts) -> int:
    return max(layer.key + layer.value for layer in facts.layers)
