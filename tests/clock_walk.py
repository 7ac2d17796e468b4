"""What a caller and drone sees whose clock may be wrong: one line of JSON.

``python -m tests.clock_walk URL NAME [KEY]``
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import aclosing
from typing import Any

from job_client.tasks import TaskClient
from operations.errors import Conflict
from operations.tasks import Beat, Claim, ClaimRequest, NewDrone, NewTask, Retry, Task
from tests.cluster import until

LEASE_S = 4.0
WORK_S = 5.0
BEAT_S = 0.5
SHORT_S = 2.0
LONG_S = 900.0

Seen = tuple[Task, float]
"""A task that has ended, and how long it took to what was waited for, by the database's clock."""


class Walk:
    def __init__(self, tasks: TaskClient, name: str) -> None:
        self.tasks = tasks
        self.name = name

    async def enqueue(self, step: str, **said: Any) -> Task:
        return await self.tasks.enqueue(NewTask(type=f"{self.name}-{step}", **said))

    async def take(self, task: Task, **said: Any) -> Claim:
        request = ClaimRequest(drone_id=self.name, types=(task.type,), wait=60, **said)
        [claim] = await self.tasks.claim(request)
        return claim

    async def failed(self, task: Task) -> Task:
        async def now() -> Task | None:
            found = await self.tasks.get(task.id)
            return found if found.status == "failed" else None

        found: Task = await until(now, f"the end of {task.type}", within_s=60, every_s=0.1)
        return found

    # -- steps -------------------------------------------------------------------------------

    async def kept(self) -> Seen:
        """Work that takes longer than its lease, with heartbeats."""
        claim = await self.take(await self.enqueue("kept", lease_s=LEASE_S))
        until_s = time.monotonic() + WORK_S
        while time.monotonic() < until_s:
            kept = await self.tasks.beat(claim.claim_id, Beat())
            assert (kept.lease_s, kept.cancel) == (LEASE_S, False)
            await asyncio.sleep(BEAT_S)
        done = await self.tasks.complete(claim.claim_id)
        return done, _took(done.started_at, done.finished_at)

    async def lost(self) -> Seen:
        """Work without heartbeats, whose lease runs out."""
        task = await self.enqueue("lost", retry=Retry(attempts=1))
        claim = await self.take(task, lease_s=SHORT_S)
        failed = await self.failed(task)
        try:
            await self.tasks.complete(claim.claim_id)
        except Conflict:
            return failed, _took(failed.started_at, failed.finished_at)
        raise AssertionError("a claim that was lost is taken for good")

    async def delayed(self) -> Seen:
        """Work that is not to begin at once."""
        claim = await self.take(await self.enqueue("delayed", not_before=SHORT_S))
        done = await self.tasks.complete(claim.claim_id)
        return done, _took(done.created_at, done.started_at)

    async def late(self) -> Seen:
        """A deadline that passes."""
        failed = await self.failed(await self.enqueue("late", deadline=SHORT_S))
        return failed, _took(failed.created_at, failed.finished_at)

    async def in_time(self) -> Seen:
        """A deadline that is nearer than the clock is wrong, and does not pass."""
        claim = await self.take(await self.enqueue("in_time", deadline=LONG_S))
        done = await self.tasks.complete(claim.claim_id)
        return done, _took(done.created_at, done.finished_at)

    async def topics(self, steps: dict[str, Seen]) -> dict[str, list[str]]:
        """What the events tell of each step's task."""
        told: dict[str, list[str]] = {task.id: [] for task, _ in steps.values()}
        ends = ("task.completed", "task.failed")
        async with aclosing(self.tasks.events(["task.*"], after=0)) as events:
            async for event in events:
                if event.subject in told:
                    told[event.subject].append(event.topic)
                if all(topics and topics[-1] in ends for topics in told.values()):
                    return {step: told[task.id] for step, (task, _) in steps.items()}
        raise AssertionError("the events ended")


async def main(url: str, name: str, key: str | None = None) -> None:
    async with TaskClient(url, api_key=key) as tasks:
        walk = Walk(tasks, name)
        await tasks.register(NewDrone(id=name))
        calls = (walk.kept, walk.lost, walk.delayed, walk.late, walk.in_time)
        seen = await asyncio.gather(*(call() for call in calls))
        steps = {call.__name__: one for call, one in zip(calls, seen, strict=True)}
        topics = await walk.topics(steps)
        await tasks.heard(name)
        active = name in {drone.id for drone in await tasks.drones(active=True)}
    saw = {
        step: [task.status, task.attempts, (task.error or {}).get("code"), topics[step]]
        for step, (task, _) in steps.items()
    }
    took = {step: seconds for step, (_, seconds) in steps.items()}
    print(json.dumps({"clock": time.time(), "saw": saw, "took": took, "active": active}))


def _took(begun: float | None, ended: float | None) -> float:
    assert begun is not None
    assert ended is not None
    return ended - begun


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
