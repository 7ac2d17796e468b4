"""``hive secret …``: the cluster's secret, on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keeper.command import Json, given
from keeper.exits import WrongUsage
from keeper.output import Output
from operations.errors import HiveError, NotFound

if TYPE_CHECKING:
    from wire.secret import Secret

File = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Where it is kept.", show_default="~/.local/state/hive/secret"
    ),
]


def declare(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("new")(new)
    app.command("show")(show)
    app.command("set")(set_)


def new(
    ctx: typer.Context,
    file: File = None,
    force: Annotated[
        bool, typer.Option("--force", metavar="", help="Replace one; ends its keys.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make the secret of a new cluster, once, on one machine."""
    from wire.secret import Secret

    path = _place(file)
    if path.exists() and not force:
        raise HiveError(
            f"{path} holds a secret already; a new one would part this machine from its cluster "
            "and end all API keys. If that is meant, say --force.",
            code="secret_exists",
        )
    made = Secret.new()
    _save(made, path)
    out = Output(as_json or given(ctx).as_json)
    out.result(
        {"cluster_id": made.cluster_id, "file": str(path)},
        f"Cluster {made.cluster_id}: the secret is in {path}.",
    )
    out.hint("To the next machine: 'hive secret show' here, 'hive secret set' there.")
    out.hint("Daemons that run already must be started again to know it.")


def show(ctx: typer.Context, file: File = None, as_json: Json = False) -> None:
    """Print the secret, to be copied to another machine. Whoever has it is a daemon."""
    from wire.secret import BadSecret, load

    path = _place(file)
    try:
        found = load(path)
    except BadSecret as error:
        raise HiveError(f"The cluster secret cannot be used: {error}.", code="bad_secret") from None
    if found is None:
        raise NotFound(
            f"There is no secret in {path}. Make one with 'hive secret new', or bring that of "
            "another machine with 'hive secret set'."
        )
    out = Output(as_json or given(ctx).as_json)
    out.result({"cluster_id": found.cluster_id, "secret": found.text}, found.text)


def set_(
    ctx: typer.Context,
    file: File = None,
    force: Annotated[
        bool, typer.Option("--force", metavar="", help="Replace another cluster's.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Take the secret of another machine, asked for here or read from standard input."""
    from wire.secret import BadSecret, Secret, load

    path = _place(file)
    text = _asked()
    try:
        given_secret = Secret.parse(text.strip())
        there = load(path) if path.exists() and not force else None
    except BadSecret as error:
        raise HiveError(f"Nothing was changed: {error}.", code="bad_secret") from None
    if there is not None and there.cluster_id != given_secret.cluster_id:
        raise HiveError(
            f"{path} holds the secret of another cluster ({there.cluster_id}). To leave that one, "
            "say --force.",
            code="secret_exists",
        )
    _save(given_secret, path)
    out = Output(as_json or given(ctx).as_json)
    out.result(
        {"cluster_id": given_secret.cluster_id, "file": str(path)},
        f"This machine belongs to cluster {given_secret.cluster_id}; the secret is in {path}.",
    )
    out.hint("Daemons that run already must be started again to know it.")


def _asked() -> str:
    """The secret, from a prompt that shows nothing or from a pipe; never from the command line,
    where every user of the machine could read it."""
    if not sys.stdin.isatty():
        text = sys.stdin.read(4096)
        if not text.strip():
            raise WrongUsage(
                "Nothing came on standard input. Pipe the secret in: 'hive secret set < FILE'."
            )
        return text
    asked: str = typer.prompt("The cluster's secret (not shown)", hide_input=True, err=True)
    return asked


def _place(file: Path | None) -> Path:
    from keeper.connect import secret_file

    return file or secret_file()


def _save(secret: Secret, path: Path) -> None:
    from wire.secret import save

    try:
        save(secret, path)
    except OSError as error:
        raise HiveError(
            f"{path} cannot be written: {error.strerror}. Choose another place with --file.",
            code="not_written",
        ) from None
