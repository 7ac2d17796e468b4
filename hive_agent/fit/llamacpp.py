"""How llama.cpp allocates: whole blocks on each device, and a KV cache per sequence at once.

Sources: ``src/llama-kv-cache.cpp``, ``src/llama-kv-cache-iswa.cpp`` and ``src/llama-context.cpp``
for the caches; the compute buffer is what ``ggml_gallocr`` finds for the graph of
``src/llama-graph.cpp``, with flash attention, as ``worker/engines/llamacpp.py`` runs it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Final

from hive_agent.fit.facts import Layer, ModelFacts
from hive_agent.fit.verdict import MIB, Need, Plan, Request, free_bytes
from hive_agent.kv_types import KV_TYPES, OFFERED
from hive_agent.models.gguf import TENSOR_TYPES

BATCH: Final = 512  # tokens; n_ubatch
CELLS: Final = 256  # a cache holds a multiple of so many tokens
CPU_OVERHEAD: Final = 64 * MIB  # interpreter, library and HTTP threads: 52 MB were measured
GPU_OVERHEAD: Final = 512 * MIB  # CUDA's context, its kernels and cuBLAS's workspace: assumed

KV_BYTES: Final[dict[str, tuple[int, int]]] = {
    name.lower(): (block, size) for name, block, size in TENSOR_TYPES.values()
}


def refusal(request: Request) -> str | None:
    """Why llama.cpp cannot run this whatever the memory."""
    if len(request.devices) > 1 and any(one.device_type == "cpu" for one in request.devices):
        return "a model is laid on GPUs or on the CPU, not on both"
    if len(request.devices) > (shares := len(request.facts.layers) + 1):
        return f"it falls into {shares} parts at most, and each of the devices needs one"
    if request.kv_type not in KV_TYPES["llamacpp"]:
        offered = ", ".join(OFFERED["llamacpp"])
        return f"llama.cpp has no KV cache of type {request.kv_type}; take one of {offered}"
    return None


def plan(request: Request) -> Plan:
    """Blocks on devices so that the fullest is as empty as it can be, and what that takes.

    Each device gets a block at least: the engine takes its buffers of every device that it is
    given. The request must be none that :func:`refusal` refuses.
    """
    facts = request.facts
    on_cpu = request.devices[0].device_type == "cpu"
    head = facts.head + facts.other + (facts.embedding if on_cpu or not facts.head else 0)
    compute = compute_bytes(request)
    overhead = CPU_OVERHEAD if on_cpu else GPU_OVERHEAD
    outputs = 4 * request.slots * facts.vocabulary
    if on_cpu:
        compute += outputs
    weights = [*(layer.weights for layer in facts.layers), head]
    caches = [*(kv_bytes(layer, request) for layer in facts.layers), 0]
    items = [weight + cache for weight, cache in zip(weights, caches, strict=True)]
    counts = spread(items, compute + overhead, [free_bytes(one) for one in request.devices])
    ends = list(accumulate(counts))
    needs = []
    for device, end, count in zip(request.devices, ends, counts, strict=True):
        part = slice(end - count, end)
        held = sum(weights[part]), sum(caches[part])
        needs.append(Need(device.id, *held, compute, overhead))
    host = 0 if on_cpu else facts.embedding + outputs
    return Plan(tuple(needs), tuple(counts), host)


def kv_bytes(layer: Layer, request: Request) -> int:
    """KV cache of one block for all slots. A windowed block keeps its window and one batch."""
    cells = _padded(request.context_length)
    if layer.window is not None:
        cells = min(cells, _padded(min(cells, layer.window + batch(request))))
    block, size = KV_BYTES[request.kv_type]
    row = -(-layer.key // block) * size + -(-layer.value // block) * size
    return request.slots * cells * row


def compute_bytes(request: Request) -> int:
    """The compute buffer of one device.

    What lives at once while a batch passes a block, in 32-bit floats a token: in the feed-forward
    part five states of the model's width (embedding, residual, norms, sums) and three of the
    feed-forward width (gate, up, product), and with experts their outputs, which reuse gate and up
    where they are small enough. Only where that is little, attention needs more: queries no wider
    than the model take the place of a state, wider ones fit no freed place (both as the engine
    reported over a grid of such models). At the end come the scores of the vocabulary for one token
    of each slot. The masks are 16 bits for each cell and token of the batch, once for whole and
    once for windowed blocks.
    """
    facts, tokens = request.facts, batch(request)
    inner = 3 * facts.feed_forward
    outputs = facts.experts_used * facts.width
    if outputs > 2 * facts.feed_forward:
        inner += outputs
    key = max(layer.key for layer in facts.layers)
    attention = facts.query + 2 * key - facts.width
    if facts.query > facts.width:
        attention = max(2 * facts.query, facts.query + 3 * key)
    scores = 4 * request.slots * facts.vocabulary
    state = 4 * tokens * 5 * facts.width
    return state + max(4 * tokens * max(inner, attention), scores) + _mask_bytes(facts, request)


def batch(request: Request) -> int:
    """Tokens computed at once: no more than all contexts together hold."""
    return min(request.batch or BATCH, request.context_length * request.slots)


def spread(items: Sequence[int], fixed: int, free: Sequence[int]) -> list[int]:
    """How many consecutive items each device takes so that the fullest is as empty as possible.

    Filling in order up to a common share of what is free, and the smallest share in thousandths
    for which all finds a place: more room or one more device never makes that share larger.

    :param items: bytes of each block, in order; no fewer than devices, for each takes one at least
    :param fixed: bytes that each device needs beside its blocks
    :param free: bytes free on each device
    """
    if len(free) == 1:
        return [len(items)]
    low, high = 0, 1000
    while (counts := _fill(items, fixed, free, high)) is None:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        fewer = _fill(items, fixed, free, middle)
        if fewer is None:
            low = middle
        else:
            high, counts = middle, fewer
    return counts


def _fill(
    items: Sequence[int], fixed: int, free: Sequence[int], thousandths: int
) -> list[int] | None:
    """Counts with which no device takes more than that share; None where there are none."""
    # Beyond all that is free, a full device counts as having a little.
    rooms = (room if thousandths <= 1000 else max(room, MIB) for room in free)
    budgets = [room * thousandths // 1000 - fixed for room in rooms]
    after = list(accumulate(reversed(budgets)))[::-1]  # of a device and all behind it
    before = [0, *accumulate(items)]  # bytes of the items before each
    hopeless: set[tuple[int, int]] = set()

    def lay(device: int, start: int) -> list[int] | None:
        """The items from ``start`` on this device and those behind it: here as many as go."""
        furthest = bisect_right(before, before[start] + budgets[device]) - 1
        behind = len(free) - device - 1
        if not behind:
            return [furthest - start] if furthest == len(items) else None
        for end in range(min(furthest, len(items) - behind), start, -1):
            if before[-1] - before[end] > after[device + 1]:
                break
            if (device + 1, end) in hopeless:
                continue
            if (counts := lay(device + 1, end)) is not None:
                return [end - start, *counts]
        hopeless.add((device, start))
        return None

    return lay(0, 0) if min(budgets) >= 0 else None


def _mask_bytes(facts: ModelFacts, request: Request) -> int:
    cells = _padded(request.context_length)
    widest = max((layer.window or 0 for layer in facts.layers), default=0)
    whole = cells if any(layer.window is None for layer in facts.layers) else 0
    windowed = min(cells, _padded(widest + batch(request))) if widest else 0
    return 2 * batch(request) * (whole + windowed)


def _padded(tokens: int) -> int:
    return -(-tokens // CELLS) * CELLS
