"""The queue on a PostgreSQL, which several queens may share."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, Final, Self, TypeVar

import asyncpg
from sqlalchemy import Connection, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine

from hive_orchestration.migrations import upgrade
from hive_orchestration.store import RETRY_AFTER_S, Store
from hive_orchestration.transaction import CHANNEL, Step, Tx, together
from operations.errors import HiveError, InvalidRequest, Unavailable, WontFit

T = TypeVar("T")

CONNECT_S: Final = 5.0
STATEMENT_S: Final = 30.0
LISTEN_PAUSE_S: Final = 1.0
TRIES: Final = 3
UPGRADE_LOCK: Final = 0x68697666

_NOW = text("SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000 AS bigint)")
_AGAIN = ("40001", "40P01")  # a serialization failure, a deadlock
_FULL = "53100"
_AWAY = (DBAPIError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError)

log = logging.getLogger(__name__)


class PostgresStore(Store):
    """Writes on one connection, in groups; reads on others; hears of other queens by NOTIFY."""

    def __init__(self, url: str) -> None:
        """:raises InvalidRequest: it is no URL of a PostgreSQL"""
        super().__init__()
        try:
            parsed = make_url(url)
        except Exception as error:
            raise InvalidRequest(
                "The database's URL cannot be read. Write it as postgresql://user@host/name."
            ) from error
        if parsed.get_backend_name() != "postgresql":
            raise InvalidRequest("The database must be a PostgreSQL: postgresql://user@host/name.")
        self._plain = parsed.set(drivername="postgresql")
        self.name = self._plain.render_as_string(hide_password=True)
        self._engine = create_async_engine(
            parsed.set(drivername="postgresql+asyncpg"),
            pool_size=4,
            max_overflow=4,
            pool_pre_ping=False,
            connect_args={"timeout": CONNECT_S, "command_timeout": STATEMENT_S},
        )
        self._listener: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, url: str) -> Self:
        """Connect, and bring the tables up to date.

        :raises HiveError: it cannot be reached, or its tables are from a newer Hive
        """
        store = cls(url)
        try:
            async with store._engine.begin() as conn:
                await conn.execute(text("SELECT pg_advisory_xact_lock(:k)"), {"k": UPGRADE_LOCK})
                await conn.run_sync(upgrade)
        except HiveError:
            await store._shut()
            raise
        except Exception as error:
            await store._shut()
            raise store._explained(error) from error
        store._begin()
        store._listener = asyncio.get_running_loop().create_task(store._listen())
        return store

    async def read(self, step: Step[T]) -> T:
        try:
            async with self._engine.begin() as conn:
                return await conn.run_sync(lambda sync: step(_tx(sync)))
        except HiveError:
            raise
        except Exception as error:
            raise self._explained(error) from error

    async def _commit(self, steps: Sequence[Step[Any]]) -> tuple[list[Any], bool]:
        tries = 0
        while True:
            try:
                async with self._engine.begin() as conn:
                    return await conn.run_sync(_transaction, steps)
            except DBAPIError as error:
                tries += 1
                if _state(error) not in _AGAIN or tries >= TRIES:
                    raise

    async def _listen(self) -> None:
        """Wake those who wait when another queen has committed; and when in doubt."""
        while True:
            connection = None
            try:
                connection = await asyncpg.connect(
                    self._plain.render_as_string(hide_password=False), timeout=CONNECT_S
                )
                gone = asyncio.Event()
                connection.add_termination_listener(partial(_set, gone))
                await connection.add_listener(CHANNEL, lambda *_: self.changes.tell())
                self.changes.tell()
                await gone.wait()
            except _AWAY as error:
                log.debug("listening to %s failed: %s", self.name, error)
            finally:
                if connection is not None and not connection.is_closed():
                    connection.terminate()
            await asyncio.sleep(LISTEN_PAUSE_S)

    def _explained(self, error: Exception) -> HiveError:
        state = _state(error)
        if state == _FULL:
            return WontFit(
                f"The disk of the database {self.name} is full, so nothing was written. Make room "
                "there, and send it again.",
                code="disk_full",
                retryable=True,
                retry_after=RETRY_AFTER_S,
            )
        if not isinstance(error, _AWAY):
            return HiveError("The queue broke over this. The log has the details.")
        return Unavailable(
            f"The queue's database {self.name} cannot be used now ({_why(error)}). It may have "
            "done what was asked; send it again.",
            code="queue_unavailable",
            retry_after=RETRY_AFTER_S,
        )

    async def _shut(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await listener
        await self._engine.dispose()


def _set(event: asyncio.Event, *_: object) -> None:
    event.set()


def _tx(conn: Connection) -> Tx:
    return Tx(conn, conn.execute(_NOW).scalar_one(), postgres=True)


def _transaction(conn: Connection, steps: Sequence[Step[Any]]) -> tuple[list[Any], bool]:
    tx = _tx(conn)
    # Those who wait are told by the database, this queen's own among them.
    return together(tx, steps), tx.ready or tx.wrote_events


def _state(error: Exception) -> str:
    """The SQLSTATE, if there is one."""
    if isinstance(error, DBAPIError):
        return str(getattr(error.orig, "sqlstate", "") or "")
    return str(getattr(error, "sqlstate", "") or "")


def _why(error: Exception) -> str:
    """Without the statement, whose values may be anybody's."""
    first = (error.orig if isinstance(error, DBAPIError) else None) or error
    return type(first.__cause__ or first).__name__
