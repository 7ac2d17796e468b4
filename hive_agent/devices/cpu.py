"""The CPU: cores that may be used, memory, and the instruction sets that engines care for.

A container's limits are its cgroup's: ``cpu.max``, ``memory.max`` and ``memory.current`` in
version 2, ``cpu.cfs_quota_us``, ``memory.limit_in_bytes`` and ``memory.usage_in_bytes`` in version
1 (Linux, ``admin-guide/cgroup-v2.rst`` and ``cgroup-v1/memory.rst``). A group is also under the
limits of those above it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from operations.hosts import Device

MIB = 2**20
PROC = Path("/proc")
UNLIMITED = 2**60  # bytes; version 1 writes a huge number where there is no limit

_INSTRUCTION_SETS = {
    "avx2": "avx2",
    "avx512f": "avx512f",
    "amx_tile": "amx",
    "asimd": "neon",
    "neon": "neon",
}


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    total: int
    free: int


class Cpu:
    """Samples the CPU. What does not change while a process lives is read once."""

    def __init__(self, proc: Path = PROC) -> None:
        self._name = cpu_name(proc)
        self._cores = cores(proc)
        self._instruction_sets = instruction_sets(proc)
        self._groups = [folder for name in ("memory", "") for folder in groups(name, proc)]

    def sample(self) -> Device:
        machine = psutil.virtual_memory()
        memory = limited(Memory(machine.total, machine.available), self._groups)
        return Device(
            id="cpu",
            name=self._name,
            device_type="cpu",
            vram_total_mb=memory.total // MIB,
            vram_free_mb=memory.free // MIB,
            vram_used_mb=(memory.total - memory.free) // MIB,
            cores=self._cores,
            instruction_sets=self._instruction_sets,
        )


def cores(proc: Path = PROC) -> int:
    """Cores that this process may use, by its affinity and its cgroups' quota; at least 1."""
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    folders = [folder for name in ("cpu", "") for folder in groups(name, proc)]
    quotas = [quota for folder in folders if (quota := _quota(folder)) is not None]
    return max(1, int(min([allowed, *quotas])))  # a part of a core cannot run a spinning thread


def limited(machine: Memory, folders: list[Path]) -> Memory:
    """What a process in these cgroups has of the machine's memory."""
    total, free = machine.total, machine.free
    for folder in folders:
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        if limit is None or limit >= UNLIMITED:
            continue
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes")
        # Files that were read lie in the group's memory, too, until somebody else needs it.
        cached = _stat(folder, "inactive_file")
        left = min(limit, max(0, limit - (used or 0) + cached))
        total, free = min(total, limit), min(free, left)
    return Memory(total, free)


def cpu_name(proc: Path = PROC) -> str:
    """The CPU's model name."""
    return _cpuinfo(proc).get("model name") or platform.processor() or platform.machine()


def instruction_sets(proc: Path = PROC) -> tuple[str, ...]:
    """Those of ``avx2``, ``avx512f``, ``amx`` and ``neon`` that this CPU has."""
    info = _cpuinfo(proc)
    flags = set(info.get("flags", "").split()) | set(info.get("features", "").split())
    if platform.machine() == "arm64":  # macOS has no /proc; every arm64 has it
        flags.add("neon")
    return tuple(dict.fromkeys(name for flag, name in _INSTRUCTION_SETS.items() if flag in flags))


def groups(controller: str, proc: Path = PROC) -> Iterator[Path]:
    """The folders of this process's cgroup and of those above it, the root last.

    :param controller: ``cpu`` or ``memory`` for version 1; empty for version 2
    """
    own = _own_group(controller, _lines(proc / "self" / "cgroup"))
    if own is None:
        return
    for line in _lines(proc / "self" / "mountinfo"):
        fields, _, kind = line.partition(" - ")
        fstype, _, options = (*kind.split(), "", "", "")[:3]
        held = controller in options.split(",") and fstype == "cgroup"
        if not (held if controller else fstype == "cgroup2"):
            continue
        root, mounted = (Path(_unescaped(field)) for field in fields.split()[3:5])
        inside = own.relative_to(root) if own.is_relative_to(root) else Path()
        folder = mounted / inside
        yield from (folder, *(above for above in folder.parents if above.is_relative_to(mounted)))
        return


def _own_group(controller: str, lines: list[str]) -> Path | None:
    for line in lines:
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if controller in names.split(","):  # version 2 has the empty name
            return Path(path)
    return None


def _quota(folder: Path) -> float | None:
    """Cores that a cgroup may use on average; None where it is not limited."""
    if words := _words(folder / "cpu.max"):
        quota, period = (*words, "100000")[:2]
    else:
        quota = "".join(_words(folder / "cpu.cfs_quota_us"))
        period = "".join(_words(folder / "cpu.cfs_period_us"))
    if not (quota.isdigit() and period.isdigit() and int(period)):
        return None  # "max", or -1
    return int(quota) / int(period)


def _cpuinfo(proc: Path) -> dict[str, str]:
    """The first value of each field of ``/proc/cpuinfo``, by its name in small letters."""
    found: dict[str, str] = {}
    for line in _lines(proc / "cpuinfo"):
        name, _, value = line.partition(":")
        found.setdefault(name.strip().lower(), value.strip())
    return found


def _number(path: Path) -> int | None:
    text = "".join(_words(path))
    return int(text) if text.isdigit() else None


def _stat(folder: Path, name: str) -> int:
    """A line of a cgroup's ``memory.stat``, bytes; ``total_…`` in version 1."""
    found = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat") if " " in line)
    text = found.get(f"total_{name}", found.get(name, "0"))
    return int(text) if text.isdigit() else 0


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:  # not every machine has every file
        return []


def _unescaped(field: str) -> str:
    return field.replace("\\040", " ")
