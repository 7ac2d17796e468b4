"""Where inference goes: what the scheduler finds of the registry, kept until something changes."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Final

from operations.hosts import HiveInfo, Task, WorkerInfo
from queen.registry import Registry
from queen.scheduler import Candidate, Placement, candidates, least

KEPT_S: Final = 0.1  # a hive that falls silent does so without a word
KEPT: Final = 256


class Routes:
    """The candidates for each model, and the least loaded of them at each request."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._found: dict[tuple[str, Task], tuple[int, float, list[Candidate]]] = {}

    def place(self, model: str, task: Task, avoid: Collection[str]) -> Placement:
        """As :func:`queen.scheduler.place`; raises what it does."""
        return least(self._candidates(model, task), self._in_flight, avoid)

    def _candidates(self, model: str, task: Task) -> list[Candidate]:
        now = time.monotonic()
        known = self._found.get((model, task))
        if known is not None and known[0] == self._registry.changes and now < known[1]:
            return known[2]
        found = candidates(model, self._registry.hives(), task=task)
        if len(self._found) >= KEPT:
            self._found.clear()
        self._found[model, task] = (self._registry.changes, now + KEPT_S, found)
        return found

    def _in_flight(self, hive: HiveInfo, worker: WorkerInfo) -> int:
        return self._registry.in_flight(hive.hive_url, worker.worker_id)
