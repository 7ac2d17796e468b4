"""``hive demo``: everything once, on free ports and in a temporary folder, and away again."""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from keeper.answer import Answer
from keeper.child import environment
from keeper.command import Json, endings, given
from keeper.daemons import PANEL
from keeper.exits import Cancelled
from keeper.interrupts import Interrupts, interrupts
from keeper.output import Fields, Output
from keeper.session import Session
from keeper.told import told
from keeper.up import describe_devices, online, options, pair
from operations import operations as ops
from operations.hosts import WorkerInfo

MODEL = "hive-tiny"
QUESTION = "What is Hive?"
MAX_TOKENS = 200
STOP_S = 10.0
NAMES_WIDTH = len("worker")

NEXT = (
    ("hive up", "keep a queen and a hive running"),
    ("hive models pull Qwen/Qwen3-0.6B-GGUF:Q8_0", "fetch a real model"),
    ("hive workers spawn qwen3-0.6b", "load it, on a GPU if you can"),
    ("hive chat qwen3-0.6b", "talk with it"),
)


def declare(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command("demo", rich_help_panel=PANEL)(demo)


def demo(
    ctx: typer.Context,
    question: Annotated[str, typer.Option(metavar="TEXT", help="What to ask.")] = QUESTION,
    as_json: Json = False,
) -> None:
    """See it work: a queen, a hive, a worker, an answer. Leaves nothing."""
    out = Output(as_json or given(ctx).as_json)
    folder = Path(tempfile.mkdtemp(prefix="hive-demo-"))
    try:
        with endings():
            asyncio.run(_demo(out, folder, question))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _demo(out: Output, folder: Path, question: str) -> None:
    with interrupts() as signals:
        try:
            await _show(out, folder, question, signals)
        except asyncio.CancelledError:
            if signals.count:
                raise Cancelled("cancelled; everything that was started has been stopped") from None
            raise


async def _show(out: Output, folder: Path, question: str, signals: Interrupts) -> None:
    from keeper import connect

    began = time.monotonic()
    out.note("Starting a queen, a hive and a small model that comes along. Nothing is kept.")
    runtime = folder / "run"
    runtime.mkdir(mode=0o700)
    # Settings of a hive that runs here must not leak in, nor anything of this one stay behind.
    env = {**environment(without_settings=True), "XDG_RUNTIME_DIR": str(runtime)}
    daemon = options(port=0, state_dir=folder / "state", drain_seconds=0, log_level="warning")
    async with pair(["queen", *daemon], ["agent", *daemon], env, signals, patience_s=STOP_S) as (
        queen,
        agent,
    ):
        hive = await online(queen.url, agent.id)
        if not out.as_json:
            here = f"{hive.hive_id}: {describe_devices(hive)}"
            out.fields(Fields([("queen", queen.url), ("hive", here)], NAMES_WIDTH))
        async with connect.client(queen.url) as client:
            session = Session(out, connect.Daemon(queen.url, "queen"), client)
            load = ops.WorkerSpawn(hive_id=agent.id, model=MODEL, worker="cpu", device=0)
            loaded = await session.stream(load, lambda line: None)
            worker = told(WorkerInfo, loaded.value())
            if not out.as_json:
                runs = f"{worker.worker_id}: {worker.model} on the CPU"
                out.fields(Fields([("worker", runs)], NAMES_WIDTH))
                out.say("")
                out.say(f"> {question}", style="bold")
                out.say("")
            answer = await _ask(session, question)
    seconds = time.monotonic() - began
    _conclude(out, answer, worker, seconds)


async def _ask(session: Session, question: str) -> Answer:
    answer = Answer(session.out)
    operation = ops.Infer(model=MODEL, prompt=question, max_tokens=MAX_TOKENS, temperature=0.0)
    answer.wait()
    try:
        outcome = await session.stream(operation, answer.take)
    finally:
        answer.close()
    outcome.value()
    return answer


def _conclude(out: Output, answer: Answer, worker: WorkerInfo, seconds: float) -> None:
    if out.as_json:
        result: dict[str, Any] = answer.end.model_dump() if answer.end else {}
        out.document(
            {**result, "worker": worker.model_dump(exclude_none=True), "seconds": round(seconds, 3)}
        )
        return
    out.say("")
    out.say(answer.figures())
    out.say(f"All of it took {seconds:.1f} s, and all of it has been stopped. What to try next:")
    out.say("")
    width = max(len(line) for line, _ in NEXT)
    for line, what in (*activation(), *NEXT):
        out.say(f"  {line:<{width}}  {what}")


def activation() -> list[tuple[str, str]]:
    """The step before all others, where the shell does not find ``hive`` yet."""
    script = Path(sys.executable).parent / "activate"
    if shutil.which("hive") is not None or not script.exists():
        return []
    here = Path.cwd()
    shown = script.relative_to(here) if script.is_relative_to(here) else script
    return [(f"source {shown}", "so that the shell finds hive")]
