"""The queue in one file, by SQLite: what a queen has unless she is told otherwise."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError

from hive_orchestration.migrations import upgrade
from hive_orchestration.store import RETRY_AFTER_S, Store
from hive_orchestration.transaction import Step, Tx, together, watch
from operations.errors import HiveError, Unavailable, WontFit

T = TypeVar("T")

BUSY_S: Final = 10.0  # another process's transaction is waited for so long
READERS: Final = 2
MS: Final = 1000

_FULL = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR_WRITE,
    sqlite3.SQLITE_IOERR_SHMSIZE,
    sqlite3.SQLITE_IOERR_SHMMAP,
)


class SqliteStore(Store):
    """Writes in one thread, reads beside it (write-ahead log)."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._writing = ThreadPoolExecutor(1, "queue-writer")
        self._reading = ThreadPoolExecutor(READERS, "queue-reader")
        self._engine = _engine(path, "BEGIN IMMEDIATE")
        self._readers = _engine(path, "BEGIN")

    @classmethod
    async def open(cls, path: Path) -> Self:
        """Make the file where there is none, and bring its tables up to date.

        :raises HiveError: it is no such file, is damaged or from a newer Hive, or the disk is full
        """
        store = cls(path)
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(store._writing, store._upgrade)
        except DBAPIError as error:
            await store._shut()
            raise store._explained(error) from error
        except BaseException:
            await store._shut()
            raise
        store._begin()
        return store

    def _upgrade(self) -> None:
        with self._engine.begin() as conn:
            upgrade(conn)

    async def read(self, step: Step[T]) -> T:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._reading, self._read, step)
        except HiveError:
            raise
        except Exception as error:
            raise self._explained(error) from error

    @contextlib.contextmanager
    def frozen(self) -> Iterator[Connection]:
        """A connection that reads, while nobody writes to the file, no other process either."""
        with self._engine.connect() as conn, conn.begin():
            yield conn

    def _read(self, step: Step[T]) -> T:
        with self._readers.connect() as conn, conn.begin():
            return step(self._tx(conn))

    async def _commit(self, steps: Sequence[Step[Any]]) -> tuple[list[Any], Tx]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._writing, self._transaction, steps)

    def _transaction(self, steps: Sequence[Step[Any]]) -> tuple[list[Any], Tx]:
        with self._engine.begin() as conn:
            tx = self._tx(conn)
            said = together(tx, steps)
        return said, tx

    def _tx(self, conn: Connection) -> Tx:
        return Tx(conn, _now(), postgres=False, lanes=self._lanes)

    def _trouble(self, error: Exception) -> HiveError | None:
        code = getattr(getattr(error, "orig", None), "sqlite_errorcode", 0)
        if code in _FULL:
            return WontFit(
                f"The disk of the queue's file {self.path} is full, so nothing was written. "
                "Make room there, and send it again.",
                code="disk_full",
                retryable=True,
                retry_after=RETRY_AFTER_S,
            )
        if not isinstance(error, DBAPIError) or isinstance(error, IntegrityError | DataError):
            return None
        return Unavailable(
            f"The queue's file {self.path} cannot be used now: {error.orig}. Send it again; if it "
            "stays so, look at the file.",
            code="queue_unavailable",
            retry_after=RETRY_AFTER_S,
        )

    async def _shut(self) -> None:
        loop = asyncio.get_running_loop()
        for pool, engine in ((self._reading, self._readers), (self._writing, self._engine)):
            try:
                await loop.run_in_executor(pool, engine.dispose)
            except RuntimeError:
                continue  # it was shut before
            pool.shutdown()


def _now() -> int:
    return int(time.time() * MS)


def _engine(path: Path, begin: str) -> Engine:
    url = URL.create("sqlite", database=str(path))
    engine = create_engine(url, connect_args={"timeout": BUSY_S, "check_same_thread": False})

    @event.listens_for(engine, "connect")
    def made(connection: Any, record: object) -> None:
        connection.isolation_level = None  # transactions begin where we say it
        for pragma in (
            "journal_mode = WAL",
            "synchronous = FULL",
            "foreign_keys = ON",
            f"busy_timeout = {int(BUSY_S * MS)}",
        ):
            connection.execute(f"PRAGMA {pragma}")

    watch(engine)

    @event.listens_for(engine, "begin")
    def begun(conn: Connection) -> None:
        conn.exec_driver_sql(begin)

    return engine
