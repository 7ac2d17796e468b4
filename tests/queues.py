"""Queues of the tests' own, on SQLite and PostgreSQL, for which time passes when a test says so."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import asyncpg
from sqlalchemy import Table, func, select, update

from hive_orchestration import schema
from hive_orchestration.machine.reading import bounds
from hive_orchestration.postgres import PostgresStore
from hive_orchestration.queue import Queue
from hive_orchestration.seal import Sealer
from hive_orchestration.sqlite import SqliteStore
from hive_orchestration.store import Store
from operations.tasks import Claim, ClaimRequest, NewTask, QueueEvent, Task
from tests.postgres import Postgres

KEY = bytes(range(32))
KINDS = ("sqlite", "postgres")

_databases: WeakKeyDictionary[Postgres, str] = WeakKeyDictionary()
_TIMES: dict[Table, dict[str, int]] = {
    schema.tasks: dict.fromkeys(
        (
            *("rank", "due", "deadline", "lease_until"),
            *("created_at", "updated_at", "started_at", "finished_at"),
        ),
        1,
    ),
    schema.rates: {"tat": 1000},
    schema.claims: {"at": 1},
    schema.logs: {"at": 1},
    schema.events: {"at": 1},
    schema.deliveries: {"due": 1},
    schema.drones: {"registered_at": 1, "heartbeat_at": 1},
}
"""Columns that hold times, and how many of their units are a millisecond."""


@dataclass
class Durable:
    """A queue and what is below it. Nothing sweeps it but the test."""

    kind: str
    url: str
    store: Store
    queue: Queue

    async def add(self, tenant: str = "default", **said: Any) -> Task:
        """Queue one task, by default of type ``t``."""
        [queued] = await self.queue.enqueue(tenant, [NewTask(**{"type": "t", **said})])
        return queued.task

    async def take(self, tenant: str | None = None, **said: Any) -> Claim:
        """Claim one task, which must be there."""
        [claim] = await self.queue.claim(tenant, ClaimRequest(**said))
        return claim

    async def nothing(self, tenant: str | None = None, **said: Any) -> bool:
        """Whether a claim is given nothing."""
        return await self.queue.claim(tenant, ClaimRequest(**said)) == []

    async def pass_time(self, seconds: float) -> None:
        """All that was written has been so for that much longer; what is due then is done."""
        ms = int(seconds * 1000)

        def earlier(tx: Any) -> None:
            for table, columns in _TIMES.items():
                moved = {name: table.c[name] - ms * unit for name, unit in columns.items()}
                tx.conn.execute(update(table).values(moved))

        await self.store.write(earlier)
        while await self.queue.sweep():
            pass

    async def status(self, id: str) -> str:
        return (await self.queue.get(None, id)).status

    async def events(self, subject: str | None = None, after: int = 0) -> list[QueueEvent]:
        """All that were written until now, or those of a task, drone or hive."""
        last = await self.last_event()
        found: list[QueueEvent] = []
        if last > after:
            async with contextlib.aclosing(self.queue.follow(None, after)) as followed:
                async for event in followed:
                    found.append(event)
                    if event.seq >= last:
                        break
        return [event for event in found if subject is None or event.subject == subject]

    async def tell(self, topic: str, subject: str, tenant: str, data: dict[str, Any]) -> None:
        """An event that is of no task."""
        await self.store.write(lambda tx: tx.event(topic, subject, tenant, data))

    async def last_event(self) -> int:
        """The number of the newest event; 0 where there was none."""
        return (await self.store.read(bounds))[1]

    async def topics(self, subject: str) -> list[str]:
        return [event.topic for event in await self.events(subject)]

    async def rows(self, table: Table) -> list[dict[str, Any]]:
        """What a table holds."""

        def step(tx: Any) -> list[dict[str, Any]]:
            found = tx.conn.execute(select(table).order_by(*table.primary_key.columns))
            return [dict(row) for row in found]

        return await self.store.read(step)

    async def count(self, table: Table) -> int:
        return await self.store.read(
            lambda tx: int(tx.conn.execute(select(func.count()).select_from(table)).scalar())
        )


async def open_store(kind: str, where: str) -> Store:
    """:param where: a file's path, or a database's URL"""
    return await (SqliteStore.open(Path(where)) if kind == "sqlite" else PostgresStore.open(where))


async def _emptied(server: Postgres) -> str:
    """The URL of a server's one database for this; emptying it is faster than making others."""
    if server not in _databases:
        _databases[server] = await asyncio.to_thread(server.create, "queue")
    else:
        tables = ", ".join(table.name for table in schema.metadata.sorted_tables)
        connection = await asyncpg.connect(_databases[server])
        await connection.execute(f"TRUNCATE {tables} RESTART IDENTITY")
        await connection.close()
    return _databases[server]


@contextlib.asynccontextmanager
async def durable_queue(kind: str, folder: Path, server: Postgres | None) -> AsyncIterator[Durable]:
    """A queue of its own, empty at first."""
    if kind == "sqlite":
        url = str(folder / "queue.db")
    else:
        assert server is not None
        url = await _emptied(server)
    async with opened(kind, url) as durable:
        yield durable


@contextlib.asynccontextmanager
async def opened(kind: str, url: str) -> AsyncIterator[Durable]:
    """A queue as it is. :param url: a file's path, or a database's URL"""
    store = await open_store(kind, url)
    queue = Queue(store, Sealer(KEY))
    try:
        yield Durable(kind, url, store, queue)
    finally:
        await queue.close()
