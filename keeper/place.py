"""On which device a worker is to run. A pure decision."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from keeper.exits import WrongUsage
from operations.hosts import Device, ModelInfo
from operations.names import short_forms

KINDS = ("cpu", "cuda", "metal", "rocm", "vulkan")

_DEVICE = re.compile(r"(?:(?P<kind>[a-z]+):)?(?P<index>\d{1,3})|(?P<bare>[a-z]+)")


@dataclass(frozen=True)
class Offer:
    """One device of one hive; ``hive_id`` is None where the hive asked is the only one.

    ``has_model``: the model that is to be loaded is on that hive's disk.
    """

    hive_id: str | None
    device: Device
    has_model: bool = False

    @property
    def kind(self) -> str:
        return self.device.id.partition(":")[0]

    @property
    def index(self) -> int:
        return int(self.device.id.partition(":")[2] or 0)


@dataclass(frozen=True)
class Place:
    """What goes into a ``worker_spawn``; ``hive_id`` None leaves the hive to the daemon."""

    kind: str
    indices: tuple[int, ...]
    hive_id: str | None = None


def decide(kind: str | None, devices: Sequence[str], offers: Sequence[Offer]) -> Place:
    """The place that ``--worker-type`` and ``--device`` ask for.

    Nothing asked: the GPU with the most free memory, and without a GPU the CPU; among the hives
    that have the model, if any has it.

    :param devices: each an index (``0``) or an id (``cuda:0``, ``cpu``)
    :param offers: the devices of the hives in question; may be empty if kind and index are given
    :raises WrongUsage: no such kind, or devices of two kinds
    """
    asked = [_parse(device) for device in devices]
    kinds = {of for of, _ in asked if of is not None} | ({kind} if kind else set())
    if len(kinds) > 1:
        raise WrongUsage(
            f"A worker runs on one kind of device, not on {' and '.join(sorted(kinds))}. Name one."
        )
    for unknown in kinds - set(KINDS):
        raise WrongUsage(f"There is no kind of device '{unknown}'. There are: {', '.join(KINDS)}.")
    wanted = next(iter(kinds), None)
    indices = tuple(index for _, index in asked if index is not None)
    if wanted is not None and (indices or wanted == "cpu"):
        return Place(wanted, indices or (0,))
    fitting = [
        offer
        for offer in [offer for offer in offers if offer.has_model] or offers
        if offer.device.healthy
        and (wanted is None or offer.kind == wanted)
        and (not indices or offer.device.device_type == "gpu")
        and (not indices or offer.index == indices[0])
    ]
    gpus = [offer for offer in fitting if offer.device.device_type == "gpu"]
    best = max(gpus, key=lambda offer: offer.device.vram_free_mb, default=None)
    if best is None:
        return Place(wanted or "cpu", indices or (0,))
    return Place(best.kind, indices or (best.index,), best.hive_id)


def has_model(name: str, models: Iterable[ModelInfo]) -> bool:
    """Whether one of these models goes by this name."""
    wanted = name.lower()
    return any(
        wanted in (model.digest.lower(), model.id.lower()) or wanted in short_forms(model.id)
        for model in models
    )


def _parse(device: str) -> tuple[str | None, int | None]:
    match = _DEVICE.fullmatch(device.lower())
    if match is None:
        raise WrongUsage(f"'{device}' is no device. Give an index (0) or an id (cuda:0, cpu).")
    if match["bare"]:
        return match["bare"], None
    return match["kind"], int(match["index"])
