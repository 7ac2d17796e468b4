"""How vLLM allocates: a part of every block on each device, and paged keys and values.

Sources: ``vllm/v1/kv_cache_interface.py`` (bytes of a page, pages of a sequence),
``vllm/v1/core/kv_cache_utils.py`` (groups of blocks of different kinds), ``vllm/config/model.py``
(heads of a rank), ``vllm/engine/arg_utils.py`` (tokens of a batch).

Its share of a GPU, rounded up to a byte, must be free when it first looks, and by then CUDA's
context and NCCL's buffers are there (``init_device`` in ``vllm/v1/worker/gpu_worker.py``,
``request_memory`` in ``vllm/v1/worker/utils.py``). So these two come on top of the share.

vLLM itself starts with less, as long as one sequence of full length has room, and lets the rest
wait. What is asked here is room for all slots at full length, as llama.cpp takes it at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from hive_agent.fit.facts import Layer, ModelFacts
from hive_agent.fit.verdict import GIB, MIB, Need, Plan, Request, Reservation, free_bytes
from hive_agent.kv_types import KV_TYPES, OFFERED
from operations.hosts import Device

PAGE: Final = 16  # tokens; block_size
CPU_PAGE: Final = 128  # vllm/platforms/cpu.py
LARGE_GPU: Final = 70 * GIB
LARGEST_GPU: Final = 160 * GIB
CPU_OVERHEAD: Final = 1536 * MIB  # interpreter, torch and compiled code: 1.75 GB were measured
GPU_OVERHEAD: Final = 1024 * MIB  # workspaces and captured graphs, of its share: assumed
CONTEXT_BYTES: Final = 512 * MIB  # CUDA's context, outside of the share: assumed
NCCL_BYTES: Final = 512 * MIB  # on each of several GPUs, outside of the share: assumed

SCORE_BYTES: Final = 36
"""For each slot and word while sampling is profiled: scores at 16 and 32 bits, their sorted copy
and its 64-bit indices, probabilities, sums and masks. How many of these live at once was taken from
the 1.26 GiB that vLLM reported for 256 sequences and 128,256 words (its pull request 10511)."""

EMPTY_SHARE: Final = 0.9
"""A GPU that has so much to give counts as empty, and so much of it is taken then: what a model
does not need holds more sequences, and prefixes for longer."""

LORA_RANK: Final = 64
"""The largest rank of an adapter. vLLM refuses adapters above its ``--max-lora-rank``, and takes
memory for all of that."""

SHARE_STEPS: Final = 10_000  # shares are rounded up to one in so many

_QUANTIZED_ON_LOADING: Final = {"fp8": 8, "bitsandbytes": 4, "experts_int8": 8}
"""Methods that make 16-bit weights smaller as they are loaded: bits of a weight afterwards."""


def refusal(request: Request) -> str | None:
    """Why vLLM cannot run this whatever the memory."""
    ranks, facts = len(request.devices), request.facts
    if request.kv_type not in KV_TYPES["vllm"]:
        offered = ", ".join(OFFERED["vllm"])
        return f"vLLM has no KV cache of type {request.kv_type}; take one of {offered}"
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
    weights = -(-(_weights(request) + _adapters(request)) // ranks)
    cache = request.slots * sequence_bytes(request)
    need = Need("", weights, cache, compute_bytes(request), overhead, outside_bytes(request))
    return Plan(tuple(replace(need, device=one.id) for one in request.devices))


def outside_bytes(request: Request) -> int:
    """What it takes of each device beyond its share, and before it looks whether that is free."""
    if request.devices[0].device_type == "cpu":
        return 0
    return CONTEXT_BYTES + (NCCL_BYTES if len(request.devices) > 1 else 0)


def rounded(share: float) -> float:
    """A share as vLLM is told it."""
    return max(1, round(share * SHARE_STEPS)) / SHARE_STEPS


def share_bytes(share: float, device: Device) -> int:
    """What vLLM takes of a device by this share."""
    return -(-round(share * SHARE_STEPS) * device.vram_total_mb * MIB // SHARE_STEPS)


def quantized(facts: ModelFacts, method: str | None) -> ModelFacts:
    """The model after vLLM has quantized its blocks while loading them.

    :param method: vLLM's ``quantization``; one that only says how the files are to be read, and
        None, change nothing
    """
    bits = _QUANTIZED_ON_LOADING.get(method or "")
    if bits is None or facts.quantization is not None:
        return facts
    layers = tuple(replace(one, weights=one.weights * bits // 16) for one in facts.layers)
    return replace(facts, layers=layers, quantization=method)


def reservation(request: Request, plan: Plan, *, spread: bool) -> Reservation | None:
    """What vLLM is to take: the share that was asked for, or its need, or most of empty GPUs.

    :param request: with its devices as others have left them
    :param plan: what it needs of them
    :param spread: it may fill an empty GPU; otherwise room is left for other workers
    :returns: None where nothing could be planned
    """
    if not plan.needs:
        return None
    cache = max(need.kv_cache for need in plan.needs)
    if request.devices[0].device_type == "cpu":
        return Reservation(None, cache)
    if request.share is not None:
        return Reservation(request.share, cache)
    share = _smallest_share(plan, request.devices)
    outside = outside_bytes(request)
    empty = all(
        free_bytes(one) >= share_bytes(EMPTY_SHARE, one) + outside for one in request.devices
    )
    return Reservation(max(share, EMPTY_SHARE) if empty and spread else share, cache)


def filled(plan: Plan, request: Request, share: float | None = None) -> Plan:
    """What vLLM will really take where it needs this: what is left of its share holds keys and
    values, and its share is the same of every GPU. What comes from rounding the smallest share up
    counts as overhead. On the CPU it takes whole GiB for them.

    :param share: instead of the one in the request, or of the smallest that will do
    """
    devices = request.devices
    if not plan.needs:
        return plan
    if devices[0].device_type == "cpu":
        whole = [replace(one, kv_cache=-(-one.kv_cache // GIB) * GIB) for one in plan.needs]
        return replace(plan, needs=tuple(whole))
    share = share or request.share or _smallest_share(plan, devices)
    needs = []
    for need, device in zip(plan.needs, devices, strict=True):
        least = share_bytes(_share_of(need, device), device)
        rounding = max(0, least - need.inside)
        more = max(0, share_bytes(share, device) - max(least, need.inside))
        overhead = need.overhead + rounding
        needs.append(replace(need, kv_cache=need.kv_cache + more, overhead=overhead))
    return replace(plan, needs=tuple(needs))


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
        page = _page(request) * _token_bytes(key, value, heads, request)
        total += blocks * _pages(window, request) * page
    return total


def compute_bytes(request: Request) -> int:
    """The peak of activations on one device: of a full batch in a block, or of sampling.

    In a block, in numbers as wide as the weights': six states of the model's width, gate, up and
    product of the feed-forward part, the outputs of the experts, and queries, keys and values;
    tensors inside are shared by the devices, states are not.
    """
    facts, ranks, tokens = request.facts, len(request.devices), batch(request)
    inner = 3 * facts.feed_forward + facts.query + _kv_elements(facts)
    outer = (6 + facts.experts_used) * facts.width
    block = request.number_bytes * tokens * (outer + -(-inner // ranks))
    sampling = SCORE_BYTES * request.slots * facts.vocabulary + 4 * tokens * facts.width
    return max(block, sampling)


def batch(request: Request) -> int:
    """Tokens computed at once: the server's default is larger on large GPUs other than the A100,
    and no more than all sequences together hold."""
    smallest = min(one.vram_total_mb * MIB for one in request.devices)
    default = 2048
    if request.devices[0].device_type == "gpu":
        if smallest >= LARGEST_GPU:
            default = 16_384
        elif smallest >= LARGE_GPU and "a100" not in request.devices[0].name.lower():
            default = 8192
    return request.batch or min(default, request.slots * request.context_length)


def _weights(request: Request) -> int:
    """Bytes of all weights: those that are not quantized have the numbers of the request."""
    facts = request.facts
    plain = facts.embedding + facts.head
    if facts.quantization is None:
        plain = facts.weights
    return facts.weights + plain * (request.number_bytes - 2) // 2


def _adapters(request: Request) -> int:
    """Bytes of the buffers for LoRA adapters, which have the largest rank whatever an adapter's is:
    two matrices beside each of queries, keys, values, their output and the feed-forward part
    (``vllm/lora/layers``)."""
    facts = request.facts
    elements = 0
    for layer in facts.layers:
        attention = 2 * (facts.width + facts.query) + 2 * facts.width + layer.key + layer.value
        elements += attention + 3 * (facts.width + facts.feed_forward)
    return request.adapters * LORA_RANK * elements * request.number_bytes


def _smallest_share(plan: Plan, devices: Sequence[Device]) -> float:
    """The share of every GPU that covers its need: vLLM takes the same of each."""
    return max(_share_of(*pair) for pair in zip(plan.needs, devices, strict=True))


def _share_of(need: Need, device: Device) -> float:
    """The share of a GPU that covers what is needed inside of it, in whole steps; 1 at most."""
    total = max(1, device.vram_total_mb * MIB)
    steps = (need.inside - 1) * SHARE_STEPS // total + 1
    return min(steps, SHARE_STEPS) / SHARE_STEPS


def _kind(layer: Layer) -> tuple[int, int, int, int | None]:
    return (layer.key, layer.value, layer.kv_heads, layer.window)


def _pages(window: int | None, request: Request) -> int:
    if window is None:
        return -(-request.context_length // _page(request))
    tokens = min(window - 1 + batch(request), request.context_length)
    return -(-tokens // _page(request)) + 1


def _page(request: Request) -> int:
    """Tokens of a page."""
    return CPU_PAGE if request.devices[0].device_type == "cpu" else PAGE


def _token_bytes(key: int, value: int, kv_heads: int, request: Request) -> int:
    """Heads are shared by the devices; where they are fewer, and for MLA, each device has one."""
    ranks = 1 if request.facts.latent else min(len(request.devices), kv_heads)
    return -(-(key + value) // ranks) * (1 if request.kv_type == "fp8" else request.number_bytes)


def _kv_elements(facts: ModelFacts) -> int:
    return max(layer.key + layer.value for layer in facts.layers)
