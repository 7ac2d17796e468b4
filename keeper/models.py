"""``hive models …``: what is on the disks."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from keeper import complete, tables
from keeper.command import command
from keeper.session import Session
from keeper.told import each, told
from operations import operations as ops
from operations.hosts import Fit, ModelInfo

Name = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model's name, or as much of it as is unambiguous.",
        show_default=False,
        autocompletion=complete.models,
    ),
]
Reference = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="ORG/REPO, ORG/REPO:Q4_K_M, ORG/REPO:file.gguf or file:/path.",
        show_default=False,
    ),
]


def declare(app: typer.Typer) -> None:
    """Add the commands of this module."""
    command(app, "ls")(ls)
    command(app, "show")(show)
    command(app, "pull")(pull)
    command(app, "rm")(rm)
    command(app, "unload")(unload)


async def ls(session: Session) -> None:
    """List the models on disk."""
    result = await session.run(ops.ModelList(hive_id=session.hive_id))
    found = each(ModelInfo, result, "models")
    session.out.result(result, tables.models(found))


async def show(session: Session, model: Name) -> None:
    """Show one model: its size, its digest, where it lies."""
    result = await session.run(ops.ModelGet(hive_id=session.hive_id, id=model))
    session.out.result(result, tables.model(told(ModelInfo, result)))


async def pull(session: Session, model: Reference) -> None:
    """Fetch a model from the Hugging Face hub, or take one from a file."""
    result = await session.run(
        ops.ModelDownload(hive_id=session.hive_id, model=model), narrate=True
    )
    got = told(ModelInfo, result)
    place = f" on {got.hive_id}" if got.hive_id else ""
    session.out.result(result, f"{got.id} is here{place}.")
    session.out.hint(f"Load it with 'hive workers spawn {got.id}'.")


async def fit(
    session: Session,
    model: Name,
    context_length: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens of one request.", show_default=False)
    ] = None,
    slots: Annotated[
        int | None, typer.Option(metavar="N", help="Requests at the same time.", show_default=False)
    ] = None,
    kv_type: Annotated[
        ops.KvType | None,
        typer.Option(metavar="TYPE", help="Numbers of the KV cache.", show_default="f16"),
    ] = None,
    engine: Annotated[
        Literal["llamacpp", "vllm"] | None,
        typer.Option(
            metavar="NAME", help="llamacpp or vllm.", show_default="what the model's format needs"
        ),
    ] = None,
    dtype: Annotated[
        ops.DType | None,
        typer.Option(metavar="TYPE", help="Numbers of the weights (vLLM).", show_default="auto"),
    ] = None,
    quantization: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How vLLM reads or makes quantized weights: awq, fp8, …",
            show_default="what the model says",
        ),
    ] = None,
) -> None:
    """Tell what a model would take of each device, and what would make it fit.

    ORG/REPO or ORG/REPO:Q4_K_M need not be on disk: the hub tells then.
    """
    options = ops.WorkerOptions(
        engine=engine,
        context_length=context_length,
        slots=slots,
        kv_type=kv_type,
        dtype=dtype,
        quantization=quantization,
    )
    result = await session.run(ops.ModelFit(hive_id=session.hive_id, model=model, options=options))
    found = each(Fit, result, "fits")
    session.out.result(result, tables.fits(found))
    for hive_id in dict.fromkeys(verdict.hive_id for verdict in found if not verdict.on_disk):
        session.out.note(f"{hive_id}: {model} is not on its disk; the hub told of it.")
    for verdict in found:
        for text in tables.remarks(verdict):
            session.out.note(f"{verdict.device} of {verdict.hive_id}: {text}")


async def rm(session: Session, model: Name) -> None:
    """Remove a model from the disk; refused while a worker has it loaded."""
    result = await session.run(ops.ModelDelete(hive_id=session.hive_id, id=model))
    session.out.result(result, str(result["message"]))


async def unload(session: Session, model: Name) -> None:
    """Stop every worker that has the model loaded."""
    result = await session.run(ops.ModelUnload(hive_id=session.hive_id, id=model))
    stopped = ", ".join(result["stopped"])
    done = f"Stopped {stopped}." if stopped else f"No worker had {model} loaded."
    session.out.result(result, done)
