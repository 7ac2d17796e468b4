"""Whose turn it is to load on a GPU.

vLLM takes whatever goes from the free memory of a GPU while it loads for its own, and refuses to
start when some comes back meanwhile (``memory_profiling`` in ``vllm/utils/mem_utils.py``). So
nothing else loads where it does.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from hive_agent.workers.spec import WorkerSpec


@dataclass(eq=False)
class Turn:
    """One load.

    :param alone: nothing else may load on its GPUs meanwhile
    :param disturbed: others took or gave back memory there all the same
    """

    worker_id: str
    gpus: frozenset[str]
    alone: bool
    loads: bool = False
    disturbed: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def meets(self, other: Turn) -> bool:
        return not self.gpus.isdisjoint(other.gpus)

    def bars(self, other: Turn) -> bool:
        return (self.alone or other.alone) and self.meets(other)


class Turns:
    """The loads of one machine, in the order in which they were asked for: none overtakes one that
    it would have to wait for."""

    def __init__(self) -> None:
        self._turns: list[Turn] = []

    @contextlib.asynccontextmanager
    async def taken(self, spec: WorkerSpec, told: Callable[[str], None]) -> AsyncIterator[Turn]:
        """Wait for a worker's turn, and hold it while it loads.

        :param told: given a sentence for people while it waits
        """
        turn = Turn(spec.worker_id, gpus_of(spec), alone=spec.engine == "vllm")
        self._turns.append(turn)
        try:
            while (before := self._before(turn)) is not None:
                shared = ", ".join(sorted(turn.gpus & before.gpus))
                told(f"waiting until worker {before.worker_id} has loaded on {shared}")
                await before.over.wait()
            turn.loads = True
            for other in self._turns:
                if other is not turn and other.loads and other.meets(turn):
                    turn.disturbed = other.disturbed = True
            yield turn
        finally:
            self._turns.remove(turn)
            turn.over.set()

    def gave_back(self, spec: WorkerSpec) -> None:
        """A worker's process has ended, and its memory is free again."""
        gpus = gpus_of(spec)
        for turn in self._turns:
            if turn.loads and turn.worker_id != spec.worker_id and turn.gpus & gpus:
                turn.disturbed = True

    def _before(self, turn: Turn) -> Turn | None:
        """The first of the earlier turns that this one has to wait for."""
        earlier = self._turns[: self._turns.index(turn)]
        return next((other for other in earlier if other.bars(turn)), None)


def gpus_of(spec: WorkerSpec) -> frozenset[str]:
    """The GPUs whose memory a worker takes."""
    if spec.engine == "scripted":
        return frozenset()
    return frozenset(id for id in spec.devices if id != "cpu")
