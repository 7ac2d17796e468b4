"""A long past for Hive's queue: finished tasks by the million, made of one that really was."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from sqlalchemy import func, insert, literal, select

from hive_orchestration.postgres import PostgresStore
from hive_orchestration.schema import DONE, tasks
from hive_orchestration.sqlite import SqliteStore
from hive_orchestration.store import Store
from hive_orchestration.transaction import Tx

AT_ONCE: Final = 20_000  # rows in a transaction, so that the queen beside it can write as well


async def finished(where: str, count: int) -> None:
    """Copy finished tasks until there are so many.

    :param where: the queue's file, or the URL of its database
    """
    store: Store = (
        await PostgresStore.open(where)
        if where.startswith("postgresql:")
        else await SqliteStore.open(Path(where))
    )
    try:
        there = await store.read(_finished)
        number = 0
        while there < count:
            number += 1
            more = min(AT_ONCE, there, count - there)
            await store.write(lambda tx, mark=number, most=more: _copy(tx, mark, most))  # type: ignore[misc]
            there += more
    finally:
        await store.close()


def _finished(tx: Tx) -> int:
    return int(tx.conn.execute(select(func.count()).where(tasks.c.state == DONE)).scalar())


def _copy(tx: Tx, mark: int, most: int) -> None:
    """Of the oldest ones; the mark makes their ids differ."""
    names = [column.name for column in tasks.c if column.name != "seq"]
    values = [
        (tasks.c.id + literal(f".{mark}")) if name == "id" else tasks.c[name] for name in names
    ]
    some = select(*values).where(tasks.c.state == DONE).order_by(tasks.c.seq).limit(most)
    tx.conn.execute(insert(tasks).from_select(names, some))
