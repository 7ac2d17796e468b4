"""A queue moves from its file to a PostgreSQL, with all that it holds."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hive_orchestration.postgres import PostgresStore
from hive_orchestration.queue import Queue
from hive_orchestration.seal import Sealer
from hive_orchestration.sqlite import SqliteStore
from operations.tasks import Beat, ClaimRequest, Concurrency, NewDrone, NewTask
from tests.cluster import clean_env
from tests.postgres import Postgres, binaries, running
from tests.queues import opened

pytestmark = pytest.mark.skipif(binaries() is None, reason="there is no PostgreSQL here")

SEALER = Sealer(b"s" * 32)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running() as server:
        yield server


@pytest.fixture
async def filled(tmp_path: Path) -> dict[str, Any]:
    """What a queue's file holds: finished, leased, parked, delayed and secret things."""
    store = await SqliteStore.open(tmp_path / "queue.db")
    queue = Queue(store, SEALER)
    one_at_a_time = Concurrency(key="gpu")
    new = [NewTask(type="t", concurrency=one_at_a_time, secrets={"token": "s3cret"})] * 2
    await queue.enqueue("default", [*new, NewTask(type="late", not_before=3600)])
    await queue.enqueue("other", [NewTask(type="done", role="r")])
    [done] = await queue.claim("other", ClaimRequest(role="r"))
    await queue.complete(done.claim_id, {"answer": 42})
    [held] = await queue.claim("default", ClaimRequest(drone_id="d-1"))
    await queue.beat(held.claim_id, Beat(logs="so far so good"))
    assert await queue.claim("default", ClaimRequest()) == []  # the other one is parked now
    await queue.register("default", NewDrone(id="d-1", capabilities=("bash",)))
    await queue.pause("r")
    before = {"held": held, "done": done, "events": await store.read(_events)}
    await queue.close()
    return before


def _events(tx: Any) -> list[Any]:
    from hive_orchestration.machine.reading import happened

    return happened(tx, None, 0)[0]


async def test_everything_moves_and_work_goes_on(
    filled: dict[str, Any], tmp_path: Path, postgres: Postgres
) -> None:
    url = postgres.create("moved")
    done = moved(tmp_path, url)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"]["tasks"] == 4
    store = await PostgresStore.open(url)
    queue = Queue(store, SEALER)
    try:
        assert await store.read(_events) == filled["events"]
        assert (await queue.get(None, filled["done"].task.id)).result == {"answer": 42}
        assert [d.id for d in await queue.drones(None)] == ["d-1"]
        assert [r.role for r in await queue.roles(None) if r.paused] == ["r"]
        held = filled["held"]
        assert [line["text"] for line in await queue.lines(None, held.task.id)] == [
            "so far so good"
        ]
        # The claim holds on, its end frees the parked one, and new rows get new numbers.
        await queue.complete(held.claim_id, None)
        [freed] = await queue.claim("default", ClaimRequest())
        assert freed.secrets == {"token": "s3cret"}
        [new] = await queue.enqueue("default", [NewTask(type="new")])
        assert (await queue.get(None, new.task.id)).status == "queued"
        assert (await store.read(_events))[-1].seq > filled["events"][-1].seq
    finally:
        await queue.close()


async def test_a_database_with_a_queue_in_it_is_refused(
    filled: dict[str, Any], tmp_path: Path, postgres: Postgres
) -> None:
    url = postgres.create("in_use")
    first = moved(tmp_path, url)
    assert first.returncode == 0
    Path(json.loads(first.stdout)["kept"]).rename(tmp_path / "queue.db")
    again = moved(tmp_path, url)
    assert again.returncode != 0
    assert "already" in again.stdout + again.stderr


async def test_a_queue_that_somebody_has_open_is_not_moved(
    filled: dict[str, Any], tmp_path: Path, postgres: Postgres
) -> None:
    """What he was told is kept would be lost."""
    url = postgres.create("beside")
    async with opened("sqlite", str(tmp_path / "queue.db")) as durable:
        refused = await asyncio.to_thread(moved, tmp_path, url)
        assert refused.returncode != 0
        assert "is in use" in refused.stdout + refused.stderr
        await durable.add()
    done = await asyncio.to_thread(moved, tmp_path, url)
    assert json.loads(done.stdout)["rows"]["tasks"] == 5
    assert not (tmp_path / "queue.db").exists()
    assert Path(json.loads(done.stdout)["kept"]).exists()


def test_no_file_and_no_database_are_said(tmp_path: Path, postgres: Postgres) -> None:
    nothing = moved(tmp_path, postgres.url())
    assert nothing.returncode != 0
    assert "There is no queue in" in nothing.stdout + nothing.stderr
    assert not (tmp_path / "queue.db").exists()


def moved(folder: Path, url: str) -> subprocess.CompletedProcess[str]:
    command = ("queue", "migrate", "--json", "--to", url, "--state-dir", str(folder))
    return subprocess.run(
        [sys.executable, "-m", "keeper", *command],
        env=clean_env(),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
