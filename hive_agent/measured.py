"""What a worker holds of its devices, once it is ready, so as to compare with the prediction.

On the CPU: what is resident of its processes, and what they have allocated and not touched yet.
An engine touches its compute buffer with the first long prompt, so what is resident at first is
less than it will be (measured with llama.cpp on a windowed model: 217 MiB resident and 47 MiB
allocated beyond, then 255 MiB resident after a long prompt). Weights that are mapped from their
file count in full, as they do in a prediction.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Final

import psutil

from hive_agent.devices.processes import PROC, belongs
from hive_agent.fit.verdict import GIB, MIB
from operations.hosts import Device

LARGE_BYTES: Final = 16 * MIB
"""Of an allocation: stacks of threads, which are never touched whole, are smaller."""

_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ (\d+)")
_VLLM_CACHE = re.compile(
    r"Available KV cache memory: (-?[\d.]+) GiB|set \(([\d.]+)/[\d.]+\) GiB for KV cache"
)


def on_cpu(pid: int, proc: Path = PROC) -> int | None:
    """Bytes of memory that a process and its descendants hold; None where nothing tells it.

    Pages that several of them share count once. Blocks for about a microsecond a mapping.

    Source: Linux, ``proc_pid_smaps(5)``.
    """
    try:
        process = psutil.Process(pid)
        pids = [pid, *(child.pid for child in process.children(recursive=True))]
        return sum(held(proc / str(one) / "smaps", alone=len(pids) == 1) for one in pids)
    except (psutil.Error, OSError, ValueError):
        return None


def held(smaps: Path, *, alone: bool) -> int:
    """Bytes that the mappings of one process hold, or will.

    :param alone: it shares its pages with no process that is counted beside it
    :raises OSError: the process has gone, or is not ours
    """
    total = size = 0
    growing = False
    with smaps.open() as lines:
        for line in lines:
            if (mapping := _MAPPING.match(line)) is not None:
                size = int(mapping[2], 16) - int(mapping[1], 16)
                private = mapping[3] == "rw-p" and mapping[4] == "0"
                growing = private and size >= LARGE_BYTES
                continue
            name, _, amount = line.partition(":")
            if name == "Rss":
                resident = int(amount.split()[0]) * 1024
                total += resident if alone else 0
                total += size - resident if growing else 0
            elif name == "Pss" and not alone:
                total += int(amount.split()[0]) * 1024
    return total


def on_gpus(pid: int, ids: Sequence[str], devices: Collection[Device]) -> dict[str, int] | None:
    """Bytes that a worker's processes hold of each of its GPUs; None where the driver is silent.

    :param devices: with all of their processes
    """
    found = so_far_on_gpus(pid, ids, devices)
    return found if len(found) == len(ids) else None


def so_far_on_gpus(pid: int, ids: Sequence[str], devices: Collection[Device]) -> dict[str, int]:
    """Bytes that a worker's processes hold of those of its GPUs whose driver tells it.

    :param devices: with all of their processes
    """
    found: dict[str, int] = {}
    for device in devices:
        if device.id not in ids:
            continue
        ours = [process for process in device.processes if belongs(process.pid, {pid})]
        if ours and all(process.used_mb is not None for process in ours):
            found[device.id] = sum(process.used_mb or 0 for process in ours) * MIB
    return found


def vllm_cache(log: Iterable[str]) -> int | None:
    """Bytes that vLLM says in its log to have on each device for keys and values: what is left of
    its share of a GPU, or what it was told to take on the CPU; to the hundredth of a GiB."""
    found = [match for line in log if (match := _VLLM_CACHE.search(line)) is not None]
    return round(float(found[-1][1] or found[-1][2]) * GIB) if found else None
