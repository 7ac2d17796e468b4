"""``hive events``: what happens to tasks, drones and hives."""

from __future__ import annotations

from contextlib import aclosing
from typing import Annotated

import typer

from keeper import task_tables
from keeper.command import command
from keeper.session import Session
from keeper.tasks import PANEL, queue_of


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
    queue, topics = queue_of(session), topic or ()
    told = (
        queue.events(topics, after=after) if follow else queue.past_events(topics, after=after or 0)
    )
    async with aclosing(told) as found:
        async for event in found:
            if session.out.as_json:
                session.out.json_line(event.model_dump(mode="json"))
            else:
                session.out.say(task_tables.event(event))
