"""``hive workers attach``: a server that somebody else started becomes a worker."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from keeper.exits import WrongUsage
from keeper.session import Session
from keeper.told import told
from operations import operations as ops
from operations.errors import HiveError
from operations.hosts import WorkerInfo
from operations.patterns import KEY as KEY_PATTERN
from wire.files import read_file

KEY = "HIVE_ENGINE_KEY"
LONGEST_KEY = 4096  # characters
LISTED = 20


async def attach(
    session: Session,
    server: Annotated[
        str,
        typer.Argument(
            metavar="URL", help="http://host:port or unix:/path, as the hive reaches it."
        ),
    ],
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="Which of its models; may be repeated.",
            show_default="the only one",
        ),
    ] = None,
    all_models: Annotated[
        bool, typer.Option("--all", metavar="", help="All of its models, a worker each.")
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(
            "--as", metavar="NAME", help="What the model is called here.", show_default="as there"
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=f"Holds the server's own key; or {KEY}.",
            show_default=False,
        ),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(metavar="N", help="Requests it serves at the same time.", show_default="4"),
    ] = None,
    context_length: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens of one request.", show_default="what it tells"),
    ] = None,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", metavar="", help="It is for embeddings, not for chat.")
    ] = False,
    rerank: Annotated[
        bool, typer.Option("--rerank", metavar="", help="It reranks documents.")
    ] = False,
) -> None:
    """Use a server that already runs as a worker: Ollama, llama-server, vLLM.

    It must speak the OpenAI API. Hive watches it and sends it requests; it
    never starts, stops or kills it. Servers attached under one name share its
    requests: let one name mean one model.
    """
    if name is not None and (all_models or len(model or ()) > 1):
        raise WrongUsage("--as names one model. Attach the others one by one.")
    if all_models and model:
        raise WrongUsage("Give either --model or --all.")
    api_key = engine_key(api_key_file)
    options = ops.WorkerOptions(
        engine="external",
        url=server,
        api_key=api_key,
        slots=slots,
        context_length=context_length,
        embeddings=embeddings,
        rerank=rerank,
    )
    attached: list[WorkerInfo] = []
    for wanted in model or await _served(session, server, api_key, all_models=all_models):
        try:
            attached.append(await _attach(session, wanted, name or wanted, options))
        except HiveError:
            if attached:
                done = ", ".join(worker.model for worker in attached)
                session.out.note(f"Attached before this: {done}.")
            raise
        if not session.out.as_json:
            session.out.say(_said(attached[-1]))
    if session.out.as_json:
        session.out.document({"workers": [w.model_dump(exclude_none=True) for w in attached]})
    session.out.hint(f"Ask it with 'hive infer {attached[-1].model} \"What is Hive?\"'.")


def engine_key(file: Path | None) -> str | None:
    """A server's own key: from a file, else from ``HIVE_ENGINE_KEY``.

    :raises WrongUsage: the file cannot be read or is no regular one; or what is there is no key
    """
    source = str(file) if file is not None else KEY
    key = os.environ.get(KEY, "") if file is None else _content(file)
    key = key.strip()
    if not key and file is None:
        return None
    if not key:
        raise WrongUsage(f"{source} is empty. Write the server's key into it.")
    if not re.match(KEY_PATTERN, key) or len(key) > LONGEST_KEY:
        raise WrongUsage(
            f"{source} holds no key: a key has printable ASCII characters alone, no spaces, and "
            f"{LONGEST_KEY} of them at most. Put the server's key there, and nothing else."
        )
    return key


def _content(file: Path) -> str:
    try:
        return read_file(file, 2 * LONGEST_KEY).decode()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise WrongUsage(f"{file} cannot be read: {why}. Name the file with the key.") from None


def which(there: Sequence[str], server: str, *, all_models: bool) -> Sequence[str]:
    """The models to attach where none was named: the only one, or with ``--all`` each.

    :raises WrongUsage: there are several, or none
    """
    if len(there) == 1 or (all_models and there):
        return there
    if not there:
        raise WrongUsage(f"{server} serves no model. Load one there first.")
    listed = ", ".join(there[:LISTED])
    more = f" and {len(there) - LISTED} more" if len(there) > LISTED else ""
    raise WrongUsage(
        f"{server} serves several models: {listed}{more}. Name one with --model, or take --all."
    )


async def _served(
    session: Session, server: str, api_key: str | None, *, all_models: bool
) -> Sequence[str]:
    """What the server lists, asked from where it is reached: by the hive."""
    question = ops.EngineModels(hive_id=session.hive_id, url=server, api_key=api_key)
    answer = await session.run(question)
    return which([str(found["id"]) for found in answer["models"]], server, all_models=all_models)


async def _attach(
    session: Session, there: str, name: str, options: ops.WorkerOptions
) -> WorkerInfo:
    operation = ops.WorkerSpawn(
        hive_id=session.hive_id,
        model=name,
        options=options.model_copy(update={"served_as": there}),
    )
    return told(WorkerInfo, await session.run(operation, narrate=True))


def _said(worker: WorkerInfo) -> str:
    where = f" of {worker.hive_id}" if worker.hive_id else ""
    return f"{worker.worker_id} is {worker.state}: {worker.model} at {worker.url}{where}."
