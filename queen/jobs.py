"""Jobs as the queen has them: her own, and those that run on a hive and only pass through.

A job on a hive has one id end to end: the queen mints it and posts it with the operation. The
hive alone numbers its events, so a reader may resume here or there. The queen remembers where
a job went; after a restart, or for a job that another queen placed, she asks her hives.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from operations import events
from operations.errors import HiveError, NotFound, Unavailable, WorkerBroke
from operations.hosts import HiveInfo, JobInfo
from operations.operations import Operation
from queen.lines import HiveLines
from queen.registry import Registry
from queen.scheduler import Placement
from queen.streams import Spliced
from wire import sse
from wire.answering import Answering
from wire.door.door import Request, Serve
from wire.door.job_streams import job_of
from wire.inflight import InFlight
from wire.jobs import JobTable, Runner, check_event_id, never, new_job_id, unknown_job
from wire.log import REQUEST_ID, outcome

log = logging.getLogger(__name__)

T = TypeVar("T")

REMEMBERED = 10_000
UNREACHED = ("daemon_unreachable", "hive_lost")
UNREAD_S = 2.0  # a job that nobody reads is counted by its hive by then


@dataclass(frozen=True)
class Forward:
    """A hive to hand an operation to, and why that one; of an ``infer`` also the worker."""

    hive_id: str
    hive_url: str
    reason: str
    placement: Placement | None = None


Route = Callable[[Operation, frozenset[str]], Awaitable[Runner | Forward]]
"""Decides for each operation: the queen's own work, or a hive's; not one of those that failed."""


class QueenJobs:
    """Implements :class:`wire.jobs_api.JobService` over the queen's own jobs and her hives'."""

    def __init__(
        self,
        own: JobTable,
        route: Route,
        registry: Registry,
        lines: HiveLines,
        forwarded: Callable[[str, str], None],
        passing: InFlight,
    ) -> None:
        """
        :param lines: the ways to the hives, for streams
        :param forwarded: told of each forwarded operation and the reason of its placement
        :param passing: counts the streams that pass through
        """
        self._own = own
        self._route = route
        self._registry = registry
        self._lines = lines
        self._forwarded = forwarded
        self._passing = passing
        self._closing = asyncio.Event()
        self._streams: set[Spliced] = set()
        self._placed: OrderedDict[str, Forward] = OrderedDict()
        self._unread: dict[str, tuple[ExitStack, asyncio.TimerHandle]] = {}
        """Loads of jobs that nobody reads yet; soon the hive's heartbeats tell of them."""

    async def submit(self, operation: Operation, job_id: str | None) -> str:
        if job_id is not None and (known := self._own.find(job_id)):
            return self._own.start(operation, never, known.id).id
        self._own.check_open()
        if job_id is not None and (target := self._placed.get(job_id)):
            await self._post(operation, job_id, target)
            return job_id
        return await self._place(operation, job_id)

    async def _place(self, operation: Operation, job_id: str | None) -> str:
        """Start a job here, or on the hive that the route names.

        An ``infer`` that did not reach its hive, or was not taken up before the hive fell silent,
        is handed to the next one. It may then run twice; nobody has seen anything of the first.
        """
        failed: set[str] = set()
        while True:
            target = await self._route(operation, frozenset(failed))
            if not isinstance(target, Forward):
                return self._own.start(operation, target, job_id).id
            job_id = job_id or new_job_id()
            with ExitStack() as load:
                if target.placement is not None:
                    load.enter_context(self._registry.loaded(target.placement))
                try:
                    await self._post(operation, job_id, target)
                except Unavailable as error:
                    again = target.placement is not None and target.hive_id not in failed
                    if not again or error.code not in UNREACHED:
                        raise
                    failed.add(target.hive_id)
                    continue
                self._hold(job_id, load.pop_all())
            return job_id

    async def _post(self, operation: Operation, job_id: str, target: Forward) -> None:
        """Hand a job to its hive. :raises HiveError: the hive refuses, or cannot be reached"""
        posted = self._registry.client(target.hive_url).submit(operation, job_id=job_id)
        await self._unless_lost(posted, target)
        self._remember(job_id, target)
        self._forwarded(operation.operation, target.reason)
        outcome(
            "job",
            job=job_id,
            operation=operation.operation,
            status="forwarded",
            hive=target.hive_id,
            reason=target.reason,
        )

    def placed(self, job_id: str) -> Forward | None:
        """The hive to which a job was handed; None for her own, and for one that others placed."""
        return self._placed.get(job_id)

    async def describe(self, job_id: str) -> JobInfo:
        if self._own.find(job_id) is not None:
            return await self._own.describe(job_id)
        target = await self._where(job_id)
        asked = self._registry.client(target.hive_url).get(f"/v1/jobs/{job_id}")
        answer = await self._unless_lost(asked, target)
        try:
            return JobInfo.model_validate(answer)
        except ValueError:
            raise WorkerBroke(
                f"Hive {target.hive_id} answered in a form not understood.", hop="hive"
            ) from None

    async def listing(self) -> list[JobInfo]:
        """The queen's own and every hive's, newest first; a silent hive is left out."""
        found = await self._own.listing()
        for hive, answer in await self._ask_all("/v1/jobs"):
            try:
                found += [JobInfo.model_validate(job) for job in answer["jobs"]]
            except (KeyError, TypeError, ValueError):
                log.warning("hive %s answered its jobs in a form not understood", hive.hive_id)
        return sorted(found, key=lambda job: job.created_at, reverse=True)

    async def cancel(self, job_id: str) -> str:
        if self._own.find(job_id) is not None:
            return await self._own.cancel(job_id)
        target = await self._where(job_id)
        return await self._unless_lost(
            self._registry.client(target.hive_url).cancel(job_id), target
        )

    async def events(
        self, job_id: str, last_event_id: str | None
    ) -> AsyncGenerator[sse.Event, None] | None:
        return await self._own.events(job_id, last_event_id)

    def streams(self, path: str) -> Serve | None:
        """Who serves the stream of a job on a hive; None for her own, and for other paths."""
        job_id = job_of(path)
        if job_id is None or self._own.find(job_id) is not None:
            return None
        return partial(self._splice, job_id)

    async def _splice(self, job_id: str, request: Request, answer: Answering) -> None:
        REQUEST_ID.set(request.request_id)
        resumes = check_event_id(request.headers.get("last-event-id")) is not None
        target = await self._where(job_id)
        peer = self._registry.peer(target.hive_url)
        stream = Spliced(
            request,
            answer,
            self._lines.to(peer, target.hive_id),
            peer.renew,
            hive_id=target.hive_id,
            greeting="" if resumes else events.info(f"On hive {target.hive_id} ({target.reason})"),
        )
        if self._closing.is_set():
            raise _queen_stops()
        lost = partial(stream.cut, _hive_lost(target.hive_id))
        unwatch = self._registry.watch(target.hive_url, lost)
        self._streams.add(stream)
        try:
            with self._passing, self._release(job_id):
                await stream.run()
        finally:
            self._streams.discard(stream)
            unwatch()

    def close(self) -> None:
        """The queen stops: streams that still pass get their last line. Fine to call twice."""
        self._closing.set()
        for stream in list(self._streams):
            stream.cut(_queen_stops())

    async def _unless_lost(self, answer: Coroutine[Any, Any, T], target: Forward) -> T:
        """Wait for a hive's answer, for as long as the hive is heard.

        :raises Unavailable: the hive is gone
        """
        asking = asyncio.create_task(answer)
        gone = asyncio.create_task(self._registry.lost(target.hive_url))
        closing = asyncio.create_task(self._closing.wait())
        try:
            await asyncio.wait((asking, gone, closing), return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                return asking.result()
        finally:
            for task in (asking, gone, closing):
                task.cancel()
            await asyncio.gather(asking, gone, closing, return_exceptions=True)
        raise _queen_stops() if self._closing.is_set() else _hive_lost(target.hive_id)

    # -- inside ------------------------------------------------------------------------------

    def _hold(self, job_id: str, load: ExitStack) -> None:
        """Let a job's load count until it is read, or until heartbeats tell of it."""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(UNREAD_S, lambda: self._release(job_id).close())
        self._unread[job_id] = (load, timer)

    def _release(self, job_id: str) -> ExitStack:
        """The load of a job that was not read yet; closing it ends its counting."""
        load, timer = self._unread.pop(job_id, (ExitStack(), None))
        if timer is not None:
            timer.cancel()
        return load

    def _remember(self, job_id: str, target: Forward) -> None:
        self._placed[job_id] = target
        while len(self._placed) > REMEMBERED:
            self._placed.popitem(last=False)

    async def _where(self, job_id: str) -> Forward:
        """The hive that has a job, at the address at which it is heard from now.

        :raises NotFound: no hive that answers knows it
        """
        if target := self._placed.get(job_id):
            if url := self._registry.where(target.hive_id):
                return replace(target, hive_url=url)
            return target  # it is silent; whoever asks is told so
        for hive, _ in await self._ask_all(f"/v1/jobs/{job_id}"):
            target = Forward(hive.hive_id, hive.hive_url, "lookup")
            self._remember(job_id, target)
            return target
        raise unknown_job(job_id)

    async def _ask_all(self, path: str) -> list[tuple[HiveInfo, dict[str, Any]]]:
        online = [hive for hive in self._registry.hives() if hive.state == "online"]

        async def ask(hive: HiveInfo) -> tuple[HiveInfo, dict[str, Any]] | None:
            try:
                return hive, await self._registry.client(hive.hive_url).get(path, timeout_s=5)
            except NotFound:
                return None
            except HiveError as error:
                log.info("hive %s did not answer %s: %s", hive.hive_id, path, error.message)
                return None

        return [answer for answer in await asyncio.gather(*map(ask, online)) if answer]


def _hive_lost(hive_id: str) -> Unavailable:
    return Unavailable(
        f"Hive {hive_id} has fallen silent. Look at that machine, or retry elsewhere.",
        code="hive_lost",
        hop="hive",
    )


def _queen_stops() -> Unavailable:
    return Unavailable("the queen is stopping; the job goes on there.", code="queen_stops")
