"""Works through a queen's tasks, several at a time, until it is ended; what it is told is a line.

``python -m tests.queue_claimer URL NAME N``. Its result is its name. A task whose payload says
``frail`` fails at its first attempt.
"""

from __future__ import annotations

import asyncio
import sys

from job_client.tasks import TaskClient
from operations.errors import HiveError
from operations.tasks import Claim, ClaimRequest


def say(what: str, claim: Claim) -> None:
    """With task and fence."""
    print(what, *claim.claim_id.split("~")[:2], flush=True)


async def work(tasks: TaskClient, name: str, claims: list[Claim]) -> None:
    done: list[Claim] = []
    for claim in claims:
        say("claimed", claim)
        if claim.task.payload["frail"] and claim.task.attempts == 1:
            await tasks.fail(claim.claim_id, "It broke.")
            say("failed", claim)
        else:
            done.append(claim)
    if not done:
        return
    said = await tasks.complete_all([(claim.claim_id, name) for claim in done])
    for claim, outcome in zip(done, said, strict=True):
        say("refused" if isinstance(outcome, HiveError) else "completed", claim)


async def main(url: str, name: str, n: str) -> None:
    async with TaskClient(url) as tasks:
        print("ready", flush=True)
        while True:
            claims = await tasks.claim(ClaimRequest(drone_id=name, n=int(n), wait=60))
            await work(tasks, name, claims)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
