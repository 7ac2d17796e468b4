"""``hive workers …``: the processes that answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from keeper import complete, engine_options, place, tables
from keeper.attach import attach
from keeper.command import command
from keeper.exits import WrongUsage
from keeper.session import Session
from keeper.told import each, told
from operations import operations as ops
from operations.hosts import WorkerInfo, together

FOLLOW_S = 1.0
WINDOW_LINES = 1000  # what is looked at each time; more than that within a second is lost

Worker = Annotated[
    str,
    typer.Argument(
        metavar="WORKER",
        help="A worker's id (w-3f9a1c) or its process id.",
        show_default=False,
        autocompletion=complete.workers,
    ),
]


def declare(app: typer.Typer) -> None:
    """Add the commands of this module."""
    command(app, "ls")(ls)
    command(app, "spawn")(spawn)
    command(app, "attach")(attach)
    command(app, "show")(show)
    command(app, "logs")(logs)
    command(app, "rm")(rm)


async def ls(session: Session) -> None:
    """List the workers."""
    result = await session.run(ops.WorkerProcessList(hive_id=session.hive_id))
    found = each(WorkerInfo, result, "workers")
    session.out.result(result, tables.workers(found))
    for text in tables.worker_notes(found):
        session.out.note(text, style="yellow")


async def spawn(
    session: Session,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="The model to load.",
            show_default=False,
            autocompletion=complete.models,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The same, in the older form.",
            show_default=False,
            autocompletion=complete.models,
        ),
    ] = None,
    worker_type: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="cpu, cuda, metal, rocm or vulkan.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DEVICE",
            help="0, cuda:0 or cpu; several times to share the model among GPUs.",
            show_default="as many GPUs as it needs, else the CPU",
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=64,
            help="GPUs to share the model; the hive chooses which.",
            show_default="as few as it fits on",
        ),
    ] = None,
    placement: Annotated[
        ops.Placement,
        typer.Option(help="The emptiest GPUs, or the fullest that have room."),
    ] = "spread",
    engine: Annotated[
        Literal["llamacpp", "vllm", "scripted"] | None,
        typer.Option(
            metavar="NAME", help="llamacpp or vllm.", show_default="what the model's format needs"
        ),
    ] = None,
    engine_version: Annotated[
        str | None,
        typer.Option(
            metavar="V", help="Which of 'hive engines ls'.", show_default="the newest that is whole"
        ),
    ] = None,
    context_length: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Tokens of one request, prompt and answer.", show_default=False
        ),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(metavar="N", help="Requests served at the same time.", show_default=False),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="CPU threads of the engine.", show_default=False)
    ] = None,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", metavar="", help="Serve embeddings instead of chat.")
    ] = False,
    rerank: Annotated[
        bool, typer.Option("--rerank", metavar="", help="Rerank documents instead of chat.")
    ] = False,
    kv_type: Annotated[
        ops.KvType | None,
        typer.Option(metavar="TYPE", help="Numbers of the KV cache.", show_default="f16"),
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
    memory_share: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="How much of each GPU vLLM takes, 0 to 1.",
            show_default="what it needs, or of an empty GPU most",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", metavar="", help="Load it although it will not fit.")
    ] = False,
    context_shift: Annotated[
        bool,
        typer.Option(
            "--context-shift", metavar="", help="Let answers outrun the context by forgetting."
        ),
    ] = False,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH[@SCALE]",
            help="Add an adapter that lies on the hive; several times for several.",
            show_default=False,
        ),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Jinja text on this machine, in place of the model's own template.",
            show_default=False,
        ),
    ] = None,
    projector: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="An mmproj file on the hive, so that the model sees (llama.cpp).",
            show_default="the one that came with the model",
        ),
    ] = None,
    flag: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Any other flag of the engine; several times for several.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Start a worker: load MODEL on a device, and wait until it is ready.

    The older form does the same:
      hive workers spawn --hive HOST --model M --worker-type cuda --device 0
    """
    if (name is None) == (model is None):
        raise WrongUsage("Name one model: hive workers spawn MODEL.")
    wanted = name or model or ""
    where = place.decide(worker_type, device or [], gpus)
    operation = ops.WorkerSpawn(
        hive_id=session.hive_id,
        model=wanted,
        worker=where.kind,
        device=where.device,
        devices=where.devices,
        gpus=gpus,
        placement=placement,
        force=force,
        options=ops.WorkerOptions(
            engine=engine,
            engine_version=engine_version,
            context_length=context_length,
            slots=slots,
            threads=threads,
            embeddings=embeddings,
            rerank=rerank,
            kv_type=kv_type,
            context_shift=context_shift,
            dtype=dtype,
            quantization=quantization,
            memory_share=memory_share,
            lora=engine_options.adapters(lora or []),
            chat_template=engine_options.text_of(chat_template),
            projector=projector,
            flags=engine_options.flags(flag or []),
        ),
    )
    result = await session.run(operation, narrate=True)
    worker = told(WorkerInfo, result)
    on = together(worker.devices or (worker.device,))
    on = f"{on} of {worker.hive_id}" if worker.hive_id else on
    session.out.result(result, f"{worker.worker_id} is {worker.state}: {worker.model} on {on}.")
    session.out.hint(f"Ask it with 'hive infer {worker.model} \"What is Hive?\"'.")


async def show(session: Session, worker: Worker) -> None:
    """Show one worker: what it runs, how busy it is, where its log is."""
    result = await session.run(_get(session, worker, log_lines=0))
    session.out.result(result, tables.worker(told(WorkerInfo, result)))


async def rm(session: Session, worker: Worker) -> None:
    """Stop a worker; what it is answering may finish."""
    result = await session.run(ops.WorkerProcessDelete(hive_id=session.hive_id, **_named(worker)))
    session.out.result(result, str(result["message"]))


async def logs(
    session: Session,
    worker: Worker,
    lines: Annotated[int, typer.Option("--lines", "-n", metavar="N", help="How many.")] = 50,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", metavar="", help="Go on until Ctrl-C.")
    ] = False,
) -> None:
    """Print the last lines of a worker's log. With --follow and --json, one line of JSON each."""
    window = max(lines, WINDOW_LINES) if follow else lines
    tail = await _tail(session, worker, window)
    last = tail[-lines:] if lines else []
    if session.out.as_json and not follow:
        session.out.document({"worker": worker, "log_tail": last})
    else:
        _print(session, last)
    while follow:
        await asyncio.sleep(FOLLOW_S)
        now = await _tail(session, worker, window)
        _print(session, newer(tail, now))
        tail = now


def newer(before: Sequence[str], now: Sequence[str]) -> Sequence[str]:
    """The lines of ``now`` that came after those of ``before``.

    Both are the last lines of one log through a window of one size, so ``now`` begins where
    ``before`` did or later. A log that was begun anew is new as a whole.
    """
    for gone in range(len(before)):
        kept = before[gone:]
        if list(now[: len(kept)]) == list(kept):
            return now[len(kept) :]
    return now


def _print(session: Session, lines: Sequence[str]) -> None:
    for line in lines:
        if session.out.as_json:
            session.out.json_line(line)
        else:
            session.out.line(line)


async def _tail(session: Session, worker: str, lines: int) -> list[str]:
    result = await session.run(_get(session, worker, log_lines=lines))
    return [str(line) for line in result["log_tail"]]


def _get(session: Session, worker: str, log_lines: int) -> ops.WorkerProcessGet:
    return ops.WorkerProcessGet(hive_id=session.hive_id, log_lines=log_lines, **_named(worker))


def _named(worker: str) -> dict[str, Any]:
    return {"pid": int(worker)} if worker.isdecimal() else {"worker_id": worker}
