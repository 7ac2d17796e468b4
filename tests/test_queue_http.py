"""The durable queue over HTTP at real queens, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from yarl import URL

from operations.errors import HiveError
from tests.cluster import Cluster, Daemon, clean_env, cluster, online, spawn_scripted, until
from tests.postgres import Postgres, binaries, running
from wire import sse
from wire.keys import Keys, Scope
from wire.secret import Secret

STORES = [
    "sqlite",
    pytest.param(
        "postgres",
        marks=pytest.mark.skipif(binaries() is None, reason="there is no PostgreSQL here"),
    ),
]


class Http:
    """One caller of a queen."""

    def __init__(self, url: str, key: str | None = None) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else None
        self.session = aiohttp.ClientSession(url, headers=headers)

    async def __call__(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        async with self.session.request(method, path, json=body) as answer:
            said = await answer.json()
            if answer.status >= 400:
                assert said["error"]["request_id"] == answer.headers["x-request-id"]
                return answer.status, said["error"]["code"]
            return answer.status, said

    async def ok(self, method: str, path: str, body: Any = None) -> Any:
        status, said = await self(method, path, body)
        assert status in (200, 201), (status, said)
        return said

    async def task(self, type: str = "t", **more: Any) -> str:
        return str((await self.ok("POST", "/v1/tasks", {"type": type, **more}))["id"])

    async def claim(self, **asked: Any) -> list[dict[str, Any]]:
        return list((await self.ok("POST", "/v1/claims", {"drone_id": "d", **asked}))["claims"])

    @asynccontextmanager
    async def events(
        self, query: str = "", last_event_id: str | None = None
    ) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """Events as they come; the stream is open when this is entered."""
        headers = {} if last_event_id is None else {"last-event-id": last_event_id}
        async with self.session.get(f"/v1/events{query}", headers=headers) as answer:
            assert answer.status == 200, await answer.text()

            async def told() -> AsyncIterator[dict[str, Any]]:
                async for event in sse.decode(answer.content.iter_any()):
                    said = json.loads(event.data)
                    assert (event.id, event.event) == (str(said["seq"]), said["topic"])
                    yield said

            yield told()


async def taken(events: AsyncIterator[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    async with asyncio.timeout(15):
        return [await anext(events) for _ in range(count)]


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running() as server:
        yield server


@pytest.fixture
async def made() -> AsyncIterator[Cluster]:
    async with cluster() as one:
        yield one


@pytest.fixture(scope="module", params=STORES)
async def queen(request: pytest.FixtureRequest) -> AsyncIterator[Daemon]:
    async with cluster() as one:
        if request.param == "postgres":
            server: Postgres = request.getfixturevalue("postgres")
            one.env = {"HIVE_DATABASE": server.create("shared")}
        yield await one.queen()


@pytest.fixture
async def http(queen: Daemon) -> AsyncIterator[Http]:
    caller = Http(queen.url)
    for claim in await caller.claim(n=100):
        await caller.ok("POST", f"/v1/claims/{claim['claim_id']}/complete")
    yield caller
    await caller.session.close()


# -- tasks and claims -------------------------------------------------------------------------


async def test_no_callback_does_anything_at_a_daemon(queen: Daemon) -> None:
    """Whoever queues a task may name any address that is allowed, a daemon's among them."""
    headers = {
        "webhook-id": "msg_1",
        "webhook-signature": "v1,x",
        "content-type": "application/json",
    }
    async with aiohttp.ClientSession(queen.url, headers=headers) as one:
        for path in ("/v1/shutdown", "/v1/tasks", "/v1/chat/completions"):
            async with one.post(path, data=b"{}") as answer:
                assert answer.status == 403
                assert (await answer.json())["error"]["code"] == "callback_not_taken"


async def test_small_and_large_batches_take_turns_on_one_connection(queen: Daemon) -> None:
    """A head that is known again takes no large body where only small ones go."""
    connector = aiohttp.TCPConnector(limit=1)
    headers = {"content-type": "application/json"}
    async with aiohttp.ClientSession(queen.url, connector=connector, headers=headers) as one:

        async def status(*texts: str) -> int:
            tasks = [{"type": "sized", "payload": {"text": text}} for text in texts]
            body = io.BytesIO(json.dumps({"tasks": tasks}).encode())
            async with one.post("/v1/tasks", data=body) as answer:
                return answer.status

        for size in (1, 500_000, 2, 500_000):
            assert await status(*["x" * size] * 3) == 201
        assert await status("é" * 600_000) == 413


@pytest.mark.parametrize("way", ["whole", "chunked", "escaped", "large"])
async def test_the_same_is_answered_at_the_door_and_behind_it(http: Http, way: str) -> None:
    """Small whole bodies are served at the door, all else by the ASGI application."""

    async def post(path: str, body: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        data = json.dumps(body).encode()
        if way == "large":
            data += b" " * 1_100_000
        if way == "escaped":
            path = path.replace("/v1/", "/%761/")

        async def pieces() -> AsyncIterator[bytes]:
            yield data[:5]
            yield data[5:]

        async with http.session.post(
            URL(path, encoded=True),
            data=pieces() if way == "chunked" else io.BytesIO(data),
            headers={"content-type": "application/json", "x-request-id": "its-own"},
        ) as answer:
            assert answer.headers["x-request-id"] == "its-own"
            return answer.status, await answer.json(), dict(answer.headers)

    status, batch, _ = await post("/v1/tasks", {"tasks": [{"type": way}]})
    assert (status, batch["tasks"][0]["created"]) == (201, True)
    [claim] = await http.claim(types=[way])
    assert claim["task"]["id"] == batch["tasks"][0]["id"]
    status, refused, _ = await post("/v1/tasks", {"tasks": [{"type": way, "colour": "red"}]})
    assert (status, refused["error"]["param"]) == (400, "0.colour")
    ending = {"claims": [{"claim_id": claim["claim_id"], "result": 1}]}
    status, ended, headers = await post("/v1/claims/complete", ending)
    assert (status, ended["claims"][0]["task"]["status"]) == (200, "completed")
    assert headers["Content-Type"] == "application/json"
    status, unknown, _ = await post("/v1/nothing", {})
    assert (status, unknown["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("path", ["/v1/tasks", "/%761/tasks"])  # at the door, and behind it
async def test_who_prefers_it_is_told_no_more_than_the_id(http: Http, path: str) -> None:
    new = {"type": "t", "idempotency_key": path}

    async def post(prefer: str) -> tuple[int, Any, str | None]:
        url, headers = URL(path, encoded=True), {"prefer": prefer}
        async with http.session.post(url, json=new, headers=headers) as answer:
            said = await answer.json()
            assert answer.headers["location"] == f"/v1/tasks/{said['id']}"
            return answer.status, said, answer.headers.get("preference-applied")

    status, first, applied = await post("wait=5, Return = minimal; colour=red")
    assert (status, applied) == (201, "return=minimal")
    assert first == {"id": first["id"], "created": True}
    status, again, applied = await post('return="minimal"')
    assert (status, applied) == (200, "return=minimal")
    assert again == {"id": first["id"], "created": False}
    whole = await http.ok("GET", f"/v1/tasks/{first['id']}")
    for other in (
        "return=representation",
        "wait=5; return=minimal",
        "return=representation, return=minimal",
    ):
        assert await post(other) == (200, whole, None)


async def test_a_task_goes_its_way(http: Http) -> None:
    body = {
        "type": "bake",
        "payload": {"a": None, "b": [1, {"c": None}]},
        "tags": ["x"],
        "idempotency_key": "bake-1",
        "secrets": {"key": "hidden"},
    }
    async with http.session.post("/v1/tasks", json=body) as answer:
        made = await answer.json()
        assert answer.status == 201
        assert answer.headers["location"] == f"/v1/tasks/{made['id']}"
    assert await http("POST", "/v1/tasks", body) == (200, made)
    assert (made["payload"], made["status"]) == (body["payload"], "queued")
    assert await http("POST", "/v1/tasks", {**body, "tags": []}) == (409, "idempotency_conflict")
    path = f"/v1/tasks/{made['id']}"
    assert await http.ok("GET", path) == made
    assert [t["id"] for t in (await http.ok("GET", "/v1/tasks/waiting"))["tasks"]] == [made["id"]]
    [claim] = await http.claim(types=["bake"])
    assert claim["secrets"] == {"key": "hidden"}
    assert claim["task"]["payload"] == body["payload"]
    at = f"/v1/claims/{claim['claim_id']}"
    beat = {"progress": 0.5, "logs": "warm\0", "lease_s": 30, "metadata": {"m": 1}}
    assert await http.ok("POST", f"{at}/heartbeat", beat) == {"lease_s": 30.0, "cancel": False}
    assert (await http.ok("GET", path))["progress"] == 0.5
    assert [line["text"] for line in (await http.ok("GET", f"{path}/logs"))["lines"]] == ["warm�"]
    done = {"result": {"loaf": None}, "logs": "done"}
    for _ in range(2):
        said = await http.ok("POST", f"{at}/complete", done)
        assert (said["status"], said["result"]) == ("completed", {"loaf": None})
    assert await http("POST", f"{at}/complete", {"result": 2}) == (409, "stale_claim")
    assert await http("POST", f"{at}/heartbeat") == (409, "stale_claim")
    assert await http.ok("DELETE", path) == {"deleted": True}
    assert await http.ok("DELETE", path) == {"deleted": False}
    assert await http("GET", path) == (404, "no_task")


async def test_many_tasks_are_queued_together_or_not_at_all(http: Http) -> None:
    good = {"type": "many", "idempotency_key": "many-1"}
    said = await http("POST", "/v1/tasks", {"tasks": [good, good, {"type": "many"}]})
    assert said[0] == 201
    assert [one["created"] for one in said[1]["tasks"]].count(True) >= 2
    assert said[1]["tasks"][0]["id"] == said[1]["tasks"][1]["id"]
    clash = {"tasks": [{"type": "many"}, {**good, "title": "other"}]}
    assert await http("POST", "/v1/tasks", clash) == (409, "idempotency_conflict")
    waiting = await http.ok("GET", "/v1/tasks?type=many")
    assert len(waiting["tasks"]) == 2
    claims = await http.claim(types=["many"], n=5)
    ids = [claim["claim_id"] for claim in claims]
    results = [{"claim_id": id, "result": n} for n, id in enumerate(ids)]
    forged = {"claim_id": ids[0][:-1] + ("A" if ids[0][-1] != "A" else "B")}
    answers = (
        await http.ok(
            "POST", "/v1/claims/complete", {"claims": [*results, forged, {"claim_id": "x"}]}
        )
    )["claims"]
    assert [one["task"]["result"] for one in answers[:2]] == [0, 1]
    assert [one["error"]["code"] for one in answers[2:]] == ["stale_claim", "bad_claim_id"]


async def test_pages_go_on_where_the_last_one_ended(http: Http) -> None:
    ids = [await http.task("page") for _ in range(5)]
    seen: list[str] = []
    cursor = ""
    while True:
        page = await http.ok("GET", f"/v1/tasks?type=page&status=pending&limit=2{cursor}")
        seen += [task["id"] for task in page["tasks"]]
        if "next" not in page:
            break
        cursor = f"&cursor={page['next']}"
    assert seen == ids[::-1]


async def test_a_failed_task_is_retried_and_a_dead_one_replayed(http: Http) -> None:
    id = await http.task("frail", retry={"attempts": 2, "backoff_s": 60})
    for attempt in (1, 2):
        [claim] = await http.claim(types=["frail"])
        assert claim["task"]["attempts"] == attempt
        at = f"/v1/claims/{claim['claim_id']}/fail"
        said = await http.ok("POST", at, {"message": "broke", "code": "oven"})
        if attempt == 1:
            assert (said["status"], said["error"]["code"]) == ("queued", "oven")
            assert await http.claim(types=["frail"]) == []
            await http.ok("POST", f"/v1/tasks/{id}/retry")
    assert said["status"] == "failed"
    assert (await http.ok("POST", f"/v1/tasks/{id}/replay"))["status"] == "queued"
    [claim] = await http.claim(types=["frail"])
    said = await http.ok("POST", f"/v1/claims/{claim['claim_id']}/release")
    assert (said["status"], said["attempts"]) == ("queued", 0)
    assert (await http.ok("POST", f"/v1/tasks/{id}/cancel"))["status"] == "cancelled"


async def test_a_status_is_set_by_hand_only_where_nobody_holds_the_task(http: Http) -> None:
    id = await http.task("hand")
    said = await http.ok(
        "POST", f"/v1/tasks/{id}/status", {"status": "running", "metadata": {"by": "me"}}
    )
    assert (said["status"], said["metadata"]) == ("in_progress", {"by": "me"})
    move = f"/v1/tasks/{id}/status"
    assert await http("POST", move, {"status": "approved"}) == (409, "impossible_transition")
    await http.ok("POST", move, {"status": "completed"})
    held = await http.task("held")
    await http.claim(types=["held"])
    said = await http("POST", f"/v1/tasks/{held}/status", {"status": "completed"})
    assert said == (409, "leased")
    assert await http("DELETE", f"/v1/tasks/{held}") == (409, "leased")


async def test_a_claim_waits_and_several_are_served_in_turn(http: Http) -> None:
    waiting = [asyncio.create_task(http.claim(types=["late"], wait=20)) for _ in range(3)]
    ids = {await http.task("late") for _ in range(3)}
    given = await asyncio.gather(*waiting)
    assert {claims[0]["task"]["id"] for claims in given} == ids


async def test_a_claim_sent_again_is_given_the_same(http: Http) -> None:
    await http.task("again")
    await http.task("again")
    first, second = [(await http.claim(types=["again"], key="k1"))[0]["claim_id"] for _ in "12"]
    assert first == second


async def test_a_paused_role_is_given_to_nobody(http: Http) -> None:
    await http.task("p", role="tester")
    role = {"role": "tester"}
    assert await http.ok("POST", "/v1/roles/pause", role) == {"changed": True}
    assert await http.ok("POST", "/v1/roles/pause", role) == {"changed": False}
    assert await http.claim(role="tester", types=["p"]) == []
    [info] = [r for r in (await http.ok("GET", "/v1/roles"))["roles"] if r["role"] == "tester"]
    assert (info["paused"], info["queued"]) == (True, 1)
    await http.ok("POST", "/v1/roles/resume", role)
    assert len(await http.claim(role="tester", types=["p"])) == 1


async def test_drones_come_and_go(http: Http) -> None:
    new = {"id": "lab/gpu-0@x", "role": "builder", "capabilities": ["docker", "bash"]}
    status, drone = await http("POST", "/v1/drones", new)
    assert (status, drone["status"], drone["capabilities"]) == (201, "active", ["bash", "docker"])
    for path in ("/v1/drones/lab/gpu-0@x", "/v1/drones/lab%2Fgpu-0%40x"):
        assert (await http.ok("GET", path))["id"] == new["id"]
        assert (await http.ok("POST", f"{path}/heartbeat"))["status"] == "active"
    found = (await http.ok("GET", "/v1/drones?role=builder&active=true"))["drones"]
    assert [one["id"] for one in found] == [new["id"]]
    await http.ok("POST", "/v1/drones/lab/gpu-0@x/heartbeat", {"status": "idle"})
    assert (await http.ok("GET", "/v1/drones?role=builder&active=true"))["drones"] == []
    assert await http.ok("DELETE", "/v1/drones/lab/gpu-0@x") == {"deleted": True}
    assert await http("GET", "/v1/drones/lab/gpu-0@x") == (404, "no_drone")
    assert await http("POST", "/v1/drones/lab/gpu-0@x/heartbeat") == (404, "no_drone")


# -- events -----------------------------------------------------------------------------------


async def test_events_come_from_now_on_and_go_on_where_a_reader_was(http: Http) -> None:
    await http.task("before")
    async with http.events("?topics=task.*") as events:
        id = await http.task("told")
        [first] = await taken(events, 1)
    assert (first["topic"], first["subject"]) == ("task.queued", id)
    await http.ok("POST", f"/v1/tasks/{id}/cancel")
    for query, last in ((f"?after={first['seq']}", None), ("?after=0", str(first["seq"]))):
        async with http.events(query, last) as events:
            [second] = await taken(events, 1)
        assert (second["topic"], second["subject"]) == ("task.cancelled", id)
    async with http.events("?after=0&topics=task.cancelled,drone.*") as events:
        assert (await taken(events, 1))[0]["topic"] in ("task.cancelled", "drone.joined")


async def test_a_place_that_is_not_kept_is_gone(http: Http) -> None:
    await http.task()
    assert await http("GET", "/v1/events?after=999999999") == (410, "gone")
    for query in ("?after=x", "?after=-1", "?after=" + "9" * 30, "?topics=%00", "?topics=a b"):
        assert (await http("GET", f"/v1/events{query}"))[0] == 400
    async with http.session.get("/v1/events", headers={"last-event-id": "abc:1"}) as answer:
        assert answer.status == 400


async def test_events_of_the_past_come_as_pages(http: Http) -> None:
    place = (await http.ok("GET", "/v1/events?follow=false"))["last"]
    id = await http.task("told", metadata={"none": None})
    await http.ok("POST", f"/v1/tasks/{id}/cancel")
    page = await http.ok("GET", f"/v1/events?follow=false&after={place}&topics=task.*")
    assert [(one["topic"], one["subject"]) for one in page["events"]] == [
        ("task.queued", id),
        ("task.cancelled", id),
    ]
    assert page["next"] == page["last"] == page["events"][-1]["seq"]
    async with http.events(f"?after={place}") as events:
        assert await taken(events, 2) == page["events"]
    nothing = await http.ok("GET", f"/v1/events?follow=false&after={page['last']}")
    assert nothing == {"events": [], "next": page["last"], "last": page["last"]}
    assert await http("GET", "/v1/events?follow=false&after=999999999") == (410, "gone")
    assert (await http("GET", "/v1/events?follow=perhaps"))[0] == 400


async def test_events_that_were_deleted_are_gone(made: Cluster) -> None:
    http = Http((await made.queen()).url)
    for _ in range(3):
        await http.task()
    with closing(sqlite3.connect(made.folder / "queen" / "queue.db")) as file, file:
        file.execute("DELETE FROM events WHERE seq <= 2")
        file.execute("INSERT INTO facts VALUES ('events_forgotten', '2')")
    assert await http("GET", "/v1/events?after=1") == (410, "gone")
    for query in ("?after=0", "?after=2"):
        async with http.events(query) as events:
            assert [event["seq"] for event in await taken(events, 1)] == [3]
    await http.session.close()


async def test_a_reader_that_does_not_read_holds_nobody_up(http: Http, queen: Daemon) -> None:
    _reader, writer = await asyncio.open_connection(*queen.url.removeprefix("http://").split(":"))
    writer.write(b"GET /v1/events?after=0 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await writer.drain()
    before = _rss_mb(queen.pid)
    many = {"tasks": [{"type": "slow", "title": "x" * 1000, "payload": {"x": "y" * 1000}}] * 100}
    for _ in range(8):
        await http.ok("POST", "/v1/tasks", many)
    async with http.events() as events:
        await http.task("slow")
        await taken(events, 1)
    assert _rss_mb(queen.pid) < before + 60
    writer.close()
    while claims := await http.claim(types=["slow"], n=100):
        ids = [{"claim_id": claim["claim_id"]} for claim in claims]
        await http.ok("POST", "/v1/claims/complete", {"claims": ids})


def _rss_mb(pid: int) -> float:
    words = Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()
    return int(words[0]) / 1024


# -- bad input --------------------------------------------------------------------------------

TASK = {"type": "bad"}
BAD = [
    ("POST", "/v1/tasks", {}),
    ("POST", "/v1/tasks", {**TASK, "colour": "red"}),
    ("POST", "/v1/tasks", {**TASK, "type": "a\nb"}),
    ("POST", "/v1/tasks", {**TASK, "type": 5}),
    ("POST", "/v1/tasks", {**TASK, "title": "a\0b"}),
    ("POST", "/v1/tasks", {**TASK, "priority": 101}),
    ("POST", "/v1/tasks", {**TASK, "priority": "1"}),
    ("POST", "/v1/tasks", {**TASK, "payload": []}),
    ("POST", "/v1/tasks", {**TASK, "role": "a/b"}),
    ("POST", "/v1/tasks", {**TASK, "role": "queen"}),
    ("POST", "/v1/tasks", {**TASK, "lease_s": 0}),
    ("POST", "/v1/tasks", {**TASK, "deadline": 1e300}),
    ("POST", "/v1/tasks", {**TASK, "retry": {"attempts": 0}}),
    ("POST", "/v1/tasks", {**TASK, "parent": "../x"}),
    ("POST", "/v1/tasks", {**TASK, "callback_url": "http://169.254.169.254/"}),
    ("POST", "/v1/tasks", {"tasks": []}),
    ("POST", "/v1/tasks", {"tasks": [TASK], "type": "x"}),
    ("POST", "/v1/tasks", {"tasks": [TASK] * 101}),
    ("POST", "/v1/tasks", {"type": "operation"}),
    ("POST", "/v1/tasks", {"type": "operation", "payload": {"operation": "hatch"}}),
    ("POST", "/v1/tasks", {"type": "operation", "payload": {"operation": "status", "x": 1}}),
    (
        "POST",
        "/v1/tasks",
        {
            "type": "operation",
            "payload": {"operation": "engine_models", "url": "http://x:1", "api_key": "k"},
        },
    ),
    ("POST", "/v1/tasks?tenant=../x", TASK),
    ("POST", "/v1/tasks?colour=red", TASK),
    ("GET", "/v1/tasks?status=asleep", None),
    ("GET", "/v1/tasks?limit=0", None),
    ("GET", "/v1/tasks?limit=1001", None),
    ("GET", "/v1/tasks?limit=x", None),
    ("GET", "/v1/tasks?cursor=x", None),
    ("GET", "/v1/tasks?type=%00", None),
    ("GET", "/v1/tasks?role=%00", None),
    ("GET", "/v1/tasks?parent=%00", None),
    ("GET", "/v1/tasks/waiting?limit=-1", None),
    ("POST", "/v1/tasks/x/status", {"status": "asleep"}),
    ("POST", "/v1/tasks/x/status", {"status": ["queued"]}),
    ("POST", "/v1/tasks/x/cancel", {"now": True}),
    ("POST", "/v1/claims", {"n": 0}),
    ("POST", "/v1/claims", {"n": 101}),
    ("POST", "/v1/claims", {"wait": 61}),
    ("POST", "/v1/claims", {"drone_id": ""}),
    ("POST", "/v1/claims", {"drone_id": "a b"}),
    ("POST", "/v1/claims", {"role": "queen"}),
    ("POST", "/v1/claims", {"types": "t"}),
    ("POST", "/v1/claims/x/heartbeat", None),
    ("POST", "/v1/claims/x/heartbeat", {"progress": 2}),
    ("POST", "/v1/claims/x/heartbeat", {"logs": "x" * 70_000}),
    ("POST", "/v1/claims/x/complete", {"status": "failed"}),
    ("POST", "/v1/claims/x/fail", {}),
    ("POST", "/v1/claims/x~1~%00/release", None),
    ("POST", "/v1/claims/complete", {"claims": []}),
    ("POST", "/v1/roles/pause", {}),
    ("POST", "/v1/roles/pause", {"role": "a\0b"}),
    ("POST", "/v1/drones", {"id": "../x"}),
    ("POST", "/v1/drones", {"id": "x", "role": 5}),
    ("POST", "/v1/drones/x/heartbeat", {"status": "tired"}),
    ("GET", "/v1/drones?active=yes", None),
]


@pytest.mark.parametrize(("method", "path", "body"), BAD)
async def test_bad_input_is_refused(http: Http, method: str, path: str, body: Any) -> None:
    assert (await http(method, path, body))[0] == 400
    assert (await http.ok("GET", "/v1/tasks?type=bad"))["tasks"] == []


@pytest.mark.parametrize(
    "path",
    [
        "/v1/tasks/nobody",
        "/v1/tasks/%00",
        "/v1/tasks/..%2f..%2fetc",
        "/v1/tasks/" + "x" * 500,
        "/v1/drones/nobody",
        "/v1/drones/%00",
        "/v1/nothing",
    ],
)
async def test_what_is_not_there_is_not_found(http: Http, path: str) -> None:
    assert (await http("GET", path))[0] == 404
    if "tasks" in path:
        for move in ("cancel", "retry", "replay"):
            assert (await http("POST", f"{path}/{move}"))[0] == 404
        assert (await http("GET", f"{path}/logs"))[0] == 404


async def test_what_is_no_json_or_too_much_of_it_is_refused(http: Http) -> None:
    deep = b'{"type":"bad","payload":' + b'{"a":' * 100_000
    shallow = b'{"type":"bad","payload":' + b'{"a":' * 300 + b"1" + b"}" * 301
    large = json.dumps({"type": "bad", "payload": {"x": "y" * 20_000_000}}).encode()
    huge = json.dumps({"tasks": [{"type": "bad", "payload": {"x": "y" * 2_000_000}}]}).encode()
    surrogate = b'{"type":"bad","title":"\\ud800"}'
    for raw, status in (
        (b"{", 400),
        (b"[]", 400),
        (b"\xff", 400),
        (b'{"type":"bad","priority":NaN}', 400),
        (surrogate, 400),
        (deep, 400),
        (shallow, 400),
        (large, 413),
        (huge, 413),
    ):
        for path in ("/v1/tasks", "/v1/claims"):
            headers = {"content-type": "application/json"}
            async with http.session.post(path, data=io.BytesIO(raw), headers=headers) as answer:
                assert answer.status == status, (path, raw[:40])
                assert (await answer.json())["error"]["hop"] == "queen"
    assert (await http.ok("GET", "/v1/tasks?type=bad"))["tasks"] == []


async def test_forged_claims_are_refused(http: Http) -> None:
    id = await http.task("forge")
    [claim] = await http.claim(types=["forge"])
    task, fence, token = claim["claim_id"].split("~")
    for forged, wanted in (
        (f"{task}~{fence}~{token[::-1]}", 409),
        (f"{task}~{int(fence) + 1}~{token}", 404),
        (f"{task}~999999999~{token}", 404),
        (f"nobody~{fence}~{token}", 404),
        (f"{task}~{fence}", 400),
    ):
        for call, body in (
            ("heartbeat", None),
            ("complete", {"result": 1}),
            ("fail", {"message": "x"}),
            ("release", None),
        ):
            assert (await http("POST", f"/v1/claims/{forged}/{call}", body))[0] == wanted
    assert (await http.ok("GET", f"/v1/tasks/{id}"))["status"] == "assigned"


# -- tenants and scopes -----------------------------------------------------------------------


async def test_a_key_sees_and_touches_only_its_own_tenants(made: Cluster) -> None:
    secret = Secret.new()
    made.env = {"HIVE_SECRET": secret.text}
    queen = await made.queen("--host=0.0.0.0")

    def key(tenant: str, *scopes: Scope) -> str:
        return Keys(secret).make(scopes=scopes, tenant=tenant)[0]

    callers = {
        name: Http(queen.url, key(tenant, *scopes))
        for name, tenant, scopes in (
            ("a", "a", ("queue", "drone")),
            ("b", "b", ("queue", "drone")),
            ("admin", "default", ("admin",)),
            ("drone", "a", ("drone",)),
            ("infer", "a", ("infer",)),
        )
    }
    a, b, admin = callers["a"], callers["b"], callers["admin"]
    events = b.events("?after=0")
    id = await a.task("mine")
    await b.task("theirs")
    for method, path, body in (
        ("GET", f"/v1/tasks/{id}", None),
        ("GET", f"/v1/tasks/{id}/logs", None),
        ("POST", f"/v1/tasks/{id}/cancel", None),
        ("POST", f"/v1/tasks/{id}/retry", None),
        ("POST", f"/v1/tasks/{id}/replay", None),
        ("POST", f"/v1/tasks/{id}/status", {"status": "completed"}),
        ("POST", "/v1/tasks", {"type": "x", "parent": id}),
    ):
        assert await b(method, path, body) == (404, "no_task"), path
    assert await b.ok("DELETE", f"/v1/tasks/{id}") == {"deleted": False}
    assert [t["type"] for t in (await b.ok("GET", "/v1/tasks"))["tasks"]] == ["theirs"]
    assert [c["task"]["type"] for c in await b.claim(n=10)] == ["theirs"]
    [claim] = await a.claim(n=10)
    task, fence, token = claim["claim_id"].split("~")
    forged = f"{task}~{fence}~{token[::-1]}"
    assert await b("POST", f"/v1/claims/{forged}/complete") == (404, "no_task")
    assert await a("POST", f"/v1/claims/{forged}/complete") == (409, "stale_claim")
    said = await b.ok("POST", "/v1/claims/complete", {"claims": [{"claim_id": forged}]})
    assert said["claims"][0]["error"]["code"] == "no_task"
    async with events as told:
        seen = await taken(told, 2)
    assert {event["tenant"] for event in seen} == {"b"}
    assert {event["data"]["type"] for event in seen} == {"theirs"}
    assert {t["tenant"] for t in (await admin.ok("GET", "/v1/tasks"))["tasks"]} == {"a", "b"}
    found = (await admin.ok("GET", "/v1/tasks?tenant=a"))["tasks"]
    assert [t["id"] for t in found] == [id]
    assert (await admin.ok("POST", "/v1/tasks", {"type": "x"}))["tenant"] == "default"
    assert (await admin.ok("POST", "/v1/tasks?tenant=b", {"type": "x"}))["tenant"] == "b"
    assert await a("GET", "/v1/tasks?tenant=b") == (403, "other_tenant")
    for name, method, path, body in (
        ("drone", "GET", "/v1/tasks", None),
        ("drone", "POST", "/v1/tasks", {"type": "x"}),
        ("drone", "GET", "/v1/events", None),
        ("infer", "GET", "/v1/tasks", None),
        ("infer", "POST", "/v1/claims", {}),
        ("infer", "GET", "/v1/drones", None),
        ("a", "POST", "/v1/roles/pause", {"role": "x"}),
        ("a", "POST", "/v1/tasks", {"type": "operation", "payload": {"operation": "status"}}),
    ):
        assert await callers[name](method, path, body) == (403, "scope_missing"), path
    stranger = Http(queen.url)
    for path in ("/v1/tasks", "/v1/events", "/v1/drones", "/v1/roles"):
        assert await stranger("GET", path) == (401, "no_key")
    for caller in (*callers.values(), stranger):
        await caller.session.close()


# -- operations -------------------------------------------------------------------------------


async def ended(http: Http, id: str) -> dict[str, Any]:
    async def final() -> Any:
        task = await http.ok("GET", f"/v1/tasks/{id}")
        return task if task["status"] in ("completed", "failed", "cancelled") else None

    return dict(await until(final, f"task {id} to end"))


ASK = {"operation": "infer", "model": "parrot", "prompt": "x"}


async def test_a_task_may_be_an_operation(made: Cluster) -> None:
    queen = await made.queen()
    hive = await made.hive("gpu-0", queen=queen)
    await spawn_scripted(hive, "parrot", slots=1, answer="a b")
    http = Http(queen.url)

    async def operation(operation: str, **fields: Any) -> str:
        return await http.task("operation", payload={"operation": operation, **fields})

    assert (await ended(http, await operation("queen_check")))["result"] == {
        "ok": True,
        "problems": [],
    }
    ids = [await operation("infer", model="parrot", prompt="x") for _ in range(6)]
    for task in [await ended(http, id) for id in ids]:
        assert (task["status"], task["result"]["type"]) == ("completed", "end")
        assert task["drone_id"].startswith("queen:queen-")
    failed = await ended(http, await operation("worker_get", worker_id="w-none"))
    assert (failed["status"], failed["attempts"]) == ("failed", 1)
    assert "w-none" in failed["error"]["message"]
    download = await ended(http, await operation("model_list"))
    assert download["result"]["models"]
    assert await http.claim(n=10, types=["operation"]) == []
    await http.session.close()


async def test_an_infer_waits_until_somebody_can_serve_it(made: Cluster) -> None:
    queen = await made.queen()
    http = Http(queen.url)
    id = await http.task("operation", payload=ASK)

    async def put_off() -> bool:
        return "error" in await http.ok("GET", f"/v1/tasks/{id}")

    await until(put_off, "it to be put off")
    await made.hive("gpu-1", queen=queen)  # which has no such model
    hive = await made.hive("gpu-0")
    await spawn_scripted(hive, "parrot")
    await queen.client.post("/v1/hive/ready", {"hive_id": "gpu-0", "hive_url": hive.url})
    task = await ended(http, id)
    assert (task["status"], task["attempts"]) == ("completed", 1)
    await http.session.close()


async def test_a_cancel_reaches_the_job(made: Cluster) -> None:
    queen = await made.queen()
    hive = await made.hive("gpu-0", queen=queen)
    await spawn_scripted(hive, "parrot", tokens_per_second=20)
    http = Http(queen.url)
    payload = {**ASK, "max_tokens": 100_000, "on_disconnect": "detach"}
    id = await http.task("operation", payload=payload)

    async def running_jobs() -> list[str]:
        jobs = (await hive.client.get("/v1/jobs"))["jobs"]
        return [j["job_id"] for j in jobs if j["status"] == "running" and j["operation"] == "infer"]

    await until(running_jobs, "the job to run")
    await http.ok("POST", f"/v1/tasks/{id}/cancel")
    assert (await ended(http, id))["status"] == "cancelled"
    assert await running_jobs() == []
    await http.session.close()


async def test_operations_come_behind_who_waits_for_an_answer(made: Cluster) -> None:
    queen = await made.queen()
    hive = await made.hive("gpu-0", queen=queen)
    await spawn_scripted(hive, "parrot", slots=1, tokens_per_second=20)
    http = Http(queen.url)
    ask = {"model": "parrot", "messages": [{"role": "user", "content": "x"}], "max_tokens": 40}
    chat = {**ask, "stream": True}
    async with http.session.post("/v1/chat/completions", json=chat) as answer:
        await answer.content.readany()
        id = await http.task("operation", payload={**ASK, "max_tokens": 2})
        while await answer.content.readany():
            jobs = (await hive.client.get("/v1/jobs"))["jobs"]
            assert [job for job in jobs if job["operation"] == "infer"] == []
    assert (await ended(http, id))["status"] == "completed"
    await http.session.close()


async def test_a_queen_that_stops_gives_her_operations_back(made: Cluster) -> None:
    queen = await made.queen("--drain-seconds=0")
    hive = await made.hive("gpu-0", queen=queen)
    await spawn_scripted(hive, "parrot", tokens_per_second=20)
    http = Http(queen.url)
    id = await http.task("operation", payload={**ASK, "max_tokens": 100_000})

    async def begun() -> bool:
        return (await http.ok("GET", f"/v1/tasks/{id}"))["status"] == "in_progress"

    await until(begun, "it to begin")
    await http.session.close()
    await queen.stop(signal.SIGTERM)
    again = Http((await made.queen("--drain-seconds=0")).url)
    task = await again.ok("GET", f"/v1/tasks/{id}")
    assert (task["status"], task["attempts"]) == ("queued", 0)
    await again.session.close()


# -- the house --------------------------------------------------------------------------------


async def test_hives_that_come_and_go_are_told(made: Cluster) -> None:
    queen = await made.queen()
    http = Http(queen.url)
    async with http.events("?topics=hive.*") as events:
        hive = await made.hive("gpu-0", queen=queen)
        [joined] = await taken(events, 1)
        assert (joined["topic"], joined["subject"]) == ("hive.joined", "gpu-0")
        await hive.stop()
        [left] = await taken(events, 1)
        assert (left["topic"], left["subject"]) == ("hive.left", "gpu-0")
    await http.session.close()


async def test_a_queen_that_comes_back_tells_of_no_hive_again(made: Cluster) -> None:
    queen = await made.queen()
    http = Http(queen.url)
    async with http.events("?topics=hive.*") as events:
        await made.hive("gpu-0", queen=queen)
        [joined] = await taken(events, 1)
    await http.session.close()
    await queen.stop()
    again = await made.queen(port=int(queen.url.rpartition(":")[2]))
    await online(again.client, "gpu-0")
    http = Http(again.url)
    async with http.events(f"?topics=hive.*&after={joined['seq']}") as events:
        await made.hive("gpu-1", queen=again)
        [joined] = await taken(events, 1)
    assert (joined["topic"], joined["subject"]) == ("hive.joined", "gpu-1")
    await http.session.close()


async def test_health_counts_the_tasks_that_wait(made: Cluster) -> None:
    queen = await made.queen()
    http = Http(queen.url)
    assert (await http.ok("GET", "/health"))["queued"] == 0
    for more in ({}, {"not_before": 600}, {"role": "builder"}):
        await http.task(**more)
    await http.claim()

    async def two_wait() -> bool:
        return bool((await http.ok("GET", "/health"))["queued"] == 2)

    await until(two_wait, "the tasks to be counted")
    await http.session.close()


async def test_metrics_say_what_waits(made: Cluster) -> None:
    queen = await made.queen()
    http = Http(queen.url)
    await http.task(role="builder")
    async with http.session.get("/metrics") as answer:
        text = await answer.text()
    assert 'hive_tasks{role="builder",state="queued"} 1.0' in text
    await http.session.close()


async def test_who_waits_for_a_task_is_let_go_when_the_queen_stops(made: Cluster) -> None:
    queen = await made.queen()
    http = Http(queen.url)
    waiting = asyncio.create_task(http("POST", "/v1/claims", {"wait": 60}))
    async with http.events() as events:
        await http.task("x", capabilities=["nobody-has"])
        await taken(events, 1)
        stopping = asyncio.create_task(queen.stop())
        assert await waiting == (503, "unavailable")
        with pytest.raises(StopAsyncIteration):
            await anext(events)
    assert await stopping == 0
    assert "Traceback" not in queen.log
    await http.session.close()


async def test_a_queen_at_rest_loads_nothing_of_the_queue(made: Cluster) -> None:
    queen = await made.queen()
    assert (await queen.client.get("/health"))["ok"]
    await queen.client.get("/metrics")
    with pytest.raises(HiveError):
        await queen.client.post("/v1/tasks", {"colour": "red"})
    assert not (made.folder / "queen" / "queue.db").exists()
    before = Path(f"/proc/{queen.pid}/maps").read_text()
    assert "sqlalchemy" not in before.lower()
    await queen.client.post("/v1/tasks", {"type": "t"})
    assert (made.folder / "queen" / "queue.db").exists()
    seen = Path(f"/proc/{queen.pid}/maps").read_text()
    assert "sqlite3" in seen


def test_the_queens_modules_need_neither_sqlalchemy_nor_the_queue() -> None:
    code = (
        "import sys, queen.main, queen.app, queen.queen\n"
        "wrong = {'sqlalchemy', 'alembic', 'hive_orchestration', 'standardwebhooks', 'asyncpg'}\n"
        "print(sorted(wrong & {name.partition('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean_env(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


async def test_a_database_that_cannot_be_one_stops_the_start(made: Cluster) -> None:
    for url in ("mysql://x/y", "nonsense"):
        with pytest.raises(AssertionError, match="did not start"):
            await made.queen(f"--database={url}")
    log = "".join(path.read_text() for path in made.folder.glob("*.log"))
    assert "postgresql://" in log


@pytest.mark.skipif(binaries() is None, reason="there is no PostgreSQL here")
async def test_a_database_that_is_away_stops_nobody_from_inferring(made: Cluster) -> None:
    with running() as server:
        made.env = {"HIVE_DATABASE": server.create("q")}
        server.stop()
        queen = await made.queen()
        http = Http(queen.url)
        assert (await queen.client.get("/health"))["ok"]
        assert await http("POST", "/v1/tasks", {"type": "t"}) == (503, "queue_unavailable")
        server.start()

        async def back() -> bool:
            return (await http("POST", "/v1/tasks", {"type": "t"}))[0] == 201

        await until(back, "the database to be used again")
        await http.session.close()
        await queen.stop()


@pytest.mark.skipif(binaries() is None, reason="there is no PostgreSQL here")
async def test_two_queens_share_a_database(made: Cluster, postgres: Postgres) -> None:
    secret = Secret.new()
    made.env = {"HIVE_DATABASE": postgres.create("two"), "HIVE_SECRET": secret.text}
    one = Http((await made.start("queen", "--port=0", folder="one")).url)
    two = Http((await made.start("queen", "--port=0", folder="two")).url)
    waiting = asyncio.create_task(two.claim(wait=20))
    async with two.events() as events:
        id = await one.task("shared", secrets={"k": "v"})
        [claim] = await waiting
        assert (claim["task"]["id"], claim["secrets"]) == (id, {"k": "v"})
        assert [event["topic"] for event in await taken(events, 2)] == [
            "task.queued",
            "task.assigned",
        ]
    await one.ok("POST", f"/v1/claims/{claim['claim_id']}/complete")
    assert (await two.ok("GET", f"/v1/tasks/{id}"))["status"] == "completed"
    place = (await one.ok("GET", "/v1/events?follow=false"))["last"]
    async with one.events(f"?topics=hive.*&after={place}") as events:
        for number in range(2):
            hive = await made.hive(f"gpu-{number}")
            for queen in (one, two):
                ready = {"hive_id": f"gpu-{number}", "hive_url": hive.url}
                await queen.ok("POST", "/v1/hive/ready", ready)
            [joined] = await taken(events, 1)
            assert (joined["topic"], joined["subject"]) == ("hive.joined", f"gpu-{number}")
    for http in (one, two):
        await http.session.close()
