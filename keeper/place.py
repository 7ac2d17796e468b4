"""What ``--worker-type``, ``--device`` and ``--gpus`` ask for. Pure; the hive decides the rest."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, cast, get_args

from keeper.exits import WrongUsage
from operations.operations import DeviceKind

KINDS: Final[tuple[str, ...]] = get_args(DeviceKind)

_DEVICE = re.compile(r"(?:(?P<kind>[a-z]+):)?(?P<index>\d{1,3})|(?P<bare>[a-z]+)")


@dataclass(frozen=True)
class Place:
    """The part of a ``worker_spawn`` that says where; what is None is left to the daemon."""

    kind: DeviceKind | None
    indices: tuple[int, ...] = ()

    @property
    def device(self) -> int | None:
        return self.indices[0] if len(self.indices) == 1 else None

    @property
    def devices(self) -> list[int] | None:
        return list(self.indices) if len(self.indices) > 1 else None


def decide(kind: str | None, devices: Sequence[str], gpus: int | None = None) -> Place:
    """The place that the flags ask for. An index without a kind is that of an NVIDIA GPU.

    :param kind: ``--worker-type``
    :param devices: each an index (``0``), an id (``cuda:0``, ``cpu``) or a kind (``cuda``)
    :param gpus: how many the hive is to choose
    :raises WrongUsage: no such kind, devices of two kinds, one twice, or named and counted ones
    """
    asked = [_parse(device) for device in devices]
    kinds = {of for of, _ in asked if of is not None} | ({kind} if kind else set())
    if len(kinds) > 1:
        raise WrongUsage(
            f"A worker runs on one kind of device, not on {' and '.join(sorted(kinds))}. Name one."
        )
    for unknown in kinds - set(KINDS):
        raise WrongUsage(f"There is no kind of device '{unknown}'. There are: {', '.join(KINDS)}.")
    indices = tuple(index for _, index in asked if index is not None)
    if len(set(indices)) < len(indices):
        raise WrongUsage("One device is named twice. Name each once.")
    if gpus is not None and indices:
        raise WrongUsage("Name the devices with --device, or count them with --gpus; not both.")
    if gpus is not None and "cpu" in kinds:
        raise WrongUsage("--gpus counts GPUs, and the CPU is none. Leave one of both out.")
    wanted = next(iter(kinds), "cuda" if indices else None)
    return Place(cast(DeviceKind | None, wanted), indices)


def _parse(device: str) -> tuple[str | None, int | None]:
    match = _DEVICE.fullmatch(device.lower())
    if match is None:
        raise WrongUsage(f"'{device}' is no device. Give an index (0) or an id (cuda:0, cpu).")
    if match["bare"]:
        return match["bare"], None
    return match["kind"], int(match["index"])
