"""A queue's move from its file to a PostgreSQL: all of it, or nothing."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

from sqlalchemy import Boolean, Table, func, insert, select, text

from hive_orchestration.connection import Connection
from hive_orchestration.opening import open_postgres
from hive_orchestration.schema import metadata
from hive_orchestration.sqlite import SqliteStore
from hive_orchestration.transaction import Tx
from operations.errors import Conflict, NotFound

AT_ONCE: Final = 500  # rows; a statement of PostgreSQL takes 32,767 values


class Moved(NamedTuple):
    """:param rows: by table
    :param kept: what the file is called now, so that nobody goes on with it
    """

    rows: dict[str, int]
    kept: Path


async def migrate(path: Path, url: str) -> Moved:
    """Copy everything, and put the file aside.

    :raises NotFound: there is no such file
    :raises Conflict: somebody has it open
    :raises Conflict: there is something in the database's queue already
    :raises HiveError: one of the two cannot be opened
    """
    if not await asyncio.to_thread(path.exists):
        raise NotFound(f"There is no queue in {path}. Say where it is with --state-dir.")
    source = await SqliteStore.open(path, alone=True)
    try:
        target = await open_postgres(url)
        try:
            with source.frozen() as conn:
                rows = await target.write(lambda tx: _copy(conn, tx))
        finally:
            await target.close()
    finally:
        await source.close()
    kept = path.with_name(f"{path.name}.moved-{int(time.time())}")
    await asyncio.to_thread(path.rename, kept)
    return Moved(rows, kept)


def _copy(source: sqlite3.Connection, tx: Tx) -> dict[str, int]:
    copied: dict[str, int] = {}
    for table in metadata.sorted_tables:
        if tx.conn.execute(select(func.count()).select_from(table)).scalar():
            raise Conflict(
                "There is a queue in this database already. Take an empty one.",
                code="database_in_use",
            )
        copied[table.name] = 0
        put = insert(table)
        rows = source.execute(str(select(table)))
        while some := rows.fetchmany(AT_ONCE):
            tx.conn.execute(put, [_as_in(table, row) for row in some])
            copied[table.name] += len(some)
        _count_on(tx.conn, table)
    return copied


def _as_in(table: Table, row: sqlite3.Row) -> dict[str, Any]:
    """SQLite has no booleans."""
    return {
        column.name: bool(row[column.name])
        if isinstance(column.type, Boolean)
        else row[column.name]
        for column in table.columns
    }


def _count_on(conn: Connection, table: Table) -> None:
    """New rows are numbered after those that were copied."""
    for column in table.primary_key.columns:
        if column.name in ("seq", "id") and column.type.python_type is int:
            where: dict[str, Any] = {"table": table.name, "column": column.name}
            conn.execute(
                text(
                    "SELECT setval(pg_get_serial_sequence(:table, :column), "
                    f"(SELECT COALESCE(max({column.name}), 0) + 1 FROM {table.name}), false)"
                ),
                where,
            )
