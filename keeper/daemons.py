"""``hive queen`` and ``hive agent``: this process becomes the daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from operations.errors import HiveError

PANEL = "Start here"

Host = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Where to listen.", show_default="127.0.0.1"),
]
StateDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Records, logs and locks.", show_default="~/.local/state/hive"
    ),
]
MaxBody = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Largest request: 1G.", show_default="64MiB")
]
DrainSeconds = Annotated[
    float | None,
    typer.Option(
        metavar="S", help="What running work gets to finish at the end.", show_default="30"
    ),
]
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"] | None,
    typer.Option(metavar="LEVEL", help="debug, info, warning or error.", show_default="info"),
]
HiveId = Annotated[
    str | None,
    typer.Option(
        metavar="ID", help="This machine's name among the hives.", show_default="the host's"
    ),
]
SecretFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The cluster secret.", show_default="STATE_DIR/secret"),
]
TlsCert = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A certificate, for TLS.", show_default=False),
]
TlsKey = Annotated[Path | None, typer.Option(metavar="FILE", help="Its key.", show_default=False)]
AdvertiseUrl = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="How others reach it, behind a forwarded port.", show_default=False
    ),
]
Interface = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="A network interface for discovery; may be repeated.",
        show_default="the real ones",
    ),
]
Processes = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Processes that share the port, to use more cores.", show_default="1"
    ),
]
Database = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Where the durable queue is kept: postgresql://user@host/name.",
        show_default="STATE_DIR/queue.db",
    ),
]
ExitWithParent = Annotated[bool, typer.Option("--exit-with-parent", hidden=True)]


def declare(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("queen", rich_help_panel=PANEL)(queen)
    app.command("agent", rich_help_panel=PANEL)(agent)


def queen(
    port: Annotated[
        int | None,
        typer.Option(metavar="PORT", help="0 takes any free one.", show_default="7833"),
    ] = None,
    host: Host = None,
    hive: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="A hive that does not announce itself.",
            show_default=False,
        ),
    ] = None,
    processes: Processes = None,
    database: Database = None,
    state_dir: StateDir = None,
    max_body: MaxBody = None,
    drain_seconds: DrainSeconds = None,
    log_level: LogLevel = None,
    secret_file: SecretFile = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    advertise_url: AdvertiseUrl = None,
    interface: Interface = None,
    exit_with_parent: ExitWithParent = False,
) -> None:
    """Run the queen: the one address for all hives.

    Flags come first, then the variables HIVE_PORT, HIVE_HOST, HIVE_HIVES, …
    """
    from queen.main import serve
    from queen.settings import QueenSettings
    from wire.serve import CannotStart

    try:
        settings = QueenSettings.load(
            port=port,
            host=host,
            hives=tuple(hive) if hive else None,
            processes=processes,
            database=database,
            state_dir=state_dir,
            max_body=max_body,
            drain_seconds=drain_seconds,
            log_level=log_level,
            secret_file=secret_file,
            tls_cert=tls_cert,
            tls_key=tls_key,
            advertise_url=advertise_url,
            interface=tuple(interface) if interface else None,
        )
        code = serve(settings, exit_with_parent=exit_with_parent)
    except CannotStart as error:
        raise cannot_start(str(error)) from None
    raise typer.Exit(code)


def agent(
    port: Annotated[
        int | None,
        typer.Option(metavar="PORT", help="0 takes any free one.", show_default="7835"),
    ] = None,
    host: Host = None,
    hive_id: HiveId = None,
    queen_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="The queen to join.",
            show_default="http://127.0.0.1:7833",
        ),
    ] = None,
    state_dir: StateDir = None,
    max_body: MaxBody = None,
    drain_seconds: DrainSeconds = None,
    log_level: LogLevel = None,
    secret_file: SecretFile = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    advertise_url: AdvertiseUrl = None,
    interface: Interface = None,
    exit_with_parent: ExitWithParent = False,
) -> None:
    """Run this machine's hive: its GPUs, its models, its workers.

    Flags come first, then the variables HIVE_PORT, HIVE_ID, HIVE_QUEEN_URL, …
    """
    from hive_agent.main import serve
    from hive_agent.settings import AgentSettings
    from wire.serve import CannotStart

    try:
        settings = AgentSettings.load(
            port=port,
            host=host,
            hive_id=hive_id,
            queen_url=queen_url,
            state_dir=state_dir,
            max_body=max_body,
            drain_seconds=drain_seconds,
            log_level=log_level,
            secret_file=secret_file,
            tls_cert=tls_cert,
            tls_key=tls_key,
            advertise_url=advertise_url,
            interface=tuple(interface) if interface else None,
        )
        code = serve(settings, exit_with_parent=exit_with_parent)
    except CannotStart as error:
        raise cannot_start(str(error)) from None
    raise typer.Exit(code)


def cannot_start(message: str) -> HiveError:
    """A daemon that could not start, as the failure of this command."""
    return HiveError(message, code="cannot_start")
