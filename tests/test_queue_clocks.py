"""Wrong clocks, and event loops that stand still: the queue goes by the database's clock."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from job_client.tasks import TaskClient
from operations.tasks import ClaimRequest, NewTask, Retry
from tests.clock_walk import LONG_S, SHORT_S, WORK_S
from tests.cluster import START_S, Cluster, clean_env, until
from tests.postgres import Postgres
from tests.queues import KINDS
from tests.told import told
from wire.keys import Keys
from wire.secret import Secret

HOUR_S = 3600
NOT_AN_HOUR_S = 300.0  # so long may a machine be busy

DONE = ["task.queued", "task.assigned", "task.completed"]
SAW = {
    "kept": ["completed", 1, None, ["task.queued", "task.assigned", "task.started", DONE[-1]]],
    "lost": ["failed", 1, "lease_expired", ["task.queued", "task.assigned", "task.failed"]],
    "delayed": ["completed", 1, None, DONE],
    "late": ["failed", 0, "deadline_exceeded", ["task.queued", "task.failed"]],
    "in_time": ["completed", 1, None, DONE],
}
LEAST_S = {"kept": WORK_S, "lost": SHORT_S, "delayed": SHORT_S, "late": SHORT_S, "in_time": 0.0}


@pytest.fixture
def faketime() -> str:
    """The library that gives a process another wall clock."""
    for folder in ("lib/*/faketime", "lib*/faketime", "local/lib/faketime"):
        for found in Path("/usr").glob(f"{folder}/libfaketimeMT.so.1"):
            return str(found)
    pytest.skip("no libfaketime here: install Debian's package 'libfaketime'")


@pytest.fixture(params=KINDS)
def database(request: pytest.FixtureRequest) -> dict[str, str]:
    """Variables of queens that share an empty database; with SQLite each has her own."""
    if request.param == "sqlite":
        return {}
    server: Postgres = request.getfixturevalue("postgres")
    return {"HIVE_DATABASE": server.create(f"clocks-{uuid.uuid4().hex}")}


async def walked(url: str, name: str, key: str, **env: str) -> dict[str, Any]:
    """What a process of :mod:`tests.clock_walk` saw."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.clock_walk", url, name, key),
        env={**clean_env(), **env},
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0
    return dict(json.loads(said))


async def test_wrong_clocks_change_nothing(
    fresh: Cluster, database: dict[str, str], faketime: str
) -> None:
    """Those of drones and callers; and those of queens, which are none of the database's."""

    def clock(off_s: int) -> dict[str, str]:
        wrong = {"LD_PRELOAD": faketime, "FAKETIME": f"{off_s:+d}"}
        return {**wrong, "FAKETIME_DONT_FAKE_MONOTONIC": "1"} if off_s else {}

    secret = Secret.new()
    fresh.env = {"HIVE_SECRET": secret.text, **database}
    queens_off_s = (0, HOUR_S, -HOUR_S) if database else (0,)
    starting = (
        fresh.start("queen", "--port=0", folder=f"queen{off_s}", env=clock(off_s))
        for off_s in queens_off_s
    )
    queens = dict(zip(queens_off_s, await asyncio.gather(*starting), strict=True))
    # The queen says when a key has expired, whatever time its holder thinks that it is.
    short, _ = Keys(secret).make(scopes=("queue", "drone"), seconds=LONG_S)
    lasting, _ = Keys(secret).make(scopes=("queue", "drone"))
    began = time.time()
    walks = {
        "right": walked(queens[0].url, "right", short),
        "ahead": walked(queens[0].url, "ahead", short, **clock(HOUR_S)),
        "behind": walked(queens[0].url, "behind", short, **clock(-HOUR_S)),
        **{
            f"at-{off_s}": walked(queen.url, f"at-{off_s}", lasting)
            for off_s, queen in queens.items()
            if off_s
        },
    }
    walks_off_s = {"ahead": HOUR_S, "behind": -HOUR_S}
    for name, found in zip(walks, await asyncio.gather(*walks.values()), strict=True):
        off_s = found["clock"] - began - walks_off_s.get(name, 0)
        assert 0 <= off_s < NOT_AN_HOUR_S, name
        assert found["saw"] == SAW, name
        assert found["active"], name
        for step, least_s in LEAST_S.items():
            assert least_s <= found["took"][step] < least_s + NOT_AN_HOUR_S, (name, step)


async def test_a_drone_that_stood_still_for_two_leases_is_refused(
    fresh: Cluster, database: dict[str, str]
) -> None:
    """Its task runs once elsewhere, and does so while the refusal comes."""
    fresh.env = database
    queen = await fresh.queen()
    async with TaskClient(queen.url) as tasks:
        task = await tasks.enqueue(NewTask(type="t", retry=Retry(backoff_s=0.0)))
        async with told("tests.blocked_drone", queen.url) as drone:
            await until(lambda: drone.said("blocked"), "it to stand still", within_s=START_S)
            [claim] = await tasks.claim(ClaimRequest(drone_id="other", wait=60))
            assert await drone.process.wait() == 0
        assert sorted(drone.lines) == [
            ["blocked", task.id],
            ["refused", "complete", "409", "stale_claim"],
            ["refused", "heartbeat", "409", "stale_claim"],
        ]
        assert (claim.task.id, claim.task.attempts) == (task.id, 2)
        await tasks.complete(claim.claim_id, "other")
        ended = await tasks.get(task.id)
        assert (ended.status, ended.result, ended.drone_id) == ("completed", "other", "other")
        assert await tasks.claim(ClaimRequest()) == []
        topics: list[str] = []
        async with aclosing(tasks.events(["task.*"], after=0)) as events:
            async for event in events:
                topics.append(event.topic)
                if event.topic == "task.completed":
                    break
        assert topics == [
            *("task.queued", "task.assigned", "task.started"),
            *("task.retrying", "task.assigned", "task.completed"),
        ]
