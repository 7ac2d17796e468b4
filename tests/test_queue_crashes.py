"""Processes killed, servers restarted, disks filled: what was answered stays, and work goes on."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import sqlite3
from collections import Counter
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text

from hive_orchestration import schema
from hive_orchestration.queue import Queue
from hive_orchestration.seal import Sealer
from hive_orchestration.transaction import EVENTS_LOCK
from operations.errors import Unavailable, WontFit
from operations.tasks import ClaimRequest, NewTask
from tests.cluster import until
from tests.disks import small_disk, watched_syncs
from tests.postgres import Postgres
from tests.queues import KEY, Durable, durable_queue, open_store, opened
from tests.told import Told, told

RECOVERY_S = 10.0


def load(
    kind: str, where: str, name: str, producers: int, consumers: int, **env: str
) -> contextlib.AbstractAsyncContextManager[Told]:
    """A process of :mod:`tests.queue_load`, and what it was answered."""
    return told("tests.queue_load", kind, where, name, producers, consumers, **env)


# -- SQLite ----------------------------------------------------------------------------------


async def test_only_its_owner_reads_the_file(tmp_path: Path) -> None:
    async with durable_queue("sqlite", tmp_path, None) as durable:
        await durable.add()
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("queue.db*")}
        assert modes == dict.fromkeys(
            ("queue.db", "queue.db-lock", "queue.db-wal", "queue.db-shm"), 0o600
        )


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.long)])
async def test_a_killed_process_loses_nothing_that_was_answered(tmp_path: Path, kills: int) -> None:
    path = tmp_path / "queue.db"
    queued: list[str] = []
    completed: list[str] = []
    claimed: Counter[str] = Counter()
    for number in range(kills):
        async with load("sqlite", str(path), f"life{number}", 6, 6) as loaded:
            await until(lambda: len(loaded.said("completed")) > 40 + 7 * number, "work")  # noqa: B023
            await loaded.end(signal.SIGKILL)
        queued += loaded.said("queued")
        completed += loaded.said("completed")
        claimed.update(loaded.said("claimed"))
        with contextlib.closing(sqlite3.connect(path)) as found:
            assert found.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            status = dict(found.execute("SELECT id, status FROM tasks").fetchall())
            topics = Counter(found.execute("SELECT subject, topic FROM events").fetchall())
        assert set(queued) <= set(status)
        assert {status[id] for id in completed} == {"completed"}
        assert max(claimed.values()) == 1
        for id, now in status.items():
            assert topics[id, "task.queued"] == 1
            assert topics[id, "task.completed"] == (now == "completed")


async def test_an_answer_comes_after_fsync(tmp_path: Path) -> None:
    where = str(tmp_path / "queue.db")
    with watched_syncs() as syncs:
        env = {**syncs.env, "SYNCS": "/dev/stdout"}
        async with load("sqlite", where, "a", 1, 0, **env) as loaded:
            await until(lambda: len(loaded.said("queued")) >= 50, "fifty answers")
    words = [first for first, *_ in loaded.lines]
    between = words[words.index("open") + 1 :]
    answers = [n for n, word in enumerate(between) if word == "queued"]
    for before, answer in zip([-1, *answers], answers, strict=False):
        assert "synced" in between[before + 1 : answer]


@pytest.mark.parametrize("disk", ["pages", "tmpfs"])
async def test_a_full_disk_is_told_and_survived(tmp_path: Path, disk: str) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    ballast = folder / "ballast"
    with small_disk(folder) if disk == "tmpfs" else contextlib.nullcontext():
        async with durable_queue("sqlite", folder, None) as durable:
            if disk == "tmpfs":
                ballast.write_bytes(bytes(3 << 20))
            else:
                await _limit_pages(durable, 400)
            kept = [(await durable.add()).id for _ in range(3)]
            claim = await durable.take()
            new = NewTask(type="t", payload={"large": "x" * 100_000})
            with pytest.raises(WontFit) as full:
                await _fill(durable, new, kept)
            assert (full.value.status, full.value.retryable) == (507, True)
            assert full.value.retry_after
            several = [durable.queue.enqueue("default", [new]) for _ in range(5)]
            said = await asyncio.gather(*several, return_exceptions=True)
            assert all(isinstance(one, WontFit) for one in said)
            assert await durable.status(kept[0]) == "assigned"
            if disk == "tmpfs":
                ballast.unlink()
            else:
                await _limit_pages(durable, 1_000_000)
            await durable.queue.complete(claim.claim_id)
            kept += [(await durable.queue.enqueue("default", [new]))[0].task.id]
            page = await durable.queue.page(None, limit=1000)
            assert [task.id for task in page.tasks] == kept[::-1]
        with contextlib.closing(sqlite3.connect(durable.url)) as found:
            assert found.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


async def _fill(durable: Durable, new: NewTask, kept: list[str]) -> None:
    for _ in range(200):
        [queued] = await durable.queue.enqueue("default", [new])
        kept.append(queued.task.id)


async def _limit_pages(durable: Durable, most: int) -> None:
    await durable.store.write(
        lambda tx: tx.conn.execute(text(f"PRAGMA max_page_count = {most}")).all()
    )


# -- PostgreSQL ------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.long)])
async def test_a_killed_server_loses_nothing_that_was_answered(
    own_postgres: Postgres, tmp_path: Path, kills: int
) -> None:
    async with durable_queue("postgres", tmp_path, own_postgres) as durable:
        async with (
            load("postgres", durable.url, "a", 4, 4) as one,
            load("postgres", durable.url, "b", 4, 4) as other,
        ):
            for number in range(kills):
                for loaded in (one, other):
                    before = len(loaded.said("completed"))
                    await until(
                        lambda: len(loaded.said("completed")) > before + 30,  # noqa: B023
                        f"work after kill {number}",
                        within_s=RECOVERY_S,
                    )
                how = signal.SIGKILL if number % 2 == 0 else signal.SIGINT
                await asyncio.to_thread(own_postgres.stop, how)
                said = len(one.said("unavailable"))
                await until(lambda: len(one.said("unavailable")) > said, "a refusal")  # noqa: B023
                await asyncio.to_thread(own_postgres.start)
            for loaded in (one, other):
                before = len(loaded.said("completed"))
                await until(
                    lambda: len(loaded.said("completed")) > before + 30,  # noqa: B023
                    "work at the end",
                    within_s=RECOVERY_S,
                )
        assert set(one.said("unavailable") + other.said("unavailable")) == {"1.0"}
        rows = {row["id"]: row["status"] for row in await durable.rows(schema.tasks)}
        assert set(one.said("queued") + other.said("queued")) <= set(rows)
        done = one.said("completed") + other.said("completed")
        assert {rows[id] for id in done} == {"completed"}
        claimed = Counter(one.said("claimed") + other.said("claimed"))
        assert max(claimed.values()) == 1
        topics = Counter((event.subject, event.topic) for event in await durable.events())
        for id, status in rows.items():
            assert topics[id, "task.completed"] == (status == "completed")


async def test_sweeps_and_wakings_outlive_a_killed_server(
    own_postgres: Postgres, tmp_path: Path
) -> None:
    async with durable_queue("postgres", tmp_path, own_postgres) as durable:
        async with Queue(await open_store("postgres", durable.url), Sealer(KEY)) as queue:
            await asyncio.to_thread(own_postgres.stop, signal.SIGKILL)
            with pytest.raises(Unavailable) as away:
                await queue.enqueue("default", [NewTask(type="t")])
            assert away.value.retry_after
            waiting = asyncio.create_task(_until_given(queue))
            await asyncio.to_thread(own_postgres.start)
            await until(lambda: _listeners(durable), "those who listen", within_s=RECOVERY_S)
            # One queen hears of what another has queued, without asking.
            ready = durable.store.ready.next()
            await queue.enqueue("default", [NewTask(type="t", not_before=0.3)])
            async with asyncio.timeout(RECOVERY_S):  # when it is due, which the sweeper finds
                await ready.wait()
                assert await waiting


async def _until_given(queue: Queue) -> Any:
    while True:
        with contextlib.suppress(Unavailable):
            if given := await queue.claim(None, ClaimRequest(wait=60)):
                return given
        await asyncio.sleep(0.1)


async def _listeners(durable: Durable) -> bool:
    def count(tx: Any) -> int:
        sql = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'"
        return int(tx.conn.execute(text(sql)).scalar())

    try:
        return await durable.store.read(count) == 2
    except Unavailable:
        return False


async def test_a_server_that_was_restarted_meanwhile_is_not_noticed(
    own_postgres: Postgres, tmp_path: Path
) -> None:
    async with durable_queue("postgres", tmp_path, own_postgres) as durable:
        await asyncio.gather(*(durable.last_event() for _ in range(6)))  # fills the pool
        task = await durable.add()
        await asyncio.to_thread(own_postgres.stop)
        await asyncio.to_thread(own_postgres.start)
        claim = await durable.take()
        assert claim.task.id == task.id
        assert await durable.status(task.id) == "assigned"
        await asyncio.to_thread(own_postgres.stop)
        await asyncio.to_thread(own_postgres.start)
        assert await durable.status((await durable.add()).id) == "queued"


async def test_what_may_have_been_queued_when_the_connection_was_cut_is_not_queued_again(
    postgres: Postgres, tmp_path: Path
) -> None:
    async with durable_queue("postgres", tmp_path, postgres) as durable:
        other = await asyncpg.connect(durable.url)
        await durable.add()
        await other.execute("SELECT pg_advisory_lock($1)", EVENTS_LOCK)
        adding = asyncio.create_task(durable.add())
        stuck = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'advisory'"
        pid = await until(lambda: other.fetchval(stuck), "the one that waits")
        await other.execute("SELECT pg_terminate_backend($1)", pid)
        with pytest.raises(Unavailable):
            await adding
        await other.close()  # and the lock is free
        await durable.add()
        assert await durable.count(schema.tasks) == 2


async def test_what_only_queues_is_one_statement(postgres: Postgres) -> None:
    url = await asyncio.to_thread(postgres.create, "statements")
    connection = await asyncpg.connect(url)
    await connection.execute("ALTER DATABASE statements SET log_statement = 'all'")
    await connection.close()
    log = postgres.folder / "log"

    async with opened("postgres", url) as durable:

        async def said(*calls: Awaitable[Any]) -> list[str]:
            """What the server was told for some calls, but for what it was asked the time with."""
            since = log.stat().st_size
            await asyncio.gather(*calls)
            with log.open() as lines:
                lines.seek(since)
                found = re.findall(r"LOG:  (?:statement|execute \w+): (\w+)(.*)", lines.read())
            return [verb for verb, rest in found if "clock_timestamp" not in rest]

        await said(*(durable.add() for _ in range(2)))  # the driver asks about types, once
        assert await said(durable.add()) == ["WITH"]
        assert await said(*(durable.add() for _ in range(8))) == ["WITH"]
        assert await said(durable.queue.enqueue("default", [NewTask(type="t")] * 10)) == ["WITH"]
        assert await said(durable.add(idempotency_key="k")) == ["SELECT", "WITH"]
        assert await said(durable.add(idempotency_key="k")) == ["SELECT"]
        large = [NewTask(type="t", payload={"a": "b" * 400_000})] * 4
        some = ["BEGIN", "INSERT", "INSERT", "INSERT", "WITH", "COMMIT"]
        assert await said(durable.queue.enqueue("default", large)) == some
        claimed = ["SELECT", "BEGIN", "SELECT", "UPDATE", "WITH", "COMMIT"]
        assert await said(durable.take()) == claimed
        assert await said(durable.nothing(types=("other",))) == ["SELECT"]


async def test_commits_wait_for_the_disk_whatever_the_database_says(postgres: Postgres) -> None:
    url = await asyncio.to_thread(postgres.create, "unsynced")
    connection = await asyncpg.connect(url)
    await connection.execute("ALTER DATABASE unsynced SET synchronous_commit = off")
    await connection.close()
    store = await open_store("postgres", url)
    try:
        show = text("SHOW synchronous_commit")
        assert await store.write(lambda tx: tx.conn.execute(show).scalar()) == "on"
        idle = text("SHOW idle_in_transaction_session_timeout")  # of a queen that has vanished
        assert await store.write(lambda tx: tx.conn.execute(idle).scalar()) == "15s"
    finally:
        await store.close()
