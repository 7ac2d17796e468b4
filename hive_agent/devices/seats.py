"""Which number each GPU has. Pure: a number, once given, stays with its GPU whatever others do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Seat:
    """What has a number: a compute device (a GPU or a MIG instance) of a GPU, both by key.

    ``unit`` is None when it was taken away on purpose; the next one of this GPU takes the seat.
    """

    gpu: str
    unit: str | None


@dataclass(frozen=True)
class Seen:
    """A GPU as NVML lists it now; ``units`` is None where the GPU does not answer."""

    index: int
    gpu: str
    units: tuple[str, ...] | None


def unnamed(index: int) -> str:
    """The key of a GPU that has never told its UUID, by NVML's index."""
    return f"index:{index}"


def identify(uuids: Sequence[str | None], before: Sequence[str]) -> list[str]:
    """A key for each GPU, by NVML's index, all of them different.

    :param uuids: what each GPU says; None from one that does not answer
    :param before: the keys as they were the last time
    """
    keys: list[str] = []
    for index, uuid in enumerate(uuids):
        was = before[index] if index < len(before) else unnamed(index)
        elsewhere = was in uuids or was in keys
        guess = unnamed(index) if elsewhere else was
        keys.append(uuid if uuid is not None and uuid not in keys else guess)
    return keys


def seat(seats: Sequence[Seat], gpus: Sequence[Seen]) -> tuple[Seat, ...]:
    """The seats with everything that is seen now; those of a silent or missing GPU stay."""
    taken = list(seats)
    for gpu in gpus:
        _recognise(taken, gpu)
        units = gpu.units
        if units is None:
            units = () if any(s.gpu == gpu.gpu for s in taken) else (gpu.gpu,)
        else:
            _leave(taken, gpu.gpu, units)
        for unit in units:
            _sit(taken, Seat(gpu.gpu, unit))
    return tuple(taken)


def _recognise(taken: list[Seat], gpu: Seen) -> None:
    """A GPU that was silent from the beginning has told its UUID: the seat is its own."""
    if any(one.gpu == gpu.gpu for one in taken):
        return
    for number, one in enumerate(taken):
        if one.gpu == unnamed(gpu.index):
            taken[number] = Seat(gpu.gpu, None)


def _leave(taken: list[Seat], gpu: str, units: Sequence[str]) -> None:
    for number, one in enumerate(taken):
        if one.gpu == gpu and one.unit not in units:
            taken[number] = Seat(gpu, None)


def _sit(taken: list[Seat], new: Seat) -> None:
    if new in taken:
        return
    free = Seat(new.gpu, None)
    if free in taken:
        taken[taken.index(free)] = new
    else:
        taken.append(new)
