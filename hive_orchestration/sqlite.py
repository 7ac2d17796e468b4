"""The queue in one file, by SQLite: what a queen has unless she is told otherwise."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Final, Self, TypeVar

from sqlalchemy import URL, create_engine, event
from sqlalchemy import Connection as CoreConnection
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import DBAPIError

from hive_orchestration.connection import Connection
from hive_orchestration.migrations import upgrade
from hive_orchestration.store import RETRY_AFTER_S, Store
from hive_orchestration.transaction import Step, Tx, together
from operations.errors import Conflict, HiveError, Unavailable, WontFit

T = TypeVar("T")

BUSY_S: Final = 10.0  # another process's transaction is waited for so long
READERS: Final = 2
ROWS: Final = 8  # in one INSERT, which takes a quarter less than one for each
MS: Final = 1000

_FULL = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR_WRITE,
    sqlite3.SQLITE_IOERR_SHMSIZE,
    sqlite3.SQLITE_IOERR_SHMMAP,
)
_IMMEDIATE: Final = "BEGIN IMMEDIATE"


class SqliteStore(Store):
    """Writes in one thread, reads beside it (write-ahead log)."""

    def __init__(self, path: Path, *, alone: bool = False) -> None:
        super().__init__()
        self._alone = alone
        self._lock: int | None = None
        self.path = path
        self._writing = _Writer()
        self._reading = ThreadPoolExecutor(READERS, "queue-reader")
        self._raw: sqlite3.Connection | None = None  # that writes
        self._idle: list[sqlite3.Connection] = []  # of the readers

    @classmethod
    async def open(cls, path: Path, *, alone: bool = False) -> Self:
        """Make the file where there is none, and bring its tables up to date.

        :param alone: while nobody else has it open
        :raises HiveError: it is no such file, is damaged or from a newer Hive, or the disk is full
        """
        store = cls(path, alone=alone)
        try:
            await store._writing.run(store._prepare)
        except BaseException as error:
            await store._shut()
            if isinstance(error, DBAPIError) and isinstance(error.orig, Exception):
                raise store._explained(error.orig) from error
            if isinstance(error, sqlite3.Error):
                raise store._explained(error) from error
            raise
        store._begin()
        return store

    def _prepare(self) -> None:
        self._take_lock()
        with contextlib.suppress(OSError):  # SQLite says what is wrong
            self.path.touch(mode=0o600)
        engine = create_engine(
            URL.create("sqlite", database=str(self.path)), creator=lambda: _connect(self.path)
        )

        @event.listens_for(engine, "begin")
        def begun(conn: CoreConnection) -> None:
            conn.exec_driver_sql(_IMMEDIATE)

        try:
            with engine.begin() as conn:
                upgrade(conn)
        finally:
            engine.dispose()
        self._raw = _connect(self.path)

    def _take_lock(self) -> None:
        """Shared by all who have the file open, and gone with their processes."""
        try:
            self._lock = os.open(f"{self.path}-lock", os.O_RDWR | os.O_CREAT, 0o600)
            kind = fcntl.LOCK_EX if self._alone else fcntl.LOCK_SH
            fcntl.flock(self._lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if self._alone:
                raise Conflict(
                    f"The queue in {self.path} is in use: by a queen, or by a program with the "
                    "library. Stop that first.",
                    code="queue_in_use",
                ) from None
            raise Unavailable(
                f"The queue in {self.path} is being moved. Look where to, and ask there.",
                code="queue_unavailable",
                retry_after=RETRY_AFTER_S,
            ) from None
        except OSError as error:
            if self._alone:
                raise Conflict(
                    f"Nobody can tell whether the queue in {self.path} is in use "
                    f"({error.strerror}). Move it to a disk of this machine first.",
                    code="queue_in_use",
                ) from None
            # Without locks, or room for one: if that matters, SQLite says so.

    async def read(self, step: Step[T]) -> T:
        self._check_open()
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._reading, self._read, step)
        except HiveError:
            raise
        except Exception as error:
            raise self._explained(error) from error

    @contextlib.contextmanager
    def frozen(self) -> Iterator[sqlite3.Connection]:
        """A connection that reads, while nobody writes to the file, no other process either."""
        with contextlib.closing(_connect(self.path)) as raw, _transaction(raw, _IMMEDIATE):
            yield raw

    def _read(self, step: Step[T]) -> T:
        raw = self._idle.pop() if self._idle else _connect(self.path)
        try:
            with _transaction(raw, "BEGIN"):
                return step(self._tx(raw))
        finally:
            self._idle.append(raw)

    async def _commit(self, steps: Sequence[Step[Any]]) -> tuple[list[Any], Tx]:
        return await self._writing.run(lambda: self._together(steps))

    def _together(self, steps: Sequence[Step[Any]]) -> tuple[list[Any], Tx]:
        assert self._raw is not None
        with _transaction(self._raw, _IMMEDIATE):
            tx = self._tx(self._raw)
            said = together(tx, steps)
        return said, tx

    def _tx(self, raw: sqlite3.Connection) -> Tx:
        return Tx(_Connection(raw), int(time.time() * MS), self._lanes)

    def _not_unique(self, error: Exception) -> bool:
        return isinstance(error, sqlite3.IntegrityError)

    def _refused(self, error: Exception) -> bool:
        return isinstance(error, sqlite3.DataError) or super()._refused(error)

    def _trouble(self, error: Exception) -> HiveError | None:
        if getattr(error, "sqlite_errorcode", 0) in _FULL:
            return WontFit(
                f"The disk of the queue's file {self.path} is full, so nothing was written. "
                "Make room there, and send it again.",
                code="disk_full",
                retryable=True,
                retry_after=RETRY_AFTER_S,
            )
        if not isinstance(error, sqlite3.Error) or self._not_unique(error) or self._refused(error):
            return None
        return Unavailable(
            f"The queue's file {self.path} cannot be used now: {error}. Send it again; if it "
            "stays so, look at the file.",
            code="queue_unavailable",
            retry_after=RETRY_AFTER_S,
        )

    async def _shut(self) -> None:
        await asyncio.to_thread(self._reading.shutdown)
        await asyncio.to_thread(self._writing.close)
        while self._idle:
            self._idle.pop().close()
        if self._raw is not None:
            self._raw.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class _Writer:
    """A thread that does one thing after the other.

    An executor of one thread would do; passing things to it and back costs twice as much.
    """

    def __init__(self) -> None:
        self._work: SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]] | None] = (
            SimpleQueue()
        )
        self._thread = Thread(target=self._go_on, name="queue-writer", daemon=True)
        self._thread.start()

    def run(self, call: Callable[[], T]) -> asyncio.Future[T]:
        """What the call returns or raises."""
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._work.put((call, answer))
        return answer

    def close(self) -> None:
        """Wait until all is done. Fine to call twice."""
        self._work.put(None)
        self._thread.join()

    def _go_on(self) -> None:
        while (asked := self._work.get()) is not None:
            call, answer = asked
            error: BaseException | None = None
            said: Any = None
            try:
                said = call()
            except BaseException as raised:  # noqa: BLE001  # it is the caller's
                error = raised
            with contextlib.suppress(RuntimeError):  # his loop has been closed
                answer.get_loop().call_soon_threadsafe(_settle, answer, said, error)
            del asked, call, answer, said, error


def _settle(answer: asyncio.Future[Any], said: Any, error: BaseException | None) -> None:
    if answer.done():
        return
    if error is None:
        answer.set_result(said)
    else:
        answer.set_exception(error)


class _Connection(Connection):
    dialect = sqlite.dialect(paramstyle="qmark")

    def __init__(self, raw: sqlite3.Connection) -> None:
        super().__init__()
        self._raw = raw

    def _fetched(self, sql: str, values: Sequence[Any]) -> Sequence[Any]:
        return self._raw.execute(sql, values).fetchall()

    def _changed(self, sql: str, values: Sequence[Any]) -> int:
        return self._raw.execute(sql, values).rowcount

    def _each(self, sql: str, sets: Iterable[Sequence[Any]]) -> None:
        self._raw.executemany(sql, sets)

    def _inserted(self, sql: str, rows: Sequence[tuple[Any, ...]]) -> None:
        whole = len(rows) - len(rows) % ROWS
        if whole:
            one = sql[sql.rindex("(") :]  # (?, ?, …)
            many = sql + f", {one}" * (ROWS - 1)
            groups = [rows[at : at + ROWS] for at in range(0, whole, ROWS)]
            self._each(many, [tuple(chain.from_iterable(group)) for group in groups])
        self._each(sql, rows[whole:])


@contextlib.contextmanager
def _transaction(raw: sqlite3.Connection, begin: str) -> Iterator[None]:
    raw.execute(begin)
    try:
        yield
        raw.execute("COMMIT")
    except BaseException:
        if raw.in_transaction:  # a full disk has ended it by itself
            raw.execute("ROLLBACK")
        raise


def _connect(path: Path) -> sqlite3.Connection:
    raw = sqlite3.connect(path, timeout=BUSY_S, check_same_thread=False, isolation_level=None)
    raw.row_factory = sqlite3.Row
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        raw.execute(f"PRAGMA {pragma}")
    return raw
