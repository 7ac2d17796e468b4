"""The durable queue over HTTP while drones, queens, databases and disks give up."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import signal
import sqlite3
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import asyncpg
import pytest

from hive_orchestration import schema
from tests.cluster import Cluster, until
from tests.disks import Syncs, small_disk, watched_syncs
from tests.postgres import Postgres, binaries, running
from tests.queues import KINDS, opened
from tests.told import Told, told

RECOVERY_S = 10.0
ANSWER_S = 30.0
LEASE_S = 1.0
FOR_EVER = {"attempts": 1000, "backoff_s": 0.0}


@dataclass
class Site:
    """A cluster, and where its queue is kept.

    :param where: a file's path, or a database's URL
    :param server: the database's, to be killed; None: it is a file
    """

    made: Cluster
    kind: str
    where: str
    server: Postgres | None = None

    async def check(
        self, queued: set[str], completed: set[str], *, all_done: bool = False
    ) -> dict[str, dict[str, Any]]:
        """What was confirmed is there, and each task was completed once at most; its rows.

        :param completed: tasks and the fences of the claims that have completed them
        """
        if self.kind == "sqlite":
            with contextlib.closing(sqlite3.connect(self.where)) as found:
                assert found.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        async with opened(self.kind, self.where) as durable:
            rows = {row["id"]: row for row in await durable.rows(schema.tasks)}
            events = await durable.rows(schema.events)
        topics = Counter((event["subject"], event["topic"]) for event in events)
        assert queued <= rows.keys()
        done = {f"{id} {row['fence']}" for id, row in rows.items() if row["status"] == "completed"}
        assert completed <= done
        assert len(done) == len(rows) or not all_done
        for id, row in rows.items():
            assert topics[id, "task.queued"] == 1
            assert topics[id, "task.completed"] == (row["status"] == "completed")
            if row["status"] == "completed":
                by = {"drone": row["drone_id"], "fence": row["fence"]}
                assert json.loads(row["result"]) == by
        return rows


@pytest.fixture(params=KINDS)
def site(request: pytest.FixtureRequest, fresh: Cluster) -> Site:
    if request.param == "sqlite":
        return Site(fresh, "sqlite", str(fresh.folder / "queen" / "queue.db"))
    server: Postgres = request.getfixturevalue("own_postgres")
    fresh.env = {"HIVE_DATABASE": server.create("queue")}
    return Site(fresh, "postgres", fresh.env["HIVE_DATABASE"], server)


class Caller:
    """Asks the same again until the answer is yes.

    What else he may be told is 503, as all errors are told, and when to come again.

    :ivar cut: answers that did not come
    """

    def __init__(self, url: str) -> None:
        self.http = aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(ANSWER_S))
        self.yes = self.refused = self.cut = 0

    async def __call__(self, path: str, body: Any = None) -> Any:
        """GET, or POST where there is a body."""
        while True:
            method = "GET" if body is None else "POST"
            try:
                async with self.http.request(method, path, json=body) as answer:
                    said = await answer.json()
            except (aiohttp.ClientError, OSError, TimeoutError):
                self.cut += 1
            else:
                if answer.status < 400:
                    self.yes += 1
                    return said
                told_to_come_again(answer, said, 503)
                self.refused += 1
            await asyncio.sleep(0.1)


def told_to_come_again(answer: aiohttp.ClientResponse, said: Any, status: int) -> None:
    assert answer.status == status, said
    assert int(answer.headers["retry-after"]) >= 1
    error = said["error"]
    assert (error["hop"], error["retryable"]) == ("queen", True)
    assert error["request_id"] == answer.headers["x-request-id"]
    assert error["message"]
    assert error["type"] == {503: "unavailable_error", 507: "capacity_error"}[status]


@dataclass
class Load:
    """Callers and drones of one queen.

    :ivar queued: tasks, of which she has said that they are
    :ivar by_callers: tasks, and the fences of the claims, of which she has said to callers that
        they are completed
    """

    callers: list[Caller] = field(default_factory=list)
    drones: dict[str, Told] = field(default_factory=dict)
    queued: set[str] = field(default_factory=set)
    by_callers: set[str] = field(default_factory=set)

    def said(self, word: str) -> list[str]:
        """What all drones that ever were have said."""
        return [rest for drone in self.drones.values() for rest in drone.said(word)]

    @property
    def completed(self) -> set[str]:
        return {*self.said("completed"), *self.by_callers}

    @property
    def work(self) -> Counter[str]:
        """How much each of them has had done."""
        done = {name: len(drone.said("completed")) for name, drone in self.drones.items()}
        return Counter(done | {f"caller-{n}": one.yes for n, one in enumerate(self.callers)})

    async def goes_on(self, steps: int, within_s: float) -> None:
        """Return when each caller has been told yes, and each drone, so many times more."""
        before = self.work
        await until(
            lambda: all(now >= before[name] + steps for name, now in self.work.items()),
            "everybody to be served",
            within_s=within_s,
        )

    async def enqueue(self, caller: Caller, *, pause_s: float, together: int = 1) -> None:
        while True:
            new = [
                {"type": "t", "lease_s": LEASE_S * 30, "idempotency_key": uuid.uuid4().hex}
                for _ in range(together)
            ]
            if together == 1:
                made = [await caller("/v1/tasks", new[0])]
            else:
                made = (await caller("/v1/tasks", {"tasks": new}))["tasks"]
            self.queued |= {one["id"] for one in made}
            await asyncio.sleep(pause_s)

    async def work_through(self, caller: Caller) -> None:
        while True:
            asked = {"drone_id": "caller", "wait": 1.0, "key": uuid.uuid4().hex}
            for claim in (await caller("/v1/claims", asked))["claims"]:
                id, fence, _ = claim["claim_id"].split("~")
                at = f"/v1/claims/{claim['claim_id']}"
                await caller(f"{at}/heartbeat", {"progress": 0.5})
                result = {"drone": "caller", "fence": int(fence)}
                done = await caller(f"{at}/complete", {"result": result})
                self.by_callers.add(f"{id} {fence}")
                assert done["status"] == "completed"
                assert await caller(f"/v1/tasks/{id}") == done


@contextlib.asynccontextmanager
async def load(url: str, *, drones: int, enqueuers: int) -> AsyncIterator[Load]:
    """Callers who enqueue, one of them many at once, one who works, and drones."""
    made = Load()
    async with contextlib.AsyncExitStack() as stack:
        for name in (f"drone-{number}" for number in range(drones)):
            drone = told("tests.queue_drone", url, name, 0.0)
            made.drones[name] = await stack.enter_async_context(drone)
        for _ in range(enqueuers + 2):
            made.callers.append(caller := Caller(url))
            stack.push_async_callback(caller.http.close)
        worker, several, *single = made.callers
        async with asyncio.TaskGroup() as group:
            loops = [
                made.work_through(worker),
                made.enqueue(several, pause_s=0.1, together=5),
                *(made.enqueue(caller, pause_s=0.03) for caller in single),
            ]
            running = [group.create_task(loop) for loop in loops]
            yield made
            for task in running:
                task.cancel()


# -- drones ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [6, pytest.param(60, marks=pytest.mark.long)])
@pytest.mark.timeout(300)
async def test_drones_that_die_or_hang_lose_their_tasks_and_no_result_counts_twice(
    site: Site, seconds: float
) -> None:
    queen = await site.made.queen()
    begun, ended = time.monotonic(), asyncio.Event()
    held: set[str] = set()
    late: set[str] = set()
    everybody = Load()
    names = (f"drone-{number}" for number in itertools.count())

    async with contextlib.AsyncExitStack() as stack:

        async def add() -> None:
            name = next(names)
            drone = told("tests.queue_drone", queen.url, name, LEASE_S / 3)
            everybody.drones[name] = await stack.enter_async_context(drone)

        async def enqueue(caller: Caller) -> None:
            while not ended.is_set():
                new = {"type": "t", "lease_s": LEASE_S, "retry": FOR_EVER}
                everybody.queued.add((await caller("/v1/tasks", new))["id"])
                await asyncio.sleep(0.1)

        for _ in range(5):
            await add()
        caller = Caller(queen.url)
        stack.push_async_callback(caller.http.close)
        async with asyncio.TaskGroup() as group:
            group.create_task(enqueue(caller))
            while time.monotonic() < begun + seconds or len(late) < 2:
                name = await at_work(everybody)
                held.add(everybody.drones[name].said("claimed")[-1])
                await everybody.drones[name].end(signal.SIGKILL)
                await add()
                late |= await hang(caller, everybody, await at_work(everybody))
            ended.set()

        async def done() -> bool:
            left = await caller("/v1/tasks?status=queued,assigned,in_progress&limit=1")
            return not left["tasks"]

        await until(done, "all of it", within_s=60)
        assert caller.refused == caller.cut == 0
    await queen.stop()
    rows = await site.check(everybody.queued, everybody.completed, all_done=True)
    assert rows.keys() == everybody.queued
    refused = [line.split() for line in everybody.said("refused")]
    assert {(status, code) for _, _, status, code in refused} <= {("409", "stale_claim")}
    assert late <= {f"{id} {fence}" for id, fence, *_ in refused}
    for id, fence, *_ in refused:
        assert rows[id]["fence"] > int(fence)
    taken_away = [line for line in held if rows[line.split()[0]]["fence"] > int(line.split()[1])]
    assert taken_away
    print(
        f"{len(rows)} tasks; {len(held)} drones killed at work, {len(taken_away)} of their tasks "
        f"given to others; {len(late)} stopped past their lease, {len(refused)} completions refused"
    )


async def at_work(load: Load) -> str:
    """A drone that has begun with a task and not ended it."""

    def found() -> list[str]:
        return [
            name
            for name, drone in load.drones.items()
            if drone.process.returncode is None and drone.lines and drone.lines[-1][0] == "claimed"
        ]

    return str(random.choice(await until(found, "a drone at work")))


async def hang(caller: Caller, load: Load, name: str) -> set[str]:
    """Stop a drone until its lease has run out; what it then completes too late, if it does."""
    drone = load.drones[name]
    claim = drone.said("claimed")[-1]
    id, fence = claim.split()

    async def lost() -> Any:
        task = await caller(f"/v1/tasks/{id}")
        at_it = task["status"] in ("assigned", "in_progress") and task["drone_id"] == name
        return None if at_it else task

    drone.process.send_signal(signal.SIGSTOP)
    try:
        task = await until(lost, f"{name} to lose its task")
    finally:
        drone.process.send_signal(signal.SIGCONT)
    if task.get("result") == {"drone": name, "fence": int(fence)}:
        return set()  # it was faster
    late = f"{claim} 409 stale_claim"
    await until(lambda: late in drone.said("refused"), f"{name} to be refused")
    return {claim}


# -- queens and databases -----------------------------------------------------------------------


@pytest.mark.parametrize(("kills", "steps"), [(4, 5), pytest.param(20, 10, marks=pytest.mark.long)])
@pytest.mark.timeout(600)
async def test_a_killed_queen_has_lost_nothing_that_she_confirmed(
    site: Site, kills: int, steps: int
) -> None:
    """On PostgreSQL the server is killed at the same time."""
    queen = await site.made.queen()
    port = int(queen.url.rpartition(":")[2])
    async with load(queen.url, drones=2, enqueuers=3) as loaded:
        for _ in range(kills):
            await loaded.goes_on(steps, within_s=ANSWER_S)
            await queen.stop(signal.SIGKILL)
            if site.server is not None:
                await asyncio.to_thread(site.server.stop, signal.SIGKILL)
                await asyncio.to_thread(site.server.start)
            await site.check(loaded.queued, loaded.completed)
            queen = await site.made.queen(port=port)
        await loaded.goes_on(steps, within_s=ANSWER_S)
    await queen.stop()
    rows = await site.check(loaded.queued, loaded.completed)
    assert not loaded.said("refused")
    print(f"{len(rows)} tasks, {len(loaded.completed)} completions confirmed")


@pytest.mark.parametrize(
    ("restarts", "pause_s"), [(2, (0, 1)), pytest.param(6, (5, 15), marks=pytest.mark.long)]
)
@pytest.mark.timeout(300)
async def test_callers_of_a_database_that_restarts_are_told_to_come_again(
    fresh: Cluster, own_postgres: Postgres, restarts: int, pause_s: tuple[float, float]
) -> None:
    where = own_postgres.create("queue")
    queen = await fresh.queen(f"--database={where}")
    recoveries: list[float] = []
    async with load(queen.url, drones=2, enqueuers=3) as loaded:
        await loaded.goes_on(5, within_s=ANSWER_S)
        for number in range(restarts):
            await asyncio.sleep(random.uniform(*pause_s))
            how = signal.SIGKILL if number % 2 == 0 else signal.SIGINT
            await asyncio.to_thread(own_postgres.stop, how)
            before = [caller.refused for caller in loaded.callers]
            await until(
                lambda: all(
                    caller.refused > refused
                    for caller, refused in zip(loaded.callers, before, strict=True)  # noqa: B023
                ),
                "every caller to be refused",
                within_s=ANSWER_S,
            )
            await asyncio.to_thread(own_postgres.start)
            back = time.monotonic()
            await loaded.goes_on(1, within_s=RECOVERY_S)
            recoveries.append(time.monotonic() - back)
    await queen.stop()
    rows = await Site(fresh, "postgres", where).check(loaded.queued, loaded.completed)
    assert sum(caller.cut for caller in loaded.callers) == 0
    assert not loaded.said("refused")
    refused = sum(caller.refused for caller in loaded.callers)
    print(f"{len(rows)} tasks, {refused} times 503, back within {max(recoveries):.1f} s")


# -- disks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_a_write_is_answered_after_fsync(fresh: Cluster, kind: str) -> None:
    if kind == "postgres" and binaries() is None:
        pytest.skip("no PostgreSQL here: install Debian's package 'postgresql'")
    with watched_syncs() as syncs, contextlib.ExitStack() as stack:
        if kind == "sqlite":
            queen = await fresh.start("queen", "--port=0", env=syncs.env)
            log = "queue.db-wal"
        else:
            server = stack.enter_context(running(env=syncs.env))
            where = server.create("queue")
            assert await wal_sync_method(where) in ("fdatasync", "fsync")  # what is watched
            queen = await fresh.queen(f"--database={where}")
            log = "/pg_wal/"
        async with aiohttp.ClientSession(queen.url) as http:
            for _ in range(2):
                await every_write(http, syncs, log)
        await queen.stop()


async def wal_sync_method(where: str) -> str:
    connection = await asyncpg.connect(where)
    try:
        return str(await connection.fetchval("SHOW wal_sync_method"))
    finally:
        await connection.close()


async def every_write(http: aiohttp.ClientSession, syncs: Syncs, log: str) -> None:
    """:param log: in the path of the file that a commit is written to"""

    async def write(path: str, body: Any = None, method: str = "POST") -> Any:
        asked = time.monotonic_ns()
        async with http.request(method, path, json=body) as answer:
            answered = time.monotonic_ns()
            said = await answer.json()
        assert answer.status in (200, 201), said
        assert any(asked < at < answered and log in file for at, file in syncs.seen()), path
        return said

    async def claimed() -> str:
        [claim] = (await write("/v1/claims", {"drone_id": "d"}))["claims"]
        return f"/v1/claims/{claim['claim_id']}"

    task = f"/v1/tasks/{(await write('/v1/tasks', {'type': 't'}))['id']}"
    await write(f"{await claimed()}/release")
    at = await claimed()
    await write(f"{at}/heartbeat", {"progress": 0.5, "logs": "half"})
    await write(f"{at}/fail", {"message": "broke", "retryable": False})
    await write(f"{task}/replay")
    await write(f"{await claimed()}/complete", {"result": 1})
    await write(task, method="DELETE")
    two = (await write("/v1/tasks", {"tasks": [{"type": "t"}, {"type": "t"}]}))["tasks"]
    await write(f"/v1/tasks/{two[0]['id']}/cancel")
    done = {"claims": [{"claim_id": (await claimed()).rpartition("/")[2]}]}
    await write("/v1/claims/complete", done)
    await write("/v1/roles/pause", {"role": "r"})
    await write("/v1/roles/resume", {"role": "r"})
    await write("/v1/drones", {"id": "d"})
    await write("/v1/drones/d/heartbeat")


async def test_a_full_disk_is_told_and_work_goes_on_when_there_is_room(fresh: Cluster) -> None:
    folder = fresh.folder / "queen"
    folder.mkdir()
    ballast = folder / "ballast"
    with small_disk(folder):
        queen = await fresh.queen()
        ballast.write_bytes(bytes(3 << 20))
        large = {"type": "large", "payload": {"x": "y" * 100_000}}
        kept: list[str] = []
        async with aiohttp.ClientSession(queen.url) as http:

            async def ask(path: str, body: Any = None) -> tuple[int, Any]:
                method = "GET" if body is None else "POST"
                async with http.request(method, path, json=body) as answer:
                    said = await answer.json()
                if answer.status >= 400:
                    told_to_come_again(answer, said, 507)
                    return answer.status, said["error"]["code"]
                return answer.status, said

            kept.append((await ask("/v1/tasks", {"type": "small"}))[1]["id"])
            [claim] = (await ask("/v1/claims", {"types": ["small"]}))[1]["claims"]
            while (said := await ask("/v1/tasks", large))[0] == 201:
                kept.append(said[1]["id"])
            assert said == (507, "disk_full")
            together = await asyncio.gather(*(ask("/v1/tasks", large) for _ in range(5)))
            assert together == [(507, "disk_full")] * 5
            assert (await ask(f"/v1/tasks/{kept[0]}"))[1]["status"] == "assigned"
            ballast.unlink()
            status, done = await ask(f"/v1/claims/{claim['claim_id']}/complete", {"result": 1})
            assert (status, done["status"]) == (200, "completed")
            kept.append((await ask("/v1/tasks", large))[1]["id"])
            found = (await ask("/v1/tasks?limit=1000"))[1]["tasks"]
            assert [task["id"] for task in found] == kept[::-1]
        await queen.stop()
        with contextlib.closing(sqlite3.connect(folder / "queue.db")) as file:
            assert file.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert {id for (id,) in file.execute("SELECT id FROM tasks")} == set(kept)
