"""Counting what runs, so that a stop can wait for it."""

from __future__ import annotations

import asyncio
from types import TracebackType


class InFlight:
    """``with in_flight:`` around each unit of work; :meth:`settled` waits until none is left."""

    def __init__(self) -> None:
        self.count = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def begin(self) -> None:
        """One more runs."""
        self.count += 1
        self._idle.clear()

    def end(self) -> None:
        """One of them runs no more."""
        self.count -= 1
        if not self.count:
            self._idle.set()

    def __enter__(self) -> None:
        self.begin()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    async def settled(self, deadline_s: float) -> bool:
        """Wait until nothing runs, at most ``deadline_s`` seconds; whether nothing runs."""
        try:
            async with asyncio.timeout(deadline_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
