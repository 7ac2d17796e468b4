"""The words of a prediction: what is asked, what it needs, what is said about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hive_agent.fit.facts import ModelFacts
from operations.hosts import Device
from operations.operations import KvType

MIB = 2**20
GIB = 2**30

FitEngine = Literal["llamacpp", "vllm"]
Change = Literal["devices", "kv_type", "slots", "context", "several", "quantization", "evict"]
"""What can be changed, the cheapest first: an idle GPU costs nobody anything, a smaller KV type a
little precision, fewer slots only waiting; eviction takes a model from others."""


@dataclass(frozen=True)
class Request:
    """A model, how it is to run, and the devices as they are now.

    :param context_length: tokens of one sequence, prompt and answer together
    :param slots: sequences at the same time, each of which may fill its context
    :param kv_type: how keys and values are kept
    :param batch: tokens that the engine computes at once; None for its default of a generating
        worker (one that embeds computes 2,048 in llama.cpp)
    :param number_bytes: of a weight that is not quantized, of a state and, in vLLM, of keys and
        values of 16 bits: 4 with its dtype ``float32``
    :param share: of each GPU, what vLLM is told to take; None for what it needs
    :param adapters: LoRA adapters that vLLM has room for beside the model
    :param devices: those to be used; several share the model
    """

    model: str
    facts: ModelFacts
    engine: FitEngine
    context_length: int
    slots: int
    devices: tuple[Device, ...]
    kv_type: KvType = "f16"
    batch: int | None = None
    number_bytes: int = 2
    share: float | None = None
    adapters: int = 0


@dataclass(frozen=True)
class Need:
    """Bytes on one device.

    :param overhead: what an engine takes before it holds any model, and what past loads taught; it
        alone may be negative
    :param outside: what vLLM takes of a GPU beyond the share that it is told
    """

    device: str
    weights: int
    kv_cache: int
    compute: int
    overhead: int
    outside: int = 0

    @property
    def inside(self) -> int:
        return max(0, self.weights + self.kv_cache + self.compute + self.overhead)

    @property
    def total(self) -> int:
        return self.inside + self.outside


@dataclass(frozen=True)
class Plan:
    """How an engine lays a model out.

    :param layers: blocks on each device, for llama.cpp's ``tensor_split``, where the output head
        counts as one more on the last; empty where every device holds a part of each block
    :param host: bytes of memory of the machine itself that are used beside the GPUs
    """

    needs: tuple[Need, ...]
    layers: tuple[int, ...] = ()
    host: int = 0


@dataclass(frozen=True)
class Reservation:
    """What vLLM is told to take, so that it takes what was promised and no more.

    :param share: of the memory of each GPU (``gpu_memory_utilization``), to which comes what lies
        outside of it; None on the CPU
    :param kv_cache: bytes of keys and values on each device (``kv_cache_memory_bytes``); on GPUs
        vLLM finds out itself what is left for them
    """

    share: float | None
    kv_cache: int


@dataclass(frozen=True)
class Suggestion:
    """One change after which it fits.

    :param request: what to ask for instead
    :param evict: workers to stop first
    :param needed: bytes on all devices together, after the change
    :param text: for people
    """

    change: Change
    request: Request
    evict: tuple[str, ...]
    needed: int
    text: str


@dataclass(frozen=True)
class Verdict:
    """:param free: bytes free on each device, in the order of ``plan.needs``
    :param refused: why the engine would not start whatever the memory, else None
    :param suggestions: changes that make it fit, the cheapest first
    :param sentence: for people
    """

    request: Request
    plan: Plan
    free: tuple[int, ...]
    refused: str | None
    notes: tuple[str, ...]
    sentence: str
    suggestions: tuple[Suggestion, ...] = ()

    @property
    def missing(self) -> tuple[int, ...]:
        """Bytes missing on each device."""
        pairs = zip(self.plan.needs, self.free, strict=True)
        return tuple(max(0, need.total - free) for need, free in pairs)

    @property
    def fits(self) -> bool:
        return self.refused is None and not any(self.missing)

    @property
    def needed(self) -> int:
        """Bytes on all devices together."""
        return sum(need.total for need in self.plan.needs)


def free_bytes(device: Device) -> int:
    """What other programs leave of a device, bytes."""
    return max(0, device.vram_free_mb) * MIB
