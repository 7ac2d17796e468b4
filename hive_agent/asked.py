"""Questions that take long, are asked by many at once, and have an answer that stays."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Asked(Generic[K, V]):
    """Answers by what was asked. A failure is told to all who wait for it, and not kept.

    Belongs to one event loop.
    """

    def __init__(self) -> None:
        self._answers: dict[K, asyncio.Task[V]] = {}

    async def get(self, key: K, ask: Callable[[], Coroutine[Any, Any, V]]) -> V:
        """The answer that is known, or that somebody waits for already, else a new one.

        Whoever is cancelled while waiting takes the answer from nobody else.
        """
        answer = self._answers.get(key)
        if answer is None or _failed(answer):
            answer = self._answers[key] = asyncio.create_task(ask())
            answer.add_done_callback(_failed)  # looked at, should nobody wait any more
        return await asyncio.shield(answer)


def _failed(answer: asyncio.Task[Any]) -> bool:
    return answer.done() and (answer.cancelled() or answer.exception() is not None)
