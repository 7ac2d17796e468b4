"""The jobs API as routes to mount; the same on queen and hive agent."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Protocol

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from operations.hosts import JobInfo
from operations.operations import Infer, Operation, parse
from wire import sse
from wire.headers import JOB_ID_HEADER
from wire.jobs import PING_S, check_event_id, check_job_id, stream_path
from wire.keys import Scope
from wire.reply import reply
from wire.trust_api import caller_of


class JobService(Protocol):
    """What a daemon must be able to do with jobs."""

    async def submit(self, operation: Operation, job_id: str | None) -> str:
        """Admit and start an operation; raise :class:`HiveError` instead of starting a bad one."""

    async def describe(self, job_id: str) -> JobInfo: ...

    async def listing(self) -> list[JobInfo]: ...

    async def cancel(self, job_id: str) -> str: ...

    async def events(
        self, job_id: str, last_event_id: str | None
    ) -> AsyncGenerator[sse.Event, None] | None:
        """A reader's events from its place on; None when it has already seen the end."""


def scope_of(operation: Operation) -> Scope:
    """What a key needs to post an operation."""
    return "infer" if isinstance(operation, Infer) else "admin"


Elsewhere = Callable[[Request, str], tuple[str, Mapping[str, str]] | None]
"""The request that has posted an ``infer``, and the id of its job → another URL of its stream, and
headers that go with it; None leaves it here."""


def job_routes(
    jobs: JobService, elsewhere: Elsewhere = lambda request, job_id: None
) -> list[Route]:
    """POST, list, read, stream and cancel."""

    async def post(request: Request) -> Response:
        forwarded = request.headers.get(JOB_ID_HEADER)
        job_id = check_job_id(forwarded) if forwarded is not None else None
        operation = parse(await request.body(), from_daemon=forwarded is not None)
        caller_of(request).must(scope_of(operation))
        job_id = await jobs.submit(operation, job_id)
        sse_url, headers = stream_path(job_id), {"location": f"/v1/jobs/{job_id}"}
        if isinstance(operation, Infer) and (found := elsewhere(request, job_id)) is not None:
            sse_url = found[0]
            headers |= found[1]
        return reply({"job_id": job_id, "sse_url": sse_url}, status=201, headers=headers)

    async def all_jobs(request: Request) -> Response:
        return reply({"jobs": await jobs.listing()})

    async def get(request: Request) -> Response:
        return reply(await jobs.describe(check_job_id(request.path_params["job_id"])))

    async def delete(request: Request) -> Response:
        job_id = check_job_id(request.path_params["job_id"])
        return reply({"job_id": job_id, "status": await jobs.cancel(job_id)})

    async def stream(request: Request) -> Response:
        job_id = check_job_id(request.path_params["job_id"])
        last_event_id = check_event_id(request.headers.get("last-event-id"))
        events = await jobs.events(job_id, last_event_id)
        return Response(status_code=204) if events is None else event_stream(events)

    return [
        Route("/v1/jobs", post, methods=["POST"]),
        Route("/v1/jobs", all_jobs, methods=["GET"]),
        Route("/v1/jobs/{job_id}", get, methods=["GET"]),
        Route("/v1/jobs/{job_id}", delete, methods=["DELETE"]),
        Route("/v1/jobs/{job_id}/stream", stream, methods=["GET"]),
    ]


def event_stream(events: AsyncGenerator[sse.Event, None]) -> EventSourceResponse:
    """Events as a response; a comment every 15 s keeps the connection alive."""

    async def encoded() -> AsyncGenerator[ServerSentEvent, None]:
        async with aclosing(events):
            async for event in events:
                yield ServerSentEvent(event.data, event=event.event, id=event.id, sep="\n")

    return EventSourceResponse(encoded(), ping=int(PING_S), sep="\n")
