"""``hive events``: what happens to tasks, drones and hives."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Annotated

import typer

from keeper import task_tables
from keeper.command import command
from keeper.session import Session
from keeper.tasks import PANEL, queue_of

FIRST_S = 5.0  # nothing has come for so long: there is nothing
QUIET_S = 1.0  # nothing more has come for so long: that was all


def declare(app: typer.Typer) -> None:
    """Add the command of this module."""
    command(app, "events", panel=PANEL)(events)


async def events(
    session: Session,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", metavar="", help="Go on until Ctrl-C.")
    ] = False,
    topic: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOPIC",
            help="task.failed, or task.* for all that begin so; several times.",
            show_default="all",
        ),
    ] = None,
    after: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Only what came after this number.",
            show_default="all that are kept; with --follow from now on",
        ),
    ] = None,
) -> None:
    """Print events, one a line, in the order in which they happened.

    --json prints each as one line of JSON.
    """
    patience_s = FIRST_S
    place = 0 if after is None and not follow else after
    async with aclosing(queue_of(session).events(topic or (), after=place)) as found:
        while True:
            try:
                async with asyncio.timeout(None if follow else patience_s):
                    event = await anext(found)
            except TimeoutError:
                return
            patience_s = QUIET_S
            if session.out.as_json:
                session.out.json_line(event.model_dump(mode="json"))
            else:
                session.out.say(task_tables.event(event))
