"""The client of the durable queue, against a real queen, and through a connection that breaks."""

from __future__ import annotations

import asyncio
import re
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from job_client.tasks import TaskClient
from operations.errors import Conflict, Gone, HiveError, NotFound, Unavailable, WorkerBroke
from operations.tasks import Beat, ClaimRequest, NewDrone, NewTask, QueueEvent, Retry, Task
from tests.cluster import Cluster, Daemon, clean_env, cluster, until
from tests.flaky import RETRY_AFTER_S, Flaky, flaky
from wire.keys import Keys
from wire.secret import Secret

MANUAL = Path(__file__).resolve().parent.parent / "docs" / "queue.md"


@pytest.fixture(scope="module")
async def queen() -> AsyncIterator[Daemon]:
    async with cluster() as made:
        yield await made.queen()


@pytest.fixture
async def tasks(queen: Daemon) -> AsyncIterator[TaskClient]:
    async with TaskClient(queen.url) as client:
        yield client


@pytest.fixture
async def proxy(queen: Daemon) -> AsyncIterator[Flaky]:
    async with flaky(queen.url) as made:
        yield made


@pytest.fixture
async def shaky(proxy: Flaky) -> AsyncIterator[TaskClient]:
    """A client behind the proxy."""
    async with TaskClient(proxy.url) as client:
        yield client


@pytest.fixture
def kind() -> str:
    """A type, or a role, that no other test uses."""
    return f"kind-{uuid.uuid4().hex[:8]}"


def asking(kind: str, **more: object) -> ClaimRequest:
    return ClaimRequest.model_validate({"drone_id": "d", "types": (kind,), **more})


async def all_of(tasks: TaskClient, kind: str) -> list[Task]:
    return [task async for task in tasks.each(type=kind)]


# -- every call ----------------------------------------------------------------------------------


async def test_a_task_lives_from_queue_to_result(tasks: TaskClient, kind: str) -> None:
    payload = {"a": 1, "nothing": None, "deep": {"none": None}}
    new = NewTask(type=kind, title="T", payload=payload, secrets={"token": "hush"})
    task = await tasks.enqueue(new)
    assert (task.status, task.title, task.payload) == ("queued", "T", payload)
    assert await tasks.get(task.id) == task
    [claim] = await tasks.claim(asking(kind))
    assert (claim.task.id, claim.secrets) == (task.id, {"token": "hush"})
    kept = await tasks.beat(claim.claim_id, Beat(progress=0.5, logs="half way"), lease_s=30)
    assert (kept.cancel, kept.lease_s) == (False, 30)
    assert (await tasks.get(task.id)).progress == 0.5
    done = await tasks.complete(claim.claim_id, {"n": None}, said=Beat(logs="done"))
    assert (done.status, done.result) == ("completed", {"n": None})
    assert [line["text"] for line in await tasks.lines(task.id)] == ["half way", "done"]
    assert await tasks.remove(task.id)
    assert not await tasks.remove(task.id)
    with pytest.raises(NotFound, match="task"):
        await tasks.get(task.id)


async def test_pages_and_waiting(tasks: TaskClient, kind: str) -> None:
    new = [NewTask(type=kind, priority=n % 2) for n in range(120)]
    made = await tasks.enqueue_all(new[:100]) + await tasks.enqueue_all(new[100:])
    assert len({one.id for one in made if one.created}) == 120
    page = await tasks.page(type=kind, limit=50, statuses=("queued", "failed"))
    assert len(page.tasks) == 50
    assert page.next is not None
    assert [task.id for task in await all_of(tasks, kind)] == [one.id for one in made][::-1]
    waiting = await tasks.waiting(type=kind, limit=5)
    assert [task.id for task in waiting] == [one.id for one in made[1:10:2]]


async def test_cancel_retry_replay_and_move(tasks: TaskClient, kind: str) -> None:
    retry = Retry(attempts=2, backoff_s=3600, backoff_max_s=3600)
    task = await tasks.enqueue(NewTask(type=kind, retry=retry))
    [claim] = await tasks.claim(asking(kind))
    assert (await tasks.fail(claim.claim_id, "once")).status == "queued"
    assert await tasks.claim(asking(kind)) == []  # not for an hour
    await tasks.retry(task.id)
    [claim] = await tasks.claim(asking(kind))
    failed = await tasks.fail(claim.claim_id, "twice", code="broken", retryable=False)
    assert (failed.status, failed.error) == ("failed", {"message": "twice", "code": "broken"})
    assert (await tasks.replay(task.id)).status == "queued"
    moved = await tasks.move(task.id, "in_progress", {"by": "hand", "nobody": None})
    assert (moved.status, moved.metadata) == ("in_progress", {"by": "hand", "nobody": None})
    with pytest.raises(Conflict, match="cannot become assigned"):
        await tasks.move(task.id, "assigned")
    assert (await tasks.cancel(task.id)).status == "cancelled"


async def test_cancel_reaches_who_works_on_it(tasks: TaskClient, kind: str) -> None:
    task = await tasks.enqueue(NewTask(type=kind))
    [claim] = await tasks.claim(asking(kind))
    assert (await tasks.cancel(task.id)).cancel_requested
    assert (await tasks.beat(claim.claim_id, Beat())).cancel
    assert (await tasks.release(claim.claim_id)).status == "cancelled"


async def test_a_claim_waits_for_a_task(tasks: TaskClient, kind: str) -> None:
    waiting = asyncio.create_task(tasks.claim(asking(kind, wait=30)))
    await asyncio.sleep(0)
    task = await tasks.enqueue(NewTask(type=kind))
    [claim] = await waiting
    assert claim.task.id == task.id


async def test_several_completions_each_by_itself(tasks: TaskClient, kind: str) -> None:
    await tasks.enqueue_all([NewTask(type=kind)] * 3)
    claims = await tasks.claim(asking(kind, n=3))
    await tasks.release(claims[1].claim_id)
    said = await tasks.complete_all([(claim.claim_id, {"ok": 1}) for claim in claims])
    assert isinstance(said[1], Conflict)
    assert said[1].message
    assert [one.status for one in said if isinstance(one, Task)] == ["completed"] * 2


async def test_roles_are_paused_and_resumed(tasks: TaskClient, kind: str) -> None:
    await tasks.enqueue(NewTask(type=kind, role=kind))
    assert await tasks.pause(kind)
    assert not await tasks.pause(kind)
    [role] = [role for role in await tasks.roles() if role.role == kind]
    assert (role.paused, role.queued) == (True, 1)
    assert await tasks.claim(asking(kind, role=kind)) == []
    assert await tasks.resume(kind)
    assert len(await tasks.claim(asking(kind, role=kind))) == 1


async def test_drones_come_and_go(tasks: TaskClient, kind: str) -> None:
    id = f"{kind}/1"  # as older workers are called, path-like
    new = NewDrone(id=id, role=kind, capabilities=("gpu", "bash"), metadata={"rack": None})
    drone = await tasks.register(new)
    assert (drone.role, set(drone.capabilities)) == (kind, {"gpu", "bash"})
    assert (await tasks.heard(id, "idle")).status == "idle"
    assert (await tasks.drone(id)).id == id
    assert [one.id for one in await tasks.drones(kind)] == [id]
    assert await tasks.drones(kind, active=True) == []
    assert await tasks.unregister(id)
    assert not await tasks.unregister(id)
    with pytest.raises(NotFound, match="drone"):
        await tasks.heard(id)


async def test_a_stale_claim_is_told_so(tasks: TaskClient, kind: str) -> None:
    await tasks.enqueue(NewTask(type=kind))
    [claim] = await tasks.claim(asking(kind))
    await tasks.release(claim.claim_id)
    [again] = await tasks.claim(asking(kind))
    for call in (
        tasks.beat(claim.claim_id, Beat()),
        tasks.complete(claim.claim_id),
        tasks.fail(claim.claim_id, "late"),
        tasks.release(claim.claim_id),
    ):
        with pytest.raises(Conflict):
            await call
    assert (await tasks.complete(again.claim_id)).status == "completed"


async def test_keys_see_their_own_tenants_tasks(fresh: Cluster, kind: str) -> None:
    secret = Secret.new()
    fresh.env = {"HIVE_SECRET": secret.text}
    queen = await fresh.queen()
    keys = Keys(secret)
    ann, _ = keys.make(scopes=("queue", "drone"), tenant="ann")
    bob, _ = keys.make(scopes=("queue",), tenant="bob")
    async with (
        TaskClient(queen.url, api_key=ann) as anns,
        TaskClient(queen.url, api_key=bob) as bobs,
    ):
        task = await anns.enqueue(NewTask(type=kind))
        assert task.tenant == "ann"
        with pytest.raises(NotFound):
            await bobs.get(task.id)
        with pytest.raises(HiveError, match="drone") as refused:
            await bobs.claim(asking(kind))
        assert refused.value.status == 403
        assert len(await anns.claim(asking(kind))) == 1


# -- what is lost on the way ---------------------------------------------------------------------


async def test_a_task_whose_answer_is_lost_is_queued_once(
    shaky: TaskClient, proxy: Flaky, kind: str
) -> None:
    proxy.lose = 2
    task = await shaky.enqueue(NewTask(type=kind))
    assert [one.id for one in await all_of(shaky, kind)] == [task.id]
    assert proxy.seen.count("POST /v1/tasks") == 3


async def test_many_whose_answer_is_lost_are_queued_once(
    shaky: TaskClient, proxy: Flaky, kind: str
) -> None:
    known = NewTask(type=kind, idempotency_key=f"{kind}-known")
    await shaky.enqueue(known)
    proxy.lose = 1
    made = await shaky.enqueue_all([NewTask(type=kind), known])
    assert [one.created for one in made] == [True, False]
    assert len(await all_of(shaky, kind)) == 2


async def test_a_claim_whose_answer_is_lost_is_the_same_claim(
    shaky: TaskClient, proxy: Flaky, kind: str
) -> None:
    await shaky.enqueue_all([NewTask(type=kind)] * 5)
    proxy.lose = 2
    claims = await shaky.claim(asking(kind, n=2, wait=5))
    assert [claim.task.attempts for claim in claims] == [1, 1]
    assert len([task for task in await all_of(shaky, kind) if task.status == "queued"]) == 3
    proxy.lose = 1
    assert (await shaky.beat(claims[0].claim_id, Beat(progress=0.1))).cancel is False
    proxy.lose = 1
    assert (await shaky.complete(claims[0].claim_id, 7)).result == 7
    proxy.lose = 1
    failed = await shaky.fail(claims[1].claim_id, "once")
    assert (failed.status, failed.attempts) == ("queued", 1)


async def test_what_the_queen_cannot_do_now_is_asked_again_when_she_says(
    shaky: TaskClient, proxy: Flaky, kind: str
) -> None:
    proxy.refuse = 2
    began = time.monotonic()
    await shaky.enqueue(NewTask(type=kind))
    assert time.monotonic() - began >= 2 * RETRY_AFTER_S
    assert len(await all_of(shaky, kind)) == 1


async def test_what_she_refuses_for_good_is_asked_once(
    shaky: TaskClient, proxy: Flaky, kind: str
) -> None:
    key = f"{kind}-key"
    await shaky.enqueue(NewTask(type=kind, idempotency_key=key))
    with pytest.raises(Conflict, match="another body"):
        await shaky.enqueue(NewTask(type=kind, title="other", idempotency_key=key))
    assert proxy.seen.count("POST /v1/tasks") == 2


async def test_patience_ends() -> None:
    async with TaskClient("http://127.0.0.1:9", patience_s=0.3) as tasks:
        with pytest.raises(Unavailable, match="hive up"):
            await tasks.roles()
        with pytest.raises(Unavailable):
            await anext(tasks.events())


async def test_patience_begins_when_a_long_poll_is_cut() -> None:
    asked = 0

    async def cut_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        first = asked == 1
        await reader.readuntil(b"\r\n\r\n")
        if first:
            await asyncio.sleep(0.6)  # longer than the caller's patience
        else:
            writer.write(b'HTTP/1.1 200 OK\r\ncontent-length: 14\r\n\r\n{"claims": []}')
        writer.close()

    server = await asyncio.start_server(cut_once, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, TaskClient(url, patience_s=0.4) as tasks:
        assert await tasks.claim(ClaimRequest(wait=5)) == []
    assert asked == 2


async def test_an_answer_that_is_no_queens_is_called_so() -> None:
    async def nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b'HTTP/1.1 200 OK\r\ncontent-length: 13\r\n\r\n{"tasks": 1} ')
        writer.close()

    server = await asyncio.start_server(nonsense, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, TaskClient(url) as tasks:
        for call in (tasks.get("x"), tasks.waiting(), tasks.roles()):
            with pytest.raises(WorkerBroke, match="not understood"):
                await call


async def test_a_queen_that_comes_back_is_asked_again(fresh: Cluster, kind: str) -> None:
    queen = await fresh.queen()
    async with TaskClient(queen.url, patience_s=60) as tasks:
        await tasks.enqueue(NewTask(type=kind))
        port = int(queen.url.rpartition(":")[2])
        await queen.stop()
        asked = asyncio.create_task(all_of(tasks, kind))
        await fresh.queen(port=port)
        assert len(await asked) == 1


async def test_the_worker_in_the_manual_works(fresh: Cluster) -> None:
    queen = await fresh.queen()
    examples = re.findall(r"^```python\n(.*?)^```", MANUAL.read_text(), re.M | re.S)
    [example] = [one for one in examples if "async def build" in one]
    example = example.replace("http://127.0.0.1:7833", queen.url)
    async with TaskClient(queen.url) as tasks, told_of(example.replace("sleep(1)", "sleep(0)")):
        task = await tasks.enqueue(NewTask(type="build"))

        async def is_done() -> bool:
            return (await tasks.get(task.id)).result == "built"

        await until(is_done, "the worker in the manual")
    async with TaskClient(queen.url) as tasks, told_of(example.replace("sleep(1)", "sleep(60)")):
        task = await tasks.enqueue(NewTask(type="build", lease_s=1))

        async def is_begun() -> bool:
            return (await tasks.get(task.id)).status == "in_progress"

        async def is_cancelled() -> bool:
            return (await tasks.get(task.id)).status == "cancelled"

        await until(is_begun, "a heartbeat")
        await tasks.cancel(task.id)
        await until(is_cancelled, "a worker that heard of it")


@asynccontextmanager
async def told_of(program: str) -> AsyncIterator[None]:
    """A program of Python's, ended with the block."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, env=clean_env())
    try:
        yield
    finally:
        process.kill()
        await process.wait()


# -- events --------------------------------------------------------------------------------------


async def test_events_go_on_after_a_cut_without_gap_or_repeat(
    shaky: TaskClient, proxy: Flaky, tasks: TaskClient, kind: str
) -> None:
    first = await tasks.enqueue(NewTask(type=kind))
    [begun] = [e for e in await happened(tasks, first.id, 1) if e.topic == "task.queued"]
    heard: list[QueueEvent] = []

    async def listen() -> None:
        async with aclosing(shaky.events(["task.*"], after=begun.seq)) as events:
            async for event in events:
                heard.append(event)

    listening = asyncio.create_task(listen())
    ids = []
    try:
        for number in range(4):
            ids += [one.id for one in await tasks.enqueue_all([NewTask(type=kind)] * 3)]
            await until(lambda n=number: len(heard) >= 3 * (n + 1), "the events")
            proxy.cut()
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
    ours = [event for event in heard if event.data.get("type") == kind]
    assert [event.subject for event in ours] == ids
    assert [event.seq for event in heard] == sorted({event.seq for event in heard})
    assert proxy.seen.count("GET /v1/events") >= 4


async def test_events_from_now_on_of_some_topics(tasks: TaskClient, kind: str) -> None:
    await tasks.enqueue(NewTask(type=kind))
    events = tasks.events(["task.completed", "drone.*"], after=None)
    first = asyncio.create_task(anext(events))
    async with aclosing(events):
        while not first.done():  # it may not listen yet
            [claim] = await tasks.claim(asking(kind))
            await tasks.complete(claim.claim_id)
            await tasks.enqueue(NewTask(type=kind))
            await asyncio.wait([first], timeout=0.1)
        assert first.result().topic == "task.completed"


async def test_events_of_the_past_end_where_the_present_was(tasks: TaskClient, kind: str) -> None:
    [before] = await tasks.enqueue_all([NewTask(type=kind)])
    [place] = [event.seq async for event in tasks.past_events() if event.subject == before.id]
    ids: list[str] = []
    for _ in range(6):  # more than come at once
        ids += [one.id for one in await tasks.enqueue_all([NewTask(type=kind)] * 100)]
    heard: list[str] = []
    async for event in tasks.past_events(["task.queued"], after=place):
        if not heard:
            await tasks.enqueue_all([NewTask(type=kind)])
        heard.append(event.subject)
    assert heard == ids
    with pytest.raises(Gone):
        await anext(tasks.past_events(after=10**12))


async def test_a_place_that_is_not_kept_is_gone(tasks: TaskClient) -> None:
    with pytest.raises(Gone):
        await anext(tasks.events(after=10**12))


async def happened(tasks: TaskClient, subject: str, count: int) -> list[QueueEvent]:
    """The first events of a subject."""
    found: list[QueueEvent] = []
    async with aclosing(tasks.events(after=0)) as events:
        async for event in events:
            found += [event] if event.subject == subject else []
            if len(found) == count:
                return found
    raise AssertionError("the events ended")
