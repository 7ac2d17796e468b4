"""What loads that were measured teach the next prediction.

What an engine takes besides weights and KV cache (its context, its workspaces, what its allocator
rounds up) hardly depends on the settings, so what is learned is a difference in bytes: of loads
with the same settings if there are any, else of other loads of the same model, engine and device.
The prediction itself counts as one load, and the median is taken: the first load moves it half
way, a second one like it all the way, and a single odd load among others not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from statistics import median
from typing import Any, Final

MOST_LOADS: Final = 512
LOADS_OF_ONE: Final = 9
"""Of one setting, the latest count: engines change."""

MOST_CHANGE: Final = 0.5
"""A prediction is never moved by more than this part of itself."""


@dataclass(frozen=True)
class Setting:
    """What a load is remembered by.

    :param device: the name of the GPUs, or ``cpu``
    :param devices: how many share the model
    :param quantization: of the model, as its files have it or as the engine made it; ``""`` of none
    :param batch: tokens computed at once; 0 for the engine's default
    """

    digest: str
    engine: str
    device: str
    devices: int
    context_length: int
    slots: int
    kv_type: str
    number_bytes: int
    quantization: str
    batch: int
    adapters: int

    @property
    def kin(self) -> tuple[str, str, str, int]:
        """What loads of the same model in other settings have in common."""
        return (self.digest, self.engine, self.device, self.devices)


@dataclass(frozen=True)
class Load:
    """:param predicted: bytes on one device, without any correction
    :param measured: bytes that the engine's processes held there once it was ready
    """

    setting: Setting
    predicted: int
    measured: int


@dataclass(frozen=True)
class Correction:
    """:param loads: the oldest first"""

    loads: tuple[Load, ...] = ()

    def after(self, load: Load) -> Correction:
        """This and one more load; the oldest are forgotten."""
        same = [one for one in self.loads if one.setting == load.setting]
        stale = same[: max(0, len(same) + 1 - LOADS_OF_ONE)]
        kept = [one for one in self.loads if one not in stale]
        return Correction(tuple([*kept, load][-MOST_LOADS:]))

    def adjustment(self, setting: Setting, predicted: int) -> int:
        """Bytes to add to a prediction for one device; negative where engines took less."""
        if not setting.digest:
            return 0
        learned = self._by_setting.get(setting)
        if learned is None:
            learned = self._by_kin.get(setting.kin, 0)
        most = MOST_CHANGE * predicted
        return round(max(-most, min(most, learned)))

    def last(self, setting: Setting) -> Load | None:
        """The latest load in just this setting."""
        return self._latest.get(setting)

    # An advice predicts some hundred times.
    @cached_property
    def _by_setting(self) -> Mapping[Hashable, float]:
        return self._differences(lambda setting: setting)

    @cached_property
    def _by_kin(self) -> Mapping[Hashable, float]:
        return self._differences(lambda setting: setting.kin)

    @cached_property
    def _latest(self) -> Mapping[Setting, Load]:
        return {load.setting: load for load in self.loads}

    def _differences(self, key: Callable[[Setting], Hashable]) -> Mapping[Hashable, float]:
        """What the loads under each key teach, bytes."""
        found: dict[Hashable, list[int]] = {}
        for load in self.loads:
            found.setdefault(key(load.setting), [0]).append(load.measured - load.predicted)
        return {one: median(differences) for one, differences in found.items()}

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(load) for load in self.loads]

    @staticmethod
    def from_json(stored: object) -> Correction:
        """What ``to_json`` gave; anything in it that is no load is passed over."""
        rows = stored if isinstance(stored, list) else []
        loads = [load for row in rows if (load := _load(row)) is not None]
        return Correction(tuple(loads[-MOST_LOADS:]))


def _load(row: object) -> Load | None:
    if not isinstance(row, Mapping) or not isinstance(row.get("setting"), Mapping):
        return None
    setting, sizes = row["setting"], (row.get("predicted"), row.get("measured"))
    for field in fields(Setting):
        kind = int if field.type == "int" else str
        if type(setting.get(field.name)) is not kind:
            return None
    predicted, measured = sizes
    if type(predicted) is not int or type(measured) is not int or min(predicted, measured) < 0:
        return None
    return Load(Setting(**{f.name: setting[f.name] for f in fields(Setting)}), predicted, measured)
