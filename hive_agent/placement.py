"""On which devices a worker may run: the sets worth trying, the best first. Pure decisions.

Whoever asks takes the first set in which the worker fits. Sets of several GPUs are ordered by the
worst link within them, then by free memory. Engines split a model in two ways:

- vLLM by tensor parallelism: each GPU holds the same part of every block, so the GPUs have to be
  alike, and 1, 2, 4 or 8 of them divide the heads of most models. Each layer ends in an all-reduce
  over the slowest link (Megatron-LM, arXiv:1909.08053), hence links before memory.
- llama.cpp by layers: any number of GPUs, of any kind, each with as many blocks as have room.

A MIG instance is one device to CUDA, and a process can use one of them only (NVIDIA, MIG user
guide, "CUDA device enumeration"): they never join a set of several.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

from operations.errors import HiveError, InvalidRequest
from operations.hosts import LINKS, Device
from operations.operations import Engine, Placement, WorkerSpawn

TENSOR_PARALLEL: Final = (1, 2, 4, 8)
"""How many GPUs vLLM is given where nobody says how many."""

_LINKED: Final = {
    "nvlink": "joined by NVLink",
    "pcie-switch": "behind one PCIe switch",
    "host-bridge": "under one PCIe host bridge",
    "node": "on one NUMA node",
    "system": "joined by the machine's own interconnect only",
}


@dataclass(frozen=True)
class Choice:
    """Devices to try, in the order of their numbers or as they were named.

    :param notes: sentences for whoever asked: why these, where that is no matter of course
    """

    devices: tuple[Device, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Machine:
    """What is decided from.

    :param devices: as they are now, what is promised to workers taken off what they have free
    :param workers: how many workers each device has, by id; of equally full GPUs the one with
        fewer is the emptier
    :param no_gpu_because: why there is no NVIDIA GPU, if there is none
    """

    devices: Sequence[Device]
    workers: Mapping[str, int]
    no_gpu_because: str | None = None


def candidates(request: WorkerSpawn, engine: Engine, machine: Machine) -> Iterator[Choice]:
    """The sets of devices to try, best first; at least one.

    Devices that are named are the only set. A number of GPUs gives all sets of that many. Nothing
    gives sets of one, then of as many more as the engine can share a model among.

    :raises InvalidRequest: no such device, or it takes no work, or there are too few
    """
    if request.worker is not None and (request.device is not None or request.devices):
        return iter([_named(request, machine)])
    kind, notes = _kind(request, machine)
    healthy = _healthy(kind, machine)
    if request.gpus is not None:
        _check_count(request.gpus, kind, _sharing(healthy, engine), machine)
        counts: Sequence[int] = (request.gpus,)
    elif kind == "cpu" or engine == "scripted":
        counts = (1,)
    elif engine == "vllm":
        counts = TENSOR_PARALLEL
    else:
        counts = range(1, len(healthy) + 1)
    found = _all_sets(healthy, counts, engine, request.placement, machine.workers)
    return (Choice(chosen, (*notes, *_said(chosen, request))) for chosen in found)


def worst_link(devices: Sequence[Device]) -> str:
    """The slowest link between any two of several devices; ``system`` where nothing is known."""
    ranks = [_rank(one, other) for one, other in combinations(devices, 2)]
    return LINKS[max(ranks, default=0)]


def _kind(request: WorkerSpawn, machine: Machine) -> tuple[str, tuple[str, ...]]:
    """The kind of device, and what is to be said about it."""
    if request.worker is not None or request.gpus is not None:
        return request.worker or "cuda", ()
    there = _of_kind("cuda", machine.devices)
    if any(device.healthy for device in there):
        return "cuda", ()
    why = _troubles(there) or machine.no_gpu_because or "this machine has no NVIDIA GPU"
    return "cpu", (f"It runs on the CPU, for no GPU takes work here: {why}",)


def _named(request: WorkerSpawn, machine: Machine) -> Choice:
    by_id = {device.id: device for device in machine.devices}
    chosen = []
    for device_id in request.device_ids():
        device = by_id.get(device_id)
        if device is None:
            raise _not_found(f"device {device_id}", request.worker or "", machine)
        if not device.healthy:
            raise _unhealthy(f"{device.id} takes no work: {device.problem}")
        chosen.append(device)
    sliced = [device.id for device in chosen if device.parent]
    if len(chosen) > 1 and sliced:
        raise InvalidRequest(
            f"{sliced[0]} is a MIG instance, and CUDA lets a process use one of those only. "
            "Name it alone, or whole GPUs.",
            code="device_not_shareable",
            param="devices",
        )
    return Choice(tuple(chosen))


def _healthy(kind: str, machine: Machine) -> list[Device]:
    """:raises InvalidRequest: there is none of the kind, or none that takes work"""
    there = _of_kind(kind, machine.devices)
    healthy = [device for device in there if device.healthy]
    if not there:
        raise _not_found(f"{kind} device", kind, machine)
    if not healthy:
        raise _unhealthy(f"No {kind} device takes work: {_troubles(there)}")
    return healthy


def _check_count(
    count: int, kind: str, groups: Sequence[Sequence[Device]], machine: Machine
) -> None:
    """:raises InvalidRequest: so many devices cannot share a model here"""
    if count == 1 or (kind != "cpu" and any(len(group) >= count for group in groups)):
        return
    if kind == "cpu":
        why = "the CPU is one device"
    else:
        can = " or ".join(", ".join(one.id for one in group) for group in groups) or "none"
        away = _troubles(_of_kind(kind, machine.devices))
        why = f"those that can share a model are {can}" + (f" ({away})" if away else "")
    raise InvalidRequest(
        f"There are no {count} {kind} devices to share a model: {why}. Ask for fewer.",
        code="too_few_devices",
        param="gpus",
    )


def _all_sets(
    healthy: Sequence[Device],
    counts: Iterable[int],
    engine: Engine,
    placement: Placement,
    workers: Mapping[str, int],
) -> Iterator[tuple[Device, ...]]:
    order = sorted(healthy, key=lambda device: _fullness(device, placement, workers))
    groups = _sharing(order, engine)
    for count in counts:
        if count == 1:
            yield from ((device,) for device in order)
        else:
            yield from _sets(groups, count, placement)


def _sets(
    groups: Sequence[Sequence[Device]], count: int, placement: Placement
) -> Iterator[tuple[Device, ...]]:
    """Sets of several, each once: the best linked, then the emptiest or the fullest first."""
    given: set[tuple[str, ...]] = set()
    for worst in range(len(LINKS)):
        found = [one for group in groups for one in _linked(group, count, worst, placement)]
        for chosen in sorted(found, key=lambda one: _set_fullness(one, placement)):
            ids = tuple(device.id for device in chosen)
            if ids not in given:
                given.add(ids)
                yield chosen


def _linked(
    order: Sequence[Device], count: int, worst: int, placement: Placement
) -> Iterator[tuple[Device, ...]]:
    """Sets with no link beyond ``worst``, each from one device and those next in the order.

    To spread, what is linked to the first device of a set begins no further one. Where links are
    transitive (through a switch, along the PCI tree) nothing is missed by that: the set has the
    emptiest of its island, and where they have no room no others of it have. Where they are not
    (a ring of NVLinks), a set that is as well linked may never be tried; the emptiest come all the
    same, with the slowest links, which join every device to every other.
    """
    passed: set[str] = set()
    for number, first in enumerate(order):
        if first.id in passed:
            continue
        chosen = [first]
        for other in order[number + 1 :]:
            if len(chosen) < count and all(_rank(one, other) <= worst for one in chosen):
                chosen.append(other)
        if len(chosen) == count:
            yield tuple(sorted(chosen, key=_number))
        if placement == "spread":
            passed |= {other.id for other in order if _rank(first, other) <= worst}


def _fullness(
    device: Device, placement: Placement, workers: Mapping[str, int]
) -> tuple[int, int, int]:
    sign = -1 if placement == "spread" else 1
    held = workers.get(device.id, 0)
    return (sign * device.vram_free_mb, -sign * held, _number(device))


def _set_fullness(devices: Sequence[Device], placement: Placement) -> tuple[int, int]:
    """By the one with least room, which bounds what all can share."""
    sign = -1 if placement == "spread" else 1
    free = [device.vram_free_mb for device in devices]
    return (sign * min(free), sign * sum(free))


def _sharing(devices: Sequence[Device], engine: Engine) -> list[list[Device]]:
    """Which of the devices can share a model with each other, in the order in which they come.

    In vLLM those of one name and size.
    """
    groups: dict[tuple[str, int] | None, list[Device]] = {}
    for device in devices:
        if not device.parent:
            alike = (device.name, device.vram_total_mb) if engine == "vllm" else None
            groups.setdefault(alike, []).append(device)
    return list(groups.values())


def _rank(one: Device, other: Device) -> int:
    link = one.links.get(other.id, LINKS[-1])
    return LINKS.index(link) if link in LINKS else len(LINKS) - 1


def _said(chosen: Sequence[Device], request: WorkerSpawn) -> tuple[str, ...]:
    if len(chosen) == 1:
        return ()
    names = ", ".join(device.id for device in chosen)
    why = "" if request.gpus else "It does not fit on fewer: "
    return (f"{why}{names} share the model, {_LINKED[worst_link(chosen)]}",)


def _of_kind(kind: str, devices: Iterable[Device]) -> list[Device]:
    return [device for device in devices if device.id.partition(":")[0] == kind]


def _number(device: Device) -> int:
    return int(device.id.partition(":")[2] or 0)


def _troubles(devices: Iterable[Device]) -> str:
    return "; ".join(f"{one.id}: {one.problem}" for one in devices if not one.healthy)


def _not_found(what: str, kind: str, machine: Machine) -> HiveError:
    why = machine.no_gpu_because if kind == "cuda" else None
    there = ", ".join(device.id for device in machine.devices)
    return InvalidRequest(
        f"This hive has no {what}{f' ({why})' if why else ''}. It has: {there}. Choose one of "
        "these with 'worker' and 'device'.",
        code="device_not_found",
        param="device",
    )


def _unhealthy(says: str) -> HiveError:
    return InvalidRequest(
        f"{says}. Choose another device.", code="device_unhealthy", param="device"
    )
