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
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import create_async_engine

from hive_orchestration.migrations import upgrade
from hive_orchestration.store import RETRY_AFTER_S, Store
from hive_orchestration.transaction import CHANNEL, Spoilt, Step, Tx, together, watch
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
_REFUSED = ("22", "23", "54")  # classes of states: data, integrity, limits of the program
_AWAY = (
    DBAPIError,
    OSError,
    PoolTimeout,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    TimeoutError,
)

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
        self._dsn = self._plain.render_as_string(hide_password=False)
        self._engine = create_async_engine(
            "postgresql+asyncpg://", async_creator=self._connect, pool_size=4, max_overflow=4
        )
        watch(self._engine.sync_engine)
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

    async def _connect(self) -> Any:
        # What the machine's statements rely on, whatever this database's defaults are.
        settings = {"default_transaction_isolation": "read committed"}
        return await asyncpg.connect(
            self._dsn, timeout=CONNECT_S, command_timeout=STATEMENT_S, server_settings=settings
        )

    async def read(self, step: Step[T]) -> T:
        tries = 0
        while True:
            try:
                async with self._engine.begin() as conn:
                    return await conn.run_sync(lambda sync: step(self._tx(sync)))
            except HiveError:
                raise
            except Exception as error:
                tries += 1
                if not _is_cut(error) or tries >= TRIES:
                    raise self._explained(error) from error

    async def _commit(self, steps: Sequence[Step[Any]]) -> tuple[list[Any], Tx]:
        tries = 0
        while True:
            ending = False
            try:
                async with self._engine.connect() as conn, conn.begin() as transaction:
                    said, tx = await conn.run_sync(self._transaction, steps)
                    ending = True
                    await transaction.commit()
                return said, tx
            except Exception as error:
                tries += 1
                again = _state(error) in _AGAIN or (not ending and _is_cut(error))
                if not again or tries >= TRIES:
                    raise

    def _transaction(self, conn: Connection, steps: Sequence[Step[Any]]) -> tuple[list[Any], Tx]:
        tx = self._tx(conn)
        return together(tx, steps, self._who), tx

    def _tx(self, conn: Connection) -> Tx:
        return Tx(conn, conn.execute(_NOW).scalar_one(), postgres=True, lanes=self._lanes)

    async def _listen(self) -> None:
        """Wake those who wait when another queen has committed; and when in doubt."""
        while True:
            connection = None
            try:
                connection = await self._connect()
                gone = asyncio.Event()
                connection.add_termination_listener(partial(_set, gone))
                await connection.add_listener(CHANNEL, self._hear)
                self._tell(ready=True)
                await gone.wait()
            except Exception as error:  # noqa: BLE001  # tried again for as long as this is open
                log.info("listening to %s failed: %s", self.name, _why(error))
            finally:
                if connection is not None and not connection.is_closed():
                    connection.terminate()
            await asyncio.sleep(LISTEN_PAUSE_S)

    def _refused(self, error: Exception) -> bool:
        return _state(error)[:2] in _REFUSED or _is_refused(error) or super()._refused(error)

    def _hear(self, _connection: Any, _pid: int, _channel: str, said: str) -> None:
        who, _, what = said.partition(" ")
        if who != self._who:  # this queen's own were told by her
            self._tell(ready=bool(what))

    def _trouble(self, error: Exception) -> HiveError | None:
        state = _state(error)
        if state == _FULL:
            return WontFit(
                f"The disk of the database {self.name} is full, so nothing was written. Make room "
                "there, and send it again.",
                code="disk_full",
                retryable=True,
                retry_after=RETRY_AFTER_S,
            )
        if not isinstance(error, _AWAY) or state[:2] in _REFUSED or _is_refused(error):
            return None
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


def _is_cut(error: Exception) -> bool:
    """Whether the connection was lost. One from the pool may have been so for long."""
    why = error.why if isinstance(error, Spoilt) else error
    return isinstance(why, DBAPIError) and why.connection_invalidated


def _is_refused(error: Exception) -> bool:
    """Whether asyncpg could not send a value."""
    return isinstance(getattr(error, "orig", error).__cause__, asyncpg.DataError)


def _state(error: Exception) -> str:
    """The SQLSTATE, if there is one."""
    if isinstance(error, Spoilt):
        error = error.why
    if isinstance(error, DBAPIError):
        return str(getattr(error.orig, "sqlstate", "") or "")
    return str(getattr(error, "sqlstate", "") or "")


def _why(error: Exception) -> str:
    """Without the statement, whose values may be anybody's."""
    first = (error.orig if isinstance(error, DBAPIError) else None) or error
    return type(first.__cause__ or first).__name__
