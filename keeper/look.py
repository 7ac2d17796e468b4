"""``hive status``, ``devices``, ``check`` and ``shutdown``."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keeper import tables, words
from keeper.command import Hive, Json, Url, command, conversation
from keeper.exits import Exit
from keeper.session import Session
from keeper.told import each, told
from operations import operations as ops
from operations.errors import HiveError, Unavailable
from operations.events import Line, parse_line
from operations.hosts import Device, HiveInfo, WorkerInfo

if TYPE_CHECKING:
    from job_client.client import JobClient

PANEL = "Look"
STOPPED_WITHIN_S = 60.0
POLL_S = 0.2
MOST_UNHEARD = 10


def declare(app: typer.Typer, start_panel: str) -> None:
    """Add the commands of this module."""
    command(app, "status", panel=PANEL)(status)
    command(app, "devices", panel=PANEL)(devices)
    command(app, "check", panel=PANEL)(check)
    app.command("shutdown", rich_help_panel=start_panel)(shutdown)


async def status(session: Session) -> None:
    """Show what runs: hives, workers, and how busy they are."""
    result = await session.run(ops.Status(hive_id=session.hive_id))
    if session.out.as_json:
        session.out.document(result)
    elif result["role"] == "queen":
        _queen_status(session, result)
    else:
        _hive_status(session, result)


def _queen_status(session: Session, result: dict[str, Any]) -> None:
    found = each(HiveInfo, result, "hives")
    workers = [
        worker.model_copy(update={"hive_id": hive.hive_id})
        for hive in found
        for worker in hive.workers
    ]
    heard = {hive.hive_id for hive in found if hive.state == "online"}
    lost = f" ({len(found) - len(heard)} not heard)" if len(heard) < len(found) else ""
    session.out.say(
        f"queen {result['version']} at {result['base_url']}: "
        f"{words.count(len(found), 'hive')}{lost}, "
        f"{_summary([worker for worker in workers if worker.hive_id in heard])}"
    )
    session.out.say("")
    session.out.table(tables.hives(found, result["version"]))
    for hive in found:
        if hive.problem:
            session.out.note(f"{hive.hive_id}: {hive.problem}", style="yellow")
    for one in result.get("unheard", ())[:MOST_UNHEARD]:
        name = f"{one['hive_id']} at {one['url']}" if one.get("hive_id") else one["url"]
        session.out.note(f"not heard: {name}: {one['why']}", style="yellow")
    if found:
        session.out.say("")
        _workers(session, workers)


def _hive_status(session: Session, result: dict[str, Any]) -> None:
    workers = each(WorkerInfo, result, "workers")
    held = [(result["hive_id"], told(Device, device)) for device in result["devices"]]
    session.out.say(
        f"hive {result['hive_id']} {result['version']} at {session.daemon.url}: "
        f"{words.count(len(result['models']), 'model')}, "
        f"{_summary(workers)}"
    )
    session.out.say("")
    session.out.table(tables.devices(held))
    session.out.say("")
    _workers(session, workers)


def _workers(session: Session, workers: list[WorkerInfo]) -> None:
    session.out.table(tables.workers(workers))
    for text in tables.worker_notes(workers):
        session.out.note(text, style="yellow")


def _summary(workers: list[WorkerInfo]) -> str:
    free = sum(worker.free for worker in workers)
    busy = sum(worker.in_flight for worker in workers)
    return (
        f"{words.count(len(workers), 'worker')}{f' ({free} free)' if workers else ''}, "
        f"{words.count(busy, 'request')} in flight"
    )


async def devices(session: Session) -> None:
    """List GPUs and CPUs, and how much of their memory is free."""
    result = await session.run(ops.DeviceList(hive_id=session.hive_id))
    found = [(str(d.get("hive_id", "")), told(Device, d)) for d in result["devices"]]
    session.out.result(result, tables.devices(found))


async def check(session: Session) -> None:
    """Let daemons check themselves; problems end in exit code 1."""
    operation: ops.OperationBase = ops.QueenCheck()
    if session.daemon.role == "hive" or session.hive_id is not None:
        operation = ops.HiveCheck(hive_id=session.hive_id)

    def take(line: str) -> None:
        event = parse_line(line)
        if session.out.as_json or not isinstance(event, Line) or event.terminal:
            return
        mark, style = ("!", "yellow") if event.type == "warn" else ("·", "")
        session.out.say(f"{mark} {event.text}", style=style)

    result = (await session.stream(operation, take)).value()
    if session.out.as_json:
        session.out.document(result)
    elif result["ok"]:
        session.out.say("All is well.", style="green")
    if not result["ok"]:
        found = words.count(len(result.get("problems", ())), "problem")
        raise HiveError(
            f"The check found {found}. Mend what is marked and check again.", code="check_failed"
        )


def shutdown(
    ctx: typer.Context,
    yes: Annotated[bool, typer.Option("--yes", "-y", metavar="", help="Do not ask.")] = False,
    url: Url = None,
    hive: Hive = None,
    as_json: Json = False,
) -> None:
    """Stop the daemon and its workers; a queen stops its hives too."""
    with conversation(ctx, url, hive, as_json) as (session, run):
        daemon = session.daemon
        what = "the queen and all of its hives" if daemon.role == "queen" else "the hive"
        question = f"Stop {what} at {daemon.url}?"
        if not yes and sys.stdin.isatty() and not typer.confirm(question, err=True):
            session.out.note("Nothing was stopped.")
            raise typer.Exit(Exit.FAILED)
        run(stop(session))
        if session.out.as_json:
            session.out.document({"url": daemon.url, "role": daemon.role, "status": "stopped"})
        else:
            session.out.say(f"Stopped {what} at {daemon.url}.")


async def stop(session: Session) -> None:
    """Ask the daemon to stop, and wait until it answers no more. :raises HiveError: it stays"""
    from keeper import connect

    clients = [session.client]
    if session.daemon.role == "queen":
        answer = await session.client.get("/v1/hives")
        hives = each(HiveInfo, answer, "hives")
        clients += [connect.client(hive.hive_url) for hive in hives if hive.state == "online"]
    try:
        await session.client.post("/v1/shutdown")
        stopped = await asyncio.gather(*(gone(client, STOPPED_WITHIN_S) for client in clients))
    finally:
        for client in clients[1:]:
            await client.close()
    still = [c.base_url for c, ended in zip(clients, stopped, strict=True) if not ended]
    if still:
        raise HiveError(
            f"{' and '.join(still)} still answer after {STOPPED_WITHIN_S:.0f} s: they finish what "
            "they run. 'hive jobs ls' shows what; a second 'hive shutdown' ends it at once.",
            code="still_running",
        )


async def gone(client: JobClient, within_s: float) -> bool:
    """Whether a daemon has ceased to answer in time."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within_s
    while loop.time() < deadline:
        try:
            await client.get("/health", timeout_s=2)
        except Unavailable:
            return True
        except HiveError:
            pass  # it still answers, if only to refuse
        await asyncio.sleep(POLL_S)
    return False
