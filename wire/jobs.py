"""Jobs of one daemon: what runs, what it said, and who listens.

A job starts when it is posted. Its lines go to a bounded replay buffer; any number of readers
attach at any time, each with a place of its own, and resume by event id (``<epoch>:<seq>``).

========= ============================== ==================================
state     meaning                        next
========= ============================== ==================================
queued    posted, its task has not begun running, cancelled
running   its task runs                  completed, failed, cancelled
completed ``[DONE]`` was written         none
failed    ``[ERROR] …`` was written      none
cancelled ``[CANCELLED]`` was written    none
========= ============================== ==================================
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
import secrets
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from typing import Any

from operations import events
from operations.errors import Conflict, Gone, HiveError, InvalidRequest, NotFound, Unavailable
from operations.hosts import JobInfo, JobStatus
from operations.operations import Operation
from wire import sse
from wire.log import outcome

log = logging.getLogger(__name__)

REPLAY_BYTES = 8 * 1024 * 1024
LINE_OVERHEAD = 150  # bytes that a kept line costs besides its text
KEPT_JOBS = 1_000
KEPT_LOOKS = 50
LOOKS = {
    "status",
    "worker_process_list",
    "worker_process_get",
    "model_list",
    "model_get",
    "device_list",
    "engine_list",
    "engine_models",
    "model_fit",
}
"""Operations that only look: asked every second, they must not push out what others did."""
KEPT_BYTES = 128 * 1024 * 1024
DISCONNECT_GRACE_S = 10.0
PING_S = 15.0  # a comment keeps the connection of a reader alive
JOB_ID = re.compile(r"job-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
EVENT_ID = re.compile(r"[\x20-\x7e]{1,128}")

Runner = Callable[["Job"], Awaitable[Any]]
"""Runs an admitted operation: writes progress to the job; what it returns is the result line."""


def new_job_id() -> str:
    return f"job-{uuid.uuid4()}"


def fingerprint(operation: Operation) -> bytes:
    """Tells operations apart, in 32 bytes."""
    return hashlib.sha256(operation.model_dump_json().encode()).digest()


def check_job_id(job_id: str) -> str:
    """:raises InvalidRequest: not of the form ``job-<uuid>``"""
    if not JOB_ID.fullmatch(job_id):
        raise InvalidRequest(
            "A job id looks like job-00000000-0000-0000-0000-000000000000.", param="job_id"
        )
    return job_id


def stream_path(job_id: str) -> str:
    """Where a job's events are."""
    return f"/v1/jobs/{job_id}/stream"


def check_event_id(last_event_id: str | None) -> str | None:
    """:raises InvalidRequest: no stream has ever had an event of this id"""
    if last_event_id is not None and not EVENT_ID.fullmatch(last_event_id):
        raise InvalidRequest("The Last-Event-ID is not one that this API gives out.")
    return last_event_id


class Job:
    """One job: its state, its lines, its readers."""

    def __init__(
        self, job_id: str, operation: Operation, epoch: str, hive_id: str | None = None
    ) -> None:
        self.id = job_id
        self.operation = operation.operation
        self.model: str | None = getattr(operation, "model", None)
        self.cancel_when_left = getattr(operation, "on_disconnect", "detach") == "cancel"
        # The operation itself, which may hold a long prompt, is not kept.
        self.fingerprint = fingerprint(operation)
        self.hive_id = hive_id
        self.status: JobStatus = "queued"
        self.message: str | None = None
        self.created_at = time.time()
        self.finished_at: float | None = None
        self.readers = 0
        self.size = 0
        self.task: asyncio.Task[None] | None = None
        self._epoch = epoch
        self._lines: deque[tuple[str, int]] = deque()
        self._first = 1  # sequence number of _lines[0]
        self.watchers: set[Callable[[], None]] = set()
        """Called at each new line."""

    @property
    def finished(self) -> bool:
        return self.finished_at is not None

    @property
    def last(self) -> int:
        """Sequence number of the newest line, 0 before the first."""
        return self._first + len(self._lines) - 1

    def info(self, text: str) -> None:
        self.emit(events.info(text))

    def warn(self, text: str) -> None:
        self.emit(events.warn(text))

    def emit(self, line: str) -> None:
        """Append one line and tell the watchers. The oldest lines leave when the buffer is full.

        Nothing follows the terminal line: what comes later is dropped.
        """
        if self.finished:
            return
        self._append(line)

    def _append(self, line: str) -> None:
        size = len(line) + LINE_OVERHEAD
        self._lines.append((line, size))
        self.size += size
        while self.size > REPLAY_BYTES and len(self._lines) > 1:
            self.size -= self._lines.popleft()[1]
            self._first += 1
        for tell in self.watchers:
            tell()

    def end(self, status: JobStatus, line: str, message: str | None = None) -> None:
        """Write the terminal line. A job ends once; later calls change nothing."""
        if self.finished:
            return
        self.status, self.message, self.finished_at = status, message, time.time()
        self._append(line)

    def place(self, last_event_id: str | None) -> int | None:
        """The sequence number after which a reader goes on.

        A reader without an event id begins with the oldest line that is kept.

        :returns: None when the reader has already seen the end
        :raises Gone: what comes next is no longer in the buffer, or the id is of an earlier start
        """
        seen = self._first - 1
        if last_event_id is not None:
            epoch, _, number = last_event_id.rpartition(":")
            if epoch != self._epoch or not number.isascii() or not number.isdigit():
                raise Gone(
                    f"The event id given is not one of this run of {self.id}. "
                    "Open the stream without Last-Event-ID."
                )
            seen = min(int(number[:18]), self.last)
        if self.finished and seen == self.last:
            return None
        if seen + 1 < self._first:
            raise Gone(
                f"The lines of {self.id} before event {self._first} are no longer kept. "
                f"Ask GET /v1/jobs/{self.id} what became of it."
            )
        return seen

    async def read(self, after: int) -> AsyncGenerator[sse.Event, None]:
        """Every line after sequence number ``after``, up to and with the terminal one.

        A reader that falls behind the buffer is cut off without a terminal line.
        """
        place = after
        news = asyncio.Event()
        self.watchers.add(news.set)
        try:
            while True:
                news.clear()
                while place < self.last:
                    if place + 1 < self._first:
                        return
                    place += 1
                    line = self._lines[place - self._first][0]
                    yield sse.Event(line, id=f"{self._epoch}:{place}")
                if self.finished:
                    return
                await news.wait()
        finally:
            self.watchers.discard(news.set)

    def encoded(self, after: int, most: int) -> tuple[bytes, int] | None:
        """The events after sequence number ``after`` as they go over the wire, and the number of
        the last of them. None when they are no longer kept.

        :param most: bytes; a single event may be larger
        """
        if after + 1 < self._first:
            return None
        pieces: list[bytes] = []
        place, size = after, 0
        while place < self.last:
            line = self._lines[place + 1 - self._first][0]
            piece = sse.encoded(line, id=f"{self._epoch}:{place + 1}")
            size += len(piece)
            if size > most and pieces:
                break
            pieces.append(piece)
            place += 1
        return b"".join(pieces), place

    def describe(self) -> JobInfo:
        return JobInfo(
            job_id=self.id,
            operation=self.operation,
            status=self.status,
            created_at=self.created_at,
            finished_at=self.finished_at,
            model=self.model,
            hive_id=self.hive_id,
            message=self.message,
            events=self.last,
            readers=self.readers,
        )


class JobTable:
    """All jobs of a daemon; finished ones are kept for a while, bounded in number and bytes."""

    def __init__(
        self,
        hive_id: str | None,
        *,
        ended: Callable[[str, str], None] = lambda operation, status: None,
        disconnect_grace_s: float = DISCONNECT_GRACE_S,
    ) -> None:
        """
        :param hive_id: the hive whose jobs these are; None in a queen
        :param ended: told of each job's operation and final status
        """
        self.hive_id = hive_id
        self.ended = ended
        self.epoch = secrets.token_hex(4)
        self.closed = False
        self._grace_s = disconnect_grace_s
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def start(self, operation: Operation, runner: Runner, job_id: str | None = None) -> Job:
        """Start an admitted operation.

        :param job_id: minted by the daemon that was asked first; a second start with the same
            id and operation answers the job that runs already
        :raises Conflict: the id belongs to another operation
        :raises Unavailable: the daemon is stopping
        """
        if job_id is not None and (known := self._jobs.get(job_id)):
            if known.fingerprint == fingerprint(operation):
                return known
            raise Conflict(f"{job_id} is already the id of another job. Leave the id out.")
        self.check_open()
        job = Job(job_id or new_job_id(), operation, self.epoch, self.hive_id)
        self._jobs[job.id] = job
        job.task = asyncio.create_task(self._run(job, runner), name=job.id)
        # A task that is cancelled before its first step never reaches its own except clause.
        job.task.add_done_callback(lambda task: job.end("cancelled", events.CANCELLED))
        self._forget_old()
        return job

    def find(self, job_id: str) -> Job | None:
        return self._jobs.get(job_id)

    def get(self, job_id: str) -> Job:
        """:raises NotFound: unknown, or forgotten"""
        job = self._jobs.get(job_id)
        if job is None:
            raise unknown_job(job_id)
        return job

    def check_open(self) -> None:
        """:raises Unavailable: the daemon is stopping"""
        if self.closed:
            raise Unavailable("This daemon is stopping and takes no more jobs. Retry elsewhere.")

    async def describe(self, job_id: str) -> JobInfo:
        return self.get(job_id).describe()

    async def listing(self) -> list[JobInfo]:
        """Newest first."""
        return [job.describe() for job in reversed(self._jobs.values())]

    async def events(
        self, job_id: str, last_event_id: str | None
    ) -> AsyncGenerator[sse.Event, None] | None:
        """A reader's events from its place on; None when it has already seen the end."""
        job = self.get(job_id)
        place = job.place(last_event_id)
        if place is None:
            return None
        return self._read(job, place, missed=place if last_event_id is None else 0)

    @property
    def running(self) -> Sequence[Job]:
        return [job for job in self._jobs.values() if not job.finished]

    async def cancel(self, job_id: str) -> JobStatus:
        """Cancel a job and wait until it has ended; what it had become if that was before."""
        job = self.get(job_id)
        if not job.finished and job.task is not None:
            job.task.cancel()
            await asyncio.wait([job.task])
        return job.status

    async def _read(self, job: Job, after: int, *, missed: int) -> AsyncGenerator[sse.Event, None]:
        with self.reading(job):
            if missed:
                yield sse.Event(no_longer_kept(missed))
            async with contextlib.aclosing(job.read(after)) as lines:
                async for event in lines:
                    yield event

    @contextlib.contextmanager
    def reading(self, job: Job) -> Iterator[None]:
        """Count a reader; ``on_disconnect`` applies when the last one leaves."""
        self._stop_timer(job.id)
        job.readers += 1
        try:
            yield
        finally:
            job.readers -= 1
            self._reader_left(job)

    async def close(self, deadline_s: float) -> None:
        """Take no more jobs, let running ones finish for ``deadline_s`` seconds, cancel the rest.

        Fine to call twice.
        """
        self.closed = True
        if tasks := [job.task for job in self.running if job.task]:
            await asyncio.wait(tasks, timeout=deadline_s)
        if late := [job.task for job in self.running if job.task]:
            for task in late:
                task.cancel()
            await asyncio.wait(late)
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    async def _run(self, job: Job, runner: Runner) -> None:
        started = time.monotonic()
        job.status = "running"
        try:
            value = await runner(job)
        except asyncio.CancelledError:
            job.end("cancelled", events.CANCELLED)
        except HiveError as error:
            job.end("failed", events.error(error.message), error.message)
        except Exception:  # reported to the reader without details, to the log with them
            log.exception("job %s broke", job.id)
            where = self.hive_id or "the queen"
            message = f"{job.operation} broke inside {where}; see its log."
            job.end("failed", events.error(message), message)
        else:
            if value is not None:
                job.emit(events.result(value))
            job.end("completed", events.DONE)
        self._stop_timer(job.id)
        self.ended(job.operation, job.status)
        outcome(
            "job",
            job=job.id,
            operation=job.operation,
            status=job.status,
            ms=int((time.monotonic() - started) * 1000),
            error=job.message,
        )

    def _reader_left(self, job: Job) -> None:
        if job.readers or job.finished or not job.cancel_when_left or job.id in self._timers:
            return
        loop = asyncio.get_running_loop()
        self._timers[job.id] = loop.call_later(self._grace_s, self._nobody_came_back, job)

    def _nobody_came_back(self, job: Job) -> None:
        self._timers.pop(job.id, None)
        if not job.readers and not job.finished and job.task is not None:
            job.task.cancel()

    def _stop_timer(self, job_id: str) -> None:
        if timer := self._timers.pop(job_id, None):
            timer.cancel()

    def _forget_old(self) -> None:
        done = [job for job in self._jobs.values() if job.finished and not job.readers]
        looks = [job for job in done if job.operation in LOOKS]
        for job in looks[:-KEPT_LOOKS]:
            del self._jobs[job.id]
        total = sum(job.size for job in self._jobs.values())
        for job in done:
            if len(self._jobs) <= KEPT_JOBS and total <= KEPT_BYTES:
                return
            if self._jobs.pop(job.id, None) is not None:
                total -= job.size


class LocalJobs(JobTable):
    """A job table that takes operations: :class:`wire.jobs_api.JobService` of a hive agent."""

    def __init__(
        self,
        hive_id: str | None,
        admit: Callable[[Operation], Awaitable[Runner]],
        *,
        ended: Callable[[str, str], None] = lambda operation, status: None,
    ) -> None:
        """:param admit: refuses a bad operation with a :class:`HiveError`; returns its runner"""
        super().__init__(hive_id, ended=ended)
        self._admit = admit

    async def submit(self, operation: Operation, job_id: str | None) -> str:
        known = job_id is not None and self.find(job_id) is not None
        runner = never if known else await self._admit(operation)
        return self.start(operation, runner, job_id).id


def tell(value: Callable[[], Any]) -> Runner:
    """A runner for an operation that only tells something."""

    async def run(job: Job) -> Any:
        return value()

    return run


def no_longer_kept(missed: int) -> str:
    """The line for a reader that comes when so many lines have left the buffer."""
    return events.warn(f"The first {missed} lines are no longer kept.")


async def never(job: Job) -> None:
    """The runner of a job that runs already, which a repeated post must not run again."""
    raise AssertionError(f"{job.id} runs already")


def unknown_job(job_id: str) -> NotFound:
    return NotFound(
        f"There is no job '{job_id[:64]}'. Finished jobs are kept for a while only; "
        "'hive jobs ls' shows which.",
        code="job_not_found",
        param="job_id",
    )
