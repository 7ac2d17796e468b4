"""The ``hive`` command: all commands on one screen, and the rim that turns failures into exits."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from typer.core import TyperGroup

from keeper import (
    ask,
    daemons,
    demo,
    drones,
    engines,
    events,
    jobs,
    keys,
    look,
    models,
    ports,
    queue,
    secret,
    tasks,
    tls,
    up,
    workers,
)
from keeper.command import Given, command, drop_output
from keeper.doctor import commands as doctor
from keeper.exits import MEANINGS, Cancelled, Exit, WrongUsage, exit_for
from keeper.output import Output
from operations.errors import HiveError, from_validation

MODELS_PANEL = "Models and workers"
TRUST_PANEL = "Several machines"
PANELS = (daemons.PANEL, MODELS_PANEL, ask.PANEL, tasks.PANEL, TRUST_PANEL, look.PANEL)

_EXITS = "\n".join(f"  {code.value:<4} {meaning}" for code, meaning in MEANINGS.items())

EPILOG = f"""\
[bold]First steps[/bold]
  hive demo                             [dim]see it work; leaves nothing behind[/dim]
  hive up                               [dim]keep it running, and in another terminal:[/dim]
  hive workers spawn hive-tiny          [dim]load a model; this one comes along[/dim]
  hive infer hive-tiny "What is Hive?"
  hive models pull Qwen/Qwen3-0.6B-GGUF:Q8_0  [dim]fetch a real model[/dim]

[bold]One machine, straight[/bold]
  hive workers spawn --hive HOST --model M --worker-type cuda --device 0

[bold]Which daemon[/bold]
  --url, else HIVE_QUEEN_URL, else loopback {ports.QUEEN}, then {ports.HIVE}.

[bold]Exit codes[/bold]
{_EXITS}
"""


class Ordered(TyperGroup):
    """The root command: its panels stand in the order in which one needs them."""

    def list_commands(self, ctx: Any) -> list[str]:
        def panel(name: str) -> int:
            return PANELS.index(str(getattr(self.commands[name], "rich_help_panel", "")))

        return sorted(super().list_commands(ctx), key=panel)


def build() -> typer.Typer:
    """The whole command tree."""
    app = typer.Typer(
        name="hive",
        cls=Ordered,
        help="Turns the GPU machines of a lab, an office or a home into one inference service.",
        epilog=EPILOG,
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(root)

    demo.declare(app)
    up.declare(app)
    daemons.declare(app)

    models_app = typer.Typer(help="Models: ls, show, pull, rm, unload.", no_args_is_help=True)
    models.declare(models_app)
    app.add_typer(models_app, name="models", rich_help_panel=MODELS_PANEL)

    workers_app = typer.Typer(
        help="Workers: ls, show, spawn, attach, logs, rm.", no_args_is_help=True
    )
    workers.declare(workers_app)
    app.add_typer(workers_app, name="workers", rich_help_panel=MODELS_PANEL)

    engines_app = typer.Typer(help="Engines: ls, install, rm.", no_args_is_help=True)
    engines.declare(engines_app)
    app.add_typer(engines_app, name="engines", rich_help_panel=MODELS_PANEL)

    command(app, "fit", panel=MODELS_PANEL)(models.fit)

    ask.declare(app)

    tasks_app = typer.Typer(
        help="Tasks: ls, add, show, cancel, retry, replay, rm, pause, resume, roles.",
        no_args_is_help=True,
    )
    tasks.declare(tasks_app)
    app.add_typer(tasks_app, name="tasks", rich_help_panel=tasks.PANEL)
    drones_app = typer.Typer(help="Drones, who work through tasks: ls.", no_args_is_help=True)
    drones.declare(drones_app)
    app.add_typer(drones_app, name="drones", rich_help_panel=tasks.PANEL)
    events.declare(app)

    secret_app = typer.Typer(help="The cluster's secret: new, show, set.", no_args_is_help=True)
    secret.declare(secret_app)
    app.add_typer(secret_app, name="secret", rich_help_panel=TRUST_PANEL)
    keys_app = typer.Typer(help="API keys: new, ls, revoke.", no_args_is_help=True)
    keys.declare(keys_app)
    app.add_typer(keys_app, name="keys", rich_help_panel=TRUST_PANEL)
    tls_app = typer.Typer(help="Certificates: new.", no_args_is_help=True)
    tls.declare(tls_app)
    app.add_typer(tls_app, name="tls", rich_help_panel=TRUST_PANEL)
    doctor_app = typer.Typer()
    doctor.declare(doctor_app)
    app.add_typer(doctor_app, name="doctor", rich_help_panel=TRUST_PANEL)

    queue_app = typer.Typer(help="The durable queue: migrate, callback-key.", no_args_is_help=True)
    queue.declare(queue_app)
    app.add_typer(queue_app, name="queue", rich_help_panel=tasks.PANEL)

    look.declare(app, start_panel=daemons.PANEL)
    jobs_app = typer.Typer(help="Jobs: ls, tail, cancel.", no_args_is_help=True)
    jobs.declare(jobs_app)
    app.add_typer(jobs_app, name="jobs", rich_help_panel=look.PANEL)
    return app


def root(
    ctx: typer.Context,
    url: Annotated[
        str | None,
        typer.Option("--url", metavar="URL", help="The queen or hive to ask.", show_default=False),
    ] = None,
    hive: Annotated[
        str | None,
        typer.Option(
            "--hive", metavar="HIVE", help="One hive: id, host or URL.", show_default=False
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", metavar="", help="Print JSON, errors too.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            metavar="",
            help="Print the version.",
            is_eager=True,
            callback=lambda on: _version(on),
        ),
    ] = False,
) -> None:
    ctx.obj = Given(url, hive, as_json)


def _version(wanted: bool) -> None:
    if wanted:
        from operations.hosts import VERSION

        print(f"hive {VERSION}")
        raise typer.Exit


def main() -> None:
    """Entry point of the ``hive`` script."""
    sys.exit(run(sys.argv[1:]))


def run(args: Sequence[str]) -> int:
    """Run one command line; its exit code. Never raises but for ``SystemExit``."""
    _mend_streams()
    before_dashes = list(args)[: list(args).index("--")] if "--" in args else args
    out = Output(as_json="--json" in before_dashes)
    try:
        code = _command(args)
        sys.stdout.flush()
    except HiveError as error:
        out.error(error)
        return exit_for(error)
    except BrokenPipeError:
        drop_output()
        return Exit.BROKEN_PIPE
    except OSError as error:
        drop_output()
        out.error(HiveError(f"The output cannot be written: {error.strerror}. Send it elsewhere."))
        return Exit.FAILED
    return code


def _mend_streams() -> None:
    """A closed stream swallows what is written; what the encoding lacks becomes ``?``."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  open for as long as the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _command(args: Sequence[str]) -> int:
    """:raises HiveError: whatever went wrong; an ``OSError`` is one of the output"""
    try:
        code = build()(args=list(args), prog_name="hive", standalone_mode=False)
    except (HiveError, OSError):
        raise
    except ValidationError as error:
        problem = from_validation(error)
        hint = "See 'hive COMMAND --help'."
        raise WrongUsage(f"{problem.message} {hint}", param=problem.param) from None
    except typer.Abort:
        raise Cancelled("cancelled") from None
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise HiveError(_bug(error), code="internal_error") from error
        message = _usage_message(error)
        if not message:  # help has been shown instead
            return Exit.USAGE
        raise WrongUsage(message) from None
    return code if isinstance(code, int) else Exit.OK


def _usage_message(error: Exception) -> str:
    """Typer's own words about a wrong command line, and where to read on."""
    message = str(error.format_message()).strip()  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "hive"
    stopped = message if message.endswith((".", "?")) else f"{message}."
    return f"{stopped} See '{path} --help'." if message else ""


def _bug(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{os.path.basename(place.filename)}:{place.lineno}"
    return f"hive itself broke: {type(error).__name__}: {error} ({where}). Please report this."
