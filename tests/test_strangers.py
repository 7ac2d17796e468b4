"""Strangers on the LAN: whatever they try, they get no prompt, no token and no answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import psutil
import pytest
from aiohttp import web

from operations.errors import HiveError
from tests import lan
from tests.cluster import Cluster, Daemon, clean_env, cluster, online, served, spawn_scripted, until
from tests.hosts import Room, inside
from wire.headers import JOB_ID_HEADER, SESSION_HEADER
from wire.keys import Keys, Scope
from wire.proof import HELLO, Answer, Dialler
from wire.secret import Secret

pytestmark = pytest.mark.skipif(
    lan.unavailable() is not None, reason=f"no LAN can be made here: {lan.unavailable()}"
)

PROMPT = "the-prompt-that-nobody-else-may-see"
CHAT = {"model": "parrot", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 2}
INFER = {"operation": "infer", "model": "parrot", "prompt": PROMPT, "max_tokens": 2}
ROUTES = [
    ("GET", "/v1/info", None),
    ("GET", "/v1/models", None),
    ("GET", "/v1/jobs", None),
    ("GET", "/v1/capabilities", None),
    ("GET", "/v1/heartbeats/stream", None),
    ("GET", "/metrics", None),
    ("GET", "/v1/keys/revoked", None),
    ("POST", "/v1/chat/completions", CHAT),
    ("POST", "/v1/jobs", INFER),
    ("POST", "/v1/jobs", {"operation": "status"}),
    ("POST", "/v1/shutdown", None),
    ("POST", "/v1/keys/revoked", {"key_ids": ["0123456789ab"]}),
]


class LanRoom(Room):
    """A queen, the hive ``gpu-0`` with a scripted ``parrot``, and a host of a stranger."""

    queen_: Daemon
    hive_: Daemon

    def key(self, *scopes: Scope, **limits: Any) -> str:
        return Keys(self.secret).make(scopes=scopes or ("admin",), **limits)[0]

    def daemon(self, name: str) -> Daemon:
        return self.queen_ if name == "queen" else self.hive_


@contextlib.asynccontextmanager
async def lan_room() -> AsyncIterator[LanRoom]:
    with lan.Lan() as made:
        async with cluster() as daemons:
            room = LanRoom(made, daemons)
            room.add("queen", "gpu-0", "stranger")
            room.queen_, room.hive_ = await asyncio.gather(room.queen("queen"), room.hive("gpu-0"))
            room.hive_.client = room.client("stranger", room.hive_, room.key())
            room.queen_.client = room.client("stranger", room.queen_, room.key())
            await online(room.queen_.client, "gpu-0")
            await spawn_scripted(room.hive_)
            await until(lambda: room.queen_.client.get("/v1/models"), "models")
            yield room
            await room.close()


@pytest.fixture(scope="module")
async def room() -> AsyncIterator[LanRoom]:
    async with lan_room() as made:
        yield made


@pytest.fixture(params=["queen", "hive"])
def door(request: pytest.FixtureRequest, room: LanRoom) -> Daemon:
    return room.daemon(request.param)


async def ask(
    room: Room, url: str, method: str, path: str, body: Any, **headers: str
) -> tuple[int, str, Mapping[str, str]]:
    """Status, code of the error (or ``""``), and the headers of the answer."""
    async with room.session("stranger") as http:
        async with http.request(method, url + path, json=body, headers=headers) as got:
            raw = await got.content.read(65536) if got.status != 200 else b"{}"
            error = json.loads(raw or b"{}").get("error", {})
            return got.status, error.get("code", ""), got.headers


# -- callers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
async def test_without_a_key_no_route_answers(
    room: LanRoom, door: Daemon, method: str, path: str, body: Any
) -> None:
    status, code, _ = await ask(room, door.url, method, path, body)
    assert (status, code) == (401, "no_key")


async def test_strangers_learn_only_that_a_daemon_is_well(room: LanRoom, door: Daemon) -> None:
    async with room.session("stranger") as http:
        async with http.get(door.url + "/health") as got:
            assert await got.json() == {"ok": True}
        key = {"authorization": f"Bearer {room.key('infer')}"}
        async with http.get(door.url + "/health", headers=key) as got:
            assert (await got.json())["workers"]


def keys_that_do_not_hold(room: LanRoom) -> dict[str, tuple[str, str]]:
    good = room.key()
    header, claims, _ = good.removeprefix("hk-").split(".")
    none = "eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0"  # {"alg":"none","typ":"JWT"}
    return {
        "expired": (room.key(seconds=-1), "expired_key"),
        "forged": (Keys(Secret.new()).make(scopes=("admin",))[0], "invalid_key"),
        "alg none": (f"hk-{none}.{claims}.", "invalid_key"),
        "unsigned": (f"hk-{header}.{claims}.", "invalid_key"),
        "a word": ("none", "malformed_key"),
        "the cluster's id": (room.secret.cluster_id, "malformed_key"),
        "the secret": (room.secret.text, "malformed_key"),
    }


@pytest.mark.parametrize(
    "kind",
    [
        "expired",
        "forged",
        "alg none",
        "unsigned",
        "a word",
        "the cluster's id",
        "the secret",
    ],
)
async def test_a_key_that_does_not_hold_opens_nothing(
    room: LanRoom, door: Daemon, kind: str
) -> None:
    key, why = keys_that_do_not_hold(room)[kind]
    for header in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}):
        status, code, _ = await ask(room, door.url, "POST", "/v1/chat/completions", CHAT, **header)
        assert (status, code) == (401, why)


@pytest.mark.parametrize(
    ("scope", "method", "path", "body", "status"),
    [
        ("infer", "POST", "/v1/chat/completions", CHAT, 200),
        ("infer", "POST", "/v1/jobs", INFER, 201),
        ("infer", "GET", "/v1/models", None, 200),
        ("infer", "POST", "/v1/jobs", {"operation": "status"}, 403),
        ("infer", "POST", "/v1/jobs", {"operation": "model_list"}, 403),
        ("infer", "GET", "/v1/jobs", None, 403),
        ("infer", "POST", "/v1/shutdown", None, 403),
        ("infer", "POST", "/v1/keys/revoked", {"key_ids": []}, 403),
        ("infer", "GET", "/v1/heartbeats/stream", None, 403),
        ("queue", "POST", "/v1/chat/completions", CHAT, 403),
        ("drone", "POST", "/v1/jobs", INFER, 403),
        ("queue", "GET", "/v1/models", None, 200),
    ],
)
async def test_a_key_may_do_what_its_scope_says(
    room: LanRoom,
    door: Daemon,
    scope: Scope,
    method: str,
    path: str,
    body: Any,
    status: int,
) -> None:
    key = {"authorization": f"Bearer {room.key(scope)}"}
    got = await ask(room, door.url, method, path, body, **key)
    assert got[0] == status, got
    assert status != 403 or got[1] == "scope_missing"


async def test_a_key_over_its_limit_is_told_when_to_come_again(room: LanRoom, door: Daemon) -> None:
    key = {"authorization": f"Bearer {room.key('infer', rpm=2)}"}
    route = ("POST", "/v1/chat/completions", CHAT)
    assert [(await ask(room, door.url, *route, **key))[0] for _ in range(2)] == [200, 200]
    status, code, headers = await ask(room, door.url, *route, **key)
    assert (status, code) == (429, "rate_limit_exceeded")
    assert 1 <= int(headers["retry-after"]) <= 30
    assert (await ask(room, door.url, "GET", "/v1/models", None, **key))[0] == 200


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"origin": "http://evil.example"}, 403, "origin_not_allowed"),
        ({"origin": "null"}, 403, "origin_not_allowed"),
        ({"host": "evil.example:7833"}, 401, "no_key"),
    ],
)
async def test_a_web_page_gets_nothing(
    room: LanRoom, door: Daemon, headers: dict[str, str], status: int, code: str
) -> None:
    got = await ask(room, door.url, "POST", "/v1/chat/completions", CHAT, **headers)
    assert got[:2] == (status, code)
    if "origin" in headers:  # not even with a key, which a page might have been given
        headers = {**headers, "authorization": f"Bearer {room.key()}"}
        got = await ask(room, door.url, "POST", "/v1/chat/completions", CHAT, **headers)
        assert got[:2] == (status, code)


async def test_a_stranger_cannot_make_a_daemon_read_much(room: LanRoom, door: Daemon) -> None:
    body = {"x": "a" * 100_000}
    assert (await ask(room, door.url, "POST", HELLO, body))[0] == 413


async def test_each_refusal_is_logged_once_with_its_reason(room: LanRoom, door: Daemon) -> None:
    for _ in range(5):
        await ask(room, door.url, "POST", "/v1/chat/completions", CHAT)
    stranger = room.hosts["stranger"]
    lines = re.findall(rf"action=refused who={re.escape(stranger)} why=no_key", door.log)
    assert len(lines) == 1


async def test_refusals_inside_a_route_are_logged_too(room: LanRoom, door: Daemon) -> None:
    key, key_id = Keys(room.secret).make(scopes=("infer",))
    for _ in range(2):
        operation = {"operation": "worker_list"}
        bearer = {"authorization": f"Bearer {key}"}
        got = await ask(room, door.url, "POST", "/v1/jobs", operation, **bearer)
        assert got[:2] == (403, "scope_missing")
    assert door.log.count(f"action=refused who={key_id} why=scope_missing") == 1


async def test_broken_requests_do_not_fill_the_log(room: LanRoom, door: Daemon) -> None:
    before = len(door.log)
    upgrade = {"connection": "upgrade", "upgrade": "websocket"}
    for _ in range(50):
        async with room.session("stranger") as http:
            async with http.get(f"{door.url}/health", headers=upgrade) as got:
                assert got.status == 200
    assert len(door.log) - before < 2000


async def test_a_revoked_key_ends_on_every_daemon_and_stays_ended() -> None:
    async with lan_room() as room:
        room.add("second")
        second = await room.queen("second")
        key, key_id = Keys(room.secret).make(scopes=("infer",))
        bearer = {"authorization": f"Bearer {key}"}
        route = ("POST", "/v1/chat/completions", CHAT)
        assert (await ask(room, room.hive_.url, *route, **bearer))[0] == 200
        env = {"HIVE_SECRET": room.secret.text}
        code, out, err = await room.run("queen", "keys", "revoke", key_id, env=env)
        assert code == 0, err
        assert key_id in out

        async def ended(daemon: Daemon) -> None:
            async def refused() -> bool:
                got = await ask(room, daemon.url, *route, **bearer)
                return got[:2] == (401, "revoked_key")

            await until(refused, f"{daemon.name} to refuse the key")

        for daemon in (room.queen_, room.hive_, second):
            await ended(daemon)
        await room.hive_.stop(signal.SIGKILL)
        await ended(await room.hive("gpu-0"))


# -- daemons ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["queen", "agent"])
async def test_no_daemon_listens_to_others_without_a_secret(room: LanRoom, command: str) -> None:
    code, _, err = await room.run("stranger", command, "--host=0.0.0.0", "--port=0")
    assert code == 1
    assert "hive secret new" in err


async def test_a_stranger_cannot_announce_a_hive(room: LanRoom) -> None:
    hello = {"hive_id": "rogue", "hive_url": f"http://{room.hosts['stranger']}:7835"}
    got = await ask(room, room.queen_.url, "POST", "/v1/hive/ready", hello)
    assert got[:2] == (401, "no_key")
    infer = {"authorization": f"Bearer {room.key('infer')}"}
    got = await ask(room, room.queen_.url, "POST", "/v1/hive/ready", hello, **infer)
    assert got[:2] == (403, "scope_missing")


Answers = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextlib.asynccontextmanager
async def rogue(room: Room, answers: Answers) -> AsyncIterator[list[tuple[str, bytes]]]:
    """A server on the stranger's host, announced by mDNS as a hive of this very cluster.

    Gives what it was sent: paths and bodies.
    """
    received: list[tuple[str, bytes]] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        received.append((request.path, await request.read()))
        return await answers(request)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    with inside(room.namespace("stranger")):
        listener = socket.create_server((room.hosts["stranger"], 7835))
    await web.SockSite(runner, listener).start()
    announced = {
        "hive_id": "rogue",
        "cluster_id": room.secret.cluster_id,
        "instance": secrets.token_hex(8),
        "version": "0.1",
        "port": 7835,
    }
    argv = [sys.executable, "-m", "tests.speaker", "announce", json.dumps(announced)]
    speaker = await asyncio.create_subprocess_exec(
        *room.lan.command("stranger", argv),
        env=clean_env(),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
    )
    try:
        yield received
    finally:
        assert speaker.stdin is not None
        speaker.stdin.close()
        await speaker.wait()
        await runner.cleanup()


async def not_found(request: web.Request) -> web.StreamResponse:
    return web.json_response({"error": "no"}, status=404)


async def lie(request: web.Request) -> web.StreamResponse:
    answer = {"role": "hive", "id": "gpu-0", "instance": "ab", "session": "0" * 32}
    return web.json_response({**answer, "nonce": "0" * 64, "proof": "0" * 64})


async def redirect(request: web.Request) -> web.StreamResponse:
    raise web.HTTPTemporaryRedirect("http://10.77.0.2:7835" + request.path)


@pytest.mark.parametrize(
    "answers", [not_found, lie, redirect], ids=["deaf", "lying", "redirecting"]
)
async def test_a_rogue_on_mdns_gets_nothing_but_a_hello(room: LanRoom, answers: Answers) -> None:
    async with rogue(room, answers) as received:
        await until(lambda: received, "the queen to greet the rogue")
        for _ in range(20):
            got = await room.queen_.client.run(INFER)
            assert got["tokens_out"] == 2
        hives = await room.queen_.client.get("/v1/hives")
        assert [hive["hive_id"] for hive in hives["hives"]] == ["gpu-0"]
        assert {path for path, _ in received} == {HELLO}
        assert not any(PROMPT.encode() in body for _, body in received)
        assert not any(room.secret.text.encode() in body for _, body in received)


@pytest.mark.parametrize("altered", [False, True], ids=["as it is", "with another URL"])
async def test_a_rogue_that_passes_the_proof_on_gets_nothing(room: LanRoom, altered: bool) -> None:
    refused: list[str] = []

    async def pass_on(request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        if altered:
            raw = json.dumps({**json.loads(raw), "url": room.hive_.url}).encode()
        async with room.session("stranger") as http:
            headers = {"content-type": "application/json"}
            async with http.request(
                request.method, room.hive_.url + request.path_qs, data=raw, headers=headers
            ) as got:
                body = await got.read()
                refused.append(json.loads(body).get("error", {}).get("code", ""))
                return web.Response(body=body, status=got.status)

    async with rogue(room, pass_on) as received:
        await until(lambda: len(refused) > 1, "the queen to greet the rogue again")
        assert set(refused) == ({""} if altered else {"not_my_url"})
        assert (await room.queen_.client.run(INFER))["tokens_out"] == 2
        assert {path for path, _ in received} == {HELLO}
        hives = await room.queen_.client.get("/v1/hives")
        unheard = {one["url"]: one["why"] for one in hives["unheard"]}
        why = unheard[f"http://{room.hosts['stranger']}:7835"]
        assert ("does not know" if altered else "not an address of its own") in why
    name = "unproven" if altered else "not_my_url"
    assert len(re.findall(rf"who=http://10.77.0.3:7835 why={name}", room.queen_.log)) == 1


async def test_a_rogue_at_the_address_of_a_hive_that_died_gets_nothing(fresh: Cluster) -> None:
    secret = Secret.new()
    fresh.env = {"HIVE_SECRET": secret.text}
    queen = await fresh.queen()
    hive = await fresh.hive("gpu-0", queen=queen)
    await spawn_scripted(hive)
    await served(queen.client, "parrot")
    job = await queen.client.submit({**INFER, "on_disconnect": "detach"})
    await queen.client.follow(job.job_id)
    await hive.stop(signal.SIGKILL)

    received: list[str] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        received.append(request.path)
        return await lie(request)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    port = int(hive.url.rpartition(":")[2])
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        for _ in range(20):
            for asked in (
                queen.client.submit(INFER),
                queen.client.submit(INFER, job_id=job.job_id),
                queen.client.get(f"/v1/jobs/{job.job_id}"),
                queen.client.follow(job.job_id),
                queen.client.cancel(job.job_id),
            ):
                with pytest.raises(HiveError):
                    await asked
        await until(lambda: received.count(HELLO) > 2, "the queen to greet the rogue")
    finally:
        await runner.cleanup()
    assert set(received) == {HELLO}


async def test_a_hive_of_another_cluster_is_left_alone() -> None:
    async with lan_room() as room:
        other = await room.hive("stranger", secret=Secret.new())
        await until(lambda: "why=foreign_cluster" in room.queen_.log, "the queen to see it")
        hives = await room.queen_.client.get("/v1/hives")
        assert [hive["hive_id"] for hive in hives["hives"]] == ["gpu-0"]
        assert other.url not in [one["url"] for one in hives["unheard"]]
        assert room.queen_.log.count("why=foreign_cluster") == 1


async def test_a_replayed_or_altered_request_of_a_daemon_is_refused(room: LanRoom) -> None:
    dialler = Dialler(room.secret, role="queen", id="queen-x")
    hello = dialler.hello(room.hive_.url)
    jobs = f"{room.hive_.url}/v1/jobs"
    async with room.session("stranger") as http:
        async with http.post(room.hive_.url + HELLO, json=hello.model_dump()) as got:
            signer = dialler.accept(hello, Answer.model_validate(await got.json()), "")

        async def post(body: bytes, headers: dict[str, str]) -> tuple[int, str]:
            async with http.post(jobs, data=body, headers=headers) as got:
                return got.status, (await got.json()).get("error", {}).get("code", "")

        def signed(body: bytes) -> dict[str, str]:
            headers = {"content-type": "application/json"}
            return {**headers, SESSION_HEADER: signer.header("POST", "/v1/jobs", body, headers)}

        body, other = b'{"operation":"worker_list"}', b'{"operation":"model_list"}'
        assert await post(other, signed(body)) == (401, "bad_signature")
        headers = signed(body)
        assert await post(body, headers) == (201, "")
        assert await post(body, headers) == (401, "replayed")
        assert await post(body, {**headers, JOB_ID_HEADER: "job-x"}) == (401, "bad_signature")
        number = headers[SESSION_HEADER].split(":")
        number[1] = "99"
        moved = {**headers, SESSION_HEADER: ":".join(number)}
        assert await post(body, moved) == (401, "bad_signature")


async def test_no_secret_is_to_be_seen_anywhere(room: LanRoom) -> None:
    for daemon in (room.queen_, room.hive_):
        for process in psutil.process_iter(["cmdline"]):
            assert room.secret.text not in " ".join(process.info["cmdline"] or [])
        assert room.secret.text not in daemon.log
        assert PROMPT not in daemon.log
        assert "hk-" not in daemon.log
    for path in ("/v1/info", "/v1/hives", "/metrics"):
        async with room.session("stranger") as http:
            key = {"authorization": f"Bearer {room.key()}"}
            async with http.get(room.queen_.url + path, headers=key) as got:
                assert room.secret.text not in await got.text()
