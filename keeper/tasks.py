"""``hive tasks …``: work that is kept until somebody has done it."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keeper import complete, task_tables
from keeper.command import command
from keeper.exits import WrongUsage
from keeper.session import Session
from operations.errors import InvalidRequest, NotFound
from operations.tasks import (
    FINAL,
    MAX_PRIORITY,
    MIN_PRIORITY,
    Concurrency,
    NewTask,
    RateLimit,
    Retry,
    Task,
    status_of,
)

if TYPE_CHECKING:
    from job_client.tasks import TaskClient

PANEL = "Durable work"
MOST_LISTED = 1000

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|d)?")
_RATE = re.compile(r"(.+)=(\d{1,7})/([^/=]+)")
_UNITS = {None: 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}

TaskIdArgument = Annotated[
    str,
    typer.Argument(
        metavar="TASK", help="A task's id.", show_default=False, autocompletion=complete.tasks
    ),
]
RoleArgument = Annotated[
    str,
    typer.Argument(metavar="ROLE", help="Whose tasks.", show_default="those that name no role"),
]


def declare(app: typer.Typer) -> None:
    """Add the commands of this module."""
    command(app, "ls")(ls)
    command(app, "add")(add)
    command(app, "show")(show)
    command(app, "cancel")(cancel)
    command(app, "retry")(retry)
    command(app, "replay")(replay)
    command(app, "rm")(rm)
    command(app, "pause")(pause)
    command(app, "resume")(resume)
    command(app, "roles")(roles)


async def ls(
    session: Session,
    status: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STATUS", help="queued, failed, …; several times.", show_default="all"
        ),
    ] = None,
    type: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Only of this type.", show_default=False)
    ] = None,
    role: Annotated[
        str | None, typer.Option(metavar="ROLE", help="Only for this role.", show_default=False)
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", "-n", metavar="N", min=1, max=MOST_LISTED, help="How many.")
    ] = 50,
) -> None:
    """List tasks, the newest first."""
    names = [name for given in status or () for name in given.split(",")]
    try:
        statuses = [status_of(name) for name in names]
    except InvalidRequest as error:
        raise WrongUsage(error.message, param="status") from None
    page = await queue_of(session).page(statuses=statuses, type=type, role=role, limit=limit)
    session.out.result(_plain(page), task_tables.tasks(page.tasks))
    if page.next is not None:
        session.out.note(f"There are more than these {limit}. See them with --limit.")


async def add(
    session: Session,
    type: Annotated[
        str, typer.Argument(metavar="TYPE", help="What is to be done.", show_default=False)
    ],
    title: Annotated[
        str, typer.Option(metavar="TEXT", help="For people.", show_default="TYPE")
    ] = "",
    payload: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help="What it is about: an object, @FILE with one, or @- for standard input.",
            show_default=False,
        ),
    ] = None,
    priority: Annotated[
        int,
        typer.Option(
            metavar="N", min=MIN_PRIORITY, max=MAX_PRIORITY, help="The higher, the sooner."
        ),
    ] = 1,
    role: Annotated[
        str,
        typer.Option(metavar="ROLE", help="Who may claim it.", show_default="anybody"),
    ] = "",
    capability: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="What a drone must be able to do; several times.",
            show_default=False,
        ),
    ] = None,
    tag: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Several times for several.", show_default=False),
    ] = None,
    delay: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Begin no sooner: 30, 10m, 2h, 1d.", show_default=False),
    ] = None,
    deadline: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Fail if it takes longer.", show_default=False),
    ] = None,
    lease: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="How long a drone may be silent.", show_default="1m"),
    ] = None,
    attempts: Annotated[
        int, typer.Option(metavar="N", min=1, max=1000, help="In all.")
    ] = Retry().attempts,
    key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", help="The same key again is the same task.", show_default=False
        ),
    ] = None,
    unique: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", help="At most one task with it that has not ended.", show_default=False
        ),
    ] = None,
    concurrency: Annotated[
        str | None,
        typer.Option(
            metavar="KEY[=N]", help="At most N (1) with KEY at a time.", show_default=False
        ),
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(
            metavar="KEY=N/TIME", help="At most N with KEY begin in TIME.", show_default=False
        ),
    ] = None,
    secret: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=@FILE]",
            help="Its value is in variable NAME, or FILE; several times.",
            show_default=False,
        ),
    ] = None,
    parent: Annotated[
        str | None, typer.Option(metavar="TASK", help="It is part of.", show_default=False)
    ] = None,
    callback: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Told what becomes of it.", show_default=False),
    ] = None,
) -> None:
    """Queue a task.

    hive tasks add nightly-eval --payload '{"suite": "mmlu"}' --role evaluator --delay 2h
    """
    wanted: dict[str, Any] = {
        "idempotency_key": key,
        "unique_key": unique,
        "parent": parent,
        "callback_url": callback,
        "not_before": _seconds("--delay", delay),
        "deadline": _seconds("--deadline", deadline),
        "lease_s": _seconds("--lease", lease),
        "concurrency": _concurrency(concurrency),
        "rate": _rate(rate),
    }
    new = NewTask(
        type=type,
        title=title,
        payload=_payload(payload),
        priority=priority,
        role=role,
        capabilities=tuple(capability or ()),
        tags=tuple(tag or ()),
        retry=Retry(attempts=attempts),
        secrets=dict(_secret(text) for text in secret or ()),
        **{name: value for name, value in wanted.items() if value is not None},
    )
    queue = queue_of(session)
    [queued] = await queue.enqueue_all([new])
    task = await queue.get(queued.id)
    said = "is queued" if queued.created else f"was there already, and is {task.status}"
    session.out.result(_plain(task), f"{task.id} {said}.")
    session.out.hint(f"See what becomes of it with 'hive tasks show {task.id}'.")


async def show(
    session: Session,
    task: TaskIdArgument,
    logs: Annotated[
        bool, typer.Option("--logs", metavar="", help="And what its drones have logged.")
    ] = False,
) -> None:
    """Show one task: what it asks for, and what became of it."""
    queue = queue_of(session)
    found = await queue.get(_id(task))
    lines = await queue.lines(found.id) if logs else []
    session.out.result(
        {**_plain(found), **({"logs": lines} if logs else {})}, task_tables.task(found)
    )
    if not session.out.as_json:
        for line in lines:
            session.out.say(str(line["text"]).rstrip("\n"), block=True)


async def cancel(session: Session, task: TaskIdArgument) -> None:
    """Cancel a task; one that is worked on ends when its drone hears of it."""
    before = await queue_of(session).get(_id(task))
    after = await queue_of(session).cancel(before.id)
    became = "is cancelled"
    if before.status in FINAL:
        became = f"was already {after.status}"
    elif after.status not in FINAL:
        became = "is being cancelled: its drone is told at its next heartbeat"
    session.out.result(_plain(after), f"{after.id} {became}.")


async def retry(session: Session, task: TaskIdArgument) -> None:
    """Let the next attempt begin now, without the pause before it."""
    _moved(session, await queue_of(session).retry(_id(task)))


async def replay(session: Session, task: TaskIdArgument) -> None:
    """Queue a task that has failed for good once more, with all of its attempts."""
    _moved(session, await queue_of(session).replay(_id(task)))


async def rm(session: Session, task: TaskIdArgument) -> None:
    """Delete a task and its logs."""
    id = _id(task)
    if not await queue_of(session).remove(id):
        raise NotFound(f"There is no task {id}. 'hive tasks ls' lists them.", code="no_task")
    session.out.result({"id": id, "deleted": True}, f"{id} is deleted.")


async def pause(session: Session, role: RoleArgument = "") -> None:
    """Give out no task of a role until it is resumed; what is worked on goes on."""
    changed = await queue_of(session).pause(role)
    _paused(session, role, changed, "paused" if changed else "paused already")


async def resume(session: Session, role: RoleArgument = "") -> None:
    """Give out tasks of a role again."""
    changed = await queue_of(session).resume(role)
    _paused(session, role, changed, "given out again" if changed else "not paused")


async def roles(session: Session) -> None:
    """What waits and what is worked on, by role."""
    found = await queue_of(session).roles()
    session.out.result({"roles": [_plain(role) for role in found]}, task_tables.roles(found))


def queue_of(session: Session) -> TaskClient:
    """:raises WrongUsage: the daemon is a hive, which has none"""
    from job_client.tasks import TaskClient

    if session.daemon.role == "hive":
        raise WrongUsage(
            f"Durable work is the queen's, and {session.daemon.url} is a hive. Name the queen "
            "with --url."
        )
    return TaskClient(session.client)


def _moved(session: Session, task: Task) -> None:
    session.out.result(_plain(task), f"{task.id} is {task.status}.")


def _paused(session: Session, role: str, changed: bool, what: str) -> None:
    whose = f"of role {role}" if role else "without a role"
    session.out.result({"role": role, "changed": changed}, f"Tasks {whose} are {what}.")


def _id(text: str) -> str:
    if not _ID.fullmatch(text):
        raise WrongUsage(f"'{text}' is no id of a task. 'hive tasks ls' lists them.")
    return text


def _seconds(option: str, text: str | None) -> float | None:
    if text is None:
        return None
    found = _DURATION.fullmatch(text)
    if found is None:
        raise WrongUsage(f"{option} takes a time such as 30 (seconds), 10m, 2h or 1d.")
    return float(found[1]) * _UNITS[found[2]]


def _concurrency(text: str | None) -> Concurrency | None:
    if text is None:
        return None
    key, _, limit = text.rpartition("=") if "=" in text else (text, "", "1")
    if not key or not limit.isdecimal():
        raise WrongUsage("--concurrency takes a key, or a key and a number: gpu or gpu=2.")
    return Concurrency(key=key, limit=int(limit))


def _rate(text: str | None) -> RateLimit | None:
    if text is None:
        return None
    found = _RATE.fullmatch(text)
    if found is None:
        raise WrongUsage("--rate takes a key, a number and a time, such as api=60/1m.")
    return RateLimit(key=found[1], limit=int(found[2]), per_s=_seconds("--rate", found[3]) or 0)


def _secret(text: str) -> tuple[str, str]:
    """Name and value. A value on the command line could be read by every user of the machine."""
    name, _, where = text.partition("=")
    if not name or (where and not where.startswith("@")) or text.endswith(("=", "=@")):
        raise WrongUsage(
            "--secret takes the name of a variable of the environment, or a name and a file: "
            "TOKEN or TOKEN=@FILE. @- is standard input."
        )
    if where:
        return name, _content("secret", where).rstrip("\n")
    if (value := os.environ.get(name)) is None:
        raise WrongUsage(f"There is no variable {name}. Set it, or say --secret {name}=@FILE.")
    return name, value


def _content(what: str, where: str) -> str:
    """:param where: ``@FILE``, or ``@-`` for standard input"""
    try:
        return sys.stdin.read() if where == "@-" else Path(where[1:]).read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise WrongUsage(f"The {what} cannot be read from {where[1:]}: {why}.") from None


def _payload(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    if text.startswith("@"):
        text = _content("payload", text)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WrongUsage(
            f'The payload is no JSON ({error}). Give an object, such as \'{{"script": "a.py"}}\', '
            "or @FILE."
        ) from None
    if not isinstance(value, dict):
        raise WrongUsage('The payload must be a JSON object, such as \'{"script": "a.py"}\'.')
    return value


def _plain(found: Any) -> dict[str, Any]:
    """As JSON, without what is not there."""
    told = found.model_dump(mode="json")
    return {name: value for name, value in told.items() if value is not None}
