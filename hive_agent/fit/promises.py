"""Memory that is promised to workers and does not show in what their devices have free.

What a worker takes of a GPU shows once it has loaded. On the CPU its weights never do: they are
mapped from the file, and the system counts such pages as free for others to have. So two models
that fit one by one could together push each other out of memory, over and over.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from hive_agent.fit.verdict import MIB, Plan
from operations.hosts import Device

SHOWN_S = 2.0  # after which a loaded worker's memory is in every sample of its device

Phase = Literal["loading", "loaded", "gone"]


@dataclass(frozen=True)
class Promise:
    """Bytes by device id.

    :param mapped: weights that never show as used
    :param guessed: the need could not be told; ``needs`` is what must not be given to others
    """

    needs: Mapping[str, int]
    mapped: Mapping[str, int]
    guessed: bool = False

    def hidden(self, phase: Phase) -> Mapping[str, int]:
        """What of it does not show yet, or never will."""
        match phase:
            case "loading":
                return self.needs
            case "loaded":
                return self.mapped
            case "gone":
                return {}


def promise(plan: Plan, devices: Collection[Device], *, mapped: bool = True) -> Promise:
    """What a worker of this plan is promised.

    :param mapped: on the CPU its engine maps the weights from their file
    """
    on_cpu = {device.id for device in devices if mapped and device.device_type == "cpu"}
    return Promise(
        needs={need.device: need.total for need in plan.needs},
        mapped={need.device: need.weights for need in plan.needs if need.device in on_cpu},
    )


def left(
    devices: Collection[Device], promises: Mapping[str, Promise], phases: Mapping[str, Phase]
) -> list[Device]:
    """The devices with what is promised taken off what they have free.

    :param promises: by worker id
    :param phases: of the workers; one that is not among them has gone
    """
    hidden: dict[str, int] = {}
    for worker_id, made in promises.items():
        for device_id, count in made.hidden(phases.get(worker_id, "gone")).items():
            hidden[device_id] = hidden.get(device_id, 0) + count
    return [
        device.model_copy(
            update={"vram_free_mb": max(0, device.vram_free_mb - -(-hidden[device.id] // MIB))}
        )
        if device.id in hidden
        else device
        for device in devices
    ]
