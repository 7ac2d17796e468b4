"""The dispatcher over the wire, as its SDK speaks it, at real queens."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.cluster import Cluster, Daemon, cluster
from tests.postgres import Postgres, binaries, running
from wire.keys import Keys, Scope
from wire.secret import Secret

TICKET = {"task": "agent", "instructions": "Mend the roof.\nThen rest."}
INTERNAL = "the-internal-token"
CALLBACK = "the-callback-secret"


class Sdk:
    """Sends what the SDK sends."""

    def __init__(self, http: aiohttp.ClientSession, internal: str = "", callback: str = "") -> None:
        self._http = http
        self._bearer = {"authorization": f"Bearer {internal}"} if internal else {}
        self._secret = {"x-callback-secret": callback} if callback else {}

    async def enqueue(self, **ticket: Any) -> tuple[int, Any]:
        return await self.send("/enqueue", {**TICKET, **ticket}, self._bearer)

    async def claim(self, **said: Any) -> tuple[int, Any]:
        return await self.send("/claim", said or None, self._bearer)

    async def callback(self, claim_id: str, status: str, **said: Any) -> tuple[int, Any]:
        body = {"claimId": claim_id, "workerId": "worker-1", "status": status, **said}
        return await self.send("/callback", body, self._secret)

    async def send(
        self, path: str, body: Any, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        async with self._http.post(path, json=body, headers=headers) as answer:
            return answer.status, await answer.json()


def code(said: tuple[int, Any]) -> tuple[int, str]:
    """Status and code of a refusal, which is in the common envelope."""
    assert set(said[1]) == {"error"}
    assert said[1]["error"]["message"].rstrip().endswith(".")
    return said[0], said[1]["error"]["code"]


@pytest.fixture
async def made() -> AsyncIterator[Cluster]:
    async with cluster() as one:
        yield one


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running() as server:
        yield server


@pytest.fixture(
    scope="module",
    params=[
        "sqlite",
        pytest.param(
            "postgres",
            marks=pytest.mark.skipif(binaries() is None, reason="there is no PostgreSQL here"),
        ),
    ],
)
async def plain_queen(request: pytest.FixtureRequest) -> AsyncIterator[Daemon]:
    async with cluster() as one:
        if request.param == "postgres":
            server: Postgres = request.getfixturevalue("postgres")
            one.env = {"HIVE_DATABASE": server.create("dispatcher")}
        yield await one.queen()


@pytest.fixture
async def sdk(plain_queen: Daemon) -> AsyncIterator[Sdk]:
    async with aiohttp.ClientSession(plain_queen.url) as http:
        one = Sdk(http)
        while (await one.claim(n=100))[1]["jobs"]:
            pass
        yield one


async def test_a_ticket_goes_through(sdk: Sdk) -> None:
    full = {
        "repo": "https://github.com/hive/hive",
        "branch": "roof",
        "base": "main",
        "githubToken": "ghp_x",
        "metadata": {"a": None, "b": [1]},
    }
    said = await sdk.enqueue(jobId="roof-1", **full)
    assert said == (200, {"accepted": True, "queueLength": 1})
    status, given = await sdk.claim()
    claim_id = given["job"].pop("claimId")
    assert (status, given) == (200, {"job": {**TICKET, "jobId": "roof-1", **full}})
    assert await sdk.claim() == (200, {"job": None})
    for state in ("running", "running", "succeeded", "succeeded"):
        assert await sdk.callback(claim_id, state, logs="x", metadata={"k": 1}) == (
            200,
            {"ok": True},
        )
    assert code(await sdk.callback(claim_id, "running")) == (409, "stale_claim")
    assert code(await sdk.callback(claim_id, "failed")) == (409, "stale_claim")


async def test_the_token_is_seen_by_who_claims_and_by_nobody_else(
    sdk: Sdk, plain_queen: Daemon
) -> None:
    await sdk.enqueue(jobId="secret-1", githubToken="ghp_unseen")
    task = await plain_queen.client.get("/v1/tasks/secret-1")
    assert "ghp_unseen" not in json.dumps(task)
    _, given = await sdk.claim()
    assert given["job"]["githubToken"] == "ghp_unseen"
    await sdk.callback(given["job"]["claimId"], "running", logs="on it")
    async with aiohttp.ClientSession(plain_queen.url) as http:
        async with http.get("/v1/events?after=0") as events:
            seen = b""
            async for line in events.content:
                seen += line
                if b"task.started" in line and b"secret-1" in seen:
                    break
    files = [path for path in plain_queen.log_path.parent.rglob("*") if path.is_file()]
    assert len(files) > 1  # of SQLite the database itself is among them
    assert not [path for path in files if b"ghp_unseen" in path.read_bytes()]
    assert b"ghp_unseen" not in seen


async def test_the_same_job_again_is_fine_and_another_under_its_id_is_not(sdk: Sdk) -> None:
    assert (await sdk.enqueue(jobId="twice-1"))[0] == 200
    assert await sdk.enqueue(jobId="twice-1") == (200, {"accepted": True, "queueLength": 1})
    other = await sdk.enqueue(jobId="twice-1", instructions="Something else.")
    assert code(other) == (409, "idempotency_conflict")
    assert len((await sdk.claim(n=5))[1]["jobs"]) == 1


async def test_tickets_come_first_in_first_out_and_several_at_a_time(sdk: Sdk) -> None:
    for number in range(5):
        await sdk.enqueue(jobId=f"fifo-{number}")
    _, given = await sdk.claim(workerId="w", n=3)
    assert [job["jobId"] for job in given["jobs"]] == ["fifo-0", "fifo-1", "fifo-2"]
    assert (await sdk.claim())[1]["job"]["jobId"] == "fifo-3"


async def test_a_claim_waits_for_a_ticket(sdk: Sdk) -> None:
    waiting = asyncio.create_task(sdk.claim(wait=20))
    await asyncio.sleep(0.05)  # either order is to do
    await sdk.enqueue(jobId="awaited-1")
    _, given = await waiting
    assert given["job"]["jobId"] == "awaited-1"


async def test_who_hangs_up_while_waiting_takes_nothing_along(
    sdk: Sdk, plain_queen: Daemon
) -> None:
    for _ in range(5):
        async with aiohttp.ClientSession(plain_queen.url) as http:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await Sdk(http).claim(wait=30)
    await sdk.enqueue(jobId="left-1")
    _, given = await sdk.claim(wait=10)
    assert given["job"]["jobId"] == "left-1"


async def test_a_failed_ticket_is_a_dead_letter(sdk: Sdk, plain_queen: Daemon) -> None:
    await sdk.enqueue(jobId="dead-1")
    _, given = await sdk.claim()
    claim_id = given["job"]["claimId"]
    for _ in range(2):
        assert await sdk.callback(claim_id, "error", logs="no roof") == (200, {"ok": True})
    task = await plain_queen.client.get("/v1/tasks/dead-1")
    assert (task["status"], task["attempts"]) == ("failed", 1)
    assert (await sdk.claim()) == (200, {"job": None})
    await plain_queen.client.post("/v1/tasks/dead-1/replay")
    assert (await sdk.claim())[1]["job"]["jobId"] == "dead-1"
    assert code(await sdk.callback(claim_id, "running")) == (409, "stale_claim")


async def test_a_claim_has_a_quarter_of_an_hour_and_each_running_gives_it_anew(
    sdk: Sdk, plain_queen: Daemon
) -> None:
    await sdk.enqueue(jobId="lease-1")
    _, given = await sdk.claim()
    first = (await plain_queen.client.get("/v1/tasks/lease-1"))["lease_until"]
    assert first - time.time() == pytest.approx(900, abs=30)
    await asyncio.sleep(0.02)
    await sdk.callback(given["job"]["claimId"], "running")
    assert (await plain_queen.client.get("/v1/tasks/lease-1"))["lease_until"] > first


async def test_who_works_hears_that_the_ticket_is_cancelled(sdk: Sdk, plain_queen: Daemon) -> None:
    await sdk.enqueue(jobId="cancel-1")
    _, given = await sdk.claim()
    await plain_queen.client.post("/v1/tasks/cancel-1/cancel")
    said = await sdk.callback(given["job"]["claimId"], "running")
    assert said == (200, {"ok": True, "cancel": True})
    await sdk.callback(given["job"]["claimId"], "failed")
    assert (await plain_queen.client.get("/v1/tasks/cancel-1"))["status"] == "cancelled"


async def test_a_full_queue_takes_no_more(made: Cluster) -> None:
    made.env = {"MAX_QUEUE": "2"}
    queen = await made.queen()
    async with aiohttp.ClientSession(queen.url) as http:
        sdk = Sdk(http)
        assert (await sdk.enqueue(jobId="a"))[1]["queueLength"] == 1
        assert (await sdk.enqueue(jobId="b"))[1]["queueLength"] == 2
        async with http.post("/enqueue", json={**TICKET, "jobId": "c"}) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (429, "queue_full")
            assert int(answer.headers["retry-after"]) >= 1
        assert (await sdk.enqueue(jobId="b"))[0] == 200
        await sdk.claim()
        assert (await sdk.enqueue(jobId="c"))[0] == 200


@pytest.mark.parametrize(
    ("ticket", "param"),
    [
        ({}, "jobId"),
        ({"jobId": ""}, "jobId"),
        ({"jobId": "../../etc"}, "jobId"),
        ({"jobId": 7}, "jobId"),
        ({"jobId": "x" * 200}, "jobId"),
        ({"jobId": "bad", "task": "dig"}, "task"),
        ({"jobId": "bad", "instructions": None}, "instructions"),
        ({"jobId": "bad", "repo": "github.com/a/b"}, "repo"),
        ({"jobId": "bad", "repo": "https://"}, "repo"),
        ({"jobId": "bad", "metadata": []}, "metadata"),
        ({"jobId": "bad", "colour": "red"}, "colour"),
        ({"jobId": "bad", "job_id": "bad"}, "job_id"),
        ({"jobId": "bad", "githubToken": 5}, "githubToken"),
        ({"jobId": "bad", "callbackUrl": "https://example.com/x"}, "callbackUrl"),
        ({"jobId": "bad", "callbackUrl": "http://169.254.169.254/"}, "callbackUrl"),
    ],
)
async def test_a_bad_ticket_is_refused(sdk: Sdk, ticket: dict[str, Any], param: str) -> None:
    status, said = await sdk.send("/enqueue", {**TICKET, **ticket})
    assert (status, said["error"]["param"]) == (400, param), said
    assert await sdk.claim() == (200, {"job": None})


async def test_bad_claims_and_callbacks_are_refused(sdk: Sdk) -> None:
    for said in ({"n": 0}, {"n": 101}, {"wait": 61}, {"wait": -1}, {"workerId": "a b"}, {"x": 1}):
        assert code(await sdk.claim(**said)) == (400, "invalid_request")
    await sdk.enqueue(jobId="forged-1")
    _, given = await sdk.claim()
    task, fence, token = given["job"]["claimId"].split("~")
    for forged, wanted in (
        ("", 400),
        ("forged-1", 400),
        (f"{task}~{fence}", 400),
        (f"{task}~{fence}~{token}x", 400),
        (f"{task}~{fence}~{token[::-1]}", 409),
        (f"{task}~{int(fence) + 1}~{token}", 404),
        (f"{task}~0~{token}", 409),
        (f"nobody~{fence}~{token}", 404),
        (f"{task}\0~{fence}~{token}", 400),
        (f"{task}~{fence}~{token}' OR 1=1 --", 400),
    ):
        for status in ("running", "succeeded", "failed"):
            assert code(await sdk.callback(forged, status))[0] == wanted, forged
    assert code(await sdk.callback(given["job"]["claimId"], "asleep"))[0] == 400
    assert await sdk.callback(given["job"]["claimId"], "succeeded") == (200, {"ok": True})


@pytest.mark.parametrize("path", ["/enqueue", "/claim", "/callback"])
async def test_what_is_no_json_object_is_refused(plain_queen: Daemon, path: str) -> None:
    headers = {"content-type": "application/json"}
    deep = b'{"metadata":' + b'{"a":' * 100_000
    async with aiohttp.ClientSession(plain_queen.url, headers=headers) as http:
        for raw in (b"{", b"[]", b'"x"', b"\xff\xfe", b'{"a":NaN}', deep, b"[" * 100_000):
            async with http.post(path, data=raw) as answer:
                assert answer.status == 400, raw[:20]
                assert (await answer.json())["error"]["message"]
        large = json.dumps({**TICKET, "jobId": "l", "instructions": "x" * 1_100_000})
        async with http.post(path, data=io.BytesIO(large.encode())) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (
                413,
                "body_too_large",
            )
        async with http.post(path, data=b"a=b", headers={"content-type": "text/plain"}) as answer:
            assert answer.status == 415


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "null", "content-type": "application/x-www-form-urlencoded"},
        {"host": "evil.example"},
    ],
)
async def test_no_web_page_claims_with_an_empty_post(
    sdk: Sdk, plain_queen: Daemon, headers: dict[str, str]
) -> None:
    job_id = f"page-{time.monotonic_ns()}"
    await sdk.enqueue(jobId=job_id)
    async with aiohttp.ClientSession(plain_queen.url) as http:
        async with http.post("/claim", headers=headers) as answer:
            assert answer.status == 403
    assert (await sdk.claim())[1]["job"]["jobId"] == job_id


@pytest.mark.parametrize(
    ("internal", "callback"),
    [
        ("HIVE_INTERNAL_TOKEN", "HIVE_CALLBACK_SECRET"),
        ("INTERNAL_API_TOKEN", "CALLBACK_SECRET"),
    ],
)
async def test_tokens_that_are_set_are_asked_for_on_loopback(
    made: Cluster, internal: str, callback: str
) -> None:
    made.env = {internal: INTERNAL, callback: CALLBACK}
    queen = await made.queen()
    async with aiohttp.ClientSession(queen.url) as http:
        good, bad = Sdk(http, INTERNAL, CALLBACK), Sdk(http, INTERNAL[:-1], CALLBACK.upper())
        for stranger in (Sdk(http), bad):
            assert code(await stranger.enqueue(jobId="a")) == (401, "wrong_token")
        assert (await good.enqueue(jobId="a"))[0] == 200
        status, given = await Sdk(http).claim()  # on loopback
        assert status == 200
        claim_id = given["job"]["claimId"]
        for stranger in (Sdk(http), bad):
            assert code(await stranger.callback(claim_id, "running")) == (401, "wrong_token")
        assert await good.callback(claim_id, "running") == (200, {"ok": True})


async def test_beyond_loopback_only_who_has_a_token_or_a_key_gets_in(made: Cluster) -> None:
    secret = Secret.new()

    def key(*scopes: Scope) -> str:
        return Keys(secret).make(scopes=scopes)[0]

    made.env = {
        "HIVE_SECRET": secret.text,
        "HIVE_INTERNAL_TOKEN": INTERNAL,
        "HIVE_CALLBACK_SECRET": CALLBACK,
    }
    queen = await made.queen("--host=0.0.0.0")
    async with aiohttp.ClientSession(queen.url) as http:
        good, stranger = Sdk(http, INTERNAL, CALLBACK), Sdk(http)
        for said in (
            await stranger.enqueue(jobId="a"),
            await stranger.claim(),
            await stranger.callback("a~1~" + "x" * 22, "running"),
            await Sdk(http, "hk-forged").enqueue(jobId="a"),
            await Sdk(http, INTERNAL + "x").claim(),
        ):
            assert said[0] == 401, said
        for path in ("/v1/tasks", "/v1/hives"):  # the token holds on the dispatcher's routes
            bearer = {"authorization": f"Bearer {INTERNAL}"}
            async with http.get(path, headers=bearer) as answer:
                assert answer.status == 401
        assert code(await Sdk(http, key("infer", "drone")).enqueue(jobId="a"))[0] == 403
        assert code(await Sdk(http, key("infer", "queue")).claim())[0] == 403
        # More than a stranger may send:
        assert (await good.enqueue(jobId="a", instructions="x" * 100_000))[0] == 200
        assert (await Sdk(http, key("queue")).enqueue(jobId="b"))[0] == 200
        _, given = await good.claim()
        assert await good.callback(given["job"]["claimId"], "succeeded") == (200, {"ok": True})
        _, given = await Sdk(http, key("drone")).claim()
        drone = {"authorization": f"Bearer {key('drone')}"}
        body = {"claimId": given["job"]["claimId"], "workerId": "w", "status": "succeeded"}
        assert await stranger.send("/callback", body, drone) == (200, {"ok": True})


async def test_the_dispatcher_answers_in_each_of_several_processes(made: Cluster) -> None:
    made.env = {"HIVE_INTERNAL_TOKEN": INTERNAL}
    queen = await made.queen("--processes=2")
    for number in range(8):
        async with aiohttp.ClientSession(queen.url) as http:
            assert code(await Sdk(http).enqueue(jobId=f"p-{number}"))[0] == 401
            said = await Sdk(http, INTERNAL).enqueue(jobId=f"p-{number}")
            assert said == (200, {"accepted": True, "queueLength": number + 1})


async def test_what_was_accepted_is_there_after_a_kill(made: Cluster) -> None:
    queen = await made.queen()
    async with aiohttp.ClientSession(queen.url) as http:
        await Sdk(http).enqueue(jobId="kept-1", githubToken="ghp_kept")
    await queen.stop(9)
    again = await made.queen()
    async with aiohttp.ClientSession(again.url) as http:
        _, given = await Sdk(http).claim()
        assert given["job"]["githubToken"] == "ghp_kept"
    assert Path(made.folder / "queen" / "queue.key").stat().st_mode & 0o077 == 0
