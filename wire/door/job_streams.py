"""The stream of a job, written straight to its reader.

What a job has said since is one write, however many lines it is. A reader that takes nothing is
waited for; one that falls behind the replay buffer is cut off without a terminal line.
"""

from __future__ import annotations

import asyncio
import re
from typing import Final

from wire import sse
from wire.answering import Answering
from wire.door.door import Request, Serve, Streams
from wire.http1.body import LAST_CHUNK
from wire.http1.head import Header
from wire.jobs import JOB_ID, PING_S, Job, JobTable, check_event_id, no_longer_kept

PIECE_BYTES: Final = 32 * 1024  # of several events in one chunk; a larger event is one by itself
PING: Final = b": ping\n\n"
_STREAM = re.compile(rf"/v1/jobs/({JOB_ID.pattern})/stream")


def job_of(path: str) -> str | None:
    """The job whose stream a path is, if it is one."""
    found = _STREAM.fullmatch(path)
    return None if found is None else found[1]


STREAM_HEADERS: Final[tuple[Header, ...]] = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
)
"""Of a stream of events."""


def seen_to_the_end(answer: Answering) -> None:
    """Tell a reader that nothing follows the event that it names."""
    answer.whole(204, (), b"")


def finish(answer: Answering) -> None:
    """End a stream of events."""
    if answer.chunked:
        answer.write(LAST_CHUNK)
    answer.end()


def job_streams(table: JobTable) -> Streams:
    """Who serves the streams of a daemon's own jobs."""

    def find(path: str) -> Serve | None:
        job_id = job_of(path)
        if job_id is None:
            return None

        async def serve(request: Request, answer: Answering) -> None:
            job = table.get(job_id)
            last_event_id = check_event_id(request.headers.get("last-event-id"))
            place = job.place(last_event_id)
            if place is None:
                seen_to_the_end(answer)
                return
            with table.reading(job):
                answer.head(200, STREAM_HEADERS, length=None)
                if place and last_event_id is None:
                    answer.chunk(sse.encoded(no_longer_kept(place)))
                await _Reader(job, place, answer).run()

        return serve

    return find


class _Reader:
    """Writes a job's events to one reader, each time there are new ones and he can take them."""

    __slots__ = ("_answer", "_done", "_due", "_job", "_loop", "_ping", "_place")

    def __init__(self, job: Job, after: int, answer: Answering) -> None:
        self._job = job
        self._place = after
        self._answer = answer
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._due = False
        self._ping: asyncio.TimerHandle

    async def run(self) -> None:
        """Until the terminal line has been written, or the reader has fallen behind."""
        self._job.watchers.add(self._news)
        self._answer.on_writable = self._flow
        self._ping = self._loop.call_later(PING_S, self._keep_alive)
        self._news()
        try:
            await self._done
        finally:
            self._job.watchers.discard(self._news)
            self._answer.unwatched()
            self._ping.cancel()
        finish(self._answer)

    def _news(self) -> None:
        """Write soon: what is said until then goes with it."""
        if not self._due:
            self._due = True
            self._loop.call_soon(self._write)

    def _flow(self, writable: bool) -> None:
        if writable:
            self._news()

    def _write(self) -> None:
        self._due = False
        job, answer = self._job, self._answer
        while self._place < job.last and answer.writable and not self._done.done():
            taken = job.encoded(self._place, PIECE_BYTES)
            if taken is None:
                self._done.set_result(None)
                return
            data, self._place = taken
            answer.chunk(data)
        if job.finished and self._place == job.last and not self._done.done():
            self._done.set_result(None)

    def _keep_alive(self) -> None:
        if self._answer.writable:
            self._answer.chunk(PING)
        self._ping = self._loop.call_later(PING_S, self._keep_alive)
