"""Run by Alembic, which finds the connection in its configuration's attributes."""

from __future__ import annotations

from alembic import context

from hive_orchestration.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=False,  # the caller's transaction holds all of it
)
context.run_migrations()
