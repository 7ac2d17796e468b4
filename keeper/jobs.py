"""``hive jobs …``: what runs and what ran."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from keeper import complete, tables
from keeper.answer import Answer
from keeper.command import command
from keeper.session import Session
from keeper.told import each
from keeper.words import printable_json
from operations.events import Line, Result, parse_line
from operations.hosts import JobInfo

Job = Annotated[
    str,
    typer.Argument(
        metavar="JOB", help="A job's id.", show_default=False, autocompletion=complete.jobs
    ),
]
RunningJob = Annotated[
    str,
    typer.Argument(
        metavar="JOB", help="A job's id.", show_default=False, autocompletion=complete.running_jobs
    ),
]


def declare(app: typer.Typer) -> None:
    """Add the commands of this module."""
    command(app, "ls")(ls)
    command(app, "tail")(tail)
    command(app, "cancel")(cancel)


async def ls(session: Session) -> None:
    """List the jobs that run, and those that ended lately."""
    result = await session.get("/v1/jobs")
    found = each(JobInfo, result, "jobs")
    session.out.result(result, tables.jobs(found))


async def tail(session: Session, job: Job) -> None:
    """Follow a job from its first line to its end, and end as it ends.

    Ctrl-C only stops the following; the job goes on. --json prints each line as JSON.
    """
    out = session.out
    answer = Answer(out)

    def take(line: str) -> None:
        event = parse_line(line)
        if out.as_json:
            out.json_line(event.model_dump(exclude_none=True))
        elif isinstance(event, Result):
            out.line(printable_json(line))
        elif isinstance(event, Line) and not event.terminal and not out.rich_out:
            out.line(event.text)
        else:
            answer.take(line)

    try:
        outcome = await session.client.follow(job, take)
    except asyncio.CancelledError:
        out.note(f"No longer following. The job goes on; 'hive jobs cancel {job}' ends it.")
        raise
    finally:
        answer.close()
    outcome.value()


async def cancel(session: Session, job: RunningJob) -> None:
    """Cancel a job."""
    status = await session.client.cancel(job)
    became = "is cancelled" if status == "cancelled" else f"was already {status}"
    session.out.result({"job_id": job, "status": status}, f"{job} {became}.")
