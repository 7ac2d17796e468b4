"""``hive queue …``: where the durable queue is kept."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from keeper.command import Json, given
from keeper.output import Output
from operations.errors import HiveError, NotFound

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
    app.command("callback-key")(callback_key)


def migrate(
    ctx: typer.Context,
    to: Annotated[str, typer.Option("--to", metavar="URL", help="postgresql://user@host/name")],
    where: StateDir = None,
    as_json: Json = False,
) -> None:
    """Move the queue from its file to a PostgreSQL. Stop the queen first; the file is put aside."""
    from hive_orchestration.migrate import migrate as moved
    from keeper.connect import state_dir
    from operations.tasks import QUEUE_FILE

    path = (where or state_dir()) / QUEUE_FILE
    done = asyncio.run(moved(path, to))
    out = Output(as_json or given(ctx).as_json)
    out.result(
        {"file": str(path), "rows": done.rows, "kept": str(done.kept)},
        f"{done.rows['tasks']} tasks of {path} are there now. "
        f"The file is kept as {done.kept.name}.",
    )
    out.hint("Start the queen with 'hive queen --database URL', or HIVE_DATABASE.")


def callback_key(ctx: typer.Context, where: StateDir = None, as_json: Json = False) -> None:
    """Print the key that the queen of this machine signs callbacks with, for their receivers."""
    from operations.tasks import QUEUE_KEY_FILE
    from queen.settings import QueenSettings
    from queen.signing import signing_key, written
    from wire.serve import CannotStart

    try:
        settings = QueenSettings.load(state_dir=where)
        secret = settings.cluster_secret()
    except CannotStart as error:
        raise HiveError(str(error), code="bad_settings") from None
    file = settings.state_dir / QUEUE_KEY_FILE
    if settings.callback_secret is None and secret is None and not file.exists():
        raise NotFound(
            f"There is neither a cluster secret nor {file}, which a queen makes with her first "
            "task. Name her state folder with --state-dir."
        )
    try:
        key = written(signing_key(settings, secret))
    except (OSError, ValueError) as error:
        raise HiveError(f"{file} cannot be used: {error}.", code="bad_key") from None
    Output(as_json or given(ctx).as_json).result({"key": key}, key)
