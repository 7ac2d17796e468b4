"""Where the queue is kept: one file, or a PostgreSQL that several queens share.

Writes are grouped: all that wait when a transaction begins are in it, and each is answered after
its COMMIT, which on SQLite means after fsync (``synchronous=FULL``). So many callers share one
fsync, and none is told of what a crash could still undo. Where several callers ask again as soon
as they are answered, a transaction gives them a moment to be in it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, TypeVar

from pydantic import ValidationError

from hive_orchestration.transaction import LaneKey, Spoilt, Step, Tx, cause_of
from operations.errors import Conflict, HiveError, InvalidRequest, Unavailable

T = TypeVar("T")

MOST_TOGETHER: Final = 256  # steps in one transaction
MOST_TURNS: Final = 3  # of the event loop in which as many as were in the last one are waited for
MOST_WAITING: Final = 10_000  # writes; more are refused
MOST_LANES: Final = 10_000  # that are remembered
RETRY_AFTER_S: Final = 1.0

log = logging.getLogger(__name__)


class _Waiting(NamedTuple):
    step: Step[Any]
    answer: asyncio.Future[Any]


class Changes:
    """Wakes those who wait for something to have changed."""

    def __init__(self) -> None:
        self._event: asyncio.Event | None = None  # where somebody waits

    def tell(self) -> None:
        event, self._event = self._event, None
        if event is not None:
            event.set()

    def next(self) -> asyncio.Event:
        """Set at the next change after this call."""
        if self._event is None:
            self._event = asyncio.Event()
        return self._event


class Store(ABC):
    """Runs steps of the state machine. Belongs to one event loop."""

    def __init__(self) -> None:
        self._waiting: list[_Waiting] = []
        self._writer: asyncio.Task[None] | None = None  # while something waits
        self._open = False
        self._last = 0  # so many waited when the last transaction began
        self.changes = Changes()
        """Told after each commit that wrote events, here or, on PostgreSQL, anywhere."""
        self.ready = Changes()
        """The same of commits that made something claimable."""
        self.transactions = 0
        """That were begun."""
        self._who = secrets.token_hex(8)  # among the queens on one database
        self._lanes: dict[LaneKey, int] = {}

    # -- for those who use it ----------------------------------------------------------------

    async def write(self, step: Step[T]) -> T:
        """Run a step; what it returns, once that is committed.

        :raises HiveError: what the step raises; nothing of it stays
        :raises Unavailable: the database cannot be reached, or the commit was not confirmed
        :raises WontFit: the disk is full
        """
        return await self.begun(step)

    def begun(self, step: Step[T]) -> asyncio.Future[T]:
        """As :meth:`write`, begun at once: what it will return or raise."""
        self._check_open()
        if len(self._waiting) >= MOST_WAITING:
            raise Unavailable(
                "The queue's database is behind. Send it again.", retry_after=RETRY_AFTER_S
            )
        answer: asyncio.Future[T] = self._loop.create_future()
        self._waiting.append(_Waiting(step, answer))
        if self._writer is None:
            self._writer = self._loop.create_task(self._write_out())
        return answer

    def _check_open(self) -> None:
        if not self._open:
            raise Unavailable("The queue is closed. Ask again when it has been started.")

    @abstractmethod
    async def read(self, step: Step[T]) -> T:
        """Run a step that writes nothing, beside the writes.

        :raises HiveError: what the step raises, or as :meth:`write`
        """

    async def close(self) -> None:
        """What waits is still written. Fine to call twice."""
        self._open = False
        if self._writer is not None:
            await self._writer
        await self._shut()

    # -- for the two kinds -------------------------------------------------------------------

    def _begin(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._open = True

    async def _write_out(self) -> None:
        """Write all that waits; begins when those who call now have had their turn."""
        while self._waiting:
            for _ in range(MOST_TURNS):
                if len(self._waiting) >= self._last:
                    break
                await asyncio.sleep(0)
            self._last = len(self._waiting)
            group, self._waiting = (
                self._waiting[:MOST_TOGETHER],
                self._waiting[MOST_TOGETHER:],
            )
            await self._write_group(group)
        self._writer = None

    async def _write_group(self, group: Sequence[_Waiting]) -> None:
        try:
            said = await self._written([waiting.step for waiting in group])
        except Exception as error:  # noqa: BLE001  # those whom it concerns are told
            why = cause_of(error)
            if len(group) > 1 and self._trouble(why) is None:  # somebody's own: not the others'
                for waiting in group:
                    await self._write_group([waiting])
                return
            said = [self._explained(why)] * len(group)
        for waiting, result in zip(group, said, strict=True):
            if waiting.answer.done():
                continue  # nobody waits for it any more
            if isinstance(result, BaseException):
                waiting.answer.set_exception(result)
            else:
                waiting.answer.set_result(result)

    async def _written(self, steps: Sequence[Step[Any]]) -> list[Any]:
        self.transactions += 1
        try:
            said, tx = await self._commit(steps)
        except Spoilt as error:
            if len(steps) > 1 or not self._not_unique(error.why):
                raise
            said, tx = await self._commit(steps)  # another queen was first: now it sees her rows
        if len(self._lanes) > MOST_LANES:
            self._lanes.clear()
        self._lanes.update(tx.lanes)
        if tx.ready or tx.wrote_events:
            self._tell(ready=tx.ready)
        return said

    def _tell(self, *, ready: bool) -> None:
        self.changes.tell()
        if ready:
            self.ready.tell()

    def _explained(self, error: Exception) -> HiveError:
        """What a failure means to who called."""
        if isinstance(error, HiveError):
            return error
        if (trouble := self._trouble(error)) is not None:
            return trouble
        if self._not_unique(error):
            return Conflict(
                "Something else has what this asks for: a key that may be there once. Look what "
                "has it, and end that first.",
                code="not_unique",
            )
        if self._refused(error):
            return InvalidRequest(
                "The queue's database cannot keep a value of this. Send shorter texts and smaller "
                "numbers.",
                code="unstorable",
            )
        log.error("a step of the queue broke", exc_info=error)
        return HiveError("The queue broke over this. The log has the details.")

    @abstractmethod
    async def _commit(self, steps: Sequence[Step[Any]]) -> tuple[list[Any], Tx]:
        """Run steps in one transaction, and commit it; what each said.

        :raises Spoilt: one of them failed after it had begun to write; nothing of any stays
        """

    @abstractmethod
    def _trouble(self, error: Exception) -> HiveError | None:
        """What callers are to be told of a failure that is the database's; None: it is none."""

    @abstractmethod
    def _not_unique(self, error: Exception) -> bool:
        """Whether the database has what may be there once."""

    def _refused(self, error: Exception) -> bool:
        """Whether the database would not have a value."""
        return isinstance(error, ValidationError | OverflowError)

    @abstractmethod
    async def _shut(self) -> None: ...
