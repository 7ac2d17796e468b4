"""A drone in a process of its own, to be killed and stopped; each answer that it gets is a line.

``python -m tests.queue_drone URL NAME WORK_S``
"""

from __future__ import annotations

import asyncio
import sys

from job_client.tasks import TaskClient
from operations.errors import Conflict
from operations.tasks import Beat, Claim, ClaimRequest

PATIENCE_S = 60.0  # while the queen or her database is away
WAIT_S = 5.0


def say(*words: object) -> None:
    print(*words, flush=True)


async def work(tasks: TaskClient, claim: Claim, name: str, work_s: float) -> None:
    """Half, a heartbeat, the other half; completed however late that is."""
    id, fence, _ = claim.claim_id.split("~")
    say("claimed", id, fence)
    try:
        await asyncio.sleep(work_s / 2)
        await tasks.beat(claim.claim_id, Beat(progress=0.5))
        await asyncio.sleep(work_s / 2)
    except Conflict:
        say("lost", id, fence)
    try:
        await tasks.complete(claim.claim_id, {"drone": name, "fence": int(fence)})
    except Conflict as error:
        say("refused", id, fence, error.status, error.code)
    else:
        say("completed", id, fence)


async def main(url: str, name: str, work_s: str) -> None:
    async with TaskClient(url, patience_s=PATIENCE_S) as tasks:
        while True:
            for claim in await tasks.claim(ClaimRequest(drone_id=name, wait=WAIT_S)):
                await work(tasks, claim, name, float(work_s))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
