"""The tables' history, by Alembic; brought up to date when a store is opened."""

from __future__ import annotations

from pathlib import Path

from alembic.command import upgrade as alembic_upgrade
from alembic.config import Config
from alembic.util.exc import CommandError
from sqlalchemy import Connection

from operations.errors import InvalidRequest


def upgrade(conn: Connection) -> None:
    """Within the connection's transaction.

    :raises InvalidRequest: the tables are from a newer Hive
    """
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = conn
    try:
        alembic_upgrade(config, "head")
    except CommandError as error:
        raise InvalidRequest(
            f"The queue's tables are not of this version of Hive ({error}). Start the version "
            "that wrote them, or a newer one."
        ) from error
