"""A drone whose event loop stands still for twice its lease; what it is told is a line each.

``python -m tests.blocked_drone URL``
"""

from __future__ import annotations

import asyncio
import sys
import time

from job_client.tasks import TaskClient
from operations.errors import Conflict
from operations.tasks import Beat, ClaimRequest

LEASE_S = 1.0


def say(*words: object) -> None:
    print(*words, flush=True)


async def keep(tasks: TaskClient, claim_id: str, alive: asyncio.Event) -> None:
    """Heartbeats, for as long as they are of use."""
    try:
        while True:
            await tasks.beat(claim_id, Beat())
            alive.set()
            await asyncio.sleep(LEASE_S / 3)
    except Conflict as error:
        say("refused", "heartbeat", error.status, error.code)


async def main(url: str) -> None:
    alive = asyncio.Event()
    async with TaskClient(url) as tasks, asyncio.TaskGroup() as group:
        [claim] = await tasks.claim(ClaimRequest(drone_id="blocked", wait=60, lease_s=LEASE_S))
        group.create_task(keep(tasks, claim.claim_id, alive))
        await alive.wait()
        say("blocked", claim.task.id)
        time.sleep(2 * LEASE_S)  # noqa: ASYNC251  # what this drone is for
        try:
            await tasks.complete(claim.claim_id, "blocked")
        except Conflict as error:
            say("refused", "complete", error.status, error.code)
        else:
            say("completed", claim.task.id)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
