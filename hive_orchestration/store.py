"""Where the queue is kept: one file, or a PostgreSQL that several queens share.

Writes are grouped: all that wait when a transaction begins are in it, and each is answered after
its COMMIT, which on SQLite means after fsync (``synchronous=FULL``). So many callers share one
fsync, and none is told of what a crash could still undo.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from hive_orchestration.transaction import Step
from operations.errors import HiveError, Unavailable

T = TypeVar("T")

MOST_TOGETHER: Final = 256  # steps in one transaction
MOST_WAITING: Final = 10_000  # writes; more are refused
RETRY_AFTER_S: Final = 1.0


@dataclass(frozen=True)
class _Waiting:
    step: Step[Any]
    answer: asyncio.Future[Any]


class Changes:
    """Wakes those who wait for something to have changed."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def tell(self) -> None:
        event, self._event = self._event, asyncio.Event()
        event.set()

    def next(self) -> asyncio.Event:
        """Set at the next change after this call."""
        return self._event


class Store(ABC):
    """Runs steps of the state machine. Belongs to one event loop."""

    def __init__(self) -> None:
        self._waiting: list[_Waiting] = []
        self._wanted = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        self.changes = Changes()
        """Told after each commit that made something claimable or wrote events, here or, on
        PostgreSQL, anywhere."""

    # -- for those who use it ----------------------------------------------------------------

    async def write(self, step: Step[T]) -> T:
        """Run a step; what it returns, once that is committed.

        :raises HiveError: what the step raises; nothing of it stays
        :raises Unavailable: the database cannot be reached, or the commit was not confirmed
        :raises WontFit: the disk is full
        """
        if self._writer is None:
            raise Unavailable("The queue is closed. Ask again when it has been started.")
        if len(self._waiting) >= MOST_WAITING:
            raise Unavailable(
                "The queue's database is behind. Send it again.", retry_after=RETRY_AFTER_S
            )
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(step, answer))
        self._wanted.set()
        said: T = await answer
        return said

    @abstractmethod
    async def read(self, step: Step[T]) -> T:
        """Run a step that writes nothing, beside the writes.

        :raises HiveError: what the step raises, or as :meth:`write`
        """

    async def close(self) -> None:
        """What waits is still written. Fine to call twice."""
        writer, self._writer = self._writer, None
        if writer is not None:
            self._wanted.set()
            await writer
        await self._shut()

    # -- for the two kinds -------------------------------------------------------------------

    def _begin(self) -> None:
        self._writer = asyncio.get_running_loop().create_task(self._write_on())

    async def _write_on(self) -> None:
        while True:
            await self._wanted.wait()
            group, self._waiting = (
                self._waiting[:MOST_TOGETHER],
                self._waiting[MOST_TOGETHER:],
            )
            if not self._waiting:
                self._wanted.clear()
            group = [waiting for waiting in group if not waiting.answer.done()]
            if group:
                await self._write_group(group)
            if self._writer is None and not self._waiting:
                return

    async def _write_group(self, group: Sequence[_Waiting]) -> None:
        try:
            said, changed = await self._commit([waiting.step for waiting in group])
        except Exception as error:  # noqa: BLE001  # all of them are told
            broken = self._explained(error)
            said, changed = [broken] * len(group), False
        for waiting, result in zip(group, said, strict=True):
            if waiting.answer.done():
                continue  # nobody waits for it any more
            if isinstance(result, BaseException):
                waiting.answer.set_exception(result)
            else:
                waiting.answer.set_result(result)
        if changed:
            self.changes.tell()

    @abstractmethod
    async def _commit(self, steps: Sequence[Step[Any]]) -> tuple[list[Any], bool]:
        """Run steps in one transaction; what each said, and whether somebody is to be woken."""

    @abstractmethod
    def _explained(self, error: Exception) -> HiveError:
        """What a failure of the database means to callers."""

    @abstractmethod
    async def _shut(self) -> None: ...


Opened = Callable[[], Store]
