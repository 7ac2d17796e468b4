"""Where inference goes: what the scheduler finds of the registry, kept until something changes."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Final, NamedTuple

from operations.hosts import HiveInfo, Task, WorkerInfo
from queen.registry import Registry
from queen.scheduler import Candidate, Placement, candidates, least

KEPT_S: Final = 0.1  # a hive that falls silent does so without a word
KEPT: Final = 256


class _Found(NamedTuple):
    """:param only: where there is no choice"""

    changes: int
    until: float
    candidates: list[Candidate]
    only: Placement | None


class Routes:
    """The candidates for each model, and the least loaded of them at each request."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._found: dict[tuple[str, Task], _Found] = {}

    def place(self, model: str, task: Task, avoid: Collection[str]) -> Placement:
        """As :func:`queen.scheduler.place`; raises what it does."""
        now = time.monotonic()
        known = self._found.get((model, task))
        if known is None or known.changes != self._registry.changes or now >= known.until:
            known = self._find(model, task, now)
        return known.only or least(known.candidates, self._in_flight, avoid)

    def _find(self, model: str, task: Task, now: float) -> _Found:
        there = candidates(model, self._registry.hives(), task=task)
        only = least(there, self._in_flight) if len(there) == 1 else None
        if len(self._found) >= KEPT:
            self._found.clear()
        found = _Found(self._registry.changes, now + KEPT_S, there, only)
        self._found[model, task] = found
        return found

    def _in_flight(self, hive: HiveInfo, worker: WorkerInfo) -> int:
        return self._registry.in_flight(hive.hive_url, worker.worker_id)
