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
from typing import Any, TypeVar

from operations import events
from operations.errors import Gone, HiveError, NotFound, Unavailable, WorkerBroke
from operations.hosts import HiveInfo, JobInfo
from operations.operations import Operation
from queen.registry import Registry
from queen.scheduler import Placement
from wire import sse
from wire.inflight import InFlight
from wire.jobs import JobTable, Runner, never, new_job_id, unknown_job
from wire.log import outcome

log = logging.getLogger(__name__)

T = TypeVar("T")

REMEMBERED = 10_000
UNREACHED = ("daemon_unreachable", "hive_lost")
READ_AHEAD = 256  # events that are read from a hive before the caller has taken them
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
        forwarded: Callable[[str, str], None],
        passing: InFlight,
    ) -> None:
        """
        :param forwarded: told of each forwarded operation and the reason of its placement
        :param passing: counts the streams that pass through
        """
        self._own = own
        self._route = route
        self._registry = registry
        self._forwarded = forwarded
        self._passing = passing
        self.closing = asyncio.Event()
        """Set when the queen closes: streams that still pass get their last line."""
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
        if self._own.find(job_id) is not None:
            return await self._own.events(job_id, last_event_id)
        target = await self._where(job_id)
        opened = self._registry.client(target.hive_url).open(job_id, last_event_id)
        source = await self._unless_lost(opened, target)
        if source is None:
            return None
        return self._relayed(source, job_id, target, greeting=last_event_id is None)

    async def _unless_lost(self, answer: Coroutine[Any, Any, T], target: Forward) -> T:
        """Wait for a hive's answer, for as long as the hive is heard.

        :raises Unavailable: the hive is gone
        """
        asking = asyncio.create_task(answer)
        gone = asyncio.create_task(self._registry.lost(target.hive_url))
        closing = asyncio.create_task(self.closing.wait())
        try:
            await asyncio.wait((asking, gone, closing), return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                return asking.result()
        finally:
            for task in (asking, gone, closing):
                task.cancel()
            await asyncio.gather(asking, gone, closing, return_exceptions=True)
        if self.closing.is_set():
            raise Unavailable("the queen is stopping; the job goes on there.", code="queen_stops")
        raise Unavailable(
            f"Hive {target.hive_id} has fallen silent. Look at that machine, or retry elsewhere.",
            code="hive_lost",
            hop="hive",
        )

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

    async def _relayed(
        self,
        source: AsyncGenerator[sse.Event, None],
        job_id: str,
        target: Forward,
        *,
        greeting: bool,
    ) -> AsyncGenerator[sse.Event, None]:
        """A hive's events; the queen's own lines, before and at a loss, carry no id.

        A reader's stream always ends in a terminal line, except when the reader was too slow.
        """
        read: asyncio.Queue[sse.Event | HiveError | None] = asyncio.Queue(READ_AHEAD)

        async def pump() -> None:
            try:
                async for event in source:
                    await read.put(event)
                await read.put(None)
            except HiveError as error:
                await read.put(error)
            except Exception:  # the reader's stream ends all the same
                log.exception("reading from hive %s broke", target.hive_id)
                await read.put(WorkerBroke("reading its events broke"))

        async def watch(end: Awaitable[object], why: str) -> None:
            await end
            await read.put(Unavailable(why))

        tasks = [
            asyncio.create_task(pump()),
            asyncio.create_task(
                watch(self._registry.lost(target.hive_url), "it has fallen silent")
            ),
            asyncio.create_task(watch(self.closing.wait(), "the queen is stopping")),
        ]
        try:
            with self._passing, self._release(job_id):
                if greeting:
                    yield sse.Event(events.info(f"On hive {target.hive_id} ({target.reason})"))
                while (item := await read.get()) is not None:
                    if isinstance(item, sse.Event):
                        yield item
                    elif isinstance(item, Gone):
                        return  # the reader was too slow; the job goes on, and may be asked for
                    else:
                        yield sse.Event(events.error(_last_word(target, item)))
                        return
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await source.aclose()


def _last_word(target: Forward, error: HiveError) -> str:
    if isinstance(error, NotFound):
        return f"Hive {target.hive_id} was started again and the job is lost. Send it again."
    return f"Hive {target.hive_id} was lost on the way: {error.message}"
