"""What the queue promises, on SQLite and on PostgreSQL alike."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import RFC_4122, UUID

import pytest
from sqlalchemy import insert, select, update

from hive_orchestration import schema
from hive_orchestration.machine import claim as claiming
from hive_orchestration.machine import enqueue, sweep
from hive_orchestration.machine.enqueue import Wanted
from hive_orchestration.machine.hives import seen
from hive_orchestration.machine.lease import MOST_LOG_ROWS
from hive_orchestration.machine.limits import SPREAD_S
from hive_orchestration.machine.reading import MOST_PAGE
from hive_orchestration.queue import Queue
from hive_orchestration.seal import Sealer, sealer_for
from hive_orchestration.store import MOST_TOGETHER, MOST_WAITING
from hive_orchestration.transaction import Tx
from operations.errors import (
    Conflict,
    Gone,
    HiveError,
    InvalidRequest,
    NotFound,
    TooLarge,
    Unavailable,
)
from operations.tasks import (
    FINAL,
    MOST_BYTES,
    TRANSITIONS,
    Beat,
    Claim,
    ClaimRequest,
    Concurrency,
    NewDrone,
    NewTask,
    RateLimit,
    Retry,
    Task,
    TaskStatus,
)
from tests.queues import Durable, opened
from wire.secret import Secret

DAY_S = 86_400
ONCE = Retry(attempts=1)
AT_ONCE = Retry(backoff_s=0.0)

TIMES = pytest.mark.parametrize("times", [1, 2, 3])


# -- what comes in ---------------------------------------------------------------------------


async def test_a_task_comes_back_as_it_was_queued(durable: Durable) -> None:
    said = {
        "type": "deployment",
        "title": "Deploy – now",
        "description": "how",
        "payload": {"script": "deploy.sh", "n": [1, 2.5, None, {"ü": "🐝"}], "nul": "a\0b"},
        "metadata": {"from": "test"},
        "priority": 5,
        "role": "builder",
        "capabilities": ["python", "bash"],
        "tags": ["x"],
        "callback_url": "https://example.org/done",
    }
    task = await durable.add(**said)
    found = await durable.queue.get("default", task.id)
    assert found == task
    assert {name: getattr(found, name) for name in said} == {
        **said,
        "capabilities": ("python", "bash"),
        "tags": ("x",),
    }
    assert (found.status, found.attempts, found.max_attempts) == ("queued", 0, 3)
    assert found.created_at == found.updated_at > 1.7e9


@pytest.mark.parametrize("count", [1, 7, 8, 9, 25])
async def test_tasks_that_are_queued_together_come_back_as_each_was_queued(
    durable: Durable, count: int
) -> None:
    some: dict[str, Any] = {
        "not_before": 60.0,
        "deadline": 120.0,
        "idempotency_key": "i",
        "unique_key": "u",
        "concurrency": Concurrency(key="c", limit=2),
        "secrets": {"token": "s3cret"},
    }
    names = [*some, None]
    new = []
    for nr in range(count):
        name = names[nr % len(names)]
        said = {} if name is None else {name: some[name]}
        if name in ("idempotency_key", "unique_key"):
            said = {name: f"{nr}"}
        new.append(NewTask(type=f"t{nr}", payload={"nr": nr}, **said))
    queued = [one.task for one in await durable.queue.enqueue("default", new)]
    assert len({task.id for task in queued}) == count
    for nr, task in enumerate(queued):
        assert await durable.queue.get("default", task.id) == task
        assert (task.type, task.payload) == (f"t{nr}", {"nr": nr})
        name = names[nr % len(names)]
        for asked in ("not_before", "deadline", "idempotency_key", "unique_key"):
            assert (getattr(task, asked) is not None) == (asked == name)


async def test_tasks_are_queued_all_or_none(durable: Durable) -> None:
    await durable.add(idempotency_key="k")
    wanted = [NewTask(type="a"), NewTask(type="another body", idempotency_key="k")]
    with pytest.raises(Conflict) as refused:
        await durable.queue.enqueue("default", wanted)
    assert refused.value.code == "idempotency_conflict"
    with pytest.raises(NotFound):
        await durable.queue.enqueue("default", [NewTask(type="a"), NewTask(type="b", parent="no")])
    assert await durable.count(schema.tasks) == 1
    made = await durable.queue.enqueue("default", [NewTask(type=f"n{i}") for i in range(100)])
    assert len({one.task.id for one in made}) == 100
    claims = await durable.queue.claim(None, ClaimRequest(n=100))
    assert [claim.task.type for claim in claims] == ["t", *(f"n{i}" for i in range(99))]


@TIMES
async def test_an_idempotency_key_stands_for_one_task(durable: Durable, times: int) -> None:
    new = NewTask(type="t", payload={"a": 1}, secrets={"x": "y"}, idempotency_key="k")
    said = [(await durable.queue.enqueue("default", [new]))[0] for _ in range(times)]
    assert [one.created for one in said] == [True] + [False] * (times - 1)
    assert len({one.task.id for one in said}) == 1
    assert await durable.topics(said[0].task.id) == ["task.queued"]
    [other] = await durable.queue.enqueue("somebody-else", [new])
    assert other.created
    with pytest.raises(Conflict):
        await durable.add(payload={"a": 2}, secrets={"x": "y"}, idempotency_key="k")


async def test_an_idempotency_key_holds_when_its_task_is_done(durable: Durable) -> None:
    task = await durable.add(idempotency_key="k")
    await durable.queue.complete((await durable.take()).claim_id, 1)
    again = await durable.add(idempotency_key="k")
    assert (again.id, again.status, again.result) == (task.id, "completed", 1)


async def test_a_uniqueness_key_stands_for_what_is_not_finished(durable: Durable) -> None:
    first = await durable.add(unique_key="u")
    assert (await durable.add(unique_key="u", payload={"other": 1})).id == first.id
    claim = await durable.take()
    assert (await durable.add(unique_key="u")).id == first.id
    await durable.queue.fail(claim.claim_id, "no", retryable=False)
    second = await durable.add(unique_key="u")
    assert second.id != first.id
    with pytest.raises(Conflict) as refused:
        await durable.queue.replay(None, first.id)
    assert refused.value.code == "not_unique"
    assert await durable.status(first.id) == "failed"
    await durable.queue.cancel(None, second.id)
    assert (await durable.queue.replay(None, first.id)).status == "queued"


async def test_keys_hold_within_one_call_too(durable: Durable) -> None:
    new = [NewTask(type="t", unique_key="u"), NewTask(type="t", unique_key="u")]
    new += [NewTask(type="t", idempotency_key="k"), NewTask(type="t", idempotency_key="k")]
    said = await durable.queue.enqueue("default", new)
    assert said[0].task.id == said[1].task.id
    assert said[2].task.id == said[3].task.id
    assert await durable.count(schema.tasks) == 2


async def test_ids_can_be_chosen_once(durable: Durable) -> None:
    new = [NewTask(type="t")]
    [queued] = await durable.queue.enqueue("default", new, ids=["job-1"])
    assert queued.task.id == "job-1"
    for tenant in ("default", "another"):
        with pytest.raises(Conflict):
            await durable.queue.enqueue(tenant, new, ids=["job-1"])
    for bad in ("", "a~1", "a/b", "-a", "ü", "a" * 129, "a\0"):
        with pytest.raises(InvalidRequest):
            await durable.queue.enqueue("default", new, ids=[bad])


async def test_a_parent_must_be_there_and_be_the_tenants_own(durable: Durable) -> None:
    parent = await durable.add("a")
    child = await durable.add("a", parent=parent.id)
    assert (await durable.queue.page("a", parent=parent.id)).tasks == (child,)
    for tenant, of in (("a", "nobody"), ("b", parent.id)):
        with pytest.raises(NotFound):
            await durable.add(tenant, parent=of)


async def test_a_task_can_be_delayed(durable: Durable) -> None:
    task = await durable.add(not_before=60)
    assert task.not_before is not None
    await durable.queue.sweep()
    assert await durable.nothing()
    await durable.pass_time(61)
    assert (await durable.take()).task.id == task.id


async def test_what_has_not_ended_by_its_deadline_has_failed(durable: Durable) -> None:
    waiting = await durable.add("a", deadline=10)
    working = await durable.add("b", deadline=10, lease_s=600, callback_url="https://example.org/")
    held = await durable.add("c", deadline=10)
    in_time = await durable.add("d", deadline=60)
    claim = await durable.take("b")
    await durable.queue.move(None, held.id, "in_progress")
    await durable.pass_time(11)
    for task in (waiting, working, held):
        found = await durable.queue.get(None, task.id)
        assert (found.status, (found.error or {})["code"]) == ("failed", "deadline_exceeded")
        assert (await durable.topics(task.id))[-1] == "task.failed"
    with pytest.raises(Conflict):
        await durable.queue.complete(claim.claim_id)
    assert await durable.status(in_time.id) == "queued"
    replayed = await durable.queue.replay(None, waiting.id)
    assert replayed.deadline is not None
    await durable.queue.sweep()
    assert await durable.status(waiting.id) == "queued"


async def test_a_stale_claim_costs_the_others_nothing(durable: Durable) -> None:
    """They share a transaction, of which a refusal that has written nothing is no end."""
    await durable.add()
    claim = await durable.take()
    await durable.queue.complete(claim.claim_id, 1)
    before = durable.store.transactions
    stale = [durable.queue.complete(claim.claim_id, other) for other in (2, 3)]
    said = await asyncio.gather(durable.add(), *stale, durable.add(), return_exceptions=True)
    assert [isinstance(one, Conflict) for one in said] == [False, True, True, False]
    assert durable.store.transactions - before <= 2


async def test_what_waits_when_a_transaction_begins_is_in_it(durable: Durable) -> None:
    before = durable.store.transactions
    writes = [durable.store.write(lambda tx, n=n: n) for n in range(MOST_WAITING + 1)]  # type: ignore[misc]
    *said, one_too_many = await asyncio.gather(*writes, return_exceptions=True)
    assert said == list(range(MOST_WAITING))
    assert isinstance(one_too_many, Unavailable)
    assert durable.store.transactions - before == math.ceil(MOST_WAITING / MOST_TOGETHER)


async def test_what_waits_when_the_queue_closes_is_written(durable: Durable) -> None:
    adding = [asyncio.create_task(durable.add()) for _ in range(10)]
    await asyncio.sleep(0)  # they wait for the database
    adding[3].cancel()
    await asyncio.gather(durable.queue.close(), durable.queue.close())
    said = await asyncio.gather(*adding, return_exceptions=True)
    made = [one for one in said if isinstance(one, Task)]
    assert isinstance(said[3], asyncio.CancelledError)
    async with opened(durable.kind, durable.url) as again:
        kept = {task.id for task in (await again.queue.page(None)).tasks}
    assert len(made) == 9
    assert kept.issuperset(task.id for task in made)


async def test_what_is_closed_says_so(durable: Durable) -> None:
    await durable.queue.close()
    for call in (durable.queue.get(None, "x"), durable.queue.claim(None, ClaimRequest())):
        with pytest.raises(Unavailable, match="closed"):
            await call


async def test_a_page_of_large_tasks_is_short(durable: Durable) -> None:
    large = {"text": "x" * 1_000_000}
    made = [(await durable.add(payload=large)).id for _ in range(20)]
    first = await durable.queue.page(None)
    assert 14 <= len(first.tasks) < 20
    rest = await durable.queue.page(None, cursor=first.next)
    assert [task.id for task in (*first.tasks, *rest.tasks)] == made[::-1]
    assert rest.next is None


async def test_a_claim_is_its_tenants_own(durable: Durable) -> None:
    task = await durable.add("a")
    id = (await durable.take()).claim_id
    queue = durable.queue
    for call in (
        queue.beat(id, Beat(), tenant="b"),
        queue.complete(id, 1, tenant="b"),
        queue.complete(id, 1, status="review_pending", tenant="b"),
        queue.fail(id, "no", tenant="b"),
        queue.release(id, tenant="b"),
    ):
        with pytest.raises(NotFound):
            await call
    assert await durable.status(task.id) == "assigned"
    assert (await queue.complete(id, 2, tenant="a")).result == 2


async def test_what_is_too_large_to_keep_is_refused(durable: Durable) -> None:
    text = "é" * 600_000
    with pytest.raises(TooLarge):
        await durable.add(payload={"text": text})
    await durable.add()
    claim = await durable.take()
    for ending in ("completed", "review_pending"):
        with pytest.raises(TooLarge):
            await durable.queue.complete(claim.claim_id, text, status=ending)
    assert (await durable.queue.complete(claim.claim_id, 1)).result == 1


async def test_no_deadline_takes_away_what_waits_for_a_decision(durable: Durable) -> None:
    task = await durable.add(deadline=10)
    claim = await durable.take()
    await durable.queue.complete(claim.claim_id, 7, status="review_pending")
    await durable.pass_time(11)
    assert await durable.status(task.id) == "review_pending"
    await durable.queue.move(None, task.id, "approved")
    await durable.pass_time(11)
    assert (await durable.queue.move(None, task.id, "completed")).result == 7
    for late in (
        durable.queue.complete(claim.claim_id, 7),
        durable.queue.complete(claim.claim_id, 7, status="review_pending"),
    ):
        with pytest.raises(Conflict):  # others have decided since
            await late


@pytest.mark.parametrize("bad", ["a\0b", "a\ud800"])
async def test_texts_that_no_database_keeps_are_refused_and_harm_nobody(
    durable: Durable, bad: str
) -> None:
    good = [durable.add(payload={"n": n}) for n in range(20)]
    task = await durable.add()
    claim = await durable.take()
    refused = [
        durable.queue.get(None, bad),
        durable.queue.page(None, type=bad),
        durable.queue.pause(bad),
        durable.queue.heard(None, bad),
        durable.tell(bad, "s", "default", {}),
        durable.queue.enqueue(bad, [NewTask(type="t")]),
    ]
    if "\0" in bad:
        refused.append(durable.add(title=bad))
    else:
        refused.append(durable.queue.complete(claim.claim_id, {"deep": [bad]}))
        refused.append(durable.queue.fail(claim.claim_id, bad))
    said = await asyncio.gather(*refused, *good, return_exceptions=True)
    for one in said[: len(refused)]:
        assert isinstance(one, InvalidRequest), one
    assert all(isinstance(one, Task) for one in said[len(refused) :])
    assert await durable.status(task.id) == "assigned"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), {1, 2}, b"bytes", object()])
async def test_a_result_that_is_no_json_is_refused(durable: Durable, bad: Any) -> None:
    await durable.add()
    claim = await durable.take()
    with pytest.raises(InvalidRequest):
        await durable.queue.complete(claim.claim_id, bad)
    assert (await durable.queue.complete(claim.claim_id, [1])).status == "completed"


async def test_a_result_may_be_large_but_not_deep(durable: Durable) -> None:
    await durable.add()
    claim = await durable.take()
    for depth in (300, 5_000):
        deep: Any = 1
        for _ in range(depth):
            deep = [deep]
        with pytest.raises(InvalidRequest):
            await durable.queue.complete(claim.claim_id, deep)
    large = {"a": "ü" * 500_000, "n": 10**400}
    assert (await durable.queue.complete(claim.claim_id, large)).result == large


async def test_numbers_out_of_range_break_nothing(durable: Durable) -> None:
    await durable.add()
    assert len((await durable.queue.page(None, limit=-5)).tasks) == 1
    assert len((await durable.queue.page(None, limit=10**30)).tasks) == 1
    assert len(await durable.queue.waiting(None, limit=-1)) == 1
    for cursor in ("-1", "x", "9" * 19, "²", ""):
        with pytest.raises(InvalidRequest):
            await durable.queue.page(None, cursor=cursor)
    for after in (10**30, -(10**30)):
        following = aiter(durable.queue.follow(None, after, ("nothing",)))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(following), 0.2)
    claim = await durable.take()
    with pytest.raises(InvalidRequest):
        await durable.queue.beat(claim.claim_id, Beat(), lease_s=float("inf"))
    with pytest.raises(InvalidRequest):
        await durable.queue.beat(claim.claim_id, Beat(), lease_s=-1)


# -- who is given what -----------------------------------------------------------------------


async def test_first_come_first_served(durable: Durable) -> None:
    ids = [(await durable.add()).id for _ in range(5)]
    assert [(await durable.take()).task.id for _ in range(5)] == ids
    assert await durable.nothing()


async def test_priority_goes_first_and_waiting_counts(durable: Durable) -> None:
    low = await durable.add(priority=0)
    await durable.pass_time(5)
    high = await durable.add(priority=10)
    assert [task.id for task in await durable.queue.waiting(None)] == [high.id, low.id]
    assert (await durable.take()).task.id == high.id
    await durable.pass_time(11 * 60)
    await durable.add(priority=10)
    assert (await durable.take()).task.id == low.id  # aged past what came later


async def test_roles_and_capabilities_and_types_decide_who_may_claim(durable: Durable) -> None:
    task = await durable.add(role="builder", capabilities=["python", "gpu"], type="build")
    able = {"role": "builder", "capabilities": ("gpu", "python", "more"), "types": ("x", "build")}
    for lacking in (
        {**able, "role": ""},
        {**able, "role": "tester"},
        {**able, "capabilities": ("gpu",)},
        {**able, "types": ("x",)},
    ):
        assert await durable.nothing(**lacking)
    assert await durable.nothing("another tenant", **able)
    assert (await durable.take(**able)).task.id == task.id


async def test_who_has_a_role_may_do_what_needs_none(durable: Durable) -> None:
    task = await durable.add()
    assert (await durable.take(role="builder")).task.id == task.id


async def test_a_tenant_with_one_task_is_served_within_two_rounds(durable: Durable) -> None:
    new = [NewTask(type="t") for _ in range(100)]
    await asyncio.gather(*(durable.queue.enqueue("crowd", new) for _ in range(100)))
    for _ in range(10):
        await durable.take()
    for name in ("aaa", "zzz"):
        await durable.add(name)
        rounds = [(await durable.take()).task.tenant for _ in range(2)]
        assert name in rounds
    await durable.add("zzz")
    claims = await durable.queue.claim(None, ClaimRequest(n=10))
    assert Counter(claim.task.tenant for claim in claims) == {"crowd": 9, "zzz": 1}


async def test_tenants_take_turns(durable: Durable) -> None:
    for tenant in ("a", "b", "c"):
        for _ in range(4):
            await durable.add(tenant)
    served = [(await durable.take()).task.tenant for _ in range(12)]
    assert all(set(served[i : i + 3]) == {"a", "b", "c"} for i in range(0, 12, 3))


async def test_a_claim_waits_for_work(durable: Durable) -> None:
    waiting = [asyncio.create_task(durable.take(wait=30)) for _ in range(3)]
    await durable.last_event()  # by now they wait
    tasks = {(await durable.add()).id for _ in range(3)}
    async with asyncio.timeout(10):
        assert {(await one).task.id for one in waiting} == tasks


async def test_a_claim_waits_no_longer_than_it_says(durable: Durable) -> None:
    began = asyncio.get_running_loop().time()
    assert await durable.nothing(wait=0.3)
    assert asyncio.get_running_loop().time() - began >= 0.3


async def test_a_claim_whose_caller_goes_is_given_back(durable: Durable) -> None:
    async def gone() -> bool:
        claiming = asyncio.create_task(durable.queue.claim(None, ClaimRequest(wait=30, key="k")))
        await durable.last_event()
        await durable.add()
        claiming.cancel()
        with pytest.raises(asyncio.CancelledError):
            await claiming
        return True

    assert await gone()
    again = await durable.take(wait=20, key="k")
    assert again.task.attempts == 1


@TIMES
async def test_a_claim_sent_again_gives_the_same_tasks(durable: Durable, times: int) -> None:
    for _ in range(4):
        await durable.add(secrets={"a": "b"})
    asked = ClaimRequest(drone_id="d", n=2, key="k")
    said = [await durable.queue.claim("default", asked) for _ in range(times)]
    assert len({claim.claim_id for claims in said for claim in claims}) == 2
    assert len(await durable.queue.claim(None, ClaimRequest(n=9, drone_id="d", key="l"))) == 2


async def test_a_claims_key_opens_nothing_of_another_tenants(durable: Durable) -> None:
    await durable.add("a", secrets={"token": "of a"})
    asked = ClaimRequest(drone_id="d", key="k")
    [claim] = await durable.queue.claim("a", asked)
    assert await durable.queue.claim("b", asked) == []
    assert await durable.queue.claim("a", ClaimRequest(drone_id="e", key="k")) == []
    assert (await durable.queue.claim("a", asked))[0].secrets == claim.secrets


async def test_what_waits_can_be_seen_in_order(durable: Durable) -> None:
    low = await durable.add(priority=-5)
    later = await durable.add(not_before=60, type="late", priority=99)
    high = await durable.add(priority=50)
    await durable.add("other")
    seen = await durable.queue.waiting("default")
    assert [task.id for task in seen] == [high.id, low.id, later.id]
    assert [task.id for task in await durable.queue.waiting(None, type="late")] == [later.id]
    assert len(await durable.queue.waiting(None, limit=2)) == 2


# -- limits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 3])
async def test_no_more_than_a_concurrency_limit_are_worked_on(durable: Durable, limit: int) -> None:
    key = Concurrency(key="c", limit=limit)
    for _ in range(8):
        await durable.add(concurrency=key)
    other = await durable.add()
    done = 0
    claims = await durable.queue.claim(None, ClaimRequest(n=20))
    assert len(claims) == limit + 1
    assert other.id in {claim.task.id for claim in claims}
    at_work = [claim for claim in claims if claim.task.id != other.id]
    while at_work:
        await durable.queue.complete(at_work.pop().claim_id)
        done += 1
        at_work += await durable.queue.claim(None, ClaimRequest(n=20))
        assert len(at_work) == min(limit, 8 - done)
    assert done == 8


async def test_concurrency_is_counted_for_each_tenant(durable: Durable) -> None:
    for tenant in ("a", "b"):
        for _ in range(2):
            await durable.add(tenant, concurrency=Concurrency(key="c"))
    claims = await durable.queue.claim(None, ClaimRequest(n=10))
    assert {claim.task.tenant for claim in claims} == {"a", "b"}
    assert len(claims) == 2


async def _complete(durable: Durable, claim: Claim) -> None:
    await durable.queue.complete(claim.claim_id)


async def _give_up(durable: Durable, claim: Claim) -> None:
    await durable.queue.fail(claim.claim_id, "no", retryable=False)


async def _fail(durable: Durable, claim: Claim) -> None:
    await durable.queue.fail(claim.claim_id, "later")


async def _to_review(durable: Durable, claim: Claim) -> None:
    await durable.queue.complete(claim.claim_id, status="review_pending")


async def _die(durable: Durable, claim: Claim) -> None:
    await durable.pass_time(61)


async def _hear_of_cancel(durable: Durable, claim: Claim) -> None:
    await durable.queue.cancel(None, claim.task.id)
    await durable.queue.fail(claim.claim_id, "as you wish")


async def _miss_the_deadline(durable: Durable, claim: Claim) -> None:
    def due(tx: Any) -> None:
        tx.conn.execute(
            update(schema.tasks).where(schema.tasks.c.id == claim.task.id).values(deadline=1)
        )

    await durable.store.write(due)
    await durable.queue.sweep()


@pytest.mark.parametrize(
    "end",
    [_complete, _give_up, _fail, _to_review, _die, _hear_of_cancel, _miss_the_deadline],
)
async def test_whatever_ends_a_claim_lets_the_next_with_its_key_begin(
    durable: Durable, end: Callable[[Durable, Claim], Awaitable[None]]
) -> None:
    key = Concurrency(key="c")
    await durable.add(concurrency=key)
    second = await durable.add(concurrency=key)
    claim = await durable.take()
    assert await durable.nothing()
    waiting = asyncio.create_task(durable.take(wait=30))
    await durable.last_event()
    await end(durable, claim)
    async with asyncio.timeout(10):
        assert (await waiting).task.id == second.id


@pytest.mark.parametrize("how", ["cancel", "move", "remove", "deadline", "pause"])
async def test_none_stays_parked_behind_one_that_is_not_begun(durable: Durable, how: str) -> None:
    key = Concurrency(key="c")
    first = await durable.add(concurrency=key)
    second = await durable.add(concurrency=key, role="r", priority=9, deadline=100)
    third = await durable.add(concurrency=key)
    claim = await durable.take()
    assert claim.task.id == first.id
    assert await durable.nothing(role="r")  # both are parked
    await durable.queue.complete(claim.claim_id)  # the second, of another lane, is brought back
    if how == "cancel":
        await durable.queue.cancel(None, second.id)
    elif how == "move":
        await durable.queue.move(None, second.id, "in_progress")
    elif how == "remove":
        assert await durable.queue.remove(None, second.id)
    elif how == "deadline":
        await durable.pass_time(101)
    else:
        await durable.queue.pause("r")
    assert (await durable.take(role="r")).task.id == third.id


async def test_one_that_a_rate_puts_off_keeps_no_other_parked(durable: Durable) -> None:
    key = Concurrency(key="c")
    slow = RateLimit(key="r", limit=1, per_s=600)
    await durable.add(concurrency=key, rate=slow)
    await durable.add(concurrency=key, rate=slow)
    third = await durable.add(concurrency=key)
    claim = await durable.take()
    assert await durable.nothing()
    await durable.queue.complete(claim.claim_id)
    assert (await durable.take()).task.id == third.id


async def test_each_tasks_own_limit_counts(durable: Durable) -> None:
    await durable.add(concurrency=Concurrency(key="c", limit=3))
    alone = await durable.add(concurrency=Concurrency(key="c", limit=1))
    await durable.add(concurrency=Concurrency(key="c", limit=3))
    claims = await durable.queue.claim(None, ClaimRequest(n=9))
    assert alone.id not in {claim.task.id for claim in claims}
    for claim in claims:
        await durable.queue.complete(claim.claim_id)
    assert (await durable.take()).task.id == alone.id


async def test_no_more_begin_than_a_rate_allows(durable: Durable) -> None:
    rate = RateLimit(key="r", limit=3, per_s=30)
    for _ in range(10):
        await durable.add(rate=rate, lease_s=3600)
    assert len(await durable.queue.claim(None, ClaimRequest(n=10))) == 3  # the burst
    await durable.pass_time(5)
    assert await durable.nothing()
    begun = 0
    for _ in range(7):  # then one each 10 s
        await durable.pass_time(10)
        begun += len(await durable.queue.claim(None, ClaimRequest(n=10)))
    assert begun == 7
    await durable.add(rate=rate)
    await durable.add("other", rate=rate)
    assert (await durable.take("other")).task.tenant == "other"


async def test_a_turn_of_a_rate_brings_back_few_of_many_that_wait_for_it(durable: Durable) -> None:
    rate = RateLimit(key="r", limit=1, per_s=1)
    new = NewTask(type="t", rate=rate, lease_s=3600)
    made = [queued.task.id for queued in await durable.queue.enqueue("default", [new] * 500)]

    async def ready() -> int:
        states = [row["state"] for row in await durable.rows(schema.tasks)]
        return states.count(schema.READY)

    begun: list[str] = []
    while await ready():
        begun += [claim.task.id for claim in await durable.queue.claim(None, ClaimRequest(n=9))]
    for _ in range(SPREAD_S):
        await durable.pass_time(1)
        assert 0 < await ready() < 100
        begun += [claim.task.id for claim in await durable.queue.claim(None, ClaimRequest(n=9))]
        assert await ready() == 0
    assert len(begun) > SPREAD_S
    assert begun == made[: len(begun)]
    for id in made[len(begun) : -1]:
        await durable.queue.cancel(None, id)
    await durable.pass_time(SPREAD_S)
    assert (await durable.take()).task.id == made[-1]


async def test_a_turn_of_a_slow_rate_brings_back_few_too(durable: Durable) -> None:
    new = NewTask(type="t", rate=RateLimit(key="r", limit=1, per_s=60))
    await durable.queue.enqueue("default", [new] * 300)
    while await durable.queue.claim(None, ClaimRequest(n=9)):
        pass
    await durable.pass_time(61)
    states = [row["state"] for row in await durable.rows(schema.tasks)]
    assert 0 < states.count(schema.READY) < 100


async def test_limits_of_some_hold_up_nobody_else(durable: Durable) -> None:
    limited = NewTask(type="t", concurrency=Concurrency(key="c"))
    for _ in range(3):
        await durable.queue.enqueue("default", [limited] * 100)
    free = await durable.add()
    await durable.take()
    async with asyncio.timeout(10):
        assert (await durable.take(wait=10)).task.id == free.id


# -- leases ----------------------------------------------------------------------------------


async def test_a_lease_holds_as_long_as_its_drone_is_heard(durable: Durable) -> None:
    task = await durable.add(lease_s=60)
    claim = await durable.take(drone_id="d/1")
    assert (claim.lease_s, claim.task.status, claim.task.drone_id) == (60, "assigned", "d/1")
    for progress in (0.1, 0.5):
        await durable.pass_time(50)
        kept = await durable.queue.beat(claim.claim_id, Beat(progress=progress))
        assert (kept.lease_s, kept.cancel) == (60, False)
    found = await durable.queue.get(None, task.id)
    assert (found.status, found.progress) == ("in_progress", 0.5)
    done = await durable.queue.complete(claim.claim_id, {"r": 1})
    assert (done.status, done.result, done.progress, done.lease_until) == (
        *("completed", {"r": 1}),
        *(1.0, None),
    )
    assert await durable.topics(task.id) == [
        "task.queued",
        "task.assigned",
        "task.started",
        "task.progress",
        "task.completed",
    ]


async def test_a_claims_own_lease_is_the_claims_alone(durable: Durable) -> None:
    await durable.add(lease_s=60, retry=AT_ONCE)
    claim = await durable.take(lease_s=900)
    assert claim.lease_s == 900
    assert (await durable.queue.beat(claim.claim_id, Beat())).lease_s == 900
    assert (await durable.queue.beat(claim.claim_id, Beat(), lease_s=300)).lease_s == 300
    assert (await durable.queue.beat(claim.claim_id, Beat())).lease_s == 300
    await durable.pass_time(301)
    assert (await durable.take()).lease_s == 60


async def test_who_comes_late_is_refused_and_the_task_runs_elsewhere(durable: Durable) -> None:
    task = await durable.add(lease_s=10, retry=AT_ONCE)
    late = await durable.take(drone_id="late")
    await durable.pass_time(11)
    found = await durable.queue.get(None, task.id)
    assert (found.status, (found.error or {})["code"]) == ("queued", "lease_expired")
    await _all_refused(durable, late.claim_id)
    second = await durable.take(drone_id="second")
    assert (second.task.id, second.task.attempts) == (task.id, 2)
    await _all_refused(durable, late.claim_id)
    assert (await durable.queue.complete(second.claim_id, 2)).result == 2
    await _all_refused(durable, late.claim_id)
    assert (await durable.queue.get(None, task.id)).result == 2


async def test_a_lease_ends_by_the_clock_and_not_by_the_sweep(durable: Durable) -> None:
    await durable.add(lease_s=10)
    claim = await durable.take()

    def expire(tx: Any) -> None:
        tx.conn.execute(update(schema.tasks).values(lease_until=tx.now))

    await durable.store.write(expire)
    await _all_refused(durable, claim.claim_id)


async def _all_refused(durable: Durable, claim_id: str) -> None:
    for call in (
        durable.queue.beat(claim_id, Beat(progress=0.9, logs="late")),
        durable.queue.complete(claim_id, 1),
        durable.queue.complete(claim_id, 1, status="review_pending", said=Beat(logs="late")),
        durable.queue.fail(claim_id, "late"),
    ):
        with pytest.raises(Conflict) as refused:
            await call
        assert refused.value.code == "stale_claim"


async def test_forged_claims_open_nothing(durable: Durable) -> None:
    task = await durable.add(secrets={"a": "b"})
    claim = await durable.take()
    id, fence, token = claim.claim_id.split("~")
    forged = {
        f"{id}~{fence}~{token[:-1]}{'A' if token[-1] != 'A' else 'B'}": Conflict,
        f"{id}~{int(fence) - 1}~{token}": Conflict,
        f"{id}~{int(fence) + 1}~{token}": NotFound,
        f"{id}~999999999~{token}": NotFound,
        f"another~{fence}~{token}": NotFound,
        f"{id}~{fence}": InvalidRequest,
        f"{id}~1e3~{token}": InvalidRequest,
        f"{id}~{fence}~{token}\n": InvalidRequest,
        f"{id}'--~{fence}~{token}": InvalidRequest,
        f"{id}~{'9' * 30}~{token}": InvalidRequest,
        "": InvalidRequest,
        "\0~1~a": InvalidRequest,
    }
    for forgery, answer in forged.items():
        for call in (
            durable.queue.complete(forgery) if answer is not InvalidRequest else None,
            durable.queue.beat(forgery, Beat()) if answer is not InvalidRequest else None,
        ):
            if call is not None:
                with pytest.raises(answer):
                    await call
        with pytest.raises(answer):
            await durable.queue.release(forgery)
    assert await durable.status(task.id) == "assigned"
    assert (await durable.queue.beat(claim.claim_id, Beat())).cancel is False


@TIMES
async def test_a_drone_hears_of_a_cancel_at_its_next_heartbeat(
    durable: Durable, times: int
) -> None:
    task = await durable.add()
    claim = await durable.take()
    for _ in range(times):
        asked = await durable.queue.cancel(None, task.id)
        assert (asked.status, asked.cancel_requested) == ("assigned", True)
    assert (await durable.queue.beat(claim.claim_id, Beat())).cancel is True
    for _ in range(times):
        assert (await durable.queue.fail(claim.claim_id, "stopped")).status == "cancelled"
    assert Counter(await durable.topics(task.id))["task.cancel_requested"] == 1
    assert (await durable.topics(task.id))[-1] == "task.cancelled"


async def test_a_cancelled_task_is_not_tried_again_nor_kept_for_review(durable: Durable) -> None:
    dead, review, done = [await durable.add(lease_s=10) for _ in range(3)]
    claims = {claim.task.id: claim for claim in await durable.queue.claim(None, ClaimRequest(n=3))}
    for task in (dead, review, done):
        await durable.queue.cancel(None, task.id)
    for _ in range(2):
        said = await durable.queue.complete(claims[review.id].claim_id, 1, status="review_pending")
        assert said.status == "cancelled"
    assert (await durable.queue.complete(claims[done.id].claim_id)).status == "completed"
    await durable.pass_time(11)
    assert await durable.status(dead.id) == "cancelled"


@TIMES
async def test_a_claim_given_back_counts_as_no_attempt(durable: Durable, times: int) -> None:
    task = await durable.add(retry=ONCE)
    claim = await durable.take(key="k")
    for _ in range(times):
        back = await durable.queue.release(claim.claim_id)
        assert (back.status, back.attempts) == ("queued", 0)
    with pytest.raises(Conflict):
        await durable.queue.complete(claim.claim_id)
    again = await durable.take(key="k")
    assert (again.task.id, again.task.attempts) == (task.id, 1)
    with pytest.raises(Conflict):
        await durable.queue.release(claim.claim_id)


@TIMES
async def test_each_call_may_come_again(durable: Durable, times: int) -> None:
    async def again(call: Callable[[], Awaitable[Any]]) -> Any:
        said = [await call() for _ in range(times)]
        assert all(one == said[0] for one in said)
        return said[0]

    queue = durable.queue
    callback = "https://example.org/"
    done, failed, dead, review = [
        await durable.add(callback_url=callback, retry=retry)
        for retry in (Retry(), Retry(), ONCE, Retry())
    ]
    claims = {claim.task.id: claim for claim in await queue.claim(None, ClaimRequest(n=4))}
    said = Beat(progress=0.5, logs="line", metadata={"a": 1})
    await again(lambda: queue.beat(claims[done.id].claim_id, said))
    await again(lambda: queue.complete(claims[done.id].claim_id, [1], said=Beat(logs="end")))
    await again(lambda: queue.fail(claims[failed.id].claim_id, "why", said=Beat(logs="end")))
    await again(lambda: queue.fail(claims[dead.id].claim_id, "why"))
    await again(lambda: queue.complete(claims[review.id].claim_id, 1, status="review_pending"))
    await again(lambda: queue.move(None, review.id, "approved"))
    await again(lambda: queue.move(None, review.id, "completed", {"by": "me"}))
    ended = ["task.queued", "task.assigned"]
    assert await durable.topics(done.id) == [*ended, "task.started", "task.completed"]
    assert await durable.topics(failed.id) == [*ended, "task.retrying"]
    assert await durable.topics(dead.id) == [*ended, "task.failed"]
    assert [line["text"] for line in await queue.lines(None, done.id)] == ["line", "end"]
    assert [line["text"] for line in await queue.lines(None, failed.id)] == ["end"]
    # Out of order: what comes after the end changes nothing.
    for late in (
        queue.beat(claims[done.id].claim_id, said),
        queue.fail(claims[done.id].claim_id, ""),
    ):
        with pytest.raises(Conflict):
            await late
    delivered = Counter(row["task"] for row in await durable.rows(schema.deliveries))
    assert delivered == {done.id: 2, dead.id: 1, review.id: 1}


async def test_a_completion_that_says_something_else_is_refused(durable: Durable) -> None:
    await durable.add()
    claim = await durable.take()
    await durable.queue.complete(claim.claim_id, {"a": 1})
    with pytest.raises(Conflict):
        await durable.queue.complete(claim.claim_id, {"a": 2})


async def test_several_are_completed_each_by_itself(durable: Durable) -> None:
    await durable.queue.enqueue("default", [NewTask(type="t")] * 3)
    claims = await durable.queue.claim(None, ClaimRequest(n=3))
    await durable.queue.release(claims[1].claim_id)
    said = await durable.queue.complete_all([(claim.claim_id, 1) for claim in claims])
    assert [getattr(one, "status", None) for one in said] == ["completed", 409, "completed"]


# -- attempts --------------------------------------------------------------------------------


async def test_a_failed_task_is_tried_again_after_a_pause_that_doubles(durable: Durable) -> None:
    retry = Retry(attempts=6, backoff_s=10, backoff_max_s=60)
    task = await durable.add(retry=retry)
    for attempt, longest in enumerate((10, 20, 40, 60, 60), 1):
        claim = await durable.take()
        assert claim.task.attempts == attempt
        back = await durable.queue.fail(claim.claim_id, "not yet", code="busy")
        assert (back.status, back.error) == ("queued", {"message": "not yet", "code": "busy"})
        assert back.not_before is not None
        assert longest / 2 - 0.01 <= back.not_before - back.updated_at <= longest + 0.01
        assert await durable.nothing()
        await durable.pass_time(longest)
    claim = await durable.take()
    assert (await durable.queue.fail(claim.claim_id, "never")).status == "failed"
    assert Counter(await durable.topics(task.id))["task.retrying"] == 5
    await durable.pass_time(3600)
    assert await durable.nothing()


async def test_a_task_whose_drones_die_fails_for_good_at_last(durable: Durable) -> None:
    task = await durable.add(lease_s=10, retry=Retry(attempts=3, backoff_s=0))
    for _ in range(3):
        await durable.take()
        await durable.pass_time(11)
        await durable.queue.sweep()
    found = await durable.queue.get(None, task.id)
    assert (found.status, found.attempts) == ("failed", 3)


@TIMES
async def test_a_dead_task_can_be_replayed(durable: Durable, times: int) -> None:
    task = await durable.add(retry=ONCE, payload={"a": 1}, secrets={"s": "t"})
    claim = await durable.take()
    await durable.queue.fail(claim.claim_id, "no")
    for _ in range(times):
        again = await durable.queue.replay(None, task.id)
        assert (again.status, again.attempts, again.finished_at) == ("queued", 0, None)
    second = await durable.take()
    assert (second.task.id, second.task.attempts, second.secrets) == (task.id, 1, {"s": "t"})
    with pytest.raises(Conflict):
        await durable.queue.complete(claim.claim_id)
    await durable.queue.complete(second.claim_id)
    with pytest.raises(Conflict):
        await durable.queue.replay(None, task.id)


async def test_the_next_attempt_can_begin_now(durable: Durable) -> None:
    task = await durable.add(retry=Retry(backoff_s=300))
    await durable.queue.fail((await durable.take()).claim_id, "no")
    assert (await durable.queue.retry(None, task.id)).not_before is None
    assert (await durable.take()).task.attempts == 2


# -- by hand ---------------------------------------------------------------------------------

_PATHS: dict[TaskStatus, tuple[TaskStatus, ...]] = {
    "queued": (),
    "assigned": ("assigned",),
    "in_progress": ("in_progress",),
    "review_pending": ("in_progress", "review_pending"),
    "approved": ("in_progress", "review_pending", "approved"),
    "rejected": ("in_progress", "review_pending", "rejected"),
    "rework_needed": ("in_progress", "review_pending", "rework_needed"),
    "escalated": ("escalated",),
    "completed": ("completed",),
    "failed": ("failed",),
    "cancelled": ("cancelled",),
}


@pytest.mark.parametrize("start", TRANSITIONS)
async def test_a_task_moves_only_as_the_table_says(durable: Durable, start: TaskStatus) -> None:
    for to in TRANSITIONS:
        task = await durable.add(concurrency=Concurrency(key="c"))
        for step in _PATHS[start]:
            task = await durable.queue.move(None, task.id, step)
        before = len(await durable.events(task.id))
        assert task.status == start
        if to == start or to in TRANSITIONS[start]:
            moved = await durable.queue.move(None, task.id, to)
            assert moved.status == to
            assert (moved.finished_at is not None) == (to in FINAL)
            assert len(await durable.events(task.id)) == before + (to != start)
        else:
            with pytest.raises(Conflict) as refused:
                await durable.queue.move(None, task.id, to)
            assert refused.value.code == "impossible_transition"
            assert await durable.queue.get(None, task.id) == task
        claimed = await durable.queue.claim(None, ClaimRequest())
        assert [claim.task.id for claim in claimed] == [task.id] * (
            (to == "queued" and (start == "queued" or "queued" in TRANSITIONS[start]))
            or (start == "queued" and to not in TRANSITIONS[start] and to != start)
        )
        for claim in claimed:
            await durable.queue.complete(claim.claim_id)


async def test_nobody_moves_what_is_leased(durable: Durable) -> None:
    task = await durable.add()
    claim = await durable.take()
    for to in TRANSITIONS:
        with pytest.raises(Conflict):
            await durable.queue.move(None, task.id, to)
    with pytest.raises(Conflict):
        await durable.queue.remove(None, task.id)
    assert (await durable.queue.complete(claim.claim_id)).status == "completed"


async def test_cancel_ends_what_nobody_works_on(durable: Durable) -> None:
    for path in _PATHS.values():
        task = await durable.add()
        for step in path:
            task = await durable.queue.move(None, task.id, step)
        cancelled = await durable.queue.cancel(None, task.id)
        assert cancelled.status == (task.status if task.status in FINAL else "cancelled")


@TIMES
async def test_a_task_can_be_deleted(durable: Durable, times: int) -> None:
    task = await durable.add(callback_url="https://example.org/")
    claim = await durable.take()
    await durable.queue.complete(claim.claim_id, said=Beat(logs="a"))
    gone = [await durable.queue.remove(None, task.id) for _ in range(times)]
    assert gone == [True] + [False] * (times - 1)
    for table in (schema.tasks, schema.logs, schema.deliveries):
        assert await durable.count(table) == 0
    assert (await durable.topics(task.id))[-1] == "task.deleted"
    with pytest.raises(NotFound):
        await durable.queue.get(None, task.id)
    with pytest.raises(NotFound):
        await durable.queue.complete(claim.claim_id)


async def test_other_tenants_tasks_are_not_there(durable: Durable) -> None:
    task = await durable.add("a")
    queue = durable.queue
    for call in (
        queue.get("b", task.id),
        queue.lines("b", task.id),
        queue.cancel("b", task.id),
        queue.replay("b", task.id),
        queue.retry("b", task.id),
        queue.move("b", task.id, "completed"),
    ):
        with pytest.raises(NotFound):
            await call
    assert not await queue.remove("b", task.id)
    assert (await queue.page("b")).tasks == ()
    assert await queue.waiting("b") == []
    assert await queue.roles("b") == []
    assert await durable.nothing("b")
    assert await queue.get("a", task.id) == task


async def test_pages_hold_every_task_once(durable: Durable) -> None:
    ids = [(await durable.add(type=f"t{n % 2}", role="r" * (n % 3 == 0))).id for n in range(25)]
    await durable.queue.move(None, ids[3], "failed")
    seen: list[str] = []
    cursor = None
    while True:
        page = await durable.queue.page(None, limit=7, cursor=cursor)
        seen += [task.id for task in page.tasks]
        cursor = page.next
        if cursor is None:
            break
        await durable.add("meanwhile")
    assert seen == ids[::-1]
    assert [t.id for t in (await durable.queue.page(None, statuses=["failed"])).tasks] == [ids[3]]
    some = await durable.queue.page("default", statuses=["queued"], type="t0", role="r")
    assert [t.id for t in some.tasks] == [id for id in ids[::-1] if ids.index(id) % 6 == 0]


# -- roles and drones ------------------------------------------------------------------------


@TIMES
async def test_a_paused_role_is_given_nothing(durable: Durable, times: int) -> None:
    task = await durable.add(role="r")
    free = await durable.add()
    begun = await durable.add(role="r", priority=50)
    claim = await durable.take(role="r")
    assert claim.task.id == begun.id
    changed = [await durable.queue.pause("r") for _ in range(times)]
    assert changed == [True] + [False] * (times - 1)
    assert (await durable.take(role="r")).task.id == free.id
    assert await durable.nothing(role="r")
    await durable.queue.complete(claim.claim_id)
    [nobody, role] = await durable.queue.roles(None)
    assert (role.role, role.paused, role.queued, nobody.leased) == ("r", True, 1, 1)
    waiting = asyncio.create_task(durable.take(role="r", wait=30))
    await durable.last_event()
    changed = [await durable.queue.resume("r") for _ in range(times)]
    assert changed == [True] + [False] * (times - 1)
    async with asyncio.timeout(10):
        assert (await waiting).task.id == task.id
    topics = [event.topic for event in await durable.events("r")]
    assert topics == ["role.paused", "role.resumed"]


async def test_a_pause_holds_in_the_same_moment(durable: Durable) -> None:
    await durable.add(role="r")
    first = durable.queue.claim(None, ClaimRequest(role="r"))
    second = durable.queue.claim(None, ClaimRequest(role="r"))
    _, claims, again = await asyncio.gather(durable.queue.pause("r"), first, second)
    assert (claims, again) == ([], [])


async def test_roles_show_what_waits_and_runs(durable: Durable) -> None:
    for n in range(3):
        await durable.add(role="r", not_before=60 * (n == 0))
    await durable.pass_time(30)
    await durable.take(role="r")
    [role] = await durable.queue.roles(None)
    assert (role.queued, role.delayed, role.leased, role.paused) == (1, 1, 1, False)
    assert role.oldest_s is not None
    assert role.oldest_s >= 30


@TIMES
async def test_drones_are_known_from_when_they_register(durable: Durable, times: int) -> None:
    queue = durable.queue
    new = NewDrone(id="d/1", role="r", capabilities=("b", "a"), metadata={"m": 1})
    for _ in range(times):
        drone = await queue.register("a", new)
    assert (drone.capabilities, drone.status, drone.metadata) == (("a", "b"), "active", {"m": 1})
    assert [one.id for one in await queue.drones("a", "r", active=True)] == ["d/1"]
    assert await queue.drones("b") == []
    with pytest.raises(NotFound):
        await queue.heard("b", "d/1")
    await durable.pass_time(601)
    assert await queue.drones("a", active=True) == []
    assert len(await queue.drones("a")) == 1
    for _ in range(times):
        await queue.heard("a", "d/1", "idle")
    await queue.heard("a", "d/1", "active")
    assert len(await queue.drones(None, active=True)) == 1
    assert await queue.unregister("a", "d/1")
    assert not await queue.unregister("a", "d/1")
    with pytest.raises(NotFound):
        await queue.drone("a", "d/1")
    assert await durable.topics("d/1") == [
        *("drone.joined", "drone.idle"),
        *("drone.active", "drone.left"),
    ]


# -- events, logs, callbacks -----------------------------------------------------------------


async def test_events_come_in_order_and_from_any_place(durable: Durable) -> None:
    async def life(n: int) -> None:
        await durable.add(type=f"t{n}")
        claim = await durable.take(types=(f"t{n}",))
        await durable.queue.beat(claim.claim_id, Beat())
        await durable.queue.complete(claim.claim_id)

    await asyncio.gather(*(life(n) for n in range(20)))
    events = await durable.events()
    assert [event.seq for event in events] == sorted({event.seq for event in events})
    by_subject: dict[str, list[str]] = {}
    for event in events:
        by_subject.setdefault(event.subject, []).append(event.topic)
    whole = ["task.queued", "task.assigned", "task.started", "task.completed"]
    assert list(by_subject.values()) == [whole] * 20
    middle = events[37].seq
    assert await durable.events(after=middle) == events[38:]


async def test_events_are_told_when_they_happen_and_by_topic(durable: Durable) -> None:
    async def first(topics: tuple[str, ...], tenant: str | None = None) -> Any:
        async for event in durable.queue.follow(tenant, place, topics):
            return event
        raise AssertionError

    place = await durable.last_event()
    wanted = [("hive.*",), ("task.completed", "drone.left"), ("*",), ()]
    following = [asyncio.create_task(first(topics)) for topics in wanted]
    of_b = asyncio.create_task(first((), "b"))
    await durable.add("a")
    await durable.queue.complete((await durable.take()).claim_id)
    await durable.tell("hive.joined", "gpu-0", "", {"url": "http://x"})
    await durable.add("b")
    async with asyncio.timeout(10):
        told = [(await one).topic for one in following]
        assert (await of_b).tenant == "b"
    assert told == ["hive.joined", "task.completed", "task.queued", "task.queued"]


async def test_topics_are_no_patterns_of_the_database(durable: Durable) -> None:
    await durable.tell("taskXone", "s", "", {})
    await durable.tell("task%", "s", "", {})
    async for event in durable.queue.follow(None, 0, ("task%*",)):
        assert event.topic == "task%"
        break


async def test_who_follows_learns_that_events_are_not_kept_any_more(durable: Durable) -> None:
    for _ in range(3):
        await durable.add()
    await durable.pass_time(sweep.RETAIN_S + DAY_S)
    await durable.add()
    last = await durable.last_event()
    await durable.queue.retain()
    for place in (0, last - 2):
        with pytest.raises(Gone):
            async for _ in durable.queue.follow(None, place):
                pass
    assert [event.seq for event in await durable.events(after=last - 1)] == [last]
    await durable.pass_time(sweep.RETAIN_S + DAY_S)
    await durable.queue.retain()
    assert await durable.last_event() == last


async def test_a_hive_that_two_queens_see_is_told_of_once(durable: Durable) -> None:
    async def told(topic: Any, hive_id: str, instance: str) -> None:
        await durable.store.write(lambda tx: seen(tx, topic, hive_id, instance))

    steps = [("joined", "1"), ("left", "1"), ("joined", "1"), ("joined", "2"), ("left", "2")]
    for what, instance in steps:
        await asyncio.gather(*(told(f"hive.{what}", "gpu-0", instance) for _ in range(2)))
        await told("hive.left", "gpu-0", "0")  # somebody hears late that an earlier one is gone
    await told("hive.joined", "gpu-1", "1")
    assert await durable.topics("gpu-0") == [f"hive.{what}" for what, _ in steps]
    assert await durable.topics("gpu-1") == ["hive.joined"]


async def test_logs_are_kept_by_attempt_and_bounded(durable: Durable) -> None:
    task = await durable.add(retry=AT_ONCE)
    claim = await durable.take()
    await durable.queue.beat(claim.claim_id, Beat(logs="first\0"))
    await durable.queue.fail(claim.claim_id, "no", said=Beat(logs="second"))
    await durable.queue.sweep()
    claim = await durable.take()
    await durable.queue.beat(claim.claim_id, Beat(logs="third"))
    lines = await durable.queue.lines(None, task.id)
    assert [(line["claim"], line["text"]) for line in lines] == [
        *((1, "first\ufffd"), (1, "second")),
        (2, "third"),
    ]

    def many(tx: Any) -> None:
        row = {"task": task.id, "fence": 2, "at": tx.now, "text": "."}
        tx.conn.execute(insert(schema.logs), [row] * (MOST_LOG_ROWS + 50))

    await durable.store.write(many)
    await durable.queue.beat(claim.claim_id, Beat(logs="last"))
    lines = await durable.queue.lines(None, task.id)
    assert len(lines) == MOST_LOG_ROWS
    assert lines[-1]["text"] == "last"


async def test_of_many_large_logs_the_newest_are_shown(durable: Durable) -> None:
    task, other = await durable.add(), await durable.add()

    def many(tx: Any) -> None:
        row = {"task": task.id, "fence": 1, "at": tx.now}
        rows = [{**row, "text": f"{n:02} ".ljust(1_000_000, ".")} for n in range(20)]
        rows.append({**row, "task": other.id, "text": "." * (MOST_PAGE + 1)})
        tx.conn.execute(insert(schema.logs), rows)

    await durable.store.write(many)
    lines = await durable.queue.lines(None, task.id)
    assert [int(line["text"][:3]) for line in lines] == list(range(4, 20))
    assert len(await durable.queue.lines(None, other.id)) == 1


async def test_metadata_is_bounded_however_often_some_is_added(durable: Durable) -> None:
    task = await durable.add(metadata={"first": "x"})
    claim = await durable.take()
    part = "x" * (MOST_BYTES // 4)

    async def add(name: str) -> None:
        await durable.queue.beat(claim.claim_id, Beat(metadata={name: part}, logs=name))

    for name in ("a", "b", "c", "c"):  # the same name again is replaced
        await add(name)
    for said in (add("d"), durable.queue.complete(claim.claim_id, said=Beat(metadata={"d": part}))):
        with pytest.raises(TooLarge) as refused:
            await said
        assert refused.value.param == "metadata"
    found = await durable.queue.get(None, task.id)
    assert (found.status, sorted(found.metadata)) == ("in_progress", ["a", "b", "c", "first"])
    lines = await durable.queue.lines(None, task.id)
    assert [line["text"] for line in lines] == ["a", "b", "c"]
    await durable.queue.complete(claim.claim_id, status="review_pending")
    with pytest.raises(TooLarge):
        await durable.queue.move(None, task.id, "approved", {"ü": "ü" * (MOST_BYTES // 8)})
    await durable.queue.move(None, task.id, "approved", {"a": ""})


async def test_callbacks_are_written_with_what_happened(durable: Durable) -> None:
    url = "https://example.org/cb"
    task = await durable.add("a", callback_url=url, retry=ONCE)
    claim = await durable.take()
    await durable.queue.beat(claim.claim_id, Beat())
    await durable.queue.beat(claim.claim_id, Beat(progress=0.25))
    await durable.queue.fail(claim.claim_id, "no")
    rows = await durable.rows(schema.deliveries)
    said = [json.loads(row["body"]) for row in rows]
    assert {(row["task"], row["url"], row["attempts"]) for row in rows} == {(task.id, url, 0)}
    assert [one["status"] for one in said] == ["in_progress", "in_progress", "failed"]
    assert {(one["jobId"], one["tenant"]) for one in said} == {(task.id, "a")}


async def test_what_is_old_goes_but_for_what_is_still_to_be_delivered(durable: Durable) -> None:
    old = [await durable.add() for _ in range(3)]
    told = await durable.add(callback_url="https://example.org/")
    waiting = await durable.add(priority=-100)
    for _ in range(4):
        claim = await durable.take(key=None)
        await durable.queue.complete(claim.claim_id, said=Beat(logs="x"))
    fresh = await durable.queue.retain()
    assert fresh == 0
    await durable.pass_time(sweep.RETAIN_S + 1)
    assert await durable.queue.retain() > 3
    left = {task.id for task in (await durable.queue.page(None)).tasks}
    assert left == {told.id, waiting.id}
    assert old[0].id not in left
    assert {row["task"] for row in await durable.rows(schema.logs)} == {told.id}
    assert await durable.count(schema.events) == 1


# -- secrets ---------------------------------------------------------------------------------


async def test_secrets_are_seen_by_who_claims_the_task_alone(durable: Durable) -> None:
    secret = "correct horse battery staple"
    task = await durable.add(
        secrets={"githubToken": secret}, callback_url="https://example.org/", idempotency_key="k"
    )
    claim = await durable.take(key="k")
    assert claim.secrets == {"githubToken": secret}
    await durable.queue.beat(claim.claim_id, Beat(progress=0.5))
    await durable.queue.fail(claim.claim_id, "no", retryable=False)
    for table in schema.metadata.sorted_tables:
        assert secret not in repr(await durable.rows(table))
    seen = [await durable.queue.get(None, task.id), await durable.queue.page(None)]
    assert secret not in repr(seen)
    assert "githubToken" not in repr(seen)
    assert secret not in repr(await durable.events())


async def test_no_digest_lets_short_secrets_be_guessed(durable: Durable) -> None:
    new = NewTask(type="t", secrets={"pin": "1234"}, idempotency_key="k")
    [first] = await durable.queue.enqueue("default", [new])
    [again] = await durable.queue.enqueue("default", [new])
    assert (again.task.id, again.created) == (first.task.id, False)
    with pytest.raises(Conflict):
        await durable.queue.enqueue("default", [new.model_copy(update={"secrets": {"pin": "1"}})])
    under_another_key = Queue(durable.store, Sealer(b"x" * 32))
    await under_another_key.enqueue("other", [new])
    [here, there] = await durable.rows(schema.tasks)
    assert here["digest"] != there["digest"]
    assert (await durable.take("default")).secrets == {"pin": "1234"}


async def test_a_task_whose_secrets_cannot_be_read_fails_and_says_so(durable: Durable) -> None:
    sealed = await durable.add(secrets={"a": "b"})
    plain = await durable.add()
    other = Queue(durable.store, Sealer(b"x" * 32))
    [claim] = await other.claim(None, ClaimRequest(n=2))
    assert claim.task.id == plain.id
    failed = await durable.queue.get(None, sealed.id)
    assert (failed.status, (failed.error or {})["code"]) == ("failed", "secrets_sealed")
    await durable.queue.replay(None, sealed.id)
    assert (await durable.take()).secrets == {"a": "b"}


async def test_secrets_of_before_the_cluster_had_one_can_be_read_still(
    durable: Durable, tmp_path: Path
) -> None:
    key_file = tmp_path / "queue.key"
    store = durable.store
    before = Queue(store, sealer_for(None, key_file))
    await before.enqueue("default", [NewTask(type="t", secrets={"a": "b"})])
    secret = Secret.new()
    after = Queue(store, sealer_for(secret, key_file))
    [claim] = await after.claim(None, ClaimRequest())
    assert claim.secrets == {"a": "b"}
    await after.enqueue("default", [NewTask(type="t", secrets={"c": "d"})])
    elsewhere = Queue(store, sealer_for(secret, tmp_path / "none.key"))
    [claim] = await elsewhere.claim(None, ClaimRequest())
    assert claim.secrets == {"c": "d"}


async def test_a_key_that_comes_twice_in_a_call_makes_one_task(durable: Durable) -> None:
    for key in ("idempotency_key", "unique_key"):
        new = NewTask.model_validate({"type": "t", key: "k"})
        first, second = await durable.queue.enqueue("default", [new, new])
        assert (first.created, second.created) == (True, False)
        assert first.task == second.task == await durable.queue.get("default", first.id)


# -- the store -------------------------------------------------------------------------------


async def test_one_that_breaks_half_way_leaves_nothing_and_harms_nobody(durable: Durable) -> None:
    def half(error: Exception) -> Any:
        def step(tx: Any) -> None:
            tx.conn.execute(insert(schema.pauses), {"role": "half", "at": 1})
            tx.event("half.way", "s", "", {})
            raise error

        return durable.store.write(step)

    def twice(tx: Any) -> None:
        tx.conn.execute(insert(schema.pauses), [{"role": "twice", "at": 1}] * 2)

    said = await asyncio.gather(
        durable.add(),
        half(Conflict("refused")),
        durable.store.write(twice),
        durable.add(),
        half(ZeroDivisionError()),
        durable.add(),
        return_exceptions=True,
    )
    good, bad = [said[n] for n in (0, 3, 5)], [said[n] for n in (1, 2, 4)]
    assert all(isinstance(one, Task) for one in good), said
    assert [getattr(one, "status", None) for one in bad] == [409, 409, 500]
    assert all(isinstance(one, HiveError) for one in bad)
    assert await durable.count(schema.pauses) == 0
    assert [event.topic for event in await durable.events()] == ["task.queued"] * 3


async def test_who_looks_within_a_transaction_finds_what_was_queued_in_it(durable: Durable) -> None:
    before = durable.store.transactions
    first, given, same, other, deleted = await asyncio.gather(
        durable.add(idempotency_key="k"),
        durable.store.write(lambda tx: claiming.claim(tx, None, ClaimRequest(n=5))),
        durable.add(idempotency_key="k"),
        durable.queue.enqueue("default", [NewTask(type="t")], ids=["chosen"]),
        durable.queue.remove(None, "chosen"),
    )
    assert durable.store.transactions == before + 1
    assert [one.task.id for one in given] == [first.id] == [same.id]
    assert (other[0].task.id, deleted) == ("chosen", True)
    topics = ["task.queued", "task.assigned", "task.queued", "task.deleted"]
    assert [event.topic for event in await durable.events()] == topics


@pytest.mark.parametrize("looks", [False, True])
async def test_a_step_that_is_refused_after_it_has_queued_leaves_nothing(
    durable: Durable, looks: bool
) -> None:
    def refused(tx: Tx) -> None:
        if looks:  # at what the one before has queued
            assert [row["title"] for row in tx.conn.execute(select(schema.tasks))] == ["a"]
        enqueue.enqueue(tx, "default", [Wanted(NewTask(type="t", title="refused"))])
        raise Conflict("refused")

    await durable.nothing()
    before = durable.store.transactions
    said = await asyncio.gather(
        durable.add(title="a"),
        durable.store.write(refused),
        durable.add(title="b"),
        return_exceptions=True,
    )
    assert durable.store.transactions == before + 1  # it cost the others nothing
    assert [type(one) for one in said] == [Task, Conflict, Task]
    assert [row["title"] for row in await durable.rows(schema.tasks)] == ["a", "b"]
    assert len(await durable.events()) == 2


async def test_ids_are_uuids_that_grow_with_time(durable: Durable) -> None:
    ids: list[UUID] = []
    for _ in range(3):
        [*queued] = await durable.queue.enqueue("default", [NewTask(type="t")] * 20)
        ids += sorted(UUID(one.id) for one in queued)
        await durable.pass_time(-0.002)  # the next ones are later
    assert len(set(ids)) == 60
    assert {(id.version, id.variant) for id in ids} == {(7, RFC_4122)}
    assert [str(id) for id in ids] == sorted(
        str(row["id"]) for row in await durable.rows(schema.tasks)
    )


async def test_a_queue_keeps_all_of_it_when_it_is_opened_again(durable: Durable) -> None:
    from tests.queues import KEY, open_store

    task = await durable.add(payload={"a": 1})
    claim = await durable.take()
    await durable.queue.close()
    await durable.queue.close()
    with pytest.raises(HiveError):
        await durable.add()
    async with Queue(await open_store(durable.kind, durable.url), Sealer(KEY)) as again:
        assert (await again.get(None, task.id)).status == "assigned"
        assert (await again.complete(claim.claim_id)).status == "completed"
