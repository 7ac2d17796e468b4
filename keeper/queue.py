"""``hive queue …``: where the durable queue is kept."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from keeper.command import Json, given
from keeper.output import Output

StateDir = Annotated[
    Path | None,
    typer.Option(
        "--state-dir",
        metavar="DIR",
        help="Of the queen whose queue it is.",
        show_default="~/.local/state/hive",
    ),
]


def declare(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("migrate")(migrate)


def migrate(
    ctx: typer.Context,
    to: Annotated[str, typer.Option("--to", metavar="URL", help="postgresql://user@host/name")],
    where: StateDir = None,
    as_json: Json = False,
) -> None:
    """Move the queue from its file to a PostgreSQL. Stop the queen first; the file stays."""
    from hive_orchestration.migrate import migrate as moved
    from keeper.connect import state_dir
    from operations.tasks import QUEUE_FILE

    path = (where or state_dir()) / QUEUE_FILE
    rows = asyncio.run(moved(path, to))
    out = Output(as_json or given(ctx).as_json)
    out.result({"file": str(path), "rows": rows}, f"{rows['tasks']} tasks of {path} are there now.")
    out.hint("Start the queen with 'hive queen --database URL', or HIVE_DATABASE.")
