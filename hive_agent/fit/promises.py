"""Memory that is promised to workers and does not show in what their devices have free.

What a worker takes of a GPU shows once it has loaded. On the CPU its weights never do: they are
mapped from the file, and the system counts such pages as free for others to have. So two models
that fit one by one could together push each other out of memory, over and over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from hive_agent.fit.verdict import MIB, Plan
from operations.hosts import Device

SHOWN_S = 2.0  # after which a loaded worker's memory is in every sample of the CPU
SHOWN_ON_GPUS_S = 12.0
"""And of its GPUs: more than what a driver's last answer is still told for when it is silent."""

Phase = Literal["loading", "settling", "loaded", "gone"]
"""A worker that settles is ready; the readings of its GPUs may be older than that."""


@dataclass(frozen=True)
class Promise:
    """Bytes by device id.

    :param mapped: weights that never show as used
    :param guessed: the need could not be told; ``needs`` is what must not be given to others
    """

    needs: Mapping[str, int]
    mapped: Mapping[str, int]
    guessed: bool = False

    def hidden(self, phase: Phase, held: Mapping[str, int]) -> dict[str, int]:
        """What of it does not show yet, or never will.

        :param held: what the worker is seen to hold of its GPUs, as far as that is told
        """
        if phase == "gone":
            return {}
        hidden = dict(self.mapped)
        for device_id, need in self.needs.items():
            if phase == "loading" or (phase == "settling" and device_id != "cpu"):
                hidden[device_id] = max(0, need - held.get(device_id, 0))
        return hidden


def promise(plan: Plan, devices: Collection[Device], *, mapped: bool = True) -> Promise:
    """What a worker of this plan is promised.

    :param mapped: on the CPU its engine maps the weights from their file
    """
    on_cpu = {device.id for device in devices if mapped and device.device_type == "cpu"}
    return Promise(
        needs={need.device: need.total for need in plan.needs},
        mapped={need.device: need.weights for need in plan.needs if need.device in on_cpu},
    )


def phase_of(ready_for_s: float | None) -> Phase:
    """The phase of a worker that has not failed.

    :param ready_for_s: seconds since it came up; None while it has not
    """
    if ready_for_s is None or ready_for_s < SHOWN_S:
        return "loading"
    return "settling" if ready_for_s < SHOWN_ON_GPUS_S else "loaded"


def left(devices: Collection[Device], hidden: Iterable[Mapping[str, int]]) -> list[Device]:
    """The devices with what is promised taken off what they have free.

    :param hidden: what of each promise does not show
    """
    taken: Counter[str] = Counter()
    for one in hidden:
        taken.update(one)
    return [
        device.model_copy(
            update={"vram_free_mb": max(0, device.vram_free_mb - -(-taken[device.id] // MIB))}
        )
        if taken[device.id]
        else device
        for device in devices
    ]
