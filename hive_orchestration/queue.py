"""The durable queue: every call is one step of the state machine, answered when it is committed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final, Self

from pydantic import JsonValue

from hive_orchestration.machine import claim as claiming
from hive_orchestration.machine import drones, enqueue, lease, moves, reading, roles, sweep
from hive_orchestration.machine.claim import Given
from hive_orchestration.machine.enqueue import Queued, Wanted
from hive_orchestration.machine.lease import Outcome
from hive_orchestration.machine.rows import TASK_ID, ClaimId
from hive_orchestration.seal import Sealer
from hive_orchestration.store import Store
from operations.errors import HiveError, InvalidRequest
from operations.tasks import (
    DAY_S,
    Beat,
    Claim,
    ClaimRequest,
    Drone,
    DroneStatus,
    Kept,
    NewDrone,
    NewTask,
    QueueEvent,
    RoleInfo,
    Task,
    TaskPage,
    TaskStatus,
)

SWEEP_S: Final = 0.25
RETAIN_EVERY_S: Final = 60.0
POLL_S: Final = 1.0  # for what another queen has done, should her word of it not come
AFTER_TROUBLE_S: Final = 1.0

log = logging.getLogger(__name__)


class Queue:
    """Belongs to one event loop, as its store does.

    ``tenant`` is whose tasks a call may see and touch; None: everybody's. All calls raise
    :class:`Unavailable` while the database is away, and :class:`WontFit` while its disk is full.
    """

    def __init__(self, store: Store, sealer: Sealer, *, retain_s: float = sweep.RETAIN_S) -> None:
        """:param retain_s: what ended longer ago is deleted, and events as old"""
        self._store = store
        self._sealer = sealer
        self._retain_s = retain_s
        self._sweeper: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    def start(self) -> None:
        """Have time do what it does (:mod:`hive_orchestration.machine.sweep`)."""
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep_on())

    async def close(self) -> None:
        """Fine to call twice."""
        sweeper, self._sweeper = self._sweeper, None
        if sweeper is not None:
            sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sweeper
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._store.close()

    # -- tasks -------------------------------------------------------------------------------

    async def enqueue(
        self, tenant: str, new: Sequence[NewTask], *, ids: Sequence[str] | None = None
    ) -> list[Queued]:
        """Queue tasks, all of them or none.

        :param ids: that somebody has chosen for them
        :raises Conflict: an idempotency key came with another body before
        :raises NotFound: there is no such parent
        """
        for id in ids or ():
            if TASK_ID.fullmatch(id) is None:
                raise InvalidRequest(
                    "A task's id begins with a letter or digit; then come letters, digits, '.', "
                    "'_', ':' and '-', 128 in all. Choose such a one.",
                    param="id",
                )
        chosen: Sequence[str | None] = ids if ids is not None else [None] * len(new)
        wanted = [
            Wanted(self._sealer.veiled(one), self._sealer.seal(one.secrets), id)
            for one, id in zip(new, chosen, strict=True)
        ]
        return await self._store.write(lambda tx: enqueue.enqueue(tx, tenant, wanted))

    async def get(self, tenant: str | None, id: str) -> Task:
        """:raises NotFound: there is none, or it is another tenant's"""
        return await self._store.read(lambda tx: reading.get(tx, tenant, id))

    async def page(
        self,
        tenant: str | None,
        *,
        statuses: Sequence[TaskStatus] = (),
        type: str | None = None,
        role: str | None = None,
        parent: str | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> TaskPage:
        """Tasks that fit, the newest first. :raises InvalidRequest: the cursor is none"""
        return await self._store.read(
            lambda tx: reading.page(
                tx,
                tenant,
                statuses=statuses,
                type=type,
                role=role,
                parent=parent,
                limit=limit,
                cursor=cursor,
            )
        )

    async def waiting(
        self, tenant: str | None, *, type: str | None = None, limit: int = 10
    ) -> list[Task]:
        """What is queued, the next one first."""
        return await self._store.read(
            lambda tx: reading.waiting(tx, tenant, type=type, limit=limit)
        )

    async def lines(self, tenant: str | None, id: str) -> list[dict[str, Any]]:
        """What a task's drones have logged. :raises NotFound: there is no such task"""
        return await self._store.read(lambda tx: reading.lines(tx, tenant, id))

    async def move(
        self,
        tenant: str | None,
        id: str,
        status: TaskStatus,
        metadata: dict[str, Any] | None = None,
    ) -> Task:
        """Set the status of a task that nobody holds through a claim.

        :raises Conflict: somebody does, or what it is cannot become this
        :raises NotFound: there is no such task
        """
        return await self._store.write(lambda tx: moves.move(tx, tenant, id, status, metadata))

    async def cancel(self, tenant: str | None, id: str) -> Task:
        """At once where nobody works on it, else when its drone hears of it.

        :raises NotFound: there is no such task
        """
        return await self._store.write(lambda tx: moves.cancel(tx, tenant, id))

    async def replay(self, tenant: str | None, id: str) -> Task:
        """Queue a failed task anew. :raises Conflict: it has not failed"""
        return await self._store.write(lambda tx: moves.replay(tx, tenant, id))

    async def retry(self, tenant: str | None, id: str) -> Task:
        """Let the next attempt begin now. :raises Conflict: it waits for none"""
        return await self._store.write(lambda tx: moves.retry_now(tx, tenant, id))

    async def remove(self, tenant: str | None, id: str) -> bool:
        """Delete a task; False where there is none. :raises Conflict: somebody works on it"""
        return await self._store.write(lambda tx: moves.remove(tx, tenant, id))

    # -- claims ------------------------------------------------------------------------------

    async def claim(self, tenant: str | None, request: ClaimRequest) -> list[Claim]:
        """Be given tasks; waits up to ``request.wait`` seconds for the first one."""
        loop = asyncio.get_running_loop()
        until = loop.time() + request.wait
        while True:
            changed = self._store.ready.next()
            given = await self._given(tenant, request)
            left = until - loop.time()
            if given or left <= 0:
                opened = [await self._opened(one) for one in given]
                return [claim for claim in opened if claim is not None]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, POLL_S)):
                    await changed.wait()

    async def _opened(self, given: Given) -> Claim | None:
        """With its secrets; None: they cannot be read here, and the task has failed."""
        try:
            secrets = self._sealer.unseal(given.secrets)
        except HiveError as error:
            log.error("task %s: %s", given.task.id, error.message)
            with contextlib.suppress(HiveError):
                await self.fail(
                    str(given.claim_id), error.message, code=error.code, retryable=False
                )
            return None
        return Claim(
            claim_id=str(given.claim_id), task=given.task, secrets=secrets, lease_s=given.lease_s
        )

    async def _given(self, tenant: str | None, request: ClaimRequest) -> list[Given]:
        """A claim whose caller goes away before he has heard of it is given back."""
        writing = self._store.begun(lambda tx: claiming.claim(tx, tenant, request))
        try:
            return await asyncio.shield(writing)
        except asyncio.CancelledError:
            back = asyncio.get_running_loop().create_task(self._give_back(writing))
            self._background.add(back)
            back.add_done_callback(self._background.discard)
            raise

    async def _give_back(self, writing: asyncio.Future[list[Given]]) -> None:
        with contextlib.suppress(HiveError):
            for given in await writing:
                await self.release(str(given.claim_id))

    async def beat(
        self,
        claim_id: str,
        said: Beat,
        *,
        lease_s: float | None = None,
        tenant: str | None = None,
    ) -> Kept:
        """Still at work. :raises Conflict: the claim is stale"""
        id = ClaimId.parse(claim_id, tenant)
        if lease_s is not None and not 1 <= lease_s <= DAY_S:
            raise InvalidRequest(
                "A lease is between a second and a day long. Send such a 'lease_s'.",
                param="lease_s",
            )
        return await self._store.write(lambda tx: lease.beat(tx, id, said, lease_s=lease_s))

    async def complete(
        self,
        claim_id: str,
        result: JsonValue = None,
        *,
        status: Outcome = "completed",
        said: Beat | None = None,
        tenant: str | None = None,
    ) -> Task:
        """Done. :raises Conflict: the claim is stale"""
        id = ClaimId.parse(claim_id, tenant)
        return await self._store.write(
            lambda tx: lease.complete(tx, id, result, status=status, said=said)
        )

    async def complete_all(
        self, results: Sequence[tuple[str, JsonValue]]
    ) -> list[Task | HiveError]:
        """Several at once, each by itself: its task, or why not."""
        said = await asyncio.gather(
            *(self.complete(id, result) for id, result in results), return_exceptions=True
        )
        for one in said:
            if isinstance(one, BaseException) and not isinstance(one, HiveError):
                raise one
        return [one for one in said if isinstance(one, Task | HiveError)]

    async def fail(
        self,
        claim_id: str,
        message: str,
        *,
        code: str = "drone_failed",
        retryable: bool = True,
        said: Beat | None = None,
        tenant: str | None = None,
    ) -> Task:
        """It could not be done. :raises Conflict: the claim is stale"""
        id = ClaimId.parse(claim_id, tenant)
        return await self._store.write(
            lambda tx: lease.fail(tx, id, message, code=code, retryable=retryable, said=said)
        )

    async def release(self, claim_id: str, *, tenant: str | None = None) -> Task:
        """Given back, not begun. :raises Conflict: the claim is stale"""
        id = ClaimId.parse(claim_id, tenant)
        return await self._store.write(lambda tx: lease.release(tx, id))

    # -- roles and drones --------------------------------------------------------------------

    async def pause(self, role: str) -> bool:
        """Give out nothing of this role; False where that was so."""
        return await self._store.write(lambda tx: roles.pause(tx, role))

    async def resume(self, role: str) -> bool:
        """False where it was not paused."""
        return await self._store.write(lambda tx: roles.resume(tx, role))

    async def roles(self, tenant: str | None) -> list[RoleInfo]:
        """What waits and runs, by role."""
        return await self._store.read(lambda tx: reading.roles(tx, tenant))

    async def register(self, tenant: str, new: NewDrone) -> Drone:
        """Known from now on, or described anew."""
        return await self._store.write(lambda tx: drones.register(tx, tenant, new))

    async def heard(self, tenant: str | None, id: str, status: DroneStatus | None = None) -> Drone:
        """A drone's heartbeat. :raises NotFound: it is not registered"""
        return await self._store.write(lambda tx: drones.heard(tx, tenant, id, status))

    async def drone(self, tenant: str | None, id: str) -> Drone:
        """:raises NotFound: it is not registered"""
        return await self._store.read(lambda tx: drones.get(tx, tenant, id))

    async def drones(
        self, tenant: str | None, role: str | None = None, *, active: bool = False
    ) -> list[Drone]:
        """Those that are registered."""
        return await self._store.read(lambda tx: drones.listing(tx, tenant, role, active=active))

    async def unregister(self, tenant: str | None, id: str) -> bool:
        """False where it was not registered."""
        return await self._store.write(lambda tx: drones.unregister(tx, tenant, id))

    # -- events ------------------------------------------------------------------------------

    async def follow(
        self, tenant: str | None, after: int, topics: Sequence[str] = ()
    ) -> AsyncIterator[QueueEvent]:
        """Events after a place, and then those that happen, without end, in order.

        :raises Gone: what came after that place is not kept any more
        """
        while True:
            changed = self._store.changes.next()
            found, after = await self._store.read(
                lambda tx, place=after: reading.happened(tx, tenant, place, topics)  # type: ignore[misc]
            )
            for event in found:
                yield event
            if not found:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL_S):
                        await changed.wait()

    # -- time --------------------------------------------------------------------------------

    async def sweep(self) -> bool:
        """Do what is due now; whether there may be more of it."""
        return await self._store.write(sweep.sweep)

    async def retain(self) -> int:
        """Delete what is old; how much that was."""
        return await self._store.write(lambda tx: sweep.retain(tx, self._retain_s))

    async def _sweep_on(self) -> None:
        loop = asyncio.get_running_loop()
        retained = loop.time()
        while True:
            try:
                while await self.sweep():
                    pass
                if loop.time() - retained >= RETAIN_EVERY_S:
                    while await self.retain() >= sweep.AT_ONCE:
                        pass
                    retained = loop.time()
                await asyncio.sleep(SWEEP_S)
            except HiveError as error:
                log.warning("the queue could not be looked through: %s", error.message)
                await asyncio.sleep(AFTER_TROUBLE_S)
