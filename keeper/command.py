"""How the commands are declared: common options, common ending."""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any, Concatenate, ParamSpec, Protocol, TypeVar, get_type_hints

import typer

from keeper import complete
from keeper.exits import Cancelled, Exit
from keeper.output import Output
from keeper.session import Session

P = ParamSpec("P")
T = TypeVar("T")

WHERE = "Common options"

Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        help="The queen or hive to ask.",
        show_default=False,
        rich_help_panel=WHERE,
    ),
]
Hive = Annotated[
    str | None,
    typer.Option(
        "--hive",
        metavar="HIVE",
        help="Talk straight to this hive: its id, host or URL.",
        show_default=False,
        autocompletion=complete.hives,
        rich_help_panel=WHERE,
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", metavar="", help="Print JSON, errors too.", rich_help_panel=WHERE),
]


@dataclass
class Given:
    """The common options as they stood before the command's name."""

    url: str | None = None
    hive: str | None = None
    as_json: bool = False


def given(ctx: typer.Context) -> Given:
    return ctx.obj if isinstance(ctx.obj, Given) else Given()


def command(
    app: typer.Typer, name: str, *, panel: str | None = None
) -> Callable[
    [Callable[Concatenate[Session, P], Coroutine[Any, Any, None]]],
    Callable[Concatenate[Session, P], Coroutine[Any, Any, None]],
]:
    """Declare a command: an async function of a :class:`Session` and of its own options.

    It gains ``--url``, ``--hive`` and ``--json``; it runs once the daemon has been found.
    """

    def declare(
        function: Callable[Concatenate[Session, P], Coroutine[Any, Any, None]],
    ) -> Callable[Concatenate[Session, P], Coroutine[Any, Any, None]]:
        @wraps(function)
        def called(
            ctx: typer.Context, url: str | None, hive: str | None, as_json: bool, **own: Any
        ) -> None:
            with conversation(ctx, url, hive, as_json) as (session, run):
                run(function(session, **own))  # type: ignore[call-arg]

        _sign(called, function)
        app.command(name, rich_help_panel=panel)(called)
        return function

    return declare


class Run(Protocol):
    """Runs a coroutine to its end; Ctrl-C meanwhile cancels it and raises KeyboardInterrupt."""

    def __call__(self, coroutine: Coroutine[Any, Any, T], /) -> T: ...


@contextmanager
def conversation(
    ctx: typer.Context, url: str | None, hive: str | None, as_json: bool
) -> Iterator[tuple[Session, Run]]:
    """Find the daemon; talk to it; close.

    :raises Cancelled: Ctrl-C
    :raises typer.Exit: whoever read the output has left
    """
    before = given(ctx)
    with endings(), asyncio.Runner() as runner:
        out = Output(as_json or before.as_json)
        session = runner.run(Session.open(out, url or before.url, hive or before.hive))
        try:
            yield session, runner.run
        finally:
            runner.run(session.close())


@contextmanager
def endings() -> Iterator[None]:
    """Ctrl-C ends in :class:`Cancelled`, a reader that left in a quiet exit."""
    try:
        yield
    except KeyboardInterrupt:
        raise Cancelled("cancelled") from None
    except BrokenPipeError:
        drop_output()
        raise typer.Exit(Exit.BROKEN_PIPE) from None


def drop_output() -> None:
    """Let what is still to be written to stdout vanish, so that the interpreter ends quietly."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _sign(called: Callable[..., None], function: Callable[..., Any]) -> None:
    """Give ``called`` the options of ``function`` and the common ones, for Typer to read."""
    hints = get_type_hints(function, include_extras=True)
    own: Sequence[inspect.Parameter] = list(inspect.signature(function).parameters.values())[1:]
    common = {"url": (Url, None), "hive": (Hive, None), "as_json": (Json, False)}
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("ctx", keyword, annotation=typer.Context),
        *(
            inspect.Parameter(p.name, keyword, default=p.default, annotation=hints[p.name])
            for p in own
        ),
        *(
            inspect.Parameter(name, keyword, default=default, annotation=hint)
            for name, (hint, default) in common.items()
        ),
    ]
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {p.name: p.annotation for p in parameters}
    del called.__wrapped__  # type: ignore[attr-defined]
