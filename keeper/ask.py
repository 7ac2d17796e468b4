"""``hive infer`` and ``hive chat``."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from keeper import complete
from keeper.answer import Answer
from keeper.chat import Chat, Settings
from keeper.command import Hive, Json, Url, command, conversation
from keeper.exits import WrongUsage
from keeper.session import Session
from operations import operations as ops

PANEL = "Ask"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model that a worker has loaded.",
        show_default=False,
        autocompletion=complete.models,
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(metavar="N", help="Tokens to answer at most.", show_default=False),
]
Temperature = Annotated[
    float | None,
    typer.Option(metavar="X", help="0 to 2; 0 is always the likeliest.", show_default=False),
]
TopP = Annotated[
    float | None,
    typer.Option(metavar="X", help="Consider this much probability, up to 1.", show_default=False),
]
TopK = Annotated[
    int | None, typer.Option(metavar="N", help="Consider this many tokens.", show_default=False)
]
Seed = Annotated[
    int | None, typer.Option(metavar="N", help="The same seed, the same dice.", show_default=False)
]
System = Annotated[
    str | None,
    typer.Option("--system", metavar="TEXT", help="A system message.", show_default=False),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        metavar="ID", help="Only workers on this device: cuda:0, cpu.", show_default=False
    ),
]
WorkerOption = Annotated[
    str | None,
    typer.Option(
        metavar="ID",
        help="Only this worker.",
        show_default=False,
        autocompletion=complete.workers,
    ),
]
ShowReasoning = Annotated[
    bool | None,
    typer.Option(
        "--reasoning/--no-reasoning",
        metavar="",
        help="Show on stderr what it thinks first.",
        show_default="in a terminal",
    ),
]


def declare(app: typer.Typer) -> None:
    """Add the commands of this module."""
    command(app, "infer", panel=PANEL)(infer)
    app.command("chat", rich_help_panel=PANEL)(chat)


async def infer(
    session: Session,
    model: Model,
    prompt: Annotated[
        str,
        typer.Argument(
            metavar="PROMPT", help="The question; - reads it from stdin.", show_default=False
        ),
    ],
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Ends the answer; repeatable.", show_default=False),
    ] = None,
    system: System = None,
    device: DeviceOption = None,
    worker_id: WorkerOption = None,
    no_stream: Annotated[
        bool, typer.Option("--no-stream", metavar="", help="Write the answer when it is complete.")
    ] = False,
    reasoning: ShowReasoning = None,
) -> None:
    """Ask a model once; the answer goes to stdout as it comes.

    Ctrl-C cancels it. --json prints the end event: the whole answer, its tokens and its times.
    """
    text = prompt_from_stdin() if prompt == "-" else prompt
    asked: dict[str, Any] = {"prompt": text}
    if system is not None:
        instruction = ops.Message(role="system", content=system)
        asked = {"messages": [instruction, ops.Message(role="user", content=text)]}
    operation = ops.Infer(
        hive_id=session.hive_id,
        model=model,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=stop or None,
        stream=not no_stream,
        device=device,
        worker_id=worker_id,
        **asked,
    )
    answer = Answer(session.out, reasoning)
    answer.wait()
    try:
        outcome = await session.stream(operation, answer.take)
    finally:
        answer.close()
    outcome.value()
    if session.out.as_json:
        session.out.document(answer.end.model_dump() if answer.end else outcome.result)
    elif session.out.rich_out and session.out.rich_err:
        session.out.note(answer.figures())


def prompt_from_stdin() -> str:
    """:raises WrongUsage: it is empty, or not UTF-8"""
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise WrongUsage(f"The prompt on stdin is not UTF-8 (byte {error.start}).") from None
    if not text.strip():
        raise WrongUsage("The prompt on stdin is empty. Pipe some text into 'hive infer MODEL -'.")
    return text


def chat(
    ctx: typer.Context,
    model: Model,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    reasoning: ShowReasoning = None,
    url: Url = None,
    hive: Hive = None,
    as_json: Json = False,
) -> None:
    """Talk with a model until /bye or Ctrl-D.

    /clear forgets what was said, /system TEXT instructs the model, Ctrl-C cancels an answer.
    With a pipe, each line is a turn.
    """
    settings = Settings(
        model=model,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
    )
    with conversation(ctx, url, hive, as_json) as (session, run):
        Chat(session, settings, run, system=system, show_reasoning=reasoning).talk()
