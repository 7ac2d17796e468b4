"""Several queens on one PostgreSQL: what one of them gives out, no other does."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from contextlib import AsyncExitStack, aclosing
from itertools import cycle
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text

from hive_orchestration import schema
from hive_orchestration.machine import enqueue
from hive_orchestration.transaction import Tx
from operations.tasks import Concurrency, NewTask, QueueEvent, Retry, Task
from tests.cluster import START_S, Cluster, Daemon, until
from tests.postgres import Postgres
from tests.queues import Durable, durable_queue, opened
from tests.told import Told, told

LIMIT = 2
TENANTS = ("a", "b", "c")
AT_ONCE = (1, 1, 1, 2, 2, 5, 10, 20)
"""Tasks that each of the claimers asks for."""


def tasks(count: int) -> list[NewTask]:
    """Every tenth counts towards a limit, every seventh fails once."""
    limits = [Concurrency(key=key, limit=LIMIT) for key in ("k", "l")]
    return [
        NewTask(
            type="t",
            payload={"frail": n % 7 == 0},
            concurrency=limits[n // 10 % 2] if n % 10 == 0 else None,
            retry=Retry(attempts=2, backoff_s=0.0),
            lease_s=3600.0,
        )
        for n in range(count)
    ]


@pytest.mark.parametrize("count", [300, pytest.param(100_000, marks=pytest.mark.long)])
@pytest.mark.timeout(3600)
async def test_three_queens_give_each_task_to_one_claimer(
    postgres: Postgres, fresh: Cluster, tmp_path: Path, count: int
) -> None:
    new = tasks(math.ceil(count / len(TENANTS)))
    async with durable_queue("postgres", tmp_path, postgres) as durable:
        fresh.env = {"HIVE_DATABASE": durable.url}
        starting = (fresh.start("queen", "--port=0", folder=f"queen-{of}") for of in TENANTS)
        queens = await asyncio.gather(*starting)
        async with AsyncExitStack() as stack:
            claimers: dict[str, Told] = {}
            for at_once, queen in zip(AT_ONCE, cycle(queens), strict=False):
                name = f"claimer-{len(claimers)}"
                started = told("tests.queue_claimer", queen.url, name, at_once)
                claimers[name] = await stack.enter_async_context(started)
            await until(
                lambda: all(one.lines for one in claimers.values()),
                "the claimers",
                within_s=START_S,
            )
            await asyncio.gather(
                *(_queue(queen, tenant, new) for queen, tenant in zip(queens, TENANTS, strict=True))
            )
            # Each is claimed and completed; a frail one is claimed and fails before.
            frail = sum(bool(one.payload["frail"]) for one in new)
            lines = len(claimers) + len(TENANTS) * 2 * (len(new) + frail)
            await until(
                lambda: sum(len(one.lines) for one in claimers.values()) >= lines,
                "all of it",
                within_s=count / 20 + 30,
            )
        rows = await durable.rows(schema.tasks)
        assert len(rows) == len(TENANTS) * len(new)
        _each_claim_was_given_once(rows, claimers)
        await _never_over_the_limit(durable, rows)


async def test_two_that_queue_at_once_share_keys_and_the_order_of_events(
    postgres: Postgres, tmp_path: Path
) -> None:
    count = 100

    async def queue(durable: Durable) -> list[Task]:
        """Every second under a key that both have."""
        return [
            await durable.add(idempotency_key=None if n % 2 else f"k{n}", payload={"n": n})
            for n in range(count)
        ]

    async def follow(durable: Durable) -> list[QueueEvent]:
        found: list[QueueEvent] = []
        async with aclosing(durable.queue.follow(None, 0)) as followed:
            async for event in followed:
                found.append(event)
                if len(found) == count * 3 // 2:
                    break
        return found

    async with (
        durable_queue("postgres", tmp_path, postgres) as one,
        opened("postgres", one.url) as other,
    ):
        async with asyncio.timeout(START_S):
            ours, theirs, events = await asyncio.gather(queue(one), queue(other), follow(one))
    assert [task.id for task in ours[::2]] == [task.id for task in theirs[::2]]
    subjects = [event.subject for event in events]  # none passed by, none twice
    assert sorted(subjects) == sorted({task.id for task in ours + theirs})
    assert [event.seq for event in events] == sorted(event.seq for event in events)
    for mine in (ours, theirs):  # as each was answered
        alone = [task.id for task in mine if task.idempotency_key is None]
        assert [id for id in subjects if id in set(alone)] == alone


async def test_who_waits_for_anothers_key_does_not_keep_it_from_its_commit(
    postgres: Postgres, tmp_path: Path
) -> None:
    new = NewTask(type="t", idempotency_key="k")
    gate, log = 4711, postgres.folder / "log"
    before = log.stat().st_size

    def slowly(tx: Tx) -> str:
        [queued] = enqueue.enqueue(tx, "default", [enqueue.Wanted(new)])
        tx.conn.execute(text("SELECT pg_advisory_xact_lock(:gate)"), {"gate": gate})
        return queued.id

    async with (
        durable_queue("postgres", tmp_path, postgres) as one,
        opened("postgres", one.url) as other,
    ):
        await one.add()
        keeper = await asyncpg.connect(one.url)
        await keeper.execute("SELECT pg_advisory_lock($1)", gate)

        async def waits(how: str) -> bool:
            asked = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = $1"
            return bool(await keeper.fetchval(asked, how))

        first = asyncio.create_task(one.store.write(slowly))
        await until(lambda: waits("advisory"), "the first, with its row written")
        second = asyncio.create_task(other.queue.enqueue("default", [new]))
        await until(lambda: waits("transactionid"), "the second, for the first")
        await keeper.close()
        [same] = await second
        assert (same.id, same.created) == (await first, False)
        assert len(await one.events(same.id)) == 1
    assert b"deadlock" not in log.read_bytes()[before:]


async def _queue(queen: Daemon, tenant: str, new: list[NewTask]) -> None:
    for first in range(0, len(new), 100):
        said = [one.model_dump(mode="json", exclude_unset=True) for one in new[first : first + 100]]
        await queen.client.post(f"/v1/tasks?tenant={tenant}", {"tasks": said})


def _each_claim_was_given_once(rows: list[dict[str, Any]], claimers: dict[str, Told]) -> None:
    """And each task was completed once, by who had its last claim."""
    claims: Counter[str] = Counter()
    completed: Counter[tuple[str, str, str]] = Counter()
    for name, claimer in claimers.items():
        claims.update(claimer.said("claimed"))
        for line in claimer.said("completed"):
            id, fence = line.split()
            completed[id, fence, name] += 1
        assert not claimer.said("refused")
    expected_claims: set[str] = set()
    expected: set[tuple[str, str, str]] = set()
    for row in rows:
        attempts = 2 if json.loads(row["body"])["payload"]["frail"] else 1
        assert (row["status"], row["fence"], row["attempts"]) == ("completed", attempts, attempts)
        expected_claims.update(f"{row['id']} {fence + 1}" for fence in range(attempts))
        expected.add((row["id"], str(attempts), json.loads(row["result"])))
    assert set(claims) == expected_claims
    assert set(completed) == expected
    assert max(claims.values()) == max(completed.values()) == 1


async def _never_over_the_limit(durable: Durable, rows: list[dict[str, Any]]) -> None:
    """As the events have it, which are in the order of the commits."""
    key = {row["id"]: (row["tenant"], row["concurrency_key"]) for row in rows}
    steps = {"task.assigned": 1, "task.completed": -1, "task.retrying": -1}
    at_work: Counter[tuple[str, str | None]] = Counter()
    for event in await durable.events():
        of = key[event.subject]
        at_work[of] += steps.get(event.topic, 0)
        assert of[1] is None or at_work[of] <= LIMIT
    assert not any(at_work.values())
