"""Load on a queue from a process that may die; each write that was answered is a line.

``python -m tests.queue_load KIND WHERE NAME PRODUCERS CONSUMERS``
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys

from hive_orchestration.queue import Queue
from hive_orchestration.seal import Sealer
from operations.errors import Unavailable
from operations.tasks import ClaimRequest, NewTask
from tests.queues import KEY, open_store


def say(*words: object) -> None:
    """In one piece, whatever comes next."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


async def produce(queue: Queue, name: str) -> None:
    for number in itertools.count():
        id = f"{name}-{number}"
        try:
            await queue.enqueue("default", [NewTask(type="t", lease_s=600)], ids=[id])
        except Unavailable as error:
            say("unavailable", error.retry_after)
            await asyncio.sleep(0.1)
        else:
            say("queued", id)


async def consume(queue: Queue, name: str) -> None:
    while True:
        try:
            for claim in await queue.claim(None, ClaimRequest(drone_id=name, wait=5, n=2)):
                say("claimed", *claim.claim_id.split("~")[:2])
                await queue.complete(claim.claim_id, name)
                say("completed", claim.task.id)
        except Unavailable as error:
            say("unavailable", error.retry_after)
            await asyncio.sleep(0.1)


async def main(kind: str, where: str, name: str, producers: str, consumers: str) -> None:
    store = await open_store(kind, where)
    async with Queue(store, Sealer(KEY)) as queue, asyncio.TaskGroup() as group:
        say("open")
        for number in range(int(producers)):
            group.create_task(produce(queue, f"{name}-{number}"))
        for number in range(int(consumers)):
            group.create_task(consume(queue, f"{name}-{number}"))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
