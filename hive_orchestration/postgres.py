"""The queue on a PostgreSQL, which several queens may share."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Final, Self, TypeVar

import asyncpg
from sqlalchemy import make_url, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.sql.elements import ClauseElement
from sqlalchemy.util import await_only, greenlet_spawn

from hive_orchestration.connection import Connection, Params
from hive_orchestration.migrations import upgrade
from hive_orchestration.store import RETRY_AFTER_S, Store
from hive_orchestration.transaction import CHANNEL, Step, Tx, cause_of, together
from operations.errors import HiveError, InvalidRequest, Unavailable, WontFit

T = TypeVar("T")

CONNECT_S: Final = 5.0
STATEMENT_S: Final = 30.0
LISTEN_PAUSE_S: Final = 1.0
READERS: Final = 8
TRIES: Final = 3
UPGRADE_LOCK: Final = 0x68697666
CLOCK_S: Final = 1.0  # for which the database's clock is known, once it was asked
MS: Final = 1000

_NOW: Final = "SELECT extract(epoch FROM clock_timestamp())::float8"
# An answer means that it is on the disk, whatever this database's default is; stricter ones stay.
_SYNCED: Final = (
    "SELECT set_config('synchronous_commit', 'on', false) "
    "WHERE current_setting('synchronous_commit') = 'off'"
)
_AGAIN = ("40001", "40P01")  # a serialization failure, a deadlock
_FULL = "53100"
_NO_ENTRY = ("3D000", "28000", "28P01")  # no such database, no such user, another password
_REFUSED = ("22", "23", "54")  # classes of states: data, integrity, limits of the program
# A connection that has just broken may answer with the driver's internal error.
_BROKEN = (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError)
_AWAY = (*_BROKEN, asyncpg.PostgresError)
_CUT = (*_BROKEN, asyncpg.PostgresConnectionError)
_ENDED = "57P"  # states: the server is told to stop, has crashed, or only starts

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
        self.name = f"{parsed.database or ''} at {parsed.host or 'this machine'}"  # no password
        self._dsn = self._plain.render_as_string(hide_password=False)
        self._clock = _Clock()
        self._raw: Any = None  # the connection that writes
        self._readers: Any = None  # a pool
        self._listener: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, url: str) -> Self:
        """Connect, and bring the tables up to date.

        :raises HiveError: it cannot be reached, or its tables are from a newer Hive
        """
        store = cls(url)
        try:
            await store._prepare()
        except HiveError:
            raise
        except Exception as error:
            why = error.orig.__cause__ if isinstance(error, DBAPIError) and error.orig else None
            raise store._explained(why if isinstance(why, Exception) else error) from error
        store._begin()
        store._listener = asyncio.get_running_loop().create_task(store._listen())
        return store

    async def _prepare(self) -> None:
        engine = create_async_engine("postgresql+asyncpg://", async_creator=self._connect)
        try:
            async with engine.begin() as conn:
                await conn.execute(text("SELECT pg_advisory_xact_lock(:k)"), {"k": UPGRADE_LOCK})
                await conn.run_sync(upgrade)
        finally:
            await engine.dispose()
        self._readers = asyncpg.create_pool(
            min_size=0, max_size=READERS, connect=self._connect, reset=_as_it_is
        )
        await self._readers

    async def _connect(self, *_: Any, **__: Any) -> Any:
        # What the machine's statements rely on, whatever this database's defaults are.
        settings = {
            "default_transaction_isolation": "read committed",
            # A queen that has vanished in the middle of a transaction keeps its locks no longer.
            "idle_in_transaction_session_timeout": "15s",
            "tcp_keepalives_idle": "10",
            "tcp_keepalives_interval": "5",
            "tcp_keepalives_count": "3",
        }
        raw = await asyncpg.connect(
            self._dsn, timeout=CONNECT_S, command_timeout=STATEMENT_S, server_settings=settings
        )
        try:
            await raw.execute(_SYNCED)
        except BaseException:
            raw.terminate()
            raise
        return raw

    async def read(self, step: Step[T]) -> T:
        self._check_open()
        tries = 0
        while True:
            try:
                async with self._readers.acquire(timeout=CONNECT_S) as raw:
                    try:
                        tx = Tx(_Connection(raw), await self._clock.now(raw), self._lanes)
                        return await greenlet_spawn(step, tx)
                    except Exception as error:
                        if _is_lost(error):
                            raw.terminate()  # nobody is to get it again
                        raise
            except HiveError:
                raise
            except Exception as error:
                tries += 1
                if not _is_cut(error) or tries >= TRIES:
                    raise self._explained(error) from error

    async def _commit(self, steps: Sequence[Step[Any]]) -> tuple[list[Any], Tx]:
        tries = 0
        while True:
            writing: _Writing | None = None
            try:
                if self._raw is None or self._raw.is_closed():
                    self._raw = await self._connect()
                now = await self._clock.now(self._raw)
                writing = _Writing(self._raw)
                tx = Tx(writing, now, self._lanes)
                said = await greenlet_spawn(together, tx, steps, self._who)
                await writing.commit()
                return said, tx
            except Exception as error:
                await self._roll_back(lost=_is_lost(error))
                tries += 1
                unknown = writing is not None and writing.ending
                again = _state(error) in _AGAIN or (not unknown and _is_cut(error))
                if not again or tries >= TRIES:
                    raise

    async def _roll_back(self, *, lost: bool) -> None:
        """A connection that this cannot be said to is given up."""
        if self._raw is None:
            return
        if not lost:
            with contextlib.suppress(Exception):
                if self._raw.is_in_transaction():
                    await self._raw.execute("ROLLBACK")
                return
        self._raw.terminate()  # the next write connects anew
        self._raw = None

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

    def _not_unique(self, error: Exception) -> bool:
        return isinstance(error, asyncpg.IntegrityConstraintViolationError)

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
        if state in _NO_ENTRY:
            return Unavailable(
                f"The database {self.name} lets nobody in ({_why(error)}): there is none of this "
                "name, or the user or password is another. Create it, or mend the URL.",
                code="queue_unavailable",
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
        if self._raw is not None:
            self._raw.terminate()
            self._raw = None
        if self._readers is not None:
            self._readers.terminate()


class _Connection(Connection):
    """To be used by plain functions in a greenlet of SQLAlchemy's (``greenlet_spawn``)."""

    dialect = postgresql.asyncpg.dialect()  # type: ignore[no-untyped-call]
    postgres = True

    def __init__(self, raw: asyncpg.Connection[Any]) -> None:
        super().__init__()
        self._raw = raw

    def _fetched(self, sql: str, values: Sequence[Any]) -> Sequence[Any]:
        return await_only(self._raw.fetch(sql, *values))

    def _changed(self, sql: str, values: Sequence[Any]) -> int:
        said = await_only(self._raw.execute(sql, *values))  # "UPDATE 3", "INSERT 0 1"
        last = said.rpartition(" ")[2]
        return int(last) if last.isdecimal() else 0

    def _each(self, sql: str, sets: Iterable[Sequence[Any]]) -> None:
        await_only(self._raw.executemany(sql, sets))


class _Writing(_Connection):
    """The connection for one transaction, which begins when something is to be changed or locked.

    Until then each statement stands alone, as it does in a transaction that is READ COMMITTED. One
    that only ends with a change needs no BEGIN and no COMMIT.

    :ivar ending: whether the commit was asked for: should no answer come, nobody knows of it
    """

    def __init__(self, raw: asyncpg.Connection[Any]) -> None:
        super().__init__(raw)
        self._begun = False
        self.ending = False

    def last(self, statement: ClauseElement, params: Params) -> None:
        self.ending = not self._begun
        super().last(statement, params)

    async def commit(self) -> None:
        if self._begun:
            self.ending = True
            await self._raw.execute("COMMIT")

    def _begin(self) -> None:
        if not self._begun and not self.ending:
            self._begun = True
            await_only(self._raw.execute("BEGIN"))


class _Clock:
    """The database's clock: asked each second, and counted on in between."""

    def __init__(self) -> None:
        self._ahead = 0.0  # of the monotonic clock, s
        self._asked = -CLOCK_S

    async def now(self, raw: Any) -> int:
        """ms since the epoch"""
        before = time.monotonic()
        if before - self._asked >= CLOCK_S:
            said = await raw.fetchval(_NOW)
            self._asked = time.monotonic()
            self._ahead = said - (before + self._asked) / 2
        return int((time.monotonic() + self._ahead) * MS)


async def _as_it_is(_connection: Any) -> None:
    """Nothing is set on a connection, so there is nothing to reset."""


def _set(event: asyncio.Event, *_: object) -> None:
    event.set()


def _is_cut(error: Exception) -> bool:
    """Whether the connection was lost. One from the pool may have been so for long."""
    why = cause_of(error)
    if isinstance(why, TimeoutError):  # an OSError, too
        return False
    return (isinstance(why, _CUT) and not _is_refused(why)) or _state(why).startswith(_ENDED)


def _is_lost(error: Exception) -> bool:
    """Whether nothing more is to be said on the connection: it was cut, or does not answer."""
    return _is_cut(error) or isinstance(cause_of(error), TimeoutError)


def _is_refused(error: Exception) -> bool:
    """Whether asyncpg could not send a value."""
    return isinstance(error, asyncpg.InterfaceError) and isinstance(error, ValueError)


def _state(error: Exception) -> str:
    """The SQLSTATE, if there is one."""
    return str(getattr(cause_of(error), "sqlstate", "") or "")


def _why(error: Exception) -> str:
    """Without the statement, whose values may be anybody's."""
    return type(error).__name__
