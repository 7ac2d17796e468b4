"""Opening a store by what it is called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from operations.errors import InvalidRequest

if TYPE_CHECKING:
    from hive_orchestration.postgres import PostgresStore
    from hive_orchestration.store import Store


async def open_store(where: Path | str) -> Store:
    """A file's, or that of a PostgreSQL's URL; its tables brought up to date.

    :raises HiveError: it cannot be opened, and why
    """
    if isinstance(where, str):
        return await open_postgres(where)
    from hive_orchestration.sqlite import SqliteStore

    return await SqliteStore.open(where)


async def open_postgres(url: str) -> PostgresStore:
    """:raises InvalidRequest: its driver is not installed, or the URL is none"""
    try:
        from hive_orchestration.postgres import PostgresStore
    except ModuleNotFoundError as error:
        raise InvalidRequest(
            f"A PostgreSQL needs the package {error.name}. Install it: pip install "
            "'hive-inference[postgres]'.",
            code="driver_missing",
        ) from None
    return await PostgresStore.open(url)
