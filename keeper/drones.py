"""``hive drones …``: who works through tasks."""

from __future__ import annotations

from typing import Annotated

import typer

from keeper import task_tables
from keeper.command import command
from keeper.session import Session
from keeper.tasks import queue_of


def declare(app: typer.Typer) -> None:
    """Add the commands of this module."""
    command(app, "ls")(ls)


async def ls(
    session: Session,
    role: Annotated[
        str | None, typer.Option(metavar="ROLE", help="Only of this role.", show_default=False)
    ] = None,
    active: Annotated[
        bool, typer.Option("--active", metavar="", help="Only those that were heard of lately.")
    ] = False,
) -> None:
    """List the drones that have registered."""
    found = await queue_of(session).drones(role, active=active)
    session.out.result(
        {"drones": [drone.model_dump(mode="json") for drone in found]}, task_tables.drones(found)
    )
