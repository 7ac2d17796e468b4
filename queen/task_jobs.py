"""Tasks that are operations: the queen claims them herself, and runs each as a job.

They come behind who waits for an answer: few run at a time, and an ``infer`` only when a worker
has a slot to spare. One that nobody can serve now is put off, which counts as no attempt.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pydantic_core import from_json

from hive_orchestration.machine.own_work import any_ready, put_off
from hive_orchestration.machine.rows import ClaimId
from job_client.client import JobClient
from operations import events
from operations.errors import Conflict, HiveError, NotFound, QueueFull, Unavailable
from operations.operations import Infer, Operation
from operations.tasks import MOST_LOG_CHARS, Beat, Claim, ClaimRequest
from queen.queue_house import Opened, any_of
from queen.scheduler import candidates
from queen.tasks_api import OPERATION, QUEENS_ROLE, operation_of

if TYPE_CHECKING:
    from queen.jobs import QueenJobs
    from queen.registry import Registry

LEASE_S: Final = 30.0
BEAT_S: Final = 2.0  # so soon a job hears that its task is cancelled
POLL_S: Final = 1.0
TOGETHER_S: Final = 0.05  # what changes within it is looked at once
HEARD_S: Final = 15.0  # after her start a queen has heard all hives that there are
ROOM_S: Final = 10.0  # what an infer waits for a slot before it is put off
LOOK_S: Final = 0.1
PUT_OFF_S: Final = 1.0
LAST_PUT_OFF_S: Final = 30.0
REMEMBERED: Final = 10_000
MOST_LINES: Final = 500

log = logging.getLogger(__name__)


class TaskJobs:
    """Belongs to the queen's event loop."""

    def __init__(
        self, opened: Opened, queen_id: str, jobs: QueenJobs, registry: Registry, at_once: int
    ) -> None:
        """:param at_once: how many run at a time"""
        self._opened = opened
        self._queue = opened.queue
        self._drone_id = f"queen:{queen_id}"
        self._jobs = jobs
        self._registry = registry
        self._put_off: OrderedDict[str, int] = OrderedDict()
        """How often each task has been put off, one after the other."""
        self._at_once = at_once
        self._running: set[asyncio.Task[None]] = set()
        self._ended = asyncio.Event()
        self._all_heard_at = asyncio.get_running_loop().time() + HEARD_S
        self._claiming = asyncio.get_running_loop().create_task(self._claim_on())

    async def drain(self, deadline_s: float) -> None:
        await self._claim_no_more()
        if self._running:
            await asyncio.wait(set(self._running), timeout=deadline_s)

    async def close(self) -> None:
        await self._claim_no_more()
        running = set(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _claim_no_more(self) -> None:
        self._claiming.cancel()
        await asyncio.gather(self._claiming, return_exceptions=True)

    async def _claim_on(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            changed = self._opened.store.changes.next()
            self._ended.clear()
            try:
                claims = await self._claimed()
            except HiveError as error:
                log.debug("operations of the queue could not be claimed: %s", error.message)
                claims = []
            except Exception:  # the next ones may do
                log.exception("operations of the queue could not be claimed")
                claims = []
            for claim in claims:
                task = loop.create_task(self._work(claim), name=f"task {claim.task.id}")
                self._running.add(task)
                task.add_done_callback(self._done)
            await any_of(POLL_S, changed, self._ended)
            await asyncio.sleep(TOGETHER_S)

    async def _claimed(self) -> list[Claim]:
        """As many as may run now."""
        free = self._at_once - len(self._running)
        if not free or not await self._opened.store.read(partial(any_ready, type=OPERATION)):
            return []
        asked = ClaimRequest(
            drone_id=self._drone_id,
            role=QUEENS_ROLE,
            types=(OPERATION,),
            n=free,
            lease_s=LEASE_S,
        )
        return await self._queue.claim(None, asked)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._ended.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s broke", task.get_name(), exc_info=error)

    async def _work(self, claim: Claim) -> None:
        """Run one task to its end, or give it back."""
        work = _Work(claim, self._queue.beat)
        try:
            with contextlib.suppress(Conflict, NotFound):  # it is somebody else's by now
                await self._worked(work)
        except HiveError as error:  # its lease runs out, and it is taken up again
            log.warning("what became of task %s could not be noted: %s", claim.task.id, error)

    async def _worked(self, work: _Work) -> None:
        claim = work.claim
        try:
            async with work.leased():
                operation = operation_of(claim.task.payload, claim.secrets)
                await self._room(operation)
                result = await self._run(work, operation)
        except asyncio.CancelledError:
            if work.cancelled:
                await self._queue.fail(
                    claim.claim_id, "It was cancelled.", retryable=False, said=work.words()
                )
            elif not work.lost:  # the queen stops
                await self._queue.release(claim.claim_id)
        except NobodyYet as error:
            await self._wait(claim, error)
        except HiveError as error:
            await self._queue.fail(
                claim.claim_id,
                error.message,
                code=error.code,
                retryable=error.retryable,
                said=work.words(),
            )
        else:
            self._put_off.pop(claim.task.id, None)
            await self._queue.complete(claim.claim_id, result, said=work.words())

    async def _wait(self, claim: Claim, why: HiveError) -> None:
        times = self._put_off.pop(claim.task.id, 0)
        self._put_off[claim.task.id] = times + 1
        while len(self._put_off) > REMEMBERED:
            self._put_off.popitem(last=False)
        pause_s = min(PUT_OFF_S * 2.0 ** min(times, 20), LAST_PUT_OFF_S)
        error = {"message": why.message, "code": why.code}
        id = ClaimId.parse(claim.claim_id)
        step = partial(put_off, claim=id, pause_s=pause_s, error=error)
        await self._opened.store.write(step)

    async def _room(self, operation: Operation) -> None:
        """Wait until an ``infer`` takes nobody's place. :raises NobodyYet: it would for long"""
        if not isinstance(operation, Infer):
            return
        loop = asyncio.get_running_loop()
        until = loop.time() + ROOM_S
        while not self._has_room(operation):
            if loop.time() > until:
                raise NobodyYet("All who could serve it are busy.")
            await asyncio.sleep(LOOK_S)

    def _has_room(self, infer: Infer) -> bool:
        try:
            found = candidates(
                infer.model,
                self._registry.hives(),
                hive_id=infer.hive_id,
                device=infer.device,
                worker_id=infer.worker_id,
            )
        except Unavailable as error:
            raise NobodyYet(error.message) from None
        except NotFound as error:
            heard = {hive.state for hive in self._registry.hives()}
            if heard == {"online"} and asyncio.get_running_loop().time() > self._all_heard_at:
                raise ModelMissing(error.message, code=error.code) from None
            raise NobodyYet(error.message) from None  # who has it may come yet
        return any(
            worker.state == "ready"
            and self._registry.in_flight(hive.hive_url, worker.worker_id) < worker.slots
            for hive, worker in found
        )

    async def _run(self, work: _Work, operation: Operation) -> Any:
        """:raises HiveError: it was refused, or has failed"""
        claim = ClaimId.parse(work.claim.claim_id)
        # The same for the same claim: who asks again does not begin again.
        job_id = f"job-{uuid.uuid5(uuid.NAMESPACE_OID, f'{claim.task}/{claim.fence}')}"
        try:
            await self._jobs.submit(operation, job_id)
        except (Unavailable, QueueFull) as error:
            raise NobodyYet(error.message) from None
        try:
            return await self._followed(work, job_id)
        except BaseException:
            with contextlib.suppress(HiveError):
                await asyncio.shield(self._jobs.cancel(job_id))
            raise

    async def _followed(self, work: _Work, job_id: str) -> Any:
        """A job's result. :raises JobFailed: it gave none"""
        target = self._jobs.placed(job_id)
        if target is not None:
            client: JobClient = self._registry.client(target.hive_url)
            outcome = await client.follow(job_id, work.heard)
            if outcome.status == "failed":
                raise JobBroke(outcome.message or "The job failed; the hive's log says why.")
            if outcome.status == "cancelled":
                raise JobBroke("The job was cancelled on its hive.")
            return outcome.result
        result: Any = None
        source = await self._jobs.events(job_id, None)
        assert source is not None
        async with aclosing(source) as lines:
            async for event in lines:
                line = event.data
                work.heard(line)
                if line.startswith(events.ERROR):
                    raise JobBroke(line.removeprefix(events.ERROR).strip())
                if line == events.CANCELLED:
                    raise JobBroke("The job was cancelled.")
                if line.startswith(("{", "[")) and not events.is_terminal(line):
                    result = line
        return None if result is None else _decoded(result)


class NobodyYet(Unavailable):
    """Nobody can serve it now."""


class ModelMissing(NotFound):
    """No hive has the model now; it may still be fetched."""

    retryable = True


class JobBroke(HiveError):
    """A task's job has failed."""

    code = "job_failed"
    retryable = True


class _Work:
    """One claimed task: its heartbeats, and what its job says."""

    def __init__(self, claim: Claim, beat: Callable[[str, Beat], Awaitable[Any]]) -> None:
        self.claim = claim
        self.cancelled = False
        self.lost = False
        self._beat = beat
        self._lines: deque[str] = deque(maxlen=MOST_LINES)

    def heard(self, line: str) -> None:
        """A line of the job; what a person is told goes to the task's log."""
        if line.startswith((events.INFO, events.WARN)):
            self._lines.append(line)

    def words(self) -> Beat:
        """What was heard since the last heartbeat."""
        lines = list(self._lines)
        self._lines.clear()
        text = "\n".join(lines)[-MOST_LOG_CHARS:]
        return Beat(logs=text or None)

    @contextlib.asynccontextmanager
    async def leased(self) -> AsyncIterator[None]:
        """Beats, for as long as the block runs; which is cancelled where it is to run no more."""
        block = asyncio.current_task()
        assert block is not None
        beating = asyncio.get_running_loop().create_task(self._beat_on(block))
        try:
            yield
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)

    async def _beat_on(self, block: asyncio.Task[Any]) -> None:
        while True:
            try:
                kept = await self._beat(self.claim.claim_id, self.words())
            except (Conflict, NotFound):
                self.lost = True
            except HiveError as error:
                log.warning("a heartbeat for task %s failed: %s", self.claim.task.id, error.message)
            else:
                self.cancelled = kept.cancel
            if self.lost or self.cancelled:
                block.cancel()
                return
            await asyncio.sleep(BEAT_S)


def _decoded(line: str) -> Any:
    try:
        return from_json(line)
    except ValueError:
        return line
